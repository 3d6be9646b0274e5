"""The harness' requests: which make up a question, and answers that a model has room for."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from drllm.errors import TaskError
from drllm.evaluation.lm_eval import generation
from drllm.evaluation.lm_eval.generation import STEPS, drop_repeats, limit_answers
from drllm.evaluation.lm_eval.scoring import HarnessRequest, batch_requests

LONG = 1000
CONTEXT = 160
NAMES = (f"task {number}" for number in itertools.count())


def test_the_continuations_of_one_context_stand_behind_it_together_each_once():
    first, other = HarnessRequest("a", [1, 2], [7]), HarnessRequest("b", [3], [7])
    requests = [first, other, HarnessRequest("a", [1, 2], [8, 9]), first]
    batch = batch_requests(requests, LONG, by_prompt=True)
    first, second = batch.questions
    assert (first.context, first.continuations) == ((1, 2), [(7,), (8, 9)])
    assert (second.context, second.continuations) == ((3,), [(7,)])
    assert batch.keys == ["a", "b"]
    assert batch.places == [(0, 0), (1, 0), (0, 1), (0, 0)]


def test_where_the_options_stand_in_the_context_the_prompt_is_what_comes_before_them():
    requests = [
        HarnessRequest("gap", [1, 2, 30], [7, 8]),
        HarnessRequest("gap", [1, 2, 40, 41], [7, 8]),
    ]
    [question] = batch_requests(requests, LONG, by_prompt=True).questions
    assert question.context == (1, 2)
    assert question.continuations == [(30, 7, 8), (40, 41, 7, 8)]
    assert question.num_unscored == [1, 2]


def test_contexts_with_nothing_in_common_are_questions_of_their_own_or_refused():
    key = ("pmi", 3)
    requests = [
        HarnessRequest(key, [1, 2], [7]),
        HarnessRequest(key, [5], [7]),
        HarnessRequest(key, [1, 2], [8]),
    ]
    batch = batch_requests(requests, LONG, by_prompt=False)
    assert [question.context for question in batch.questions] == [(1, 2), (5,)]
    assert batch.places == [(0, 0), (1, 0), (0, 1)]
    with pytest.raises(TaskError, match=r"pmi 3 have no prompt in common.*path=FILE"):
        batch_requests(requests, LONG, by_prompt=True)


@pytest.mark.parametrize(
    ("by_prompt", "contexts"),
    # The last token of a continuation isn't read, so four tokens fit into three.
    [(False, [(2, 3, 4), (3, 4)]), (True, [(3, 4)])],
)
def test_what_is_too_long_loses_its_beginning_alike_where_somebody_decides_on_it(
    by_prompt, contexts
):
    requests = [HarnessRequest("a", [1, 2, 3, 4], [7]), HarnessRequest("a", [1, 2, 3, 4], [8, 9])]
    questions = batch_requests(requests, 3, by_prompt=by_prompt).questions
    assert [question.context for question in questions] == contexts


def test_a_continuation_that_the_model_cannot_read_is_refused():
    with pytest.raises(
        TaskError, match="continuation of arc 0 has 4 tokens, and the model reads 3"
    ):
        batch_requests([HarnessRequest(("arc", 0), [1], [1, 2, 3, 4])], 3, by_prompt=True)


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@given(st.lists(st.builds(HarnessRequest, st.sampled_from("abc"), tokens, tokens), max_size=12))
def test_every_request_is_found_again_whole_at_its_place(requests):
    batch = batch_requests(requests, LONG, by_prompt=False)
    for request, (place, number) in zip(requests, batch.places, strict=True):
        question = batch.questions[place]
        behind = question.continuations[number]
        whole = (*question.context, *behind)
        assert (*request.context, *request.continuation) == whole
        scored = behind[question.num_unscored[number] :]
        assert tuple(request.continuation) == tuple(scored)
        assert request.question == batch.keys[place]


def encode(prompt):
    return list(prompt.encode())


def request(length, most, task, **others):
    settings = {"max_gen_toks": most, "until": ["."], **others}
    return Instance("generate_until", {}, ("x" * length, settings), 0, (task, length, 1))


def lengths(requests):
    limited = limit_answers(requests, encode, CONTEXT, 256, warns=False)
    return [dict(request.args[1])["max_gen_toks"] for request in limited]


@pytest.fixture
def task():
    """A name that nothing was said of yet."""
    generation._warn_once.cache_clear()
    return next(NAMES)


def test_what_fits_or_asks_for_half_of_the_context_stays_as_it_is(task):
    fitting = [request(60, 100, task), request(150, 80, task), request(1, 159, task)]
    limited = limit_answers(fitting, encode, CONTEXT, 256, warns=True)
    assert all(after is before for before, after in zip(fitting, limited, strict=True))


def test_an_answer_gets_what_its_prompt_leaves_in_steps_and_half_of_the_context_at_least(task):
    limits = lengths([request(length, 32768, task) for length in range(1, CONTEXT + 40)])
    for length, most in enumerate(limits, 1):
        left = CONTEXT - length
        assert most >= CONTEXT // 2
        if left >= CONTEXT // 2:
            assert left - CONTEXT // STEPS < most <= left
    assert len(set(limits)) <= STEPS // 2 + 1  # so that many are answered side by side


def test_requests_and_their_other_settings_are_left_alone(task):
    before = request(100, 32768, task, temperature=0.7, do_sample=True)
    [after] = limit_answers([before], encode, CONTEXT, 256, warns=False)
    assert before.args[1]["max_gen_toks"] == 32768
    assert after.args[0] == before.args[0]
    assert {**after.args[1], "max_gen_toks": 32768} == before.args[1]


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", None])
def test_every_way_of_asking_is_understood(task, name):
    settings = {"until": []} if name is None else {name: 500, "until": []}
    unlimited = Instance("generate_until", {}, ("x" * 10, settings), 0, (task, 0, 1))
    [limited] = limit_answers([unlimited], encode, CONTEXT, 256, warns=False)
    assert limited.args[1]["max_gen_toks"] == CONTEXT - 10
    assert name not in limited.args[1]


def test_one_process_of_several_says_once_what_was_asked_for_and_what_is_given(task, caplog):
    requests = [request(length, 32768, task) for length in (12, 75, 140)]
    limit_answers(requests, encode, CONTEXT, 256, warns=False)
    assert caplog.records == []
    for _ in range(3):
        limit_answers(requests, encode, CONTEXT, 256, warns=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"{task} asks for answers of up to 32768 tokens, but question and answer must fit into "
        f"the model's 160 tokens; answers have at most 80 to 140"
    ]


def test_what_fills_a_process_up_is_asked_once():
    once, twice = SimpleNamespace(repeats=1), SimpleNamespace(repeats=2)
    requests, places = drop_repeats([once, twice, twice, twice, twice])
    assert (requests, places) == ([once, twice, twice], [0, 1, 2, 2, 2])
