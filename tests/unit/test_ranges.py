"""Numbers in files are in their ranges: no negative count, no share above 1, no turned interval."""

import json
from typing import Any

import pytest

from drllm.errors import RecordError
from drllm.pipeline.manifest import RunManifest
from drllm.records.codec import decode
from drllm.records.latency import Timing
from drllm.records.layers import Layers
from drllm.records.results import Sample, Spread, System
from drllm.records.search import FailedQuestion
from drllm.records.shortened import ModelResult
from drllm.reporting.run import Epoch
from drllm.statistics.differences import Verdict
from drllm.statistics.exclusion import Limits

VERDICT = {
    "quantity": "accuracy",
    "mean": 0.1,
    "interval": [0.0, 0.2],
    "n": 30,
    "shown": "too few",
    "won": 3,
    "lost": 0,
    "p": 0.25,
    "needed": 90,
}
SYSTEM = {
    "name": "base",
    "description": "",
    "accuracy": 0.5,
    "interval": [0.4, 0.6],
    "executions": 4.0,
    "gold_logprob": None,
    "seconds": 1.0,
}
SAMPLE = {
    "id": "a",
    "task": "t",
    "question": "q",
    "choices": [],
    "gold": None,
    "systems": {"base": {"correct": 1.0, "gold_logprob": None}},
}
FAILED = {"id": "a", "task": "t", "question": "q", "error": "e", "attempts": 3}
TIMING = {
    "system": "base",
    "phase": "decode",
    "batch_size": 1,
    "num_tokens": 8,
    "executions": 4.0,
    "seconds": [0.5],
}
MODEL = {"name": "skip1", "layers": [0, 2], "num_bytes": 8}
EPOCH = {"epoch": 1, "split": "train"}
SPREAD = {"mean": 1.0, "lowest": 1.0, "highest": 1.0, "deviation": None, "num_seeds": 1}
STAGE = {"search": {"made_from": {}, "seconds": -1.0}}


@pytest.mark.parametrize(
    ("kind", "valid", "changes", "place"),
    [
        (Verdict, VERDICT, {"interval": [0.2, 0.0]}, "`interval` is [0.2, 0.0]"),
        (Verdict, VERDICT, {"n": -1}, "`n`"),
        (Verdict, VERDICT, {"p": 1.5}, "`p`"),
        (Verdict, VERDICT, {"num_tests": 0}, "`num_tests`"),
        (Verdict, VERDICT, {"excluded_loss": -0.1}, "`excluded_loss`"),
        (Limits, {"max_drop": 3.0}, {"max_drop": -3.0}, "`max_drop`"),
        (System, SYSTEM, {"seconds": -1.0}, "`seconds`"),
        (System, SYSTEM, {"unchanged_routes": 1.5}, "`unchanged_routes`"),
        (Sample, SAMPLE, {"systems": {"a": {"correct": 2.0, "gold_logprob": 0}}}, "correct`"),
        (Spread, SPREAD, {"deviation": -0.5}, "`deviation`"),
        (FailedQuestion, FAILED, {"attempts": -1}, "`attempts`"),
        (Timing, TIMING, {"batch_size": -1}, "`batch_size`"),
        (ModelResult, MODEL, {"layers": [-1]}, "`layers[0]`"),
        (ModelResult, MODEL, {"speed": -2.0}, "`speed`"),
        (Epoch, EPOCH, {"accuracy": 1.5}, "`accuracy`"),
        (RunManifest, {}, {"stages": STAGE}, "seconds`"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_its_place(
    kind: type, valid: dict[str, Any], changes: dict[str, Any], place: str
):
    decode(json.dumps(valid), kind, "a.json")
    with pytest.raises(RecordError) as refused:
        decode(json.dumps({**valid, **changes}), kind, "a.json")
    assert place in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"executions": -1}, "`train.executions`"),
        ({"epochs": 1}, "unknown field `epochs` (at `train`)"),
    ],
)
def test_counts_of_routers_have_no_other_fields_and_no_negative_numbers(changes, said):
    counts = {"confusion": [[[1, 0, 0], [0, 0, 0], [0, 0, 0]]], "executions": 1, "examples": 1}
    decode(json.dumps({"epoch": 1, "train": counts}), Layers, "layers.json")
    with pytest.raises(RecordError) as refused:
        decode(json.dumps({"epoch": 1, "train": {**counts, **changes}}), Layers, "layers.json")
    assert said in str(refused.value)
