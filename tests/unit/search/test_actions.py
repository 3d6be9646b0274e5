import itertools

import pytest

from drllm.paths import Decision, full_decisions, num_executions
from drllm.search.actions import Action, apply, legal_actions


def reachable(num_layers: int, limit: int) -> set[tuple[int, ...]]:
    """Every vector that edits lead to, found by trying them all."""
    paths = {full_decisions(num_layers)}
    front = list(paths)
    while front:
        decisions = front.pop()
        for action in legal_actions(decisions, limit):
            edited = apply(decisions, action)
            if edited not in paths:
                paths.add(edited)
                front.append(edited)
    return paths


def test_the_full_path_has_l_skips_then_l_minus_1_double_skips_then_l_repeats():
    actions = legal_actions(full_decisions(30), limit=60)
    assert actions == (
        *(Action(layer, 1, Decision.SKIP) for layer in range(30)),
        *(Action(layer, 2, Decision.SKIP) for layer in range(29)),
        *(Action(layer, 1, Decision.REPEAT) for layer in range(30)),
    )


def test_an_edit_changes_only_the_layers_that_it_names():
    assert apply((1, 1, 2, 0), Action(1, 1, Decision.SKIP)) == (1, 0, 2, 0)
    assert apply((1, 1, 2, 0), Action(0, 2, Decision.SKIP)) == (0, 0, 2, 0)
    assert apply((1, 1, 2, 0), Action(0, 1, Decision.REPEAT)) == (2, 1, 2, 0)


@pytest.mark.parametrize(
    ("decisions", "limit", "edits"),
    [
        # a layer that was edited is never edited again
        (
            (0, 1, 2, 1, 1),
            10,
            "skip 1, skip 3, skip 4, skip 3-4, repeat 1, repeat 3, repeat 4",
        ),
        ((1, 1, 1), 3, "skip 0, skip 1, skip 2, skip 0-1, skip 1-2"),  # no repeats at the limit
        ((0, 1, 0), 3, "repeat 1"),  # the last execution is never skipped
        ((1, 1), 2, "skip 0, skip 1"),
        ((2, 1), 4, "skip 1, repeat 1"),
        ((1,), 2, "repeat 0"),
        ((1,), 1, ""),
    ],
)
def test_edits_that_are_legal(decisions, limit, edits):
    assert ", ".join(map(str, legal_actions(decisions, limit))) == edits


@pytest.mark.parametrize(("num_layers", "limit"), [(1, 1), (1, 2), (4, 4), (4, 5), (6, 6), (6, 12)])
def test_edits_reach_every_vector_within_the_limit_and_no_other(num_layers, limit):
    every = {
        decisions
        for decisions in itertools.product((0, 1, 2), repeat=num_layers)
        if 1 <= num_executions(decisions) <= limit
    }
    assert reachable(num_layers, limit) == every
