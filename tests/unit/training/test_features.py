"""The batched features against the slow obvious way: one prompt at a time, layer by layer."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from watching import Watching

from drllm.errors import ModelError, RecordError
from drllm.records import RejectedQuestion, SupervisionRecord, read_json_lines
from drllm.training.feature_store import Store
from drllm.training.features import collect, digest, sizes
from drllm.training.targets import write_rejected

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
        return {"input_ids": [ord(letter) % 64 for letter in text.strip("_")]}


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
def test_features_equal_one_prompt_at_a_time_layer_by_layer(base, batch_size):
    features = collect(base, Letters(), RECORDS, num_windows=W, batch_size=batch_size)
    for row, wanted in enumerate(RECORDS):
        inputs = slow_inputs(base, wanted.prompt, wanted.optimal_layer_config)
        for layer, hidden in enumerate(inputs):
            windows = torch.stack(slow_windows(hidden)).float()
            found = features.means[row, layer]
            torch.testing.assert_close(found[: len(windows)], windows, **CLOSE)
            assert not found[len(windows) :].any()
        assert int(features.filled[row]) == len(windows)


def test_features_come_in_the_order_of_the_records(base):
    features = collect(base, Letters(), RECORDS, num_windows=W, batch_size=2)
    assert features.labels.tolist() == [list(r.optimal_layer_config) for r in RECORDS]
    assert features.questions == tuple(r.question for r in RECORDS)
    assert features.tasks == ("own",) * len(RECORDS)
    assert features.filled.tolist() == [3, 3, 3, 2, 3, 3, 3]
    assert features.means.shape == (len(RECORDS), L, W, D)
    assert features.means.dtype == torch.float32


def test_each_target_of_a_batch_follows_its_own_path(base):
    """The same prompt along several paths, the first of them the full one."""
    paths = [[1, 1, 1, 1], [0, 1, 1, 1], [2, 1, 0, 1], [1, 0, 2, 1]]
    records = [record(row, "the same prompt", path) for row, path in enumerate(paths)]
    together = collect(base, Letters(), records, num_windows=W, batch_size=len(records))
    for row, one in enumerate(records):
        alone = collect(base, Letters(), [one], num_windows=W)
        torch.testing.assert_close(together.means[row], alone.means[0], **CLOSE)
    reads = together.means[:, -1]
    assert all((reads[row] - reads[0]).abs().max() > 0.01 for row in (1, 2, 3))


def test_the_model_is_left_without_routing(base):
    before = base.forward
    collect(base, Letters(), RECORDS[:1], num_windows=W)
    assert base.forward == before


def test_progress_counts_the_prompts(base):
    seen = []
    collect(
        base,
        Letters(),
        RECORDS,
        num_windows=W,
        batch_size=3,
        listener=Watching(lambda done, total: seen.append((done, total))),
    )
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_a_prompt_as_long_as_the_context_is_read(base):
    longest = record(0, "x" * (CONTEXT - 1), [1, 1, 1, 1])
    assert len(collect(base, Letters(), [longest], num_windows=W).means) == 1


def test_a_target_for_another_number_of_layers_is_refused_by_id(base):
    bad = record(9, "x", [1, 1, 1])
    with pytest.raises(RecordError, match="'q9': its target has 3 layers, the base model has 4"):
        collect(base, Letters(), [*RECORDS, bad], num_windows=W)


def test_no_targets_are_refused(base):
    with pytest.raises(RecordError, match="no targets to train on"):
        collect(base, Letters(), [], num_windows=W)


# --- targets that the model can't run ---------------------------------------------------------


def without(records, name: str):
    return [wanted for wanted in records if wanted.id != name]


def assert_same_features(found, expected) -> None:
    """The numbers of both, up to what another batch does to the last bits."""
    everything = range(len(expected.labels))
    torch.testing.assert_close(found.rows(everything), expected.rows(everything), **CLOSE)
    assert digest(found) == digest(expected)


@pytest.mark.parametrize(
    ("bad", "tokenizer", "reason"),
    [
        (record(9, "x" * CONTEXT, [1, 1, 1, 1]), Letters(), "longer than the base model's context"),
        (record(9, "_", [1, 1, 1, 1]), NoMarks(), "prompt without tokens"),
    ],
    ids=["too long", "no tokens"],
)
def test_a_single_target_that_this_model_cannot_read_is_set_aside(base, bad, tokenizer, reason):
    records = [*RECORDS[:3], bad, *RECORDS[3:]]
    features = collect(base, tokenizer, records, num_windows=W)
    assert_same_features(features, collect(base, tokenizer, RECORDS, num_windows=W))
    [rejected] = features.rejected
    assert (rejected.id, rejected.question, rejected.reason) == ("q9", bad.question, reason)


def test_targets_that_this_model_cannot_read_are_refused_where_they_are_many(base):
    long = [record(row, "x" * (CONTEXT + row), [1, 1, 1, 1]) for row in (8, 9)]
    with pytest.raises(
        RecordError,
        match=r"^2 of 9 targets can't be used .*2 longer than the base model's context; its "
        r"context holds 24 tokens\), the first is question 'q8'; give targets that were searched",
    ):
        collect(base, Letters(), [*RECORDS, *long], num_windows=W)
    with pytest.raises(RecordError, match=r"^1 of 1 targets can't be used"):
        collect(base, Letters(), long[:1], num_windows=W)


@pytest.fixture
def overflowing(base):
    """A model to which question marks are endless."""
    broken = copy.deepcopy(base)
    broken.model.embed_tokens.weight[ord("?") % 64] = math.inf
    return broken


@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_single_target_whose_states_overflow_is_set_aside(overflowing, on_disk, tmp_path):
    def pooled(name: str, records):
        store = Store(tmp_path / name) if on_disk else None
        return collect(overflowing, Letters(), records, num_windows=W, store=store)

    features = pooled("all", RECORDS)
    assert_same_features(features, pooled("finite", without(RECORDS, "q3")))
    [rejected] = features.rejected
    assert (rejected.id, rejected.reason) == ("q3", "hidden states that are NaN or infinite")
    assert sizes(features).shape == (len(RECORDS) - 1, L)
    assert pooled("all", RECORDS).rejected == (rejected,)  # on disk: read, not pooled


def test_a_target_that_was_set_aside_leaves_no_nan_in_the_file(overflowing, tmp_path):
    features = collect(
        overflowing, Letters(), RECORDS, num_windows=W, store=Store(tmp_path / "features")
    )
    assert features.means.isfinite().all()


def test_states_that_overflow_are_refused_where_they_are_many(overflowing, tmp_path):
    records = [*RECORDS, record(8, "really?", [1, 1, 1, 1])]
    for _ in range(2):  # the second time they are read
        with pytest.raises(
            ModelError,
            match=r"^2 of 8 targets, the first is question 'q3': a layer .* NaN or infinity in "
            r"torch\.float64; load it with --dtype float32",
        ):
            collect(
                overflowing, Letters(), records, num_windows=W, store=Store(tmp_path / "features")
            )


def test_rejected_targets_are_written_and_taken_away_again(overflowing, tmp_path):
    features = collect(overflowing, Letters(), RECORDS, num_windows=W)
    path = write_rejected(tmp_path, features.rejected)
    [(_, found)] = read_json_lines(path, RejectedQuestion)
    assert found == features.rejected[0]
    assert write_rejected(tmp_path, ()) is None
    assert not path.exists()


# --- what training reads -----------------------------------------------------------------------


def test_means_in_float64_are_read_as_they_are(base):
    features = collect(base, Letters(), RECORDS, num_windows=W)
    precise = dataclasses.replace(features, means=features.means.double())
    assert precise.rows([1]).dtype == torch.float64
    assert features.rows([1]).dtype == torch.float32


def test_rows_are_copies(base):
    features = collect(base, Letters(), RECORDS, num_windows=W)
    features.rows([0, 1]).zero_()
    assert features.means[:2].any()


def test_the_digest_tells_targets_apart_and_the_sizes_tell_prompts_apart(base):
    features = collect(base, Letters(), RECORDS[:2], num_windows=W)
    other_target = [RECORDS[0], record(1, "hi", [0, 2, 1, 1])]
    assert digest(features) != digest(collect(base, Letters(), other_target, num_windows=W))
    again = collect(base, Letters(), RECORDS[:2], num_windows=W, batch_size=1)
    assert digest(features) == digest(again)
    torch.testing.assert_close(sizes(features), sizes(again), **CLOSE)


def test_rows_are_those_asked_for_in_their_order(base):
    features = collect(base, Letters(), RECORDS, num_windows=W)
    assert torch.equal(features.rows([4, 0]), features.means[[4, 0]])
