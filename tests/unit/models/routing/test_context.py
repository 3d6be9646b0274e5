from __future__ import annotations

import copy
import pickle
import threading

import pytest

from drllm.models.routing.context import Override, ThreadValue


class Owner:
    """Anything that may hold a value."""


def in_a_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_the_innermost_block_counts_and_the_outer_one_comes_back():
    kind, owner = Override("kind"), Owner()
    with kind.set(owner, 1):
        with kind.set(owner, 2):
            assert kind.get(owner) == 2
        assert kind.get(owner) == 1
    assert kind.get(owner) is None


def test_what_one_owner_holds_is_nothing_to_another():
    kind, owner = Override("kind"), Owner()
    with kind.set(owner, 1):
        assert kind.get(Owner()) is None


def test_what_is_held_in_one_thread_is_not_seen_in_another():
    kind, owner = Override("kind"), Owner()
    with kind.set(owner, 1):
        assert in_a_thread(lambda: kind.get(owner)) is None


def test_it_is_in_use_while_any_thread_holds_something():
    kind, owner = Override("kind"), Owner()
    assert not kind.in_use
    with kind.set(owner, 1):
        assert in_a_thread(lambda: kind.in_use)
    assert not kind.in_use


def test_an_error_inside_the_block_ends_it():
    kind, owner = Override("kind"), Owner()
    with pytest.raises(ValueError, match="inside"), kind.set(owner, 1):
        raise ValueError("inside")
    assert kind.get(owner) is None
    assert not kind.in_use


def test_a_value_is_current_from_begin_to_end():
    current = ThreadValue()
    assert current.get() is None
    current.begin("pass")
    assert current.get() == "pass"
    current.end()
    assert current.get() is None


def test_a_value_left_behind_is_replaced_by_the_next():
    current = ThreadValue()
    current.begin("interrupted")
    current.begin("next")
    current.end()
    assert current.get() is None


def test_two_objects_have_their_own_current_values():
    first, second = ThreadValue(), ThreadValue()
    first.begin("first")
    assert second.get() is None
    second.begin("second")
    first.end()
    assert second.get() == "second"
    second.end()


def test_each_thread_has_its_own_current_value():
    current = ThreadValue()
    current.begin("main")

    def other():
        seen = current.get()
        current.begin("other")
        return seen, current.get()

    assert in_a_thread(other) == (None, "other")
    assert current.get() == "main"
    current.end()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_has_a_current_value_of_its_own(copied):
    current = ThreadValue()
    twin = copied(current)
    current.begin("pass")
    assert twin.get() is None
    current.end()
