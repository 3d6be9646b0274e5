"""The store of states: what it counts, what it gives up, and what it may not."""

import torch

from drllm.models.scoring.prefix_cache import PrefixCache, PrefixState


def state(num_tokens=10):
    return PrefixState(torch.zeros(num_tokens, 4))  # 16 bytes a token


def key(number):
    return (0, number, (0,))


def kept(cache, num):
    """Put states that nobody needs any more."""
    for number in range(num):
        cache.put({key(number): state()})
        cache.release([key(number)])


def held(cache, num):
    return [number for number in range(num) if cache.get(key(number)) is not None]


def test_bytes_of_hidden_states_keys_and_values_count():
    full = PrefixState(torch.zeros(3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, 7))
    assert full.num_bytes == 4 * (12 + 30 + 42)
    cache = PrefixCache(1e6)
    cache.put({key(0): full})
    assert cache.num_bytes == full.num_bytes


def test_the_least_recently_used_is_given_up_first():
    cache = PrefixCache(3 * 160)
    kept(cache, 3)
    assert cache.get(key(0)) is not None
    cache.put({key(3): state()})
    assert held(cache, 4) == [0, 2, 3]
    assert cache.num_bytes == 3 * 160


def test_what_a_pass_needs_stays_until_it_is_released():
    cache = PrefixCache(2 * 160)
    for number in range(4):
        cache.put({key(number): state()})
    assert held(cache, 4) == [0, 1, 2, 3]
    assert (cache.num_bytes, cache.peak_bytes) == (4 * 160, 4 * 160)
    cache.release(key(number) for number in range(4))
    assert held(cache, 4) == [2, 3]
    assert cache.num_bytes == 2 * 160


def test_a_state_that_two_passes_need_stays_for_the_second():
    cache = PrefixCache(160)
    cache.put({key(0): state()})
    cache.protect(key(0))
    cache.put({key(1): state()})
    cache.release([key(0)])
    assert held(cache, 2) == [0, 1]
    cache.release([key(0), key(1)])
    assert held(cache, 2) == [1]


def test_states_of_one_tensor_are_given_up_together_once_none_is_needed():
    cache = PrefixCache(160)
    cache.put({key(0): state(), key(1): state()})
    cache.release([key(0)])
    assert held(cache, 2) == [0, 1]
    assert cache.num_bytes == 2 * 160
    cache.release([key(1)])
    assert held(cache, 2) == []
    assert cache.num_bytes == 0


def test_asking_for_one_state_of_a_tensor_makes_all_of_them_recent():
    cache = PrefixCache(3 * 160)
    cache.put({key(0): state(), key(1): state()})
    cache.release([key(0), key(1)])
    cache.put({key(2): state()})
    cache.release([key(2)])
    assert cache.get(key(0)) is not None
    cache.put({key(3): state()})
    assert held(cache, 4) == [0, 1, 3]


def test_what_is_held_beside_the_states_takes_their_room():
    cache = PrefixCache(4 * 160)
    kept(cache, 4)
    cache.count_other(2 * 160)
    assert held(cache, 4) == [2, 3]
    cache.forget()
    assert cache.num_bytes == 2 * 160
    cache.count_other(-2 * 160)
    assert cache.num_bytes == 0


def test_a_state_put_again_stays_when_its_older_batch_is_evicted():
    cache = PrefixCache(2 * 160)
    cache.put({key(0): state(), key(1): state()})
    newer = state()
    cache.put({key(0): newer})
    cache.release([key(0), key(0), key(1)])
    assert cache.get(key(0)) is newer
    assert held(cache, 2) == [0]
    assert cache.num_bytes == 160


def test_a_state_put_again_may_be_evicted_before_its_older_batch():
    cache = PrefixCache(3 * 160)
    cache.put({key(0): state(), key(1): state()})
    cache.put({key(0): state()})
    cache.release([key(0), key(0), key(1)])
    assert cache.get(key(1)) is not None  # now the older batch is the more recently used one
    cache.put({key(2): state()})
    assert held(cache, 3) == [1, 2]
    assert cache.num_bytes == 3 * 160
    cache.put({key(3): state()})
    assert held(cache, 4) == [2, 3]
    assert cache.num_bytes == 2 * 160
