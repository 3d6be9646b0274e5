from __future__ import annotations

import itertools

import pytest

from drllm.paths import Decision, full_decisions, num_executions
from drllm.search.actions import Action, apply, legal_actions


def reachable(num_layers: int, limit: int) -> set[tuple[int, ...]]:
    """Every vector that edits lead to, found by trying them all."""
    found = {full_decisions(num_layers)}
    front = list(found)
    while front:
        decisions = front.pop()
        for action in legal_actions(decisions, limit):
            edited = apply(decisions, action)
            if edited not in found:
                found.add(edited)
                front.append(edited)
    return found


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


def test_a_layer_that_was_edited_is_never_edited_again():
    assert [str(action) for action in legal_actions((0, 1, 2, 1, 1), limit=10)] == [
        "skip 1",
        "skip 3",
        "skip 4",
        "skip 3-4",
        "repeat 1",
        "repeat 3",
        "repeat 4",
    ]


def test_a_path_at_the_limit_has_no_repeats():
    decisions = {action.decision for action in legal_actions((1, 1, 1), limit=3)}

    assert decisions == {Decision.SKIP}


def test_the_last_execution_is_never_skipped():
    assert legal_actions((0, 1, 0), limit=3) == (Action(1, 1, Decision.REPEAT),)


def test_a_double_skip_never_leaves_nothing_to_execute():
    assert [str(action) for action in legal_actions((1, 1), limit=2)] == ["skip 0", "skip 1"]


def test_a_repeated_layer_lets_the_last_layer_executed_once_be_skipped():
    assert "skip 1" in [str(action) for action in legal_actions((2, 1), limit=4)]


def test_a_model_of_one_layer_can_only_repeat_it():
    assert legal_actions((1,), limit=2) == (Action(0, 1, Decision.REPEAT),)
    assert legal_actions((1,), limit=1) == ()


@pytest.mark.parametrize(("num_layers", "limit"), [(1, 1), (1, 2), (4, 4), (4, 5), (6, 6), (6, 12)])
def test_edits_reach_every_vector_within_the_limit_and_no_other(num_layers: int, limit: int):
    every = {
        decisions
        for decisions in itertools.product((0, 1, 2), repeat=num_layers)
        if 1 <= num_executions(decisions) <= limit
    }

    assert reachable(num_layers, limit) == every
