"""What stands in the way of comparing an baseline, and what is said of one beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from drllm.evaluation.baselines.base import FittedBaselines
from drllm.evaluation.baselines.material import Material
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import Decisions, Path
from drllm.records import SearchRecord, TriedPath


def values(_: str, candidates: Sequence[Path], __: object) -> list[float]:
    """Stand in for measuring: what runs layer 2 twice is best, and the more layers the better."""
    return [10.0 * (path.count(2) == 2) + len(path) for path in candidates]


def baselines(model: Any, plans: Sequence[Decisions]) -> FittedBaselines:
    """Make baselines that know a search log of one question with these programs."""
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
    routed = RoutedModel(model)
    material = Material(routed, prompts=[[1, 2]], search=[record])
    return FittedBaselines("arc_easy", lambda: material, routed, values)


@pytest.fixture
def fitted(tiny_llama: Any) -> FittedBaselines:
    """Baselines that know a search log whose shortest program runs three of four layers."""
    return baselines(tiny_llama(num_layers=4), [(1, 1, 1, 1), (1, 0, 1, 1), (2, 1, 1, 1)])


@pytest.mark.parametrize("executions", [3.0, 3.4, 4.0, 5.0])
def test_the_best_program_can_be_had_at_what_its_log_can_be_mixed_to(fitted, executions):
    assert fitted.obstacle("best program", executions) is None


@pytest.mark.parametrize("executions", [2.9, 5.1])
def test_beyond_that_it_is_said_how_far_the_log_goes(fitted, executions):
    assert fitted.obstacle("best program", executions) == (
        "mixed with the full path, programs of the search log run 3 to 5 executions, and the "
        f"routed model has {executions:.2f}"
    )


@pytest.mark.parametrize("executions", [3.0, 4.0])
def test_a_log_of_nothing_but_the_full_path_has_no_best_program(tiny_llama, executions):
    fitted = baselines(tiny_llama(num_layers=4), [(1, 1, 1, 1)])
    assert fitted.obstacle("best program", executions) == (
        "the search log has tried nothing but the full path"
    )


def test_the_best_program_is_told_by_the_layers_that_it_skips(fitted):
    routes = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    drawn = fitted.at("best program", routes, torch.Generator())
    assert drawn.note == "skips layer 1 on 50% of the questions"
    assert drawn.plan.sum() == routes.sum()


def test_block_repeat_is_told_by_its_block(fitted):
    drawn = fitted.at("block repeat", torch.ones(2, 4, dtype=torch.long), torch.Generator())
    assert (drawn.path, drawn.note) == ((0, 1, 2, 3, 0, 1, 2, 3), "runs layers 0 to 3 twice")


def test_what_an_baseline_needs_and_there_is_not_is_named(fitted):
    assert fitted.obstacle("sequence router", 3.0) == (
        "it needs the routers' targets; give them as --supervision"
    )
    assert fitted.obstacle("last layers", 1.0) is None
