"""What happens at a layer of a routed model: ask for decisions once, pin them, run those rows.

Owns the `RoutingDriver`: from a policy's decisions to executions, with a cache and without, and
the record of the route taken. Leaves the choice to `policies`, the K/V bookkeeping to `cache`,
the mechanics of calling a layer to `injection`.

Axes: B rows, T tokens, D hidden, K keys, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.models.cache import RoutedCacheLayer, routed_entry
from drllm.models.injection import Forward, LayerCall
from drllm.models.policies import FixedPolicy, FullPolicy, Policy, PromptView
from drllm.paths import Decision

_policy: ContextVar[tuple[tuple[int, Policy], ...]] = ContextVar("drllm_policy", default=())
_lengths: ContextVar[tuple[tuple[int, Tensor], ...]] = ContextVar("drllm_lengths", default=())
_reading: ContextVar[tuple[tuple[int, Tensor], ...]] = ContextVar("drllm_reading", default=())
_session: ContextVar[tuple[tuple[int, Session], ...]] = ContextVar("drllm_session", default=())


PLANS = (FullPolicy, FixedPolicy)
"""Policies whose decisions don't depend on what they could read."""


@dataclass(slots=True)
class Session:
    """Decisions of one `generate` call that uses no cache to pin them in, by layer."""

    decisions: dict[int, tuple[int, ...]] = field(default_factory=dict)


class RoutingDriver:
    """Runs every row's own plan, layer by layer.

    A row's decisions are taken once, when its prompt passes, and hold for all that follows: they
    are pinned in the cache, or in the session of a `generate` call without one. Rows that skip a
    layer are not computed there.

    Args:
        policy: What decides unless `using` puts another policy in its place.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy: Policy = policy or FullPolicy()
        self.last_route: Tensor | None = None

    @contextmanager
    def using(self, policy: Policy) -> Iterator[None]:
        """Ask another policy inside the block."""
        with _holding(_policy, self, policy):
            yield

    @contextmanager
    def prompt_lengths(self, lengths: Tensor) -> Iterator[None]:
        """Let policies read only the first `lengths[b]` real tokens of row b inside the block."""
        with _holding(_lengths, self, lengths):
            yield

    @contextmanager
    def reading(self, readable: Tensor) -> Iterator[None]:
        """Say token by token what policies may read inside the block, `[B, T]` bool.

        For layouts that an attention mask and a length can't describe, such as several
        continuations packed behind one prompt.
        """
        with _holding(_reading, self, readable):
            yield

    @contextmanager
    def session(self) -> Iterator[None]:
        """Pin decisions for the length of the block where there is no cache to pin them in."""
        with _holding(_session, self, Session()):
            yield

    @property
    def current_policy(self) -> Policy:
        """The policy that is asked now."""
        return _held(_policy, self) or self.policy

    # --- the Driver interface ---

    def begin(self, forward: Forward) -> None:
        """Refuse outputs that can't be right when rows or passes are missing."""
        if forward.rejected and not isinstance(self.current_policy, FullPolicy):
            raise RoutingError(
                f"{', '.join(forward.rejected)} can't be given under routing: layers run zero, "
                f"one or two times on some of the rows; use policy=FullPolicy() to see the base "
                f"model's"
            )
        forward.notes["route"] = []

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run each row as often as its decision says, `[B, T, D]` to `[B, T, D]`."""
        entry = None if call.cache is None else routed_entry(call.cache, call.index)
        decisions = self._pinned(entry, call, hidden)
        if decisions is None:
            decisions = self._decide(call, hidden)
            self._pin(entry, call, decisions)
        if len(decisions) != hidden.shape[0]:
            raise RoutingError(
                f"decisions for {len(decisions)} rows are pinned, but the batch has "
                f"{hidden.shape[0]}; a continuation must keep the rows of its prompts"
            )
        return execute(call, hidden, decisions, entry)

    def end(self, forward: Forward) -> None:
        """Keep the route if this pass decided one."""
        route = forward.notes["route"]
        if route:
            self.last_route = torch.tensor(route).T.contiguous()  # [B, L]

    # --- taking and pinning decisions ---

    def _pinned(
        self, entry: RoutedCacheLayer | None, call: LayerCall, hidden: Tensor
    ) -> tuple[int, ...] | None:
        if entry is not None:
            return entry.decisions
        session = _held(_session, self)
        if session is None or call.index not in session.decisions:
            return None
        pinned = session.decisions[call.index]
        return pinned if len(pinned) == hidden.shape[0] else None

    def _pin(
        self, entry: RoutedCacheLayer | None, call: LayerCall, decisions: tuple[int, ...]
    ) -> None:
        session = _held(_session, self)
        if entry is not None:
            entry.pin(decisions)
        elif session is not None:
            session.decisions[call.index] = decisions

    def _decide(self, call: LayerCall, hidden: Tensor) -> tuple[int, ...]:
        notes = call.forward.notes
        if "readable" not in notes:
            notes["readable"] = self._readable(call.forward, hidden)
        prompts = PromptView(hidden=hidden, readable=notes["readable"])
        decided = self.current_policy.decide(call.index, prompts)
        decisions = [int(value) for value in decided.tolist()]
        if len(decisions) != hidden.shape[0] or not all(0 <= value <= 2 for value in decisions):
            raise RoutingError(
                f"the policy gave {decisions} at layer {call.index}; expected one of 0, 1, 2 for "
                f"each of {hidden.shape[0]} rows"
            )
        route: list[list[int]] = notes["route"]
        if call.is_last:
            # A row that skipped everything so far would answer from its embeddings (D-10).
            decisions = [
                value if value or any(layer[row] for layer in route) else int(Decision.EXECUTE)
                for row, value in enumerate(decisions)
            ]
        route.append(decisions)
        return tuple(decisions)

    def _readable(self, forward: Forward, hidden: Tensor) -> Tensor:
        """Return which of the T tokens of this pass the policy may read, `[B, T]`."""
        B, T = hidden.shape[:2]
        mask = forward.attention_mask
        given: Tensor | None = _held(_reading, self)
        if forward.opaque_mask and given is None and not isinstance(self.current_policy, PLANS):
            raise RoutingError(
                "the attention mask is of a kind that doesn't say which tokens are padding; give a "
                "mask of ones and zeros, or a fixed plan"
            )
        if given is not None:
            readable = given
        elif mask is None:
            readable = torch.ones(B, T, dtype=torch.bool, device=hidden.device)
        elif mask.dim() == 2:
            readable = mask[:, -T:].bool()
        else:  # [B, 1, T, K]: what the last query sees; a static cache has K > T, unfilled behind
            last = mask[:, 0, -1, :T]
            readable = last if last.dtype == torch.bool else last == 0
        readable = readable.to(hidden.device).expand(B, T)
        lengths: Tensor | None = _held(_lengths, self)
        if lengths is not None:
            lengths = torch.as_tensor(lengths).to(hidden.device)
            real = readable.sum(dim=1)
            if lengths.shape != (B,) or bool((lengths < 1).any()) or bool((lengths > real).any()):
                raise RoutingError(
                    f"prompt_lengths is {lengths.tolist()}; expected one length for each of {B} "
                    f"rows, from 1 to its number of real tokens ({real.tolist()})"
                )
            readable = readable & (readable.cumsum(dim=1) <= lengths[:, None])
        if not bool(readable.any(dim=1).all()):
            raise RoutingError("a row of the batch has no real token; every row needs a prompt")
        return readable


@contextmanager
def _holding(variable: ContextVar[Any], driver: RoutingDriver, value: Any) -> Iterator[None]:
    """Let a driver hold a value inside the block; other drivers and other threads don't see it."""
    token = variable.set(((id(driver), value), *variable.get()))
    try:
        yield
    finally:
        variable.reset(token)


def _held(variable: ContextVar[Any], driver: RoutingDriver) -> Any:
    """Return what a driver holds now, or None."""
    return next((value for owner, value in variable.get() if owner == id(driver)), None)


def execute(
    call: LayerCall, hidden: Tensor, decisions: tuple[int, ...], entry: RoutedCacheLayer | None
) -> Tensor:
    """Run one layer on each row as often as decided.

    Args:
        call: The visit at the layer.
        hidden: `[B, T, D]`.
        decisions: `[B]` of 0, 1, 2.
        entry: The layer's routed cache entry, its decisions pinned; None without a cache.

    Returns:
        `[B, T, D]`: a skipped row is what it was.
    """
    if entry is not None and entry.shadow is not None:
        entry.lengthen_shadow(hidden.shape[1], hidden)
    for count in range(max(decisions)):
        rows = tuple(row for row, value in enumerate(decisions) if value > count)
        if entry is not None:
            entry.begin_pass(count)
        try:
            if len(rows) == len(decisions):
                hidden = call.run(hidden)
            else:
                index = torch.tensor(rows, device=hidden.device)
                hidden = hidden.index_copy(0, index, call.run(hidden.index_select(0, index), rows))
        finally:
            if entry is not None:
                entry.end_pass()
    return hidden
