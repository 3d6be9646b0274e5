"""What happens at a layer of a routed model: ask for decisions once, pin them, run those rows.

Owns the `RoutingDriver`: from a policy's decisions to executions, with a cache and without, and
the record of the route taken. Leaves the choice to `policies`, the K/V bookkeeping to `cache`,
the mechanics of calling a layer to `injection`.

Axes: B rows, T tokens, D hidden, K keys, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.models.routing.bypass import Bypass, identity
from drllm.models.routing.context import Held
from drllm.models.routing.injection import Forward
from drllm.models.routing.kv_cache import RoutedCacheLayer, routed_entry
from drllm.models.routing.layer_call import LayerCall
from drllm.models.routing.policies import FullPolicy, Policy, PromptView


@dataclass(slots=True)
class Session:
    """One `generate` call.

    Attributes:
        copies: How many neighbouring rows belong to one prompt: its beams, or its answers.
        decisions: Pinned by layer, where there is no cache to pin them in.
    """

    copies: int = 1
    decisions: dict[int, tuple[int, ...]] = field(default_factory=dict)


_policy: Held[Policy] = Held("policy")
_lengths: Held[Tensor] = Held("prompt lengths")
_reading: Held[Tensor] = Held("readable tokens")
_session: Held[Session] = Held("generate call")


class RoutingDriver:
    """Runs every row's own plan, layer by layer.

    A row's decisions are taken once, when its prompt passes, and hold for all that follows: they
    are pinned in the cache, or in the session of a `generate` call without one. Rows that skip a
    layer are not computed there.

    Args:
        policy: What decides unless `using` puts another policy in its place.
        bypass: What a skipped layer leaves behind.
    """

    def __init__(self, policy: Policy | None = None, bypass: Bypass = identity) -> None:
        self.policy: Policy = policy or FullPolicy()
        self.bypass = bypass
        self.last_route: list[tuple[int, ...]] = []  # [L][B]

    @contextmanager
    def using(self, policy: Policy) -> Iterator[None]:
        """Ask another policy inside the block."""
        with _policy.holding(self, policy):
            yield

    @contextmanager
    def prompt_lengths(self, lengths: Tensor) -> Iterator[None]:
        """Let policies read only the first `lengths[b]` real tokens of row b inside the block."""
        with _lengths.holding(self, lengths):
            yield

    @contextmanager
    def reading(self, readable: Tensor) -> Iterator[None]:
        """Say token by token what policies may read inside the block, `[B, T]` bool.

        For layouts that an attention mask and a length can't describe, such as several
        continuations packed behind one prompt.
        """
        with _reading.holding(self, readable):
            yield

    @contextmanager
    def session(self, copies: int = 1) -> Iterator[None]:
        """Take the block for one `generate` call, whose decisions are taken once.

        Args:
            copies: Neighbouring rows that belong to one prompt; the policy is asked once for all.
        """
        with _session.holding(self, Session(copies)):
            yield

    @property
    def current_policy(self) -> Policy:
        """The policy that is asked now."""
        return _policy.get(self) or self.policy

    @property
    def has_prompt_lengths(self) -> bool:
        """Whether somebody said where the prompts end."""
        return _lengths.get(self) is not None

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
        decisions = self._pinned(entry, call)
        if decisions is None:
            decisions = self._decide(call, hidden)
            self._pin(entry, call, decisions)
        if len(decisions) != hidden.shape[0]:
            raise RoutingError(
                f"decisions for {len(decisions)} rows are pinned, but the batch has "
                f"{hidden.shape[0]}; a continuation must keep the rows of its prompts"
            )
        return execute(call, hidden, decisions, entry, self.bypass)

    def end(self, forward: Forward) -> None:
        """Keep the route if this pass decided one."""
        if forward.notes["route"]:
            self.last_route = forward.notes["route"]

    # --- taking and pinning decisions ---

    def _pinned(self, entry: RoutedCacheLayer | None, call: LayerCall) -> tuple[int, ...] | None:
        route: list[tuple[int, ...]] = call.forward.notes["route"]
        if call.index < len(route):  # a checkpointed layer, recomputed in the backward pass
            return route[call.index]
        if entry is not None:
            return entry.decisions
        session = _session.get(self)
        return None if session is None else session.decisions.get(call.index)

    def _pin(
        self, entry: RoutedCacheLayer | None, call: LayerCall, decisions: tuple[int, ...]
    ) -> None:
        session = _session.get(self)
        if entry is not None:
            entry.pin(decisions)
        elif session is not None:
            session.decisions[call.index] = decisions

    def _decide(self, call: LayerCall, hidden: Tensor) -> tuple[int, ...]:
        notes = call.forward.notes
        if "policy" not in notes:
            self._ask_first(call, hidden)
        decisions: tuple[int, ...] = (
            notes["plan"][call.index]
            if "plan" in notes
            else self._asked(call.index, call.forward, hidden)
        )
        route: list[tuple[int, ...]] = notes["route"]
        if call.is_last:
            # A row that skipped everything so far would answer from its embeddings (D-10).
            decisions = tuple(
                [
                    value if value or any(layer[row] for layer in route) else 1
                    for row, value in enumerate(decisions)
                ]
            )
        route.append(decisions)
        return decisions

    def _ask_first(self, call: LayerCall, hidden: Tensor) -> None:
        """Settle who decides in this pass; one who reads nothing decides for all layers at once.

        Between two layers' matrix products the same lines take several times as long, since those
        have thrown all code out of the processor's caches.
        """
        forward = call.forward
        session = _session.get(self)
        forward.notes["copies"] = 1 if session is None else session.copies
        forward.notes["policy"] = self.current_policy
        forward.notes["readable"] = self._readable(forward, hidden)[:: forward.notes["copies"]]
        forward.notes["spans"] = {}
        if not reads_prompt(forward.notes["policy"]):
            layers = range(call.index, call.num_layers)
            forward.notes["plan"] = {i: self._asked(i, forward, hidden) for i in layers}

    def _asked(self, layer: int, forward: Forward, hidden: Tensor) -> tuple[int, ...]:
        """Ask the policy for a layer's decisions, one for each row."""
        notes, B = forward.notes, hidden.shape[0]
        copies = notes["copies"]
        if B % copies:
            raise RoutingError(
                f"the batch has {B} rows, which aren't {copies} for each prompt; give generate() "
                f"one row per prompt"
            )
        prompts = PromptView(hidden[::copies], notes["readable"], notes["spans"])
        decided = notes["policy"].decide(layer, prompts)
        decisions = tuple(decided.tolist() if isinstance(decided, Tensor) else decided)
        if len(decisions) * copies != B or not all(value in (0, 1, 2) for value in decisions):
            raise RoutingError(
                f"the policy gave {list(decisions)} at layer {layer}; expected one of 0, 1, 2 "
                f"for each of {B // copies} prompts"
            )
        return tuple([int(value) for value in decisions for _ in range(copies)])

    def _readable(self, forward: Forward, hidden: Tensor) -> Tensor:
        """Return which of the T tokens of this pass the policy may read, `[B, T]`."""
        B, T = hidden.shape[:2]
        if not reads_prompt(forward.notes["policy"]):
            return torch.ones(B, T, dtype=torch.bool, device=hidden.device)
        mask = forward.attention_mask
        given = _reading.get(self)
        if forward.opaque_mask and given is None:
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
        else:
            readable = _real_tokens(mask, T)
        readable = readable.to(hidden.device).expand(B, T)
        lengths = _lengths.get(self)
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


def reads_prompt(policy: Policy) -> bool:
    """Tell whether a policy's decisions depend on the prompt; unless it says no, they do."""
    return bool(getattr(policy, "reads_prompt", True))


def _real_tokens(mask: Tensor, num_tokens: int) -> Tensor:
    """Return which tokens of a prompt are real, from its `[B, 1, T, K]` mask, `[B, T]`.

    A real token sees itself, whatever window the layer has, and nothing that lies behind it; the
    row of a padded token sees nothing, or all keys where that keeps the softmax finite. A static
    cache has K > T, its keys behind T not yet filled.
    """
    seen = mask[:, 0]  # [B, T, K]
    if seen.dtype != torch.bool:
        seen = seen == 0
    itself = seen[:, :, :num_tokens].diagonal(dim1=1, dim2=2)
    return itself & ~seen.triu(1).any(dim=2)


def execute(
    call: LayerCall,
    hidden: Tensor,
    decisions: tuple[int, ...],
    entry: RoutedCacheLayer | None,
    bypass: Bypass = identity,
) -> Tensor:
    """Run one layer on each row as often as decided.

    Args:
        call: The visit at the layer.
        hidden: `[B, T, D]`.
        decisions: `[B]` of 0, 1, 2.
        entry: The layer's routed cache entry, its decisions pinned; None without a cache.
        bypass: What a skipped row is given instead.

    Returns:
        `[B, T, D]`: a skipped row is what `bypass` leaves of it.
    """
    if entry is not None and entry.shadow is not None:
        entry.lengthen_shadow(hidden.shape[1], hidden)
    if bypass is not identity and 0 in decisions:
        skipped = tuple([row for row, value in enumerate(decisions) if value == 0])
        index = call.forward.index(skipped, hidden.device)
        left = bypass(call, hidden.index_select(0, index))
        hidden = hidden.index_copy(0, index, left.to(hidden.dtype))
    for count in range(max(decisions)):
        if entry is None:
            rows = tuple([row for row, value in enumerate(decisions) if value > count])
        else:
            rows = entry.begin_pass(count)
        try:
            if len(rows) == len(decisions):
                hidden = call.run(hidden)
            else:
                index = call.forward.index(rows, hidden.device)
                hidden = hidden.index_copy(0, index, call.run(hidden.index_select(0, index), rows))
        finally:
            if entry is not None:
                entry.end_pass()
    return hidden
