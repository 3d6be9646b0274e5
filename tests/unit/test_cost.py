import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.cost import (
    decode_executions,
    distinct_executions,
    max_executions,
    path_executions,
    share_saved,
)
from drllm.paths import StaticPath, to_path


@pytest.mark.parametrize("num_layers", range(1, 129))
def test_a_rounding_error_never_costs_an_execution(num_layers):
    for tenths in range(10, 21):
        assert max_executions(tenths / 10, num_layers) == tenths * num_layers // 10


def test_decoding_reads_an_answer_token_by_token_but_for_the_first():
    assert decode_executions([[1, 1, 1], [1, 0, 0], [2, 2, 2]], [3, 5, 1]) == (2 * 3 + 4 * 1) / 6
    assert decode_executions([[1, 1]], [1]) is None  # answers of one token


def test_each_prompt_needs_its_number_of_tokens():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        decode_executions([[1, 1], [1, 0]], [3])


def test_saved_is_the_share_of_the_full_path_and_negative_when_more_was_spent():
    assert share_saved(27.0, 30) == pytest.approx(0.1)
    assert share_saved(30.0, 30) == 0.0
    assert share_saved(33.0, 30) == pytest.approx(-0.1)


def test_a_static_path_costs_its_executions():
    assert path_executions(StaticPath([0, 1, 1])) == 3.0


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5).filter(any).map(tuple), max_size=8)
)
def test_distinct_executions_are_the_distinct_beginnings_of_the_paths(rows):
    beginnings = {to_path(row)[:end] for row in rows for end in range(1, len(to_path(row)) + 1)}
    assert distinct_executions(rows) == len(beginnings)
