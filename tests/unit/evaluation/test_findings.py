"""The sentences under the table never say more than the numbers allow."""

from __future__ import annotations

import pytest

from drllm.evaluation.findings import findings
from drllm.evaluation.statistics import wilson_interval


def said(base, routed, permuted=None, *, chance=0.25, executions=27.0, logprobs=None):
    """Return the findings for per-question outcomes of base, routed and permuted routes."""
    correct = {"base": base, "routed": routed}
    if permuted is not None:
        correct["permuted routes"] = permuted
    n = len(base)
    rows = {
        name: {
            "accuracy": sum(values) / n,
            "interval": list(wilson_interval(round(sum(values)), n)),
            "executions": 30.0 if name == "base" else executions,
        }
        for name, values in correct.items()
    }
    gold = logprobs or {name: [-1.0] * n for name in correct}
    return findings(
        task="a_task",
        rows=rows,
        correct=correct,
        gold_logprob=gold,
        chance=chance,
        num_layers=30,
        seed=0,
    )


RIGHT_80 = [1.0] * 80 + [0.0] * 20
RIGHT_50 = [1.0] * 50 + [0.0] * 50


def test_a_clear_loss_is_called_a_loss():
    text = " ".join(said(RIGHT_80, RIGHT_50))
    assert "routing loses accuracy (-30.0 points" in text
    assert "won 0, lost 30" in text


def test_a_clear_gain_is_called_a_gain():
    assert "routing gains accuracy (+30.0 points" in " ".join(said(RIGHT_50, RIGHT_80))


def test_a_gain_that_the_paired_test_does_not_show_is_not_claimed():
    routed = RIGHT_50.copy()
    routed[-2:] = [1.0, 1.0]  # two more right of a hundred
    text = " ".join(said(RIGHT_50, routed))
    assert "no difference is shown" in text
    assert "gains" not in text


def test_no_difference_names_the_loss_that_is_not_excluded():
    routed = RIGHT_80.copy()
    routed[0:3], routed[-3:] = [0.0] * 3, [1.0] * 3
    text = " ".join(said(RIGHT_80, routed))
    assert "a loss of up to 5.0 points is not excluded" in text


def test_nothing_is_claimed_where_the_base_may_be_guessing():
    assert "not shown to be above chance" in said([1.0] * 30 + [0.0] * 70, RIGHT_50)[0]
    assert "chance" not in " ".join(said(RIGHT_50, RIGHT_50))


@pytest.mark.parametrize(
    ("executions", "words"), [(27.0, "(10.0 % saved)"), (33.0, "(10.0 % more than the base)")]
)
def test_saved_and_spent_executions_are_told_apart(executions, words):
    assert words in " ".join(said(RIGHT_50, RIGHT_50, executions=executions))


@pytest.mark.parametrize(
    ("routed", "word"), [(-1.5, "lower"), (-0.5, "higher"), (-1.0, "not shown to differ")]
)
def test_the_gold_log_probability_is_compared_question_by_question(routed, word):
    logprobs = {"base": [-1.0] * 100, "routed": [routed] * 100}
    text = " ".join(said(RIGHT_50, RIGHT_50, logprobs=logprobs))
    assert f"options is {word} under routing" in text


@pytest.mark.parametrize(
    ("permuted", "words"),
    [
        ([0.5] * 50 + [0.0] * 50, "the match of route and question matters"),
        (RIGHT_50, "it is not shown that reading the question matters"),
        (RIGHT_80, "the routes do better on other questions than on their own"),
    ],
)
def test_routes_permuted_over_the_questions_decide_whether_reading_matters(permuted, words):
    assert words in " ".join(said(RIGHT_50, RIGHT_50, permuted))
