"""The path algebra for any model and any path."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.errors import PathError
from drllm.paths import (
    check_decisions,
    full_decisions,
    num_executions,
    sketch,
    to_decisions,
    to_path,
)

decision_vectors = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=64).filter(any)


@given(decision_vectors)
def test_a_path_runs_the_decided_executions_in_order_and_is_read_back(decisions):
    path = to_path(decisions)
    assert to_decisions(path, len(decisions)) == tuple(decisions)
    assert len(path) == num_executions(decisions)
    assert sorted(path) == list(path)
    assert all(path.count(layer) <= 2 for layer in path)


@given(decision_vectors)
def test_checking_changes_nothing(decisions):
    checked = check_decisions(decisions, len(decisions))
    assert checked == tuple(decisions)
    assert check_decisions(checked) == checked


@given(decision_vectors)
def test_a_sketch_has_one_sign_a_layer_and_can_be_read_back(decisions):
    assert ["·█2".index(sign) for sign in sketch(decisions)] == decisions


@given(st.integers(1, 100))
def test_the_full_path_runs_every_layer_once(num_layers):
    assert to_path(full_decisions(num_layers)) == tuple(range(num_layers))


@given(st.lists(st.integers(-3, 12), max_size=20), st.integers(1, 10))
def test_any_sequence_of_layers_is_either_refused_or_comes_back(path, num_layers):
    try:
        decisions = to_decisions(path, num_layers)
    except PathError:
        in_model = all(0 <= layer < num_layers for layer in path)
        twice = all(path.count(layer) <= 2 for layer in path)
        assert not (path and in_model and twice and sorted(path) == path)
    else:
        assert to_path(decisions) == tuple(path)


@given(
    decision_vectors,
    st.integers(0, 63),
    st.sampled_from([-1, 3, 0.5, "1", "x", None, math.nan, math.inf]),
)
def test_one_wrong_value_anywhere_is_refused_with_its_layer(decisions, where, wrong):
    layer = where % len(decisions)
    spoiled = [*decisions[:layer], wrong, *decisions[layer + 1 :]]
    with pytest.raises(PathError, match=rf"at layer {layer} is not one of 0 \(skip\)"):
        check_decisions(spoiled)
