"""The batched features against the slow obvious way: one prompt at a time, layer by layer."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from killable import CONTEXT, D, L, Letters, make_model, make_record, pooled
from small import W, Watching, assert_windows, make_features, means_of

import drllm.training.features as features
from drllm.errors import ModelError, RecordError
from drllm.model.prompts import encode
from drllm.records.codec import read_json_lines
from drllm.records.manifest import write_or_remove
from drllm.records.supervision import RejectedQuestion
from drllm.training.feature_store import FeatureStore
from drllm.training.targets import encode_targets
from slow_way import inputs_alone

BASE = make_model().double()
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""The model runs in float64, the means are stored in float32."""
FULL = (1, 1, 1)
PROMPTS = {
    "a longer prompt of 20": FULL,
    "hi": (0, 2, 1),
    "seven..": (2, 0, 2),
    "?": (0, 0, 1),
    "twelve chars": (1, 0, 0),
    "seven,,": (1, 2, 0),
    "all are repeated": (2, 2, 2),
}
RECORDS = [make_record(row, *each) for row, each in enumerate(PROMPTS.items())]
N = len(RECORDS)
LONG = [make_record(row, "x" * (CONTEXT + row), FULL) for row in (8, 9)]


def features_of(records=RECORDS, model=BASE, **options):
    return pooled(records, model, **options)


def slow_inputs(record) -> list[torch.Tensor]:
    """What each layer reads, `[T, D]`, after the labelled executions of the layers before it."""
    ids = Letters()(record.prompt)["input_ids"]
    return inputs_alone(BASE, ids, record.optimal_layer_config)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_features_equal_one_prompt_at_a_time_layer_by_layer(batch_size):
    seen = []
    watching = Watching(lambda done, total: seen.append((done, total)))
    features = features_of(batch_size=batch_size, listener=watching)
    for result, record in zip(means_of(features), RECORDS, strict=True):
        assert_windows(result, slow_inputs(record), **CLOSE)
    assert means_of(features).shape == features.shape == (N, L, W, D)
    assert means_of(features).dtype == torch.float32
    assert features.filled.tolist() == [min(len(prompt), W) for prompt in PROMPTS]
    assert features.labels.tolist() == [list(decisions) for decisions in PROMPTS.values()]
    assert features.questions == tuple(record.question for record in RECORDS)
    assert features.tasks == ("own",) * N
    sizes_of_passes = [*range(batch_size, N, batch_size), N]
    assert seen == [(done, N) for done in sizes_of_passes]


def test_where_memory_runs_out_a_batch_is_read_in_parts(monkeypatch):
    read, sizes = features.run_prompts, []

    def little_memory(routed, policy, prompts):
        if len(prompts) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        sizes.append(len(prompts))
        read(routed, policy, prompts)

    whole = features_of(batch_size=5)
    monkeypatch.setattr(features, "run_prompts", little_memory)
    in_parts = features_of(batch_size=5)
    assert sizes == [2, 2, 1, 2]
    torch.testing.assert_close(means_of(in_parts), means_of(whole), **CLOSE)
    assert torch.equal(in_parts.filled, whole.filled)


def test_a_batch_that_memory_does_not_hold_makes_later_ones_no_smaller(monkeypatch):
    read, sizes = features.run_prompts, []

    def little_memory(routed, policy, prompts):
        if sum(map(len, prompts)) > 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        sizes.append(len(prompts))
        read(routed, policy, prompts)

    monkeypatch.setattr(features, "run_prompts", little_memory)
    features_of(batch_size=4)
    assert sizes == [2, 2, 3]


@pytest.mark.parametrize(
    ("device", "num_values", "size"), [("cpu", 1, 8), ("cuda", 1, 64), ("cuda", 10**6, 16)]
)
def test_off_a_cpu_a_pass_reads_as_many_prompts_as_their_features_allow(device, num_values, size):
    assert features.choose_batch_size(device, num_values) == size


def test_each_target_of_a_batch_follows_its_own_path():
    """The same prompt along several paths, the first of them the full one."""
    paths = [FULL, (0, 1, 1), (2, 1, 0), (1, 0, 2)]
    records = [make_record(row, "the same prompt", path) for row, path in enumerate(paths)]
    together = features_of(records)
    for row, one in enumerate(records):
        torch.testing.assert_close(together.rows([row]), features_of([one]).rows([0]), **CLOSE)
    reads = means_of(together)[:, -1]
    assert all((reads[row] - reads[0]).abs().max() > 0.01 for row in (1, 2, 3))


def test_a_prompt_that_begins_with_the_mark_of_a_beginning_gets_no_second_one():
    class Marks(Letters):
        bos_token = "^"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return super().__call__(("^" if add_special_tokens else "") + text)

    assert encode(Marks(), "^a") == encode(Marks(), "a") == Letters()("^a")["input_ids"]


def test_the_model_is_left_without_routing():
    before = BASE.forward
    features_of(RECORDS[:1])
    assert BASE.forward == before


def test_a_prompt_as_long_as_the_context_is_read():
    assert features_of([make_record(0, "x" * CONTEXT, FULL)]).shape.num_targets == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([*RECORDS, make_record(9, "x", (1, 1))], "'q9': its target has 2 layers, the base .* 3"),
        ([], "no targets to train on"),
        (
            [*RECORDS, *LONG],
            r"^2 of 9 targets can't be used .*longer than the base model's context: 2; its context "
            r"holds 48 tokens\); the first is question 'q8'; give targets that were searched",
        ),
        (LONG[:1], r"^1 of 1 targets can't be used"),
    ],
    ids=["another depth", "none", "many too long", "one of one"],
)
def test_targets_of_which_too_many_do_not_fit_the_model_are_refused(records, message):
    with pytest.raises(RecordError, match=message):
        features_of(records)


def assert_same_features(result, expected) -> None:
    """The numbers of both, up to what another batch does to the last bits."""
    everything = range(len(expected.labels))
    torch.testing.assert_close(result.rows(everything), expected.rows(everything), **CLOSE)
    assert result.digest == expected.digest


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("x" * (CONTEXT + 1), "longer than the base model's context"), ("_", "prompt without tokens")],
)
def test_a_single_target_that_this_model_cannot_read_is_set_aside(prompt, reason):
    bad = make_record(9, prompt, FULL)
    features = features_of([*RECORDS[:3], bad, *RECORDS[3:]])
    assert_same_features(features, features_of())
    [rejected] = features.rejected
    assert (rejected.id, rejected.question, rejected.reason) == ("q9", bad.question, reason)


@pytest.fixture
def overflowing():
    """A model to which question marks are endless."""
    broken = copy.deepcopy(BASE)
    broken.model.embed_tokens.weight[ord("?") % 64] = math.inf
    return broken


def test_a_single_target_whose_states_overflow_is_set_aside(overflowing, tmp_path):
    def pool(name: str, records):
        return features_of(records, overflowing, store=FeatureStore(tmp_path / name))

    features = pool("all", RECORDS)
    finite = [record for record in RECORDS if record.id != "q3"]
    assert_same_features(features, pool("finite", finite))
    [rejected] = features.rejected
    assert (rejected.id, rejected.reason) == ("q3", "hidden states that are NaN or infinite")
    assert features.shape[:2] == (N - 1, L)
    assert torch.cat(features.means.blocks).isfinite().all()
    assert pool("all", RECORDS).rejected == (rejected,)  # read, not pooled


def test_states_that_overflow_are_refused_where_they_are_many(overflowing, tmp_path):
    records = [*RECORDS, make_record(8, "really?", FULL)]
    message = (
        r"^a layer .* NaN or infinity in torch\.float64 for 2 of 8 targets \(the first is question "
        r"'q3'\); load the model with --dtype float32"
    )
    for _ in range(2):  # the second time they are read
        with pytest.raises(ModelError, match=message):
            features_of(records, overflowing, store=FeatureStore(tmp_path / "features"))


def test_rejected_targets_are_written_and_taken_away_again(overflowing, tmp_path):
    features = features_of(model=overflowing)
    path = tmp_path / "rejected.jsonl"
    write_or_remove(path, features.rejected)
    [(_, result)] = read_json_lines(path, RejectedQuestion)
    assert result == features.rejected[0]
    write_or_remove(path, ())
    assert not path.exists()


def test_rows_are_copies_of_those_asked_for_in_their_order_and_at_least_in_float32():
    features = features_of()
    assert torch.equal(features.rows([4, 0]), means_of(features)[[4, 0]])
    features.rows([0, 1]).zero_()
    assert features.rows([0, 1]).any()
    precise = replace(features, means=means_of(features).double())
    assert precise.rows([1]).dtype == torch.float64
    halved = replace(features, means=means_of(features).bfloat16())
    assert halved.rows([1]).dtype == torch.float32


def test_the_digest_tells_targets_apart_and_not_last_bits():
    features = make_features()
    labels = features.labels.clone()
    labels[0, 0] = (labels[0, 0] + 1) % 3
    assert features.digest != replace(features, labels=labels).digest
    assert features.digest == replace(features, means=features.means * 1.1).digest


def test_a_model_without_a_limit_of_its_context_is_not_said_to_hold_none_tokens():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))

    def tokenizer(text, **_):
        return {"input_ids": []}

    message = r"\(prompt without tokens: [0-9]+\); the first is question"
    with pytest.raises(RecordError, match=message):
        encode_targets(model, tokenizer, L, RECORDS)
