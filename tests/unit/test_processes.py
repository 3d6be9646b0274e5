"""A process that is alone divides nothing and waits for nobody."""

import pytest

from drllm.errors import TaskError
from drllm.processes import count, from_first, is_first, share


def test_a_process_that_no_launcher_started_is_alone_and_the_first():
    assert (count(), is_first()) == (1, True)


def test_jobs_of_a_process_that_is_alone_are_done_in_order():
    done: list[int] = []

    def job(place: int) -> int:
        done.append(place)
        return 10 * place

    assert share([lambda place=place: job(place) for place in range(3)]) == [0, 10, 20]
    assert done == [0, 1, 2]


def test_an_error_of_what_the_first_process_makes_is_raised():
    def fails() -> None:
        raise TaskError("no questions")

    with pytest.raises(TaskError, match="no questions"):
        from_first(fails)
