"""What stands in the way of comparing an opponent, before it is run."""

from __future__ import annotations

from typing import Any

import pytest

from drllm.evaluation.lineup import Lineup, Material
from drllm.models.routed import RoutedModel
from drllm.records import SearchRecord, TriedPath


@pytest.fixture
def lineup(tiny_llama: Any) -> Lineup:
    """Opponents that know a search log whose shortest program runs three of four layers."""
    plans = [(1, 1, 1, 1), (1, 0, 1, 1), (2, 1, 1, 1)]
    record = SearchRecord(
        id="q",
        task="arc_easy",
        question="?",
        prompt="?",
        answer="a",
        reward="loglikelihood",
        num_layers=4,
        paths=tuple(
            TriedPath(
                decisions=plan,
                simulation=place,
                reward=1.0,
                margin=None,
                executions=float(sum(plan)),
            )
            for place, plan in enumerate(plans)
        ),
        seconds=0.0,
    )
    routed = RoutedModel(tiny_llama())
    material = Material(routed, prompts=[[1, 2]], search=[record])
    return Lineup("arc_easy", lambda: material, routed, lambda *_: [])


@pytest.mark.parametrize("executions", [3.0, 3.4, 4.0, 5.0])
def test_the_best_program_can_be_had_at_what_its_log_can_be_mixed_to(lineup, executions):
    assert lineup.obstacle("best program", executions) is None


@pytest.mark.parametrize("executions", [2.9, 5.1])
def test_beyond_that_it_is_said_how_far_the_log_goes(lineup, executions):
    assert lineup.obstacle("best program", executions) == (
        "mixed with the full path, programs of the search log run 3 to 5 executions, and the "
        f"routed model has {executions:.2f}"
    )


def test_what_an_opponent_needs_and_there_is_not_is_named(lineup):
    assert lineup.obstacle("sequence router", 3.0) == (
        "it needs the routers' targets; give them as --supervision"
    )
    assert lineup.obstacle("last layers", 1.0) is None
