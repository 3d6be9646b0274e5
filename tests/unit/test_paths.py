import numpy as np
import pytest

from drllm.errors import PathError
from drllm.paths import (
    Decision,
    StaticPath,
    check_decisions,
    to_decisions,
    to_path,
)


def test_decisions_become_the_path_of_the_papers_example():
    assert to_path([1, 1, 0, 2, 1]) == (0, 1, 3, 3, 4)
    assert to_decisions([0, 1, 3, 3, 4], num_layers=5) == (1, 1, 0, 2, 1)
    assert to_decisions([1], num_layers=4) == (0, 1, 0, 0)  # what is never reached is skipped


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
    assert StaticPath(to_path(decisions)).edits(len(decisions)) == words


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0, 1, 1, 1], "repeats layer 1 twice"),
        ([0, 0, 0, 0, 1, 1], "repeats layer 0 3 times, repeats layer 1"),
        ([0, 0, 0, 1, 1, 1], "repeats layers 0 and 1 twice"),
        ([1, 0], "runs the layers in another order"),
    ],
)
def test_edits_say_how_often_a_layer_is_repeated(layers, words):
    assert StaticPath(layers).edits(2) == words


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([1, 0, 2], "skips layer 3, runs the layers in another order"),
        ([0, 1, 0, 2, 3], "repeats layer 0, runs the layers in another order"),
    ],
)
def test_edits_name_another_order_beside_what_is_skipped_or_repeated(layers, words):
    assert StaticPath(layers).edits(4) == words


def test_layers_may_be_integers_of_numpy():
    path = StaticPath(np.array([0, 2]))
    assert path == StaticPath([0, 2])
    assert all(type(layer) is int for layer in path.layers)


@pytest.mark.parametrize("layers", [[], [-1], [True], [0.5], ["0"]])
def test_what_is_no_list_of_layers_is_no_static_path(layers):
    with pytest.raises(PathError):
        StaticPath(layers)


def test_checked_decisions_are_plain_ints_in_a_tuple():
    checked = check_decisions([True, 1.0, Decision.REPEAT])  # type: ignore[list-item]
    assert checked == (1, 1, 2)
    assert [type(value) for value in checked] == [int, int, int]


def test_another_number_of_layers_is_refused_with_both_numbers():
    with pytest.raises(PathError, match=r"3 decisions .* 4 layers"):
        check_decisions([1, 1, 1], num_layers=4)


@pytest.mark.parametrize("decisions", [[0, 0, 0], []])
def test_decisions_that_execute_nothing_are_refused(decisions):
    for use in (check_decisions, to_path):
        with pytest.raises(PathError, match="at least one layer must be executed"):
            use(decisions)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ([0, -1], "-1 at position 1"),
        ([0, 2, 0], "layer 0 follows layer 2"),
        ([0, 1, 1, 1], "layer 1 is visited more than twice"),
        ([], "at least one layer must be executed"),
    ],
)
def test_a_path_that_no_decisions_express_is_refused(path, says):
    with pytest.raises(PathError, match=says):
        to_decisions(path, num_layers=3)


@pytest.mark.parametrize(
    ("path", "says"),
    [([0, 3], "3 at position 1"), ([True], "True at position 0"), ([], "the path is empty")],
)
def test_a_path_that_the_model_cannot_run_is_refused(path, says):
    with pytest.raises(PathError, match=says):
        to_decisions(path, num_layers=3)
