from __future__ import annotations

import random

import pytest

from drllm.evaluation.curve import Outcomes, Point
from drllm.evaluation.seeds import over_seeds, seeds_row, sentence, spread


def point(correct, system="routed", executions=9.0):
    return Point(system, "10 % saved", executions, Outcomes(correct, [-x for x in correct], []))


def test_a_spread_holds_mean_ends_and_deviation_between_seeds():
    found = spread([0.5, 0.6, 0.4])
    assert (found.mean, found.lowest, found.highest) == (pytest.approx(0.5), 0.4, 0.6)
    assert found.deviation == pytest.approx(0.1)
    assert found.num_seeds == 3


def test_one_seed_has_no_deviation_and_says_so():
    assert spread([0.5]).deviation is None
    assert str(spread([0.5])) == "0.500 (one seed)"


def test_questions_are_averaged_over_seeds():
    assert over_seeds([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]) == [0.5, 0.0, 0.75]


def test_the_interval_over_questions_does_not_know_how_far_seeds_lie_apart():
    # Each seed is right everywhere or nowhere: the mean is the same on every question.
    base = point([0.0] * 20, "base")
    row = seeds_row([point([1.0] * 20), point([0.0] * 20)], base, [], seed=0)
    assert row["against_base"]["accuracy"]["interval"] == [0.5, 0.5]
    assert row["accuracy"]["deviation"] > 0.7
    assert (row["accuracy"]["lowest"], row["accuracy"]["highest"]) == (0.0, 1.0)


def test_averaging_over_seeds_narrows_the_interval_only_as_far_as_they_disagree():
    rng = random.Random(0)
    alike = [float(rng.random() < 0.5) for _ in range(200)]
    apart = [[float(rng.random() < 0.5) for _ in range(200)] for _ in range(4)]

    base = point([0.0] * 200, "base")

    def width(by_seed):
        row = seeds_row([point(values) for values in by_seed], base, [], seed=0)
        low, high = row["against_base"]["gold_logprob"]["interval"]
        return high - low

    assert width([alike] * 4) == pytest.approx(width([alike]))
    assert width(apart) == pytest.approx(width([alike]) / 2, rel=0.2)


def test_differences_are_those_of_the_mean_over_seeds_question_by_question():
    base = point([0.0, 1.0, 0.0, 1.0], "base", 10.0)
    routed = [point([1.0, 1.0, 0.0, 1.0], executions=8.0), point([0.0, 1.0, 0.0, 0.0])]
    permuted = [point([0.0, 0.0, 0.0, 1.0]), point([0.0, 0.0, 1.0, 1.0])]
    row = seeds_row(routed, base, permuted, seed=0)
    assert (row["setting"], row["num_seeds"]) == ("10 % saved", 2)
    assert row["executions"]["mean"] == 8.5
    assert row["against_base"]["accuracy"]["mean"] == 0.0
    assert row["against_permuted"]["accuracy"]["mean"] == pytest.approx(0.125)
    assert row["text_loss"] is None
    assert row["against_base"]["text_loss"] is None


def test_the_sentence_holds_the_spread_and_both_differences():
    base = point([0.0, 1.0, 0.0, 1.0], "base", 10.0)
    routed = [point([1.0, 1.0, 0.0, 1.0]), point([0.0, 1.0, 0.0, 0.0])]
    said = sentence(seeds_row(routed, base, [base], seed=0))
    assert said.startswith("Routers of 2 seeds at 10 % saved: accuracy 50.0 % (25.0 to 75.0, ")
    assert "their mean less base's: +0.0 points" in said
    assert "less that of their own routes permuted: +0.0 points" in said


def test_no_seeds_and_other_questions_are_refused():
    for asked in (spread, over_seeds):
        with pytest.raises(ValueError, match="at least one"):
            asked([])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        over_seeds([[1.0], [1.0, 0.0]])
