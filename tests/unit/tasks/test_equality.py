"""Comparing LaTeX answers: as math-verify does, in any thread, within a time limit."""

import signal
import threading
from decimal import Decimal

import math_verify
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drllm.tasks import equality
from drllm.tasks.equality import have_same_value, parse_plain_number

NUMBERS = st.one_of(
    st.integers(-(10**9) + 1, 10**9 - 1).map(str),
    st.decimals(-1000, 1000, places=2).map(str),
    st.decimals(-10, 10, places=4).map(str),
)


def by_math_verify(gold, given):
    return bool(
        math_verify.verify(
            math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(f"\\boxed{{{given}}}")
        )
    )


@given(NUMBERS, st.one_of(st.none(), NUMBERS))
@settings(max_examples=150, deadline=None)
@example("12", "12.0")
@example("0", "-0")
@example("-0.10", "-0.1")
@example("3", "3.0001")
@example("999999999.9999", "999999999.9998")
def test_plain_numbers_are_compared_as_math_verify_compares_them(gold, other):
    given_answer = gold if other is None else other
    assert parse_plain_number(gold) is not None
    assert have_same_value(gold, given_answer) == by_math_verify(gold, given_answer)


@pytest.mark.parametrize(
    ("gold", "given_answer", "expected"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("0.5", "\\dfrac{1}{2}", True),
        ("12", "x=12", True),
        ("12", "12\\text{ apples}", True),
        ("1000", "1,000", True),
        ("x^2-1", "(x-1)(x+1)", True),
        ("12", "\\text{twelve}", False),
        ("12", "", False),
        ("12", "}{", False),
    ],
)
def test_other_answers_are_compared_by_value(gold, given_answer, expected):
    assert have_same_value(gold, given_answer) is expected


def test_only_plainly_written_numbers_take_the_fast_way():
    assert parse_plain_number(" -12.5 ") == Decimal("-12.5")
    for text in ("007", "1e3", "1,000", "+1", "12.", ".5", "12345678901", "0.33333", "", "٣"):
        assert parse_plain_number(text) is None


def test_another_thread_may_ask():
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(have_same_value("7", "\\frac{14}{2}")))
    thread.start()
    thread.join()
    assert answers == [True]


def test_an_alarm_of_the_caller_goes_on_running():
    def handler(*_: object): ...

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        assert have_same_value("9", "\\sqrt{81}")
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_is_compared(monkeypatch, caplog):
    assert have_same_value("4", "2+2")  # the process runs, so that the limit is for comparing alone
    monkeypatch.setattr(equality, "LIMIT_S", 0.5)
    assert have_same_value("12", "9^{9^{9^{9}}}") is False
    assert "counted as wrong" in caplog.text
    monkeypatch.undo()
    assert have_same_value("6", "3+3")


def test_a_worker_that_was_killed_between_two_comparisons_is_started_again():
    assert have_same_value("4", "1+3")
    process = equality._comparer._process
    assert process is not None
    process.kill()
    process.wait()
    assert have_same_value("8", "3+5")


def test_a_worker_that_dies_again_and_again_gives_no_answer_and_no_error(monkeypatch, caplog):
    def fail(*_: object) -> str:
        raise BrokenPipeError

    monkeypatch.setattr(equality._Comparer, "_exchange", fail)
    assert have_same_value("8", "2+6") is False
    assert "gave no answer: counted as wrong" in caplog.text
