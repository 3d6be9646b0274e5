"""The cache entry that keeps room for tokens to come, against the one of transformers."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from drllm.models.routing.kv_cache import ROOM, GrowingLayer

H, K_SIZE, V_SIZE = 2, 3, 5
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 2 * ROOM)),
        st.tuples(
            st.sampled_from(("crop", "reorder", "repeat", "copy", "reset")), st.integers(1, 3)
        ),
    ),
    max_size=12,
)
MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}


def new_tokens(batch: int, num: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, H, num, K_SIZE, generator=draw)
    return keys, torch.randn(batch, H, num, V_SIZE, generator=draw)


def change(entry: DynamicLayer, kind: str, num: int, seed: int) -> None:
    """Do one step to an entry; the number says how much of it."""
    batch = 2 if entry.keys is None or not entry.get_seq_length() else len(entry.keys)
    if kind == "update":
        entry.update(*new_tokens(batch, num, seed))
    elif kind == "crop":
        entry.crop(-min(num, entry.get_seq_length()))
    elif kind == "reorder":
        entry.reorder_cache(torch.arange(batch).roll(num))
    elif kind == "repeat" and batch * num < 10:
        entry.batch_repeat_interleave(num)
    elif kind == "reset":
        entry.reset()


def error_of_change(entry: DynamicLayer, kind: str, num: int, seed: int) -> str:
    """Do one step to an entry and return the error that it raises, or "" if it raises none.

    A reset writes zeros over K and V. Outside of inference mode, torch refuses this for tensors
    that were made inside of it.
    """
    try:
        change(entry, kind, num, seed)
    except RuntimeError as error:
        if kind != "reset":
            raise
        return str(error)
    return ""


@example(steps=[("update", 1), ("reset", 1)], modes=["inference", "grad"])
@given(steps=STEPS, modes=st.lists(st.sampled_from(sorted(MODES)), min_size=12, max_size=12))
def test_an_entry_with_room_holds_what_one_without_does_whatever_is_done_to_it(
    steps: list[tuple[str, int]], modes: list[str]
) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    left = []  # what copies were made of, as it was
    for seed, ((kind, num), mode) in enumerate(zip(steps, modes, strict=False)):
        with MODES[mode]():
            if kind == "copy":
                left.append((ours, theirs))
                ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
            error = error_of_change(theirs, kind, num, seed)
            assert error_of_change(ours, kind, num, seed) == error
    for mine, other in [*left, (ours, theirs)]:
        assert mine.get_seq_length() == other.get_seq_length()
        if other.get_seq_length():
            assert torch.equal(mine.keys, other.keys)
            assert torch.equal(mine.values, other.values)


@torch.no_grad()
def test_what_a_step_was_given_stays_as_it_was_when_more_tokens_come() -> None:
    entry = GrowingLayer()
    keys, values = entry.update(*new_tokens(2, 4, seed=0))
    kept = keys.clone(), values.clone()
    for seed in range(1, 2 * ROOM):
        entry.update(*new_tokens(2, 1, seed))
    assert torch.equal(keys, kept[0])
    assert torch.equal(values, kept[1])


@torch.no_grad()
def test_a_step_copies_its_own_tokens_alone_until_the_room_is_used() -> None:
    entry = GrowingLayer()
    entry.update(*new_tokens(2, 4, seed=0))
    places = []
    for seed in range(ROOM + 2):
        entry.update(*new_tokens(2, 1, seed))
        places.append(entry.keys.data_ptr())
    assert len({*places[: ROOM + 1]}) == 1  # of the step that made it, and of those that fit in it
    assert places[ROOM + 1] != places[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_offloading_gives_up_the_room(mode: type[AbstractContextManager[None]]) -> None:
    with mode():
        entry = GrowingLayer()
        for seed in (0, 1):
            entry.update(*new_tokens(2, 4, seed))
        assert entry._room is not None
        entry.offload()
        assert entry._room is None
        assert entry.update(*new_tokens(2, 1, seed=2))[0].shape[-2] == 9


def test_keys_that_gradients_need_are_never_written_over() -> None:
    entry = GrowingLayer()
    with torch.no_grad():
        for seed in (4, 5):
            entry.update(*new_tokens(2, 4, seed))
    keys, values = (new.requires_grad_() for new in new_tokens(2, 1, seed=1))
    first = entry.update(keys, values)[0]
    loss = (first**2).sum()
    entry.update(*new_tokens(2, 1, seed=2))
    loss.backward()
    assert torch.equal(keys.grad, 2 * keys.detach())


@torch.no_grad()
def test_tokens_of_another_dtype_are_joined_as_without_room() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)):
        new = [part.to(dtype) for part in new_tokens(2, 3, seed)]
        mine, other = ours.update(*new)[0], theirs.update(*new)[0]
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


def test_copies_that_share_nothing_keep_the_tokens_of_each() -> None:
    entry = GrowingLayer()
    with torch.no_grad():
        entry.update(*new_tokens(2, 4, seed=0))
        entry.update(*new_tokens(2, 1, seed=1))  # it has room from here on
        copies = [entry, copy.copy(entry), copy.copy(entry)]
        for number, each in enumerate(copies):
            each.update(*new_tokens(2, 1, seed=10 + number))
    for number, each in enumerate(copies):
        keys, values = new_tokens(2, 1, seed=10 + number)
        assert each.get_seq_length() == 6
        assert torch.equal(each.keys[..., -1:, :], keys)
        assert torch.equal(each.values[..., -1:, :], values)
