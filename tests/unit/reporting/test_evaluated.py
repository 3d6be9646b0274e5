"""The sentences about a result say what the numbers allow, and not more."""

from __future__ import annotations

from typing import Any

import pytest

from drllm.reporting.blocks import Text
from drllm.reporting.evaluated import sections, verdict
from drllm.reporting.numbers import NBSP
from drllm.reporting.results import Evaluation, System


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


def evaluation(*systems: System, chance: float = 0.25) -> Evaluation:
    return Evaluation(
        task="arc_easy",
        split="test",
        num_questions=570,
        num_layers=30,
        chance=chance,
        systems=systems,
        findings=(),
        samples=(),
    )


def said(*systems: System, chance: float = 0.25) -> str:
    return " ".join(verdict(evaluation(*systems, chance=chance))).replace(NBSP, " ")


def test_a_worse_routed_model_is_called_worse():
    text = said(system("base", 0.547), system("routed", 0.47, mcnemar_p=0.0001, won=20, lost=64))
    assert text.startswith("The routed model is worse than base by 7.7 points: 47.0 %")
    assert "it wins 20 questions and loses 64" in text
    assert "shows a loss at the 0.05 level (McNemar p < 0.001)" in text
    assert "27.00 layer executions a forward pass instead of 30 (10.0 % fewer)" in text


def test_a_difference_that_the_test_does_not_show_is_not_claimed():
    text = said(system("base", 0.54), system("routed", 0.55, mcnemar_p=0.4))
    assert "better than base by 1.0 points" in text
    assert "doesn't show a difference in either direction (McNemar p = 0.400)" in text
    assert "no evidence that there is none" in text
    assert "a gain" not in text


def test_a_gain_is_claimed_where_the_test_shows_it():
    text = said(system("base", 0.50), system("routed", 0.60, mcnemar_p=0.001))
    assert "shows a gain at the 0.05 level (McNemar p = 0.001)" in text


@pytest.mark.parametrize("routed", [0.2, 0.4])
def test_nothing_is_claimed_where_base_is_not_above_chance(routed):
    text = said(system("base", 0.27), system("routed", routed, mcnemar_p=0.0001))
    assert "isn't shown to be above chance (25.0 %)" in text
    assert "The paired test shows" not in text
    assert "better" not in text
    assert "worse" not in text
    assert f"accuracy less base's is {'+13.0' if routed == 0.4 else '−7.0'} points" in text


def test_with_several_tasks_the_corrected_p_value_decides():
    routed = system("routed", 0.60, mcnemar_p=0.02, mcnemar_p_holm=0.06)
    text = said(system("base", 0.50), routed)
    assert "(McNemar p = 0.020, corrected for several tasks = 0.060)" in text
    assert "doesn't show a difference" in text
    assert "a gain" not in text


@pytest.mark.parametrize(("corrected", "shown"), [(0.06, True), (0.02, False), (None, False)])
def test_corrected_p_values_stand_below_the_table_where_they_differ(run, corrected, shown):
    routed = system("routed", 0.60, mcnemar_p=0.02, mcnemar_p_holm=corrected)
    compared = sections(run, evaluation(system("base", 0.50), routed))[0]
    texts = [block.text for block in compared.blocks if isinstance(block, Text)]
    assert shown == any("(Holm): routed p = 0.060." in text for text in texts)
    assert len(texts) == (2 if shown else 1)


@pytest.mark.parametrize("half", [0.0, 0.04])
def test_an_interval_without_width_is_said_to_be_no_certainty(run, half):
    compared = sections(run, evaluation(system("base", 0.5), system("random", 0.5, half)))[0]
    texts = " ".join(block.text for block in compared.blocks if isinstance(block, Text))
    assert ("no sign of certainty" in texts) == (half == 0)


def test_nothing_is_claimed_without_a_test():
    text = said(system("base", 0.5), system("routed", 0.9))
    assert "No paired test was recorded, so no difference is claimed." in text


def test_equal_accuracies_are_called_equal():
    text = said(system("base", 0.5), system("routed", 0.5, mcnemar_p=1.0))
    assert "answer equally many questions right" in text


def test_more_executions_are_called_more():
    text = said(system("base", 0.5), system("routed", 0.5, executions=33.0, mcnemar_p=1.0))
    assert "33.00 layer executions a forward pass instead of 30 (10.0 % more)" in text


def test_without_a_routed_model_nothing_is_said_about_routing():
    text = said(system("base", 0.5))
    assert "no routed model was evaluated, so nothing can be said about routing" in text


def test_the_heat_map_holds_the_shares_of_the_routes(run):
    routes = run.evaluations[0].routes()
    routed = next(part for part in sections(run, run.evaluations[0]) if part.title == "Routes")
    rows = dict(routed.blocks[1].rows)
    for layer in range(12):
        taken = [route[layer] for route in routes]
        assert rows["skip"][layer] == taken.count(0) / 60
        assert rows["execute"][layer] == taken.count(1) / 60
        assert rows["repeat"][layer] == taken.count(2) / 60
