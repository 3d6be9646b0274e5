"""The batched features against the slow obvious way: one prompt at a time, layer by layer."""

import copy
import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drllm.errors import ModelError, RecordError
from drllm.models.policies import RandomPolicy
from drllm.models.routed import RoutedModel
from drllm.records import SupervisionRecord
from drllm.training.examples import digest, sizes
from drllm.training.features import collect

L, W, D, CONTEXT = 4, 3, 16, 24
# The model runs in float64, the means are stored in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Letters:
    """A tokenizer of one token a letter, `^` for the beginning of a text."""

    bos_token = "^"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        marked = ("^" if add_special_tokens else "") + text
        return {"input_ids": [ord(letter) % 64 for letter in marked]}


class NoMarks(Letters):
    """The same without a token for the beginning, so that a text may have no tokens."""

    bos_token = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text.strip()]}


def record(number: int, prompt: str, decisions: list[int]) -> SupervisionRecord:
    return SupervisionRecord(
        question=f"about {prompt}",
        optimal_layer_config=tuple(decisions),
        answer="yes",
        prompt=prompt,
        id=f"q{number}",
        task="own",
        executions=float(sum(decisions)),
        improving=False,
    )


RECORDS = [
    record(0, "a longer prompt of 20", [1, 1, 1, 1]),
    record(1, "hi", [0, 2, 0, 1]),
    record(2, "seven..", [2, 0, 1, 2]),
    record(3, "?", [0, 0, 0, 1]),
    record(4, "^rendered by a chat", [2, 2, 2, 2]),
    record(5, "twelve chars", [1, 0, 0, 0]),
    record(6, "seven,,", [1, 2, 0, 1]),
]


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture
def routed(base):
    model = RoutedModel(copy.deepcopy(base))
    yield model
    model.detach()


def tokens_of(prompt: str) -> list[int]:
    """`^` once, whether the prompt brings it or not."""
    return [ord(letter) % 64 for letter in "^" + prompt.removeprefix("^")]


def slow_inputs(base: LlamaForCausalLM, prompt: str, decisions) -> list[torch.Tensor]:
    """What each layer reads, `[T, D]`, after the labelled executions of the layers before it."""
    ids = torch.tensor([tokens_of(prompt)])
    T = ids.shape[1]
    hidden = base.model.embed_tokens(ids)
    positions = base.model.rotary_emb(hidden, torch.arange(T)[None])
    causal = torch.full((T, T), -math.inf, dtype=hidden.dtype).triu(1)[None, None]
    inputs = []
    for layer, times in zip(base.model.layers, decisions, strict=True):
        inputs.append(hidden[0])
        for _ in range(times):
            output = layer(hidden, attention_mask=causal, position_embeddings=positions)
            hidden = output[0] if isinstance(output, tuple) else output
    return inputs


def slow_windows(hidden: torch.Tensor) -> list[torch.Tensor]:
    """Means over the windows of `[T, D]`, in a loop."""
    windows = min(len(hidden), W)
    edges = [window * len(hidden) // windows for window in range(windows + 1)]
    return [
        sum(hidden[token] for token in range(start, end)) / (end - start)
        for start, end in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_features_equal_one_prompt_at_a_time_layer_by_layer(base, routed, batch_size):
    features = collect(routed, Letters(), RECORDS, num_windows=W, batch_size=batch_size)
    for row, wanted in enumerate(RECORDS):
        inputs = slow_inputs(base, wanted.prompt, wanted.optimal_layer_config)
        for layer, hidden in enumerate(inputs):
            windows = torch.stack(slow_windows(hidden)).float()
            found = features.means[row, layer]
            torch.testing.assert_close(found[: len(windows)], windows, **CLOSE)
            assert not found[len(windows) :].any()
        assert int(features.filled[row]) == len(windows)


def test_features_come_in_the_order_of_the_records(routed):
    features = collect(routed, Letters(), RECORDS, num_windows=W, batch_size=2)
    assert features.labels.tolist() == [list(r.optimal_layer_config) for r in RECORDS]
    assert features.questions == tuple(r.question for r in RECORDS)
    assert features.tasks == ("own",) * len(RECORDS)
    assert features.filled.tolist() == [3, 3, 3, 2, 3, 3, 3]
    assert features.means.shape == (len(RECORDS), L, W, D)
    assert features.means.dtype == torch.float32


def test_the_policy_that_is_attached_does_not_matter(base, routed):
    other = RoutedModel(
        copy.deepcopy(base),
        policy=RandomPolicy((0.4, 0.3, 0.3), torch.Generator().manual_seed(0)),
    )
    expected = collect(routed, Letters(), RECORDS, num_windows=W)
    assert torch.equal(expected.means, collect(other, Letters(), RECORDS, num_windows=W).means)


def test_progress_counts_the_prompts(routed):
    seen = []
    collect(
        routed,
        Letters(),
        RECORDS,
        num_windows=W,
        batch_size=3,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_a_prompt_as_long_as_the_context_is_read(routed):
    longest = record(0, "x" * (CONTEXT - 1), [1, 1, 1, 1])
    assert len(collect(routed, Letters(), [longest], num_windows=W).means) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            record(9, "x" * CONTEXT, [1, 1, 1, 1]),
            "question 'q9': its prompt has 25 tokens, the base model's context holds 24",
        ),
        (
            record(9, "x", [1, 1, 1]),
            "question 'q9': its target has 3 layers, the base model has 4",
        ),
    ],
)
def test_a_target_that_this_model_cannot_run_is_refused_by_id(routed, bad, message):
    with pytest.raises(RecordError, match=message):
        collect(routed, Letters(), [*RECORDS, bad], num_windows=W)


def test_a_prompt_without_tokens_is_refused_by_id(routed):
    with pytest.raises(RecordError, match="question 'q9': its prompt has no tokens"):
        collect(routed, NoMarks(), [record(9, " ", [1, 1, 1, 1])], num_windows=W)


def test_no_targets_are_refused(routed):
    with pytest.raises(RecordError, match="no targets to train on"):
        collect(routed, Letters(), [], num_windows=W)


def test_states_that_overflow_are_refused_by_id(base):
    broken = copy.deepcopy(base)
    broken.model.embed_tokens.weight[ord("?") % 64] = math.inf
    with pytest.raises(ModelError, match=r"question 'q3': .* in torch.float64; load it with"):
        collect(RoutedModel(broken), Letters(), RECORDS, num_windows=W)


def test_the_digest_tells_targets_apart_and_the_sizes_tell_prompts_apart(routed):
    features = collect(routed, Letters(), RECORDS[:2], num_windows=W)
    other_target = [RECORDS[0], record(1, "hi", [0, 2, 1, 1])]
    assert digest(features) != digest(collect(routed, Letters(), other_target, num_windows=W))
    again = collect(routed, Letters(), RECORDS[:2], num_windows=W, batch_size=1)
    assert digest(features) == digest(again)
    torch.testing.assert_close(sizes(features), sizes(again), **CLOSE)


def test_rows_are_those_asked_for_in_their_order(routed):
    features = collect(routed, Letters(), RECORDS, num_windows=W)
    assert torch.equal(features.rows([4, 0]), features.means[[4, 0]])
