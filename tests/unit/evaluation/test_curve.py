from __future__ import annotations

import json

import pytest

from drllm.evaluation.curve import Outcomes, Point, curve_rows, differences, won_lost
from drllm.statistics.intervals import mean_interval, wilson_interval
from drllm.statistics.paired import paired_interval

BASE = Point("base", "", 30.0, Outcomes([1, 1, 1, 0, 0, 0], [-1.0] * 6, [3.0, 3.1, 2.9, 3.3, 3.2]))


def point(system="routed", setting="10 % saved", executions=27.0, correct=(1, 0, 1, 1, 0, 0)):
    losses = [3.1, 3.1, 3.0, 3.5, 3.2]
    return Point(system, setting, executions, Outcomes(correct, [-1.5] * 3 + [-0.5] * 3, losses))


def test_a_point_sums_up_its_outcomes_and_refers_to_them():
    outcomes = Outcomes([1, 0, 1, 0], [-1.0, -3.0, -1.0, -3.0], [2.0, 3.0])
    found = Point("routed", "20 % saved", 24.0, outcomes)
    assert (found.accuracy, found.gold_logprob, found.text_loss) == (0.5, -2.0, 2.5)
    assert found.interval == wilson_interval(2, 4)
    assert found.outcomes is outcomes
    assert found.name == "routed, 20 % saved"
    assert BASE.name == "base"


def test_means_over_draws_have_a_resampled_interval():
    found = Point("random", "", 24.0, Outcomes([0.5, 0.25, 1.0]))
    assert found.interval == mean_interval([0.5, 0.25, 1.0], 0)


def test_questions_are_won_and_lost_one_by_one():
    assert won_lost(point().outcomes, BASE.outcomes) == (1, 1)


def test_means_over_draws_are_neither_won_nor_lost():
    with pytest.raises(ValueError, match="one a question"):
        won_lost(Outcomes([0.5, 1]), Outcomes([1, 1]))


def test_rows_run_from_the_most_executions_to_the_fewest_system_by_system():
    points = [
        point(setting="a", executions=20.0),
        point("static", "c", 22.0),
        point(setting="b", executions=25.0),
    ]
    rows = curve_rows(BASE, points, num_layers=30, seed=0)
    assert [(row["system"], row["setting"]) for row in rows] == [
        ("base", ""),
        ("routed", "b"),
        ("routed", "a"),
        ("static", "c"),
    ]
    assert [row["saved"] for row in rows] == pytest.approx([0, 1 / 6, 1 / 3, 8 / 30])


def test_differences_to_base_are_paired_and_each_has_its_interval():
    base, row = curve_rows(BASE, [point()], num_layers=30, seed=3)
    assert base["against_base"] is None
    differences = row["against_base"]
    interval = list(paired_interval(1, 1, 6))
    assert differences["accuracy"] == {"mean": 0.0, "interval": interval, "shown": None}
    ours, theirs = point().outcomes, BASE.outcomes
    for name in ("gold_logprob", "text_loss"):
        apart = [a - b for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True)]
        assert differences[name]["mean"] == pytest.approx(sum(apart) / len(apart))
        assert differences[name]["interval"] == list(mean_interval(apart, seed=3))


def test_the_routed_model_is_compared_with_every_baseline_of_its_depth():
    static, deeper = point("static", correct=(0, 0, 1, 0, 0, 0)), point("static", "20 % saved", 24)
    base, routed, *baselines = curve_rows(BASE, [point(), static, deeper], num_layers=30, seed=0)
    assert base["routed_against"] is routed["routed_against"] is None
    assert [row["setting"] for row in baselines] == ["10 % saved", "20 % saved"]
    expected = differences(point().outcomes, static.outcomes, seed=0)
    assert baselines[0]["routed_against"] == expected
    assert expected["accuracy"]["mean"] == pytest.approx(2 / 6)
    assert baselines[1]["routed_against"] is None  # no routed model of that depth


def test_what_is_not_known_is_null_in_a_file():
    unknown = Point("static", "", 20.0, Outcomes([1, 0, 1, 0, 1, 0]))
    _, row = curve_rows(BASE, [unknown], num_layers=30, seed=0)
    assert row["gold_logprob"] is row["text_loss"] is None
    assert row["against_base"]["gold_logprob"] is row["against_base"]["text_loss"] is None
    assert json.loads(json.dumps(row)) == row


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        curve_rows(BASE, [point(correct=(1, 0))], num_layers=30, seed=0)


@pytest.mark.parametrize(
    ("won", "lost", "shown"), [(6, 0, "higher"), (0, 6, "lower"), (5, 0, None)]
)
def test_right_and_wrong_answers_differ_where_the_exact_test_shows_it(won, lost, shown):
    # Two-sided: 2 / 2**6 = 0.031 for six of one kind, 0.0625 for five.
    ours = Outcomes([1] * won + [0] * lost + [1] * 10)
    theirs = Outcomes([0] * won + [1] * lost + [1] * 10)
    assert differences(ours, theirs, seed=0)["accuracy"]["shown"] == shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.5] * 6 + [0.0] * 2, "higher"),
        ([-0.5] * 6 + [0.0] * 2, "lower"),
        ([0.5] * 5, None),  # too few that differ
        ([0.5, -0.5] * 10, None),
        ([1e-6] * 20, None),  # rounding
    ],
)
def test_other_quantities_differ_where_the_interval_shows_it_on_enough_questions(values, shown):
    right = [1.0] * len(values)
    ours, theirs = Outcomes(right, values, values), Outcomes(right, [0.0] * len(values), [0.0])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        differences(ours, theirs, seed=0)
    theirs = Outcomes(right, [0.0] * len(values), [0.0] * len(values))
    found = differences(ours, theirs, seed=0)
    assert found["gold_logprob"]["shown"] == found["text_loss"]["shown"] == shown
