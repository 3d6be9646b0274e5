"""What stands in the way of comparing a baseline, and what is said of one beside its numbers."""

import pytest
import torch

from drllm.evaluation.baselines.base import BASELINES, Material

LOG = [(1, 1, 1, 1), (1, 0, 1, 1), (2, 1, 1, 1)]
"""Programs of three to five executions; the first is the full path."""


def values(_, candidates, __):
    """Stand in for measuring: what runs layer 2 twice is best, and the more layers the better."""
    return [10.0 * (path.count(2) == 2) + len(path) for path in candidates]


@pytest.fixture
def fitted_on(routed, searched):
    """A function that makes a baseline that knows a search log of one question with these plans."""

    def make(name, *plans):
        search = [searched(0, [(plan, 1) for plan in plans])]
        material = Material(routed=routed, prompts=[[1, 2]], search=search, remember=values)
        return BASELINES.get(name)(routed, lambda: material)

    return make


@pytest.mark.parametrize("executions", [2.9, 3.0, 3.4, 3.9, 4.0, 5.0, 5.1])
@pytest.mark.parametrize(("log", "least"), [(LOG, 3), ([LOG[0], LOG[2]], 4)])
def test_the_best_program_can_be_had_at_what_its_log_can_be_mixed_to(
    fitted_on, log, least, executions
):
    said = None
    if not least <= executions <= 5:
        said = (
            f"mixed with the full path, programs of the search log run {least} to 5 executions, "
            f"and the routed model has {executions:.2f}"
        )
    assert fitted_on("best program", *log).obstacle(executions) == said


def test_a_log_of_nothing_but_the_full_path_has_no_best_program(fitted_on):
    assert fitted_on("best program", (1, 1, 1, 1)).obstacle(4.0) == (
        "the search log has tried nothing but the full path"
    )


def test_the_best_program_is_told_by_the_layers_that_it_skips(fitted_on):
    routes = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    drawn = fitted_on("best program", *LOG).at(routes, torch.Generator())
    assert drawn.note == "skips layer 1 on 50% of the questions"
    assert drawn.decides.sum() == routes.sum()


def test_what_a_baseline_needs_and_there_is_not_is_named(fitted_on):
    assert fitted_on("sequence router", *LOG).obstacle(3.0) == (
        "it needs the routers' targets; give them as --supervision"
    )
    assert fitted_on("block influence", *LOG).obstacle(1.0) is None
