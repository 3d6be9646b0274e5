"""Questions in blocks: each in one, of like length, and put back into their own order."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.errors import ModelError
from drllm.evaluation.answers import BatchResult, ModelSettings, TextBlock, TextScorer
from drllm.evaluation.plan import separate_repeats
from drllm.evaluation.systems import join_blocks
from drllm.model.batching import group_by_length
from drllm.records.codec import decode, encode

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=60)
sizes = st.integers(1, 20)


@given(lengths, sizes)
def test_each_question_is_in_one_block_the_longest_first_and_all_but_the_last_are_whole(
    lengths, size
):
    blocks = group_by_length(lengths, size)
    places = [place for block in blocks for place in block]
    assert sorted(places) == list(range(len(lengths)))
    ordered = [lengths[place] for place in places]
    assert ordered == sorted(ordered, reverse=True)
    *whole, last = map(len, blocks)
    assert all(number == size for number in whole)
    assert 1 <= last <= (whole[0] if whole else len(lengths))


@given(lengths, sizes, st.integers(1, 2000))
def test_a_batch_has_so_many_tokens_with_padding_or_one_prompt(lengths, size, max_tokens):
    for rows in group_by_length(lengths, size, max_tokens):
        padded = len(rows) * max(lengths[row] for row in rows)
        assert len(rows) == 1 or padded <= max_tokens
        assert len(rows) <= size


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_text_without_a_finite_loss_is_refused_with_what_to_do(logprob):
    """Otherwise a NaN among the losses ends the evaluation without a word on what to do."""
    scorer = SimpleNamespace(score_plans=lambda texts, paths: [[(logprob, False)]])
    model = SimpleNamespace(lm=SimpleNamespace(scorer=scorer))
    block = TextBlock("base", [SimpleNamespace(continuation=[1, 2])], {})
    with pytest.raises(ModelError, match=r"the text of base is -?(nan|inf); load the model with"):
        TextScorer(ModelSettings(1))(model, block, SimpleNamespace(report=None))


def test_no_part_of_a_block_has_a_prompt_twice():
    assert separate_repeats([0, 1, 2, 3], ["a", "b", "a", "a"]) == [[0, 1], [2], [3]]


@given(lengths, sizes, st.integers(1, 3), st.booleans())
def test_joined_answers_are_in_the_order_of_the_questions(lengths, size, num_draws, has_routes):
    blocks = group_by_length(lengths, size)

    def answers(draw, places):
        return [[(float(place), bool(draw)), f"{draw}"] for place in places]

    def routes(draw, places):
        return [(place, draw) for place in places]

    draws = range(num_draws)
    found = join_blocks(
        blocks,
        [
            BatchResult(
                answers=[answers(draw, block) for draw in draws],
                routes=[routes(draw, block) for draw in draws if has_routes],
                seconds=1.0,
            )
            for block in blocks
        ],
    )
    everything = range(len(lengths))
    assert found.answers == [answers(draw, everything) for draw in draws]
    assert found.routes == [routes(draw, everything) for draw in draws if has_routes]
    assert found.seconds == len(blocks)


@given(st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_answers_come_back_from_a_file_to_the_last_bit(logprob, text):
    answers, routes = [[[(logprob, True)], [text]]], [[(1, 0), (2, 1)]]
    answered = BatchResult(answers=answers, routes=routes, seconds=0.1)
    assert decode(encode(answered), BatchResult, "here") == answered
