"""The sentences about a result say what the tests carry, and not more."""

from __future__ import annotations

from typing import Any

import pytest

from drllm.reporting.depths import Choice, Difference, Differences, Rise, Trial
from drllm.reporting.numbers import NBSP
from drllm.reporting.results import Evaluation, System
from drllm.reporting.verdicts import (
    Verdict,
    against,
    against_base,
    headline,
    of_text_loss,
    others,
    outstanding,
    rivals,
)


def differs(
    accuracy: float | None = None, shown: str | None = None, **others: Difference | None
) -> Differences:
    found = None if accuracy is None else difference(accuracy, shown)
    return Differences(
        accuracy=found,
        gold_logprob=others.get("gold_logprob"),
        text_loss=others.get("text_loss"),
    )


def difference(mean: float, shown: str | None = None) -> Difference:
    return Difference(mean=mean, interval=(mean - 0.05, mean + 0.05), shown=shown)


def system(name: str, accuracy: float, half: float = 0.04, **changes: Any) -> System:
    values: dict[str, Any] = {
        "name": name,
        "description": "",
        "accuracy": accuracy,
        "interval": (accuracy - half, accuracy + half),
        "executions": 30.0 if name == "base" else 27.0,
        "gold_logprob": None,
        "seconds": 12.3,
        "draws": 1,
        "mcnemar_p": None,
        "won": None,
        "lost": None,
    }
    return System(**{**values, **changes})


def routed(accuracy: float, p: float | None = None, **changes: Any) -> System:
    return system("routed", accuracy, **{"mcnemar_p": p, "won": 20, "lost": 64, **changes})


def baseline(name: str, accuracy: float, ahead: float, shown: str | None, **changes: Any) -> System:
    values = {"reads_question": False, "routed_against": differs(ahead, shown), **changes}
    return system(name, accuracy, **values)


def evaluation(*systems: System, **changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "task": "arc_easy",
        "split": "test",
        "num_questions": 570,
        "num_layers": 30,
        "chance": 0.25,
        "systems": systems,
        "findings": (),
        "samples": (),
    }
    return Evaluation(**{**values, **changes})


BASE = system("base", 0.547)


def said(*systems: System, **changes: Any) -> str:
    return headline([evaluation(*systems, **changes)]).replace(NBSP, " ")


# --- against base ------------------------------------------------------------------------------


def test_a_loss_that_the_test_shows_is_called_one_with_its_numbers():
    text = said(BASE, routed(0.47, 0.0001, against_base=differs(-0.077, "lower")))
    assert text == (
        "On arc_easy, with 10.0 % fewer layer executions, routing loses accuracy: 47.0 % against "
        "54.7 % (−7.7 points, 95 % interval −12.7 to −2.7; won 20, lost 64 of 570 questions; "
        "McNemar p < 0.001)."
    )


@pytest.mark.parametrize("accuracy", [0.5, 0.55, 0.547])
def test_a_difference_that_the_test_does_not_show_is_not_claimed(accuracy):
    text = said(BASE, routed(accuracy, 0.4))
    assert "no difference of accuracy between the routed model and base is shown" in text
    assert "which is no evidence that there is none" in text
    for claim in (" gains", " loses", "better", "worse"):
        assert claim not in text


def test_a_gain_is_claimed_where_the_test_shows_it():
    assert "routing gains accuracy: 60.0 % against 54.7 %" in said(BASE, routed(0.6, 0.001))


@pytest.mark.parametrize("accuracy", [0.2, 0.4])
def test_nothing_is_claimed_where_base_is_not_above_chance(accuracy):
    permuted = baseline("permuted routes", 0.2, 0.2, "higher")
    text = said(system("base", 0.27), routed(accuracy, 0.0001), permuted)
    assert "neither a gain nor the absence of a loss can be shown, since base isn't shown" in text
    assert "above chance (25.0 %)" in text
    for claim in (" gains", " loses", "better", "matter"):
        assert claim not in text


def test_with_several_tasks_the_corrected_p_value_decides():
    text = said(BASE, routed(0.6, 0.02, mcnemar_p_holm=0.06))
    assert "McNemar p = 0.020, corrected for several tasks = 0.060" in text
    assert "no difference of accuracy between the routed model and base is shown" in text


def test_nothing_is_claimed_without_a_test():
    text = said(BASE, routed(0.9))
    assert "no paired test was recorded, so no difference of accuracy is claimed" in text


@pytest.mark.parametrize(
    ("shown", "words"),
    [("higher", "routing gains f1"), ("lower", "routing loses f1"), (None, "no difference of f1")],
)
def test_grades_are_judged_by_their_interval_and_named_by_their_metric(shown, words):
    graded = routed(0.6, won=None, lost=None, against_base=differs(0.06, shown))
    text = said(BASE, graded, metric="f1")
    assert words in text
    assert "won" not in text
    assert "McNemar" not in text


def test_more_executions_are_called_more():
    assert "with 10.0 % more layer executions" in said(BASE, routed(0.5, 1.0, executions=33.0))


def test_without_a_routed_model_nothing_is_said_about_routing():
    assert "no routed model was evaluated, so nothing can be said about routing" in said(BASE)


def test_what_accuracy_hides_is_said_in_the_headline():
    hidden = differs(
        0.0, gold_logprob=difference(-0.125, "lower"), text_loss=difference(0.2, "higher")
    )
    text = said(BASE, routed(0.547, 1.0, against_base=hidden))
    assert (
        "But the gold options' log-probability is shown to be lower (−0.125 nats, 95 % interval "
        "−0.175 to −0.075) and the next-token loss is shown to be higher (+0.200 nats, 95 % "
        "interval +0.150 to +0.250)."
    ) in text
    unclear = differs(0.0, gold_logprob=difference(-0.1), text_loss=difference(0.1))
    assert "But" not in said(BASE, routed(0.547, 1.0, against_base=unclear))


def test_the_text_loss_needs_no_base_above_chance():
    hidden = differs(
        0.0, gold_logprob=difference(-0.125, "lower"), text_loss=difference(0.2, "higher")
    )
    text = said(system("base", 0.27), routed(0.27, 1.0, against_base=hidden))
    assert "But the next-token loss is shown to be higher" in text
    assert "log-probability" not in text


# --- against baselines -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("higher", "That each question has its own route is shown to matter: against its own"),
        ("lower", "Its routes do better on other questions than on their own: against its own"),
        (None, "It isn't shown that reading the question matters: against its own routes"),
    ],
)
def test_the_permuted_routes_decide_whether_the_question_matters(shown, words):
    text = said(BASE, routed(0.55, 0.9), baseline("permuted routes", 0.5, 0.05, shown))
    assert words in text
    assert "routes permuted over the questions, +5.0 points, 95 % interval 0.0 to +10.0." in text


def told(*systems: System, **changes: Any) -> str:
    return " ".join(others(evaluation(*systems, **changes))).replace(NBSP, " ")


def test_beating_every_fixed_baseline_is_said_only_if_each_is_beaten():
    first = baseline("last layers", 0.3, 0.25, "higher")
    second = baseline("evenly spaced", 0.5, 0.05, "higher")
    assert told(BASE, routed(0.55, 0.9), first, second) == (
        "The routed model is shown to be better than each of the 2 baselines of equal executions "
        "that don't read the question."
    )
    second = baseline("evenly spaced", 0.5, 0.05, None)
    assert told(BASE, routed(0.55, 0.9), first, second) == (
        "Of the 2 baselines of equal executions that don't read the question, the routed model is "
        "shown to be better than 1, each tested by itself; the best of them is evenly spaced with "
        "50.0 % (routed less it: +5.0 points, 95 % interval 0.0 to +10.0)."
    )


def test_a_fixed_baseline_that_is_better_is_counted():
    better = baseline("evenly spaced", 0.6, -0.05, "lower")
    assert "better than 0 and worse than 1, each" in told(BASE, routed(0.55, 0.9), better)


def test_rivals_run_as_much_and_are_no_controls():
    ours = evaluation(
        BASE,
        routed(0.5),
        baseline("permuted routes", 0.9, 0, None),
        baseline("last layers", 0.3, 0, None, executions=27.2),
        baseline("evenly spaced", 0.4, 0, None, executions=26.8),
        baseline("block repeat", 0.9, 0, None, executions=27.4),
        baseline("sequence router", 0.8, 0, None, reads_question=True),
        baseline("from an old file", 0.9, 0, None, reads_question=None),
    )
    assert [each.name for each in rivals(ours)] == ["evenly spaced", "last layers"]
    assert [each.name for each in rivals(ours, read_question=True)] == ["sequence router"]
    assert outstanding(ours) == ["routed", "permuted routes", "evenly spaced", "sequence router"]
    assert rivals(evaluation(BASE)) == []


def test_a_verdict_needs_a_base_above_chance_and_a_comparison():
    good, guessing = BASE, system("base", 0.27)
    beaten = baseline("last layers", 0.3, 0.25, "higher")
    assert against(evaluation(good, routed(0.5)), beaten) is Verdict.BETTER
    assert against(evaluation(guessing, routed(0.5)), beaten) is Verdict.NO_VERDICT
    assert against(evaluation(good, routed(0.5)), system("x", 0.3)) is Verdict.UNTESTED
    assert against(evaluation(good, routed(0.5)), None) is Verdict.UNTESTED


def test_less_text_loss_is_better():
    assert of_text_loss(difference(0.2, "higher")) is Verdict.WORSE
    assert of_text_loss(difference(-0.2, "lower")) is Verdict.BETTER
    assert of_text_loss(difference(0.2)) is Verdict.NOT_SHOWN
    assert of_text_loss(None) is Verdict.UNTESTED


def test_the_choice_is_said_whatever_it_is():
    trial = Trial(
        name="routed, 10 % saved",
        executions=27.0,
        num_questions=50,
        won=1,
        lost=1,
        greatest_loss=1.5,
        texts=Rise(num_texts=30, loss_increase=0.0, greatest_increase=0.01),
        worked=None,
        failures=(),
    )
    values: dict[str, Any] = {
        "epsilon": 2.0,
        "max_loss_increase": 0.05,
        "confidence": 0.95,
        "worked_answers": None,
        "chosen_on": None,
        "trials": (trial,),
        "obstacle": None,
        "sentences": (),
    }
    chosen = Choice(**values, confirmation=trial)
    assert told(BASE, routed(0.5, 0.5), choice=chosen) == (
        "Certified as losing less than 2 points of accuracy: routed, 10 % saved, 27.00 executions "
        "a forward pass; worked answers weren't looked at."
    )
    held = Choice(**{**values, "worked_answers": "gsm8k"}, confirmation=trial)
    assert told(BASE, routed(0.5, 0.5), choice=held).endswith("27.00 executions a forward pass.")
    unconfirmed = Choice(**values, confirmation=None)
    assert told(BASE, routed(0.5, 0.5), choice=unconfirmed) == (
        "No depth is certified as losing less than 2 points of accuracy."
    )


# --- several tasks -----------------------------------------------------------------------------


def test_over_several_tasks_the_headline_counts_what_is_shown():
    lossy = differs(-0.1, "lower", text_loss=difference(0.3, "higher"))
    permuted = baseline("permuted routes", 0.4, 0.05, "higher")
    tasks = [
        evaluation(BASE, routed(0.4, 0.001, against_base=lossy), permuted, task="a"),
        evaluation(BASE, routed(0.5, 0.5, against_base=lossy), task="b"),
        evaluation(system("base", 0.26), routed(0.2, 0.001), permuted, task="c"),
        evaluation(BASE, task="d"),
    ]
    assert headline(tasks) == (
        "Of 4 tasks, routing is shown to lose on 1 (a); to gain on 0; no difference is shown on 1 "
        "(b); base isn't shown to be above chance, so nothing can be said, on 1 (c); there is no "
        "test on 1 (d). The next-token loss is shown to be higher on 2 of the 2 where it was read. "
        "That each question has its own route is shown to matter on 1 (a) of the 1 where permuted "
        "routes could be compared, each tested by itself."
    )


def test_equal_accuracies_are_no_difference_whatever_the_p_value():
    assert against_base(evaluation(BASE, routed(0.547, 0.01))) is Verdict.NOT_SHOWN
