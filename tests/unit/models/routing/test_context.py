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


def test_the_innermost_block_of_an_owner_counts_and_the_outer_one_comes_back():
    kind, owner = Override("kind"), Owner()
    with kind.set(owner, 1):
        with kind.set(owner, 2):
            assert kind.get(owner) == 2
        assert (kind.get(owner), kind.get(Owner())) == (1, None)
    assert kind.get(owner) is None


def test_what_is_held_in_one_thread_is_not_seen_in_another_but_known_to_be_in_use():
    kind, owner = Override("kind"), Owner()
    assert not kind.in_use
    with kind.set(owner, 1):
        assert in_a_thread(lambda: (kind.get(owner), kind.in_use)) == (None, True)
    assert not kind.in_use


def test_an_error_inside_the_block_ends_it():
    kind, owner = Override("kind"), Owner()
    with pytest.raises(ValueError, match="inside"), kind.set(owner, 1):
        raise ValueError("inside")
    assert (kind.get(owner), kind.in_use) == (None, False)


def test_blocks_of_generators_may_end_in_another_order_than_they_began():
    kind = Override("kind")
    owner = Owner()

    def read_inside(value):
        with kind.set(owner, value):
            while True:
                yield kind.get(owner)

    first = read_inside(1)
    second = read_inside(2)
    assert [next(first), next(second)] == [1, 2]
    first.close()
    assert next(second) == 2
    second.close()
    with kind.set(Owner(), 3):
        assert kind.get(owner) is None


def test_a_value_is_current_from_begin_to_end_and_replaces_one_left_behind():
    current = ThreadValue()
    assert current.get() is None
    current.begin("interrupted")
    current.begin("next")
    assert current.get() == "next"
    current.end()
    assert current.get() is None


def other_one(_current):
    return ThreadValue()


@pytest.mark.parametrize(
    "make", [other_one, copy.deepcopy, lambda current: pickle.loads(pickle.dumps(current))]
)
def test_another_object_even_a_copy_has_a_current_value_of_its_own(make):
    first = ThreadValue()
    second = make(first)
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
