"""Which requests of the harness make up a question, and what of them is its prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.questions import Request, asked

LONG = 1000


def test_the_continuations_of_one_context_stand_behind_it_together():
    requests = [Request("a", [1, 2], [7]), Request("b", [3], [7]), Request("a", [1, 2], [8, 9])]
    found = asked(requests, LONG, by_prompt=True)
    first, second = found.questions
    assert (first.context, first.continuations) == ((1, 2), [(7,), (8, 9)])
    assert (second.context, second.continuations) == ((3,), [(7,)])
    assert found.keys == ["a", "b"]
    assert found.places == [(0, 0), (1, 0), (0, 1)]


def test_where_the_options_stand_in_the_context_the_prompt_is_what_comes_before_them():
    requests = [Request("gap", [1, 2, 30], [7, 8]), Request("gap", [1, 2, 40, 41], [7, 8])]
    [question] = asked(requests, LONG, by_prompt=True).questions
    assert question.context == (1, 2)
    assert question.continuations == [(30, 7, 8), (40, 41, 7, 8)]
    assert question.num_unscored == [1, 2]


def test_the_same_request_twice_is_scored_once():
    requests = [Request("a", [1], [7]), Request("a", [1], [8]), Request("a", [1], [7])]
    found = asked(requests, LONG, by_prompt=True)
    assert found.questions[0].continuations == [(7,), (8,)]
    assert found.places == [(0, 0), (0, 1), (0, 0)]


def test_contexts_with_nothing_in_common_are_questions_of_their_own_under_a_fixed_plan():
    requests = [Request("a", [1, 2], [7]), Request("a", [5], [7]), Request("a", [1, 2], [8])]
    found = asked(requests, LONG, by_prompt=False)
    assert [question.context for question in found.questions] == [(1, 2), (5,)]
    assert found.places == [(0, 0), (1, 0), (0, 1)]


def test_contexts_with_nothing_in_common_are_refused_where_somebody_decides_on_the_prompt():
    requests = [Request(("pmi", 3), [1, 2], [7]), Request(("pmi", 3), [5], [7])]
    with pytest.raises(TaskError, match=r"pmi 3 have no prompt in common.*decisions=FILE"):
        asked(requests, LONG, by_prompt=True)


def test_what_is_too_long_loses_its_beginning_as_the_harness_has_it():
    requests = [Request("a", [1, 2, 3, 4], [7]), Request("a", [1, 2, 3, 4], [8, 9])]
    found = asked(requests, 3, by_prompt=False)
    # The last token of a continuation isn't read, so four tokens fit into three.
    assert [question.context for question in found.questions] == [(2, 3, 4), (3, 4)]


def test_contexts_of_a_question_are_cut_alike_where_somebody_decides_on_the_prompt():
    requests = [Request("a", [1, 2, 3, 4], [7]), Request("a", [1, 2, 3, 4], [8, 9])]
    [question] = asked(requests, 3, by_prompt=True).questions
    assert question.context == (3, 4)


def test_a_continuation_that_the_model_cannot_read_is_refused():
    with pytest.raises(TaskError, match="continuation of arc 0 has 4 tokens, the model reads 3"):
        asked([Request(("arc", 0), [1], [1, 2, 3, 4])], 3, by_prompt=True)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@given(st.lists(st.builds(Request, st.sampled_from("abc"), tokens, tokens), max_size=12))
def test_every_request_is_found_again_whole_at_its_place(requests):
    found = asked(requests, LONG, by_prompt=False)
    for request, (place, number) in zip(requests, found.places, strict=True):
        question = found.questions[place]
        behind = question.continuations[number]
        whole = (*question.context, *behind)
        assert (*request.context, *request.continuation) == whole
        scored = behind[question.num_unscored[number] :]
        assert tuple(request.continuation) == tuple(scored)
        assert request.question == found.keys[place]
