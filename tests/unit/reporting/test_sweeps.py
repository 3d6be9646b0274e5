"""Which setting of a sweep is chosen, and how settings are drawn."""

from __future__ import annotations

import msgspec
import pytest

from drllm.errors import RecordError
from drllm.records import write_json
from drllm.reporting.drawing import LIGHT, png
from drllm.reporting.sweeps import (
    Candidate,
    Placed,
    SweepResult,
    choose,
    drawn,
    read_candidate,
    read_sweep_file,
)
from drllm.statistics.verdicts import Differences, Verdict


def verdict(quantity, mean):
    ends = (mean - 0.1, mean + 0.1)
    return Verdict(quantity=quantity, mean=mean, interval=ends, n=60, shown="none shown")


def place(gold, depth="10 % saved", accuracy=0.0, num_seeds=3, task="arc_easy"):
    return Placed(
        task=task,
        depth=depth,
        num_seeds=num_seeds,
        executions=27.0,
        against_base=Differences(
            accuracy=verdict("accuracy", accuracy),
            gold_logprob=None if gold is None else verdict("gold_logprob", gold),
        ),
    )


def candidate(name, *places):
    return Candidate(name=name, places=places)


def test_the_setting_that_keeps_most_of_the_gold_log_probability_is_chosen():
    worse = candidate("worse", place(-0.3, accuracy=0.1), place(-0.5, "20 % saved"))
    better = candidate("better", place(-0.4, accuracy=-0.1), place(-0.3, "20 % saved"))
    assert choose([worse, better]).name == "better"


def test_a_setting_that_reaches_fewer_depths_or_seeds_is_not_chosen():
    everywhere = candidate("everywhere", place(-0.9), place(-0.9, "20 % saved"))
    once = candidate("once", place(-0.1))
    fewer = candidate("fewer", place(-0.1), place(-0.1, "20 % saved", num_seeds=2))
    assert choose([once, fewer, everywhere]).name == "everywhere"


def test_accuracy_counts_where_no_gold_log_probability_is_known():
    low = candidate("low", place(None, accuracy=-0.1))
    high = candidate("high", place(None, accuracy=0.0))
    assert choose([low, high]).name == "high"


def test_the_first_of_equal_settings_is_chosen():
    assert choose([candidate("a", place(-0.1)), candidate("b", place(-0.1))]).name == "a"


def test_none_is_chosen_where_no_router_saves_anything():
    assert choose([candidate("a"), candidate("b")]) is None


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    candidates = [candidate("a", place(-0.1)), candidate("b", place(-0.2)), candidate("c")]
    swept = SweepResult(
        sweep="a.yaml",
        sweep_sha256="0" * 64,
        chosen_on="select",
        chosen="a",
        settings=tuple(candidates),
    )
    path = tmp_path / "sweep.json"
    write_json(path, swept)
    assert read_sweep_file(path) == swept
    for version, message in ((99, "newer drllm"), (1, "older form")):
        write_json(path, msgspec.structs.replace(swept, schema_version=version))
        with pytest.raises(RecordError, match=message):
            read_sweep_file(path)


def test_results_are_read_at_the_depths_of_the_curve(new_folder, whole):
    folder = new_folder(num_layers=12, seed=3)
    folder.evaluation(**whole)
    found = read_candidate("a", folder.path / "eval")
    assert [each.depth for each in found.places] == ["10 % saved", "20 % saved"]
    assert all(each.num_seeds == 1 for each in found.places)


def test_a_setting_without_results_is_refused(tmp_path):
    with pytest.raises(RecordError, match="holds no results"):
        read_candidate("a", tmp_path)


def test_each_setting_has_a_row_with_its_depths_beside_each_other():
    candidates = [
        candidate("a", place(-0.1), place(-0.2, "20 % saved")),
        candidate("none"),
        candidate("b", place(-0.3)),
    ]
    figure = drawn(candidates, LIGHT)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "none", "b"]
    marks = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert marks["10 % saved"].get_xdata() == pytest.approx([-0.1, -0.3])
    assert marks["20 % saved"].get_xdata() == pytest.approx([-0.2])
    assert png(lambda colours: drawn(candidates, colours))
