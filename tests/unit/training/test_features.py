"""The batched features against the slow obvious way: one prompt at a time, layer by layer."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from drllm.config import TrainConfig
from drllm.errors import ModelError, RecordError
from drllm.models.policies import RandomPolicy
from drllm.models.routed import RoutedModel
from drllm.records import SupervisionRecord
from drllm.training.features import collect
from drllm.training.loop import new_objective, new_optimizer, new_stack, take_step

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
    assert features.digest() != collect(routed, Letters(), other_target, num_windows=W).digest()
    again = collect(routed, Letters(), RECORDS[:2], num_windows=W, batch_size=1)
    assert features.digest() == again.digest()
    torch.testing.assert_close(features.sizes(), again.sizes(), **CLOSE)
    assert features.sizes().shape == (2, L)


# --- training on features against training in the loop ----------------------------------------


class SlowRouter(nn.Module):
    """One router as the paper draws it."""

    def __init__(self, stack, layer: int) -> None:
        super().__init__()
        self.inner = nn.Linear(D, stack.config.router_width).double()
        self.outer = nn.Linear(stack.config.router_width, 3).double()
        for mine, theirs in zip(self.parameters(), stacked(stack), strict=True):
            mine.data.copy_(theirs[layer])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = [
            self.outer(nn.functional.gelu(self.inner(window), approximate="tanh"))
            for window in slow_windows(hidden)
        ]
        return sum(logits) / len(logits)


def stacked(stack) -> list[torch.Tensor]:
    return [stack.hidden_weight, stack.hidden_bias, stack.decision_weight, stack.decision_bias]


def test_training_on_features_equals_running_the_base_model_at_every_step(base, routed):
    """Teacher forcing, taken literally.

    Per example: forward along the labelled path, every layer's router on what its layer is about
    to read, focal loss, and AdamW over accumulated gradients, all in float64. Equal up to the
    float32 in which features are stored.
    """
    config = TrainConfig(num_windows=W, router_width=5, learning_rate=1e-2, weight_decay=0.1)
    features = collect(routed, Letters(), RECORDS, num_windows=W, batch_size=3)
    identity = {
        "id": "tiny",
        "revision": None,
        "class": "LlamaForCausalLM",
        "num_layers": L,
        "hidden_size": D,
        "fingerprint": "",
    }
    stack = new_stack(features, features.labels, identity, config).double()
    optimizer = new_optimizer(stack, config)
    objective = new_objective(stack.config.label_counts, config)
    features = features.__class__(
        means=features.means.double(),
        filled=features.filled,
        labels=features.labels,
        questions=features.questions,
        tasks=features.tasks,
    )

    routers = nn.ModuleList(SlowRouter(stack, layer) for layer in range(L))
    weights = [p for name, p in routers.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in routers.named_parameters() if name.endswith("bias")]
    slow_optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    )
    labels = [label for r in RECORDS for label in r.optimal_layer_config]
    inverse = [(1 - 0.999) / (1 - 0.999 ** labels.count(decision)) for decision in range(3)]
    class_weight = [3 * value / sum(inverse) for value in inverse]

    for step, rows in enumerate([[0, 4, 6], [1, 2], [5, 3, 0], [2, 6, 4], [1]]):
        rate = 1e-2 / (step + 1)
        slow_optimizer.zero_grad()
        slow_loss = 0.0
        for row in rows:
            decisions = RECORDS[row].optimal_layer_config
            inputs = slow_inputs(base, RECORDS[row].prompt, decisions)
            loss = 0
            for router, hidden, label in zip(routers, inputs, decisions, strict=True):
                p = router(hidden).softmax(dim=-1)[label]
                loss = loss - class_weight[label] * (1 - p) ** 2 * p.log() / L
            (loss / len(rows)).backward()
            slow_loss += float(loss.detach()) / len(rows)
        for group in slow_optimizer.param_groups:
            group["lr"] = rate
        slow_optimizer.step()
        counts = take_step(stack, optimizer, features, rows, objective, rate)
        assert slow_loss == pytest.approx(counts.loss / counts.examples, rel=1e-5)
    for layer, router in enumerate(routers):
        for mine, theirs in zip(router.parameters(), stacked(stack), strict=True):
            torch.testing.assert_close(mine.data, theirs[layer].data, rtol=1e-4, atol=1e-6)
