"""Answers for which a model has no room behind their prompts get shorter ones, and it is said."""

from __future__ import annotations

import itertools

import pytest
from lm_eval.api.instance import Instance

from drllm.evaluation.lm_eval import lengths
from drllm.evaluation.lm_eval.lengths import STEPS, fitted

CONTEXT = 160
NAMES = (f"task {number}" for number in itertools.count())


def encode(prompt):
    return list(prompt.encode())


def request(length, most, task, **others):
    settings = {"max_gen_toks": most, "until": ["."], **others}
    return Instance("generate_until", {}, ("x" * length, settings), 0, (task, length, 1))


def given(requests, warns=False):
    found = fitted(requests, encode, CONTEXT, 256, warns=warns)
    return [dict(each.args[1])["max_gen_toks"] for each in found]


@pytest.fixture
def task():
    """A name that nothing was said of yet."""
    lengths._warn.cache_clear()
    return next(NAMES)


def test_what_fits_or_asks_for_half_of_the_context_stays_as_it_is(task):
    fitting = [request(60, 100, task), request(150, 80, task), request(1, 159, task)]
    found = fitted(fitting, encode, CONTEXT, 256, warns=True)
    assert all(one is other for one, other in zip(fitting, found, strict=True))


def test_an_answer_gets_what_its_prompt_leaves_and_half_of_the_context_at_least(task):
    for length in range(1, CONTEXT + 40):
        [most] = given([request(length, 32768, task)])
        left = CONTEXT - length
        assert most >= CONTEXT // 2
        if left >= CONTEXT // 2:
            assert left - CONTEXT // STEPS < most <= left


def test_prompts_of_about_one_length_are_answered_side_by_side(task):
    found = given([request(length, 32768, task) for length in range(1, CONTEXT + 1)])
    assert len(set(found)) <= STEPS // 2 + 1


def test_requests_and_their_other_settings_are_left_alone(task):
    before = request(100, 32768, task, temperature=0.7, do_sample=True)
    [after] = fitted([before], encode, CONTEXT, 256, warns=False)
    assert before.args[1]["max_gen_toks"] == 32768
    assert after.args[0] == before.args[0]
    assert {**after.args[1], "max_gen_toks": 32768} == before.args[1]


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", None])
def test_every_way_of_asking_is_understood(task, name):
    settings = {"until": []} if name is None else {name: 500, "until": []}
    asked = Instance("generate_until", {}, ("x" * 10, settings), 0, (task, 0, 1))
    [found] = fitted([asked], encode, CONTEXT, 256, warns=False)
    assert found.args[1]["max_gen_toks"] == CONTEXT - 10
    assert name not in found.args[1]


def test_it_is_said_once_what_was_asked_for_and_what_is_given(task, caplog):
    requests = [request(length, 32768, task) for length in (12, 75, 140)]
    for _ in range(3):
        fitted(requests, encode, CONTEXT, 256, warns=True)
    assert [record.getMessage() for record in caplog.records] == [
        f"{task} asks for answers of up to 32768 tokens, and the model holds 160 with the "
        f"question; answers have at most 80 to 140"
    ]


def test_one_process_of_several_says_it(task, caplog):
    fitted([request(12, 32768, task)], encode, CONTEXT, 256, warns=False)
    assert caplog.records == []
