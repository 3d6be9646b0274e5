from __future__ import annotations

import pytest

from drllm.errors import PathError
from drllm.paths import (
    Decision,
    check_decisions,
    edits,
    full_decisions,
    num_executions,
    sketch,
    to_decisions,
    to_path,
)


def test_a_decision_is_the_number_of_executions():
    assert [Decision.SKIP, Decision.EXECUTE, Decision.REPEAT] == [0, 1, 2]


def test_decisions_become_the_path_of_the_papers_example():
    assert to_path([1, 1, 0, 2, 1]) == (0, 1, 3, 3, 4)
    assert to_decisions([0, 1, 3, 3, 4], num_layers=5) == (1, 1, 0, 2, 1)


def test_layers_that_a_path_never_reaches_are_skipped():
    assert to_decisions([1], num_layers=4) == (0, 1, 0, 0)


def test_the_full_path_executes_each_layer_once():
    assert full_decisions(4) == (1, 1, 1, 1)


def test_executions_are_counted_with_repeats():
    assert num_executions([2, 0, 1, 2]) == 5


@pytest.mark.parametrize(
    ("decisions", "words"),
    [
        ([1, 1], "runs every layer once"),
        ([1, 0, 1], "skips layer 1"),
        ([0, 1, 0, 0], "skips layers 0, 2 and 3"),
        ([2, 1, 0], "skips layer 2, repeats layer 0"),
    ],
)
def test_edits_name_the_layers_that_are_skipped_and_repeated(decisions, words):
    assert edits(decisions) == words


def test_a_sketch_shows_skip_execute_and_repeat():
    assert sketch([0, 1, 2]) == "·█2"


def test_checked_decisions_are_plain_ints_in_a_tuple():
    checked = check_decisions([True, 1.0, Decision.REPEAT])

    assert checked == (1, 1, 2)
    assert [type(value) for value in checked] == [int, int, int]


@pytest.mark.parametrize("value", [3, -1, 0.5, "1", "x", None, float("nan"), float("inf")])
def test_a_value_that_is_no_decision_is_refused_with_its_layer(value: object):
    with pytest.raises(PathError, match=r"at layer 1 is not one of 0 \(skip\), 1 \(execute\)"):
        check_decisions([1, value])  # type: ignore[list-item]


def test_another_number_of_layers_is_refused_with_both_numbers():
    with pytest.raises(PathError, match="3 decisions were given for a model of 4 layers"):
        check_decisions([1, 1, 1], num_layers=4)


@pytest.mark.parametrize("decisions", [[0, 0, 0], []])
def test_decisions_that_execute_nothing_are_refused(decisions: list[int]):
    with pytest.raises(PathError, match="at least one layer must be executed"):
        check_decisions(decisions)
    with pytest.raises(PathError, match="at least one layer must be executed"):
        to_path(decisions)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_outside_the_model_is_refused(layer: int):
    with pytest.raises(PathError, match=rf"layer {layer} is not in a model of 3 layers \(0 to 2\)"):
        to_decisions([0, layer], num_layers=3)


@pytest.mark.parametrize("before", [1, 2])
def test_a_path_that_goes_back_is_refused(before: int):
    with pytest.raises(PathError, match=f"layer 0 follows layer {before}"):
        to_decisions([0, before, 0], num_layers=3)


def test_a_third_visit_of_a_layer_is_refused():
    with pytest.raises(PathError, match="layer 1 is visited more than twice"):
        to_decisions([0, 1, 1, 1], num_layers=3)


def test_an_empty_path_is_refused():
    with pytest.raises(PathError, match="at least one layer must be executed"):
        to_decisions([], num_layers=3)
