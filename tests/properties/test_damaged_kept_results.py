"""A changed result of an interrupted run is read as it is now, or made again; never wrong tensors.

A result is what `ResultStore` keeps of a block. One that can't be read counts as missing, and a
warning names it.
"""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from meaning import Refusal, assert_sound, read_or_refuse, to_document
from mutations import change_bytes, change_document

from drllm.evaluation.fitting import DepthResult
from drllm.pipeline.shrink import ShrinkTimes
from drllm.records.codec import read_json
from drllm.records.healed import HealPoint
from drllm.records.search import FailedQuestion
from drllm.tuning.heal_checks import LossesBefore, TextLosses
from drllm.tuning.heal_repair import SolvedGap
from drllm.tuning.heal_training import TrainingState
from drllm.tuning.kept_tensors import KeptTensors
from drllm.tuning.path_scorer import PathScores
from drllm.tuning.score_blocks import AnswerGrades, PartScores, RepairedScores
from drllm.work.store import MARKER_FILE, ResultStore

SEEDS = range(8)  # of each result; each seed changes another place
MORE_SEEDS = range(8, 250)
KEY = "block 1"
IDENTITY = {"settings": {"seed": 0, "tasks": ["a", "b"]}, "model": "f"}

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
POINT = HealPoint(step=1, tokens=5, seconds=1.5, train_kl=0.25, held_out_kl=0.5)
RESULTS: dict[str, Any] = {
    "scores of paths": PathScores(objective=[[-1.0, -2.0]], right=[[1.0, 0.0]], seconds=1.5),
    "grades": AnswerGrades(grades=[0.0, 0.5, 1.0], seconds=2.0),
    "scores of a repaired path": RepairedScores(
        parts={"a test": PartScores(objective=[-1.0], right=[1.0], grades=[0.5], seconds=1.0)},
        refit_seconds=3.0,
    ),
    "a solved gap": SolvedGap(
        map="1.mlp", ridge=0.1, unexplained=0.5, seconds=1.0, weights=KeptTensors.pack(TENSORS)
    ),
    "a training": TrainingState(
        step=3, tokens=50, seconds=2.5, curve=[POINT], tensors=KeptTensors.pack(TENSORS)
    ),
    "losses": LossesBefore(by_source={"a": TextLosses(by_path={"full": [1.0, 2.0]})}, seconds=1.0),
    "a depth": DepthResult(depth_bias=0.25),
    "failed questions": FailedQuestion(id="a", task="t", question="q", error="e", attempts=3),
}


def make_store(folder: Path) -> ResultStore:
    """Return the store of a run in a folder."""
    return ResultStore(folder, IDENTITY, stage="search")


def keep_changed(name: str, seed: int, folder: Path) -> Any:
    """Keep a result and change its file; return the JSON of the file, None if it isn't JSON."""
    draw = random.Random(f"{name} {seed}")
    make_store(folder).put(KEY, RESULTS[name])
    [file] = [file for file in folder.iterdir() if file.name != MARKER_FILE]
    if draw.random() < 0.2:
        file.write_bytes(change_bytes(file.read_bytes(), draw))
    else:
        document, _ = change_document(json.loads(file.read_bytes()), draw)
        file.write_text(json.dumps(document))
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


def get_changed(name: str, seed: int, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Read a changed result, as a resumed run does."""
    place = folder / f"{name}-{seed}"
    document = keep_changed(name, seed, place)
    store = make_store(place)
    assert store.open()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = store.get(KEY, type(RESULTS[name]))
    if result is None:
        [record] = caplog.records
        message = record.getMessage()
        assert "\n" not in message
        assert str(place) in message
        assert message.endswith("its work is done again")
        return
    assert_sound(document, result)
    assert_same_tensors(result)


def assert_same_tensors(result: Any) -> None:
    """Assert that the tensors of a result, if it has any, are those that were kept."""
    for name in ("weights", "tensors"):
        kept = getattr(result, name, None)
        if kept is not None:
            tensors = kept.unpack()
            assert tensors.keys() == TENSORS.keys()
            assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_read_as_it_was_kept(name, tmp_path):
    make_store(tmp_path).put(KEY, RESULTS[name])
    result = make_store(tmp_path).get(KEY, type(RESULTS[name]))
    assert to_document(result) == to_document(RESULTS[name])


@pytest.mark.parametrize("name", RESULTS)
def test_a_changed_result_is_read_as_it_is_or_made_again(name, tmp_path, caplog):
    for seed in SEEDS:
        get_changed(name, seed, tmp_path, caplog)


@pytest.mark.thorough
@pytest.mark.parametrize("name", RESULTS)
def test_many_more_changed_results_are_read_as_they_are_or_made_again(name, tmp_path, caplog):
    for seed in MORE_SEEDS:
        get_changed(name, seed, tmp_path, caplog)


def open_changed(seed: int, folder: Path) -> None:
    """Change the marker of a folder of results, and open the folder."""
    place = folder / str(seed)
    make_store(place).put(KEY, RESULTS["grades"])
    marker = place / MARKER_FILE
    values = json.loads(marker.read_bytes())
    document, _ = change_document(values, random.Random(f"marker {seed}"))
    marker.write_text(json.dumps(document))
    refusal = read_or_refuse(lambda file: make_store(file.parent).open() and None, marker)
    if refusal is None:
        # The version of the schema may be an older one, and the parts that are added later be any.
        same = {name: document.get(name) for name in ("identity", "drllm_version")}
        assert same == {name: values[name] for name in same}


def test_a_changed_marker_is_refused(tmp_path):
    for seed in SEEDS:
        open_changed(seed, tmp_path)


@pytest.mark.thorough
def test_many_more_changed_markers_are_refused(tmp_path):
    for seed in MORE_SEEDS:
        open_changed(seed, tmp_path)


def test_changed_times_of_shrink_are_read_as_they_are_or_refused(tmp_path):
    file = tmp_path / "times.json"
    times = to_document(ShrinkTimes(minutes=10.0, num_candidates=3, minutes_to_heal=2.5))
    for seed in SEEDS:
        document, _ = change_document(times, random.Random(seed))
        file.write_text(json.dumps(document))
        record = read_or_refuse(lambda file: read_json(file, ShrinkTimes), file)
        if not isinstance(record, Refusal):
            assert_sound(document, record)
