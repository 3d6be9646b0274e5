"""Which setting of a sweep is chosen, and its file."""

import msgspec
import pytest

from drllm.errors import RecordError
from drllm.records.codec import write_json
from drllm.reporting.sweeps import (
    Candidate,
    Placed,
    SweepResult,
    choose,
    read_candidate,
    read_sweep_file,
)
from drllm.statistics.verdicts import Differences, Verdict


def verdict(quantity, mean):
    ends = (mean - 0.1, mean + 0.1)
    return Verdict(quantity=quantity, mean=mean, interval=ends, n=60, shown="none shown")


def place(gold, depth="10 % saved", accuracy=0.0, num_seeds=3):
    found = Differences(
        accuracy=verdict("accuracy", accuracy),
        gold_logprob=None if gold is None else verdict("gold_logprob", gold),
    )
    about = {"task": "arc_easy", "depth": depth, "num_seeds": num_seeds, "executions": 27.0}
    return Placed(**about, against_base=found)


def candidate(name, *places):
    return Candidate(name=name, places=places)


DEEPER = "20 % saved"


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        (
            [
                candidate("worse", place(-0.3, accuracy=0.1), place(-0.5, DEEPER)),
                candidate("better", place(-0.4, accuracy=-0.1), place(-0.3, DEEPER)),
            ],
            1,
        ),
        (
            [
                candidate("at one depth", place(-0.1)),
                candidate("of fewer seeds", place(-0.1), place(-0.1, DEEPER, num_seeds=2)),
                candidate("everywhere", place(-0.9), place(-0.9, DEEPER)),
            ],
            2,
        ),
        ([candidate("low", place(None, accuracy=-0.1)), candidate("high", place(None))], 1),
        ([candidate("a", place(-0.1)), candidate("b", place(-0.1))], 0),
    ],
    ids=[
        "keeps most of the gold log-probability",
        "reaches more depths with more seeds",
        "keeps most accuracy where no gold log-probability is known",
        "comes first of equal ones",
    ],
)
def test_the_setting_is_chosen_that(candidates, best):
    assert choose(candidates) == candidates[best]


def test_none_is_chosen_where_no_router_saves_anything():
    assert choose([candidate("a"), candidate("b")]) is None


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    settings = (candidate("a", place(-0.1)), candidate("b", place(-0.2)), candidate("c"))
    about = {"sweep": "a.yaml", "sweep_sha256": "0" * 64, "chosen_on": "select", "chosen": "a"}
    swept = SweepResult(**about, settings=settings)
    path = tmp_path / "sweep.json"
    write_json(path, swept)
    assert read_sweep_file(path) == swept
    for version, message in ((99, "newer drllm"), (1, "older form")):
        write_json(path, msgspec.structs.replace(swept, schema_version=version))
        with pytest.raises(RecordError, match=message):
            read_sweep_file(path)


def test_results_are_read_at_the_depths_of_the_curve(run):
    found = read_candidate("a", run.folder / "eval")
    assert [each.depth for each in found.places] == ["10 % saved", "20 % saved"]
    assert all(each.num_seeds == 1 for each in found.places)


def test_a_setting_without_results_is_refused(tmp_path):
    with pytest.raises(RecordError, match="holds no results"):
        read_candidate("a", tmp_path)
