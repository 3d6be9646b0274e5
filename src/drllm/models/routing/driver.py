"""What happens at a layer of a routed model: ask for decisions once, pin them, run those rows.

`RoutingDriver` turns a policy's decisions into executions, with a cache and without, and records
the route taken; `PathPass` runs a static path, which decisions may not be able to express.

Axes: B rows, T tokens, D hidden, K keys, L layers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.errors import RoutingError
from drllm.models.base.devices import on_device
from drllm.models.routers.stack import Spans
from drllm.models.routing.adapters import rows_by_adapter
from drllm.models.routing.context import Override
from drllm.models.routing.injection import Driver, Forward, LayerCall
from drllm.models.routing.kv_cache import RoutedCacheLayer, routed_entry
from drllm.models.routing.policies import FullPolicy, PathPolicy, Policy, PromptView
from drllm.paths import MLP, StaticPath, Step, layer_of, step_of


class Taken(NamedTuple):
    """What was decided at a layer, row by row: decisions, and the adapters by name."""

    decisions: tuple[int, ...]
    adapters: tuple[str, ...] = ()  # an empty name for a row without; none where no row has one

    def of(self, rows: Sequence[int]) -> Taken:
        """Return what was decided for some of the rows."""
        names = tuple([self.adapters[row] for row in rows if self.adapters])
        return Taken(tuple([self.decisions[row] for row in rows]), names)


class GenerateCall(NamedTuple):
    """One call of `generate`."""

    copies: int  # neighbouring rows that belong to one prompt: its beams, or its answers
    taken: dict[int, Taken]  # pinned by layer, where there is no cache to pin it in


_policy: Override[Policy] = Override("policy")
_lengths: Override[Tensor] = Override("prompt lengths")
_readable: Override[Tensor] = Override("readable tokens")
_generate: Override[GenerateCall] = Override("generate call")


class RoutingDriver(Driver):
    """Runs every row's own plan, layer by layer.

    A row's decisions are taken once, when its prompt passes, and hold for all that follows: they
    are pinned in the cache, or in the `generate` call where there is no cache. Rows that skip a
    layer are not computed there.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy: Policy = policy or FullPolicy()
        self._newest: list[Taken] = []
        self._by_thread: dict[int, list[Taken]] = {}
        self._traced: list[Taken] = []

    @property
    def last(self) -> list[Taken]:
        """`[L]`, of this thread's last prompts; of any thread's where this one had none."""
        return self._traced or self._by_thread.get(threading.get_ident()) or self._newest

    def keep(self, route: list[Taken]) -> None:
        """Make a route the last one of this thread."""
        if torch.compiler.is_compiling():  # a graph can't tell threads apart
            self._traced = route
        else:
            self._traced, self._newest = [], route
            self._by_thread[threading.get_ident()] = route

    def using(self, policy: Policy) -> AbstractContextManager[None]:
        """Ask another policy inside the block."""
        return _policy.set(self, policy)

    def prompt_lengths(self, lengths: Tensor) -> AbstractContextManager[None]:
        """Let policies read only the first `lengths[b]` real tokens of row b inside the block."""
        return _lengths.set(self, lengths)

    def reading(self, readable: Tensor) -> AbstractContextManager[None]:
        """Say token by token what policies may read inside the block, `[B, T]` bool."""
        return _readable.set(self, readable)

    def generating(self, copies: int) -> AbstractContextManager[None]:
        """Take the block for one `generate` call: a prompt's copies are asked about once."""
        return _generate.set(self, GenerateCall(copies, {}))

    @property
    def current_policy(self) -> Policy:
        """The policy that is asked now."""
        return _policy.get(self) or self.policy

    @property
    def has_prompt_lengths(self) -> bool:
        """Whether somebody said where the prompts end."""
        return _lengths.get(self) is not None

    def begin(self, forward: Forward) -> RoutedPass:
        """Start a pass; refuse outputs that can't be right when rows or executions are missing."""
        if forward.rejected and not isinstance(self.current_policy, FullPolicy):
            raise RoutingError(
                f"{', '.join(forward.rejected)} can't be given under routing: layers run zero, "
                f"one or two times on some of the rows; use policy=FullPolicy() to see the base "
                f"model's"
            )
        return RoutedPass(self, forward)


class RoutedPass(Driver):
    """One forward pass under a policy."""

    def __init__(self, driver: RoutingDriver, forward: Forward) -> None:
        self.driver = driver
        # Not `forward` itself, which holds this pass: cycles wait for the garbage collector.
        self.attention_mask = forward.attention_mask
        self.policy = driver.current_policy
        self.generate = _generate.get(driver)
        self.copies = 1 if self.generate is None else self.generate.copies
        # What was decided in this pass, `[L]` at its end; empty where it was pinned.
        self.route: list[Taken] = []
        self._readable: Tensor | None = None
        self._has_prompts: Tensor | None = None  # whether every row has a real token, unread
        self._spans: dict[tuple[int, torch.device], Spans] = {}
        self._kept: dict[Any, Any] = {}
        self._plan: dict[int, Taken] = {}
        self._has_begun = False
        self._along: PathPass | None = None

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run each row as often as its decision says, `[B, T, D]` to `[B, T, D]`."""
        if not self._has_begun:
            self._has_begun, self._along = True, self._path_pass(call, hidden)
        if self._along is not None:
            return self._along.layer(call, hidden)
        entry = None if call.cache is None else routed_entry(call.cache, call.index)
        taken = self._pinned(entry, call.index)
        if taken is None:
            taken = self._decide(call, hidden)
            if entry is not None:
                entry.pin(taken.decisions, adapters=taken.adapters)
            elif self.generate is not None:
                self.generate.taken[call.index] = taken
        check_rows(taken.decisions, hidden)
        return self._execute(call, hidden, taken, entry)

    def compiles(self, cache: Cache | None) -> bool:
        """See `Driver.compiles`."""
        first = cache.layers[0] if cache is not None and cache.layers else None
        is_pinned = isinstance(first, RoutedCacheLayer) and first.decisions is not None
        return not self.policy.reads_prompt and (cache is None or is_pinned)

    def end(self) -> None:
        """Keep the route if this pass decided one."""
        if self.route:
            self.driver.keep(self.route)
        if self._along is not None:
            self._along.end()

    def _path_pass(self, call: LayerCall, hidden: Tensor) -> PathPass | None:
        """Return what runs a static path, where the cache has one pinned or the policy is one."""
        entry = None if call.cache is None else routed_entry(call.cache, call.index)
        if entry is not None and not torch.compiler.is_compiling():
            call.forward.indices = entry.indices  # the same rows run at the next token
        if entry is not None and entry.decisions is not None:
            if not (call.forward.rejected or torch.compiler.is_compiling()):
                call.forward.pinned = call.cache
            return None if entry.path is None else PathPass(entry.path)
        if not isinstance(self.policy, PathPolicy):
            return None
        layers = range(call.num_layers)
        counts = Counter(map(layer_of, self.policy.path.steps))
        self.driver.keep([Taken((counts[layer],) * hidden.shape[0]) for layer in layers])
        return PathPass(self.policy.path)

    def _pinned(self, entry: RoutedCacheLayer | None, layer: int) -> Taken | None:
        if layer < len(self.route):  # a checkpointed layer, recomputed in the backward pass
            return self.route[layer]
        if entry is not None:
            return None if entry.decisions is None else Taken(entry.decisions, entry.adapters)
        return None if self.generate is None else self.generate.taken.get(layer)

    def _decide(self, call: LayerCall, hidden: Tensor) -> Taken:
        """Ask the policy for a layer's decisions and adapters, one for each row.

        One that reads nothing decides for all layers at once: between two layers' matrix products
        the same lines take several times as long, since those have emptied the processor's caches.
        """
        if self._readable is None:
            if self.policy.reads_prompt:
                readable = _readable_tokens(self.driver, self.attention_mask, hidden)
                self._readable = readable[:: self.copies]
                self._has_prompts = readable.any(dim=1).all()
            else:
                self._readable = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)[:: self.copies]
                layers = range(call.index, call.num_layers)
                self._plan = {layer: self._ask(layer, hidden) for layer in layers}
        taken = self._plan[call.index] if self._plan else self._ask(call.index, hidden)
        if call.is_last:
            # A row that skipped everything so far would answer from its embeddings (D-10).
            decisions = tuple(
                [
                    value if value or any(layer.decisions[row] for layer in self.route) else 1
                    for row, value in enumerate(taken.decisions)
                ]
            )
            taken = Taken(decisions, taken.adapters)
        self.route.append(taken)
        return taken

    def _ask(self, layer: int, hidden: Tensor) -> Taken:
        B, copies = hidden.shape[0], self.copies
        if B % copies:
            raise RoutingError(
                f"the batch has {B} rows, which aren't {copies} for each prompt; give generate() "
                f"one row per prompt"
            )
        assert self._readable is not None
        prompts = PromptView(hidden[::copies], self._readable, self._spans, self._kept)
        decided = self.policy.decide(layer, prompts)
        decisions = tuple(self._read(decided))
        if len(decisions) * copies != B or not all(value in (0, 1, 2) for value in decisions):
            raise RoutingError(
                f"the policy gave {list(decisions)} at layer {layer}; expected one of 0, 1, 2 "
                f"for each of {B // copies} prompts"
            )
        names = list(self.policy.adapters(layer, prompts))
        if names and len(names) * copies != B:
            said = f"the policy gave the adapters {names} at layer {layer}"
            raise RoutingError(f"{said}; expected a name for each of {B // copies} prompts")
        return Taken(
            tuple([int(value) for value in decisions for _ in range(copies)]),
            tuple([name for name in names for _ in range(copies)]) if any(names) else (),
        )

    def _read(self, decided: Tensor | Sequence[int]) -> Sequence[int]:
        """Return decisions as numbers; with the first ones, check that every row has a prompt.

        Both are read from the device together where they can be, so that it is waited for once.
        """
        unread, self._has_prompts = self._has_prompts, None
        has_prompts: Any = unread is None
        if isinstance(decided, Tensor) and decided.dim() == 1 and unread is not None:
            *decided, has_prompts = torch.cat([decided, unread.to(decided)[None]]).tolist()
        elif unread is not None:
            has_prompts = bool(unread)
        if not has_prompts:
            raise RoutingError("a row of the batch has no real token; every row needs a prompt")
        return decided.tolist() if isinstance(decided, Tensor) else decided

    def _execute(
        self, call: LayerCall, hidden: Tensor, taken: Taken, entry: RoutedCacheLayer | None
    ) -> Tensor:
        """Run a layer on each row as often as decided; skipped rows pass on what they read."""
        decisions, names = taken
        if entry is not None and entry.shadow is not None:
            entry.lengthen_shadow(hidden.shape[1], hidden)
        for count in range(max(decisions)):
            if entry is None:
                rows = tuple([row for row, value in enumerate(decisions) if value > count])
            else:
                rows = entry.begin_pass(count)
            try:
                adapters = rows_by_adapter(names, rows) if names else ()
                if len(rows) == len(decisions):
                    hidden = call.run(hidden, adapters=adapters)
                else:
                    index = call.forward.index(rows, hidden.device)
                    run = call.run(hidden.index_select(0, index), rows, adapters=adapters)
                    hidden = hidden.to(run.device)  # of the layer, maybe not that of the one before
                    hidden = hidden.index_copy(0, call.forward.index(rows, run.device), run)
            finally:
                if entry is not None:
                    entry.end_pass()
        return hidden


def _readable_tokens(driver: RoutingDriver, mask: Any, hidden: Tensor) -> Tensor:
    """Return which of the T tokens of this pass the policy may read, `[B, T]`."""
    B, T = hidden.shape[:2]
    given = _readable.get(driver)
    if given is not None:
        readable = given
    elif mask is None:
        readable = torch.ones(B, T, dtype=torch.bool, device=hidden.device)
    elif not isinstance(mask, Tensor):
        raise RoutingError(
            "the attention mask is of a kind that doesn't say which tokens are padding; give a "
            "mask of ones and zeros, or a fixed plan"
        )
    elif mask.dim() == 2:
        readable = mask[:, -T:].bool()
    else:
        # A real token sees itself, whatever window the layer has, and nothing after it; the row of
        # a padded token sees nothing, or all keys where that keeps the softmax finite. A static
        # cache has K > T, its keys after T not yet filled.
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # [B, T, K]
        itself = seen[:, :, :T].diagonal(dim1=1, dim2=2)
        readable = itself & ~seen.triu(1).any(dim=2)
    readable = readable.to(hidden.device).expand(B, T)
    lengths = _lengths.get(driver)
    if lengths is not None:
        lengths = on_device(lengths, hidden.device)
        real = readable.sum(dim=1)
        if lengths.shape != (B,) or bool(((lengths < 1) | (lengths > real)).any()):
            raise RoutingError(
                f"prompt_lengths is {lengths.tolist()}; expected one length for each of {B} "
                f"rows, from 1 to its number of real tokens ({real.tolist()})"
            )
        readable = readable & (readable.cumsum(dim=1) <= lengths[:, None])
    return readable


class PathPass(Driver):
    """One forward pass along a static path, the same for all rows.

    A step is run as soon as the model's loop has called its layer, with the arguments of that
    call; so a block of several layers that is repeated runs where its last layer is called. Nothing
    depends on what a config says of layers: masks and positions are those that the base model makes
    for its own. With a cache, an execution has an entry of its own; one of an MLP alone has none.
    """

    def __init__(self, path: StaticPath) -> None:
        self.path = path
        self._left = [step_of(item) for item in reversed(path.steps)]
        self._calls: list[LayerCall] = []
        self._entries: list[RoutedCacheLayer | None] = []
        self._num_run: Counter[int] = Counter()  # executions that keep K/V, by layer

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the steps that can be run now, `[B, T, D]` to `[B, T, D]`."""
        if call.module.training and getattr(call.module, "gradient_checkpointing", False):
            raise RoutingError(
                "layers that run in part or in another order can't be recomputed one by one; "
                "switch gradient checkpointing off"
            )
        self._calls.append(call)
        self._entries.append(self._entry(call, hidden))
        while self._left and self._left[-1].layer <= call.index:
            hidden = self._run(self._left.pop(), hidden)
        return hidden

    def end(self) -> None:
        """Let the calls go, which hold the pass and the cache."""
        self._calls.clear()
        self._entries.clear()

    def _entry(self, call: LayerCall, hidden: Tensor) -> RoutedCacheLayer | None:
        if call.cache is None:
            return None
        entry = routed_entry(call.cache, call.index)
        if entry.decisions is None:
            kept = sum(layer_of(s) == call.index and keeps_kv(s) for s in self.path.steps)
            entry.pin((kept,) * hidden.shape[0], self.path)
        check_rows(entry.decisions or (), hidden)
        if entry.shadow is not None:
            entry.lengthen_shadow(hidden.shape[1], hidden)
        return entry

    def _run(self, step: Step, hidden: Tensor) -> Tensor:
        entry = self._entries[step.layer] if keeps_kv(step) else None
        if entry is not None:
            entry.begin_pass(self._num_run[step.layer])
            self._num_run[step.layer] += 1
        try:
            return self._calls[step.layer].run(hidden, step=step)
        finally:
            if entry is not None:
                entry.end_pass()


def keeps_kv(item: int | Step) -> bool:
    """Tell whether an execution keeps K/V: one of an MLP alone doesn't."""
    return step_of(item).run != MLP


def check_rows(decisions: Sequence[int], hidden: Tensor) -> None:
    """Refuse a batch that isn't the one that decisions were pinned for."""
    if len(decisions) != hidden.shape[0]:
        raise RoutingError(
            f"decisions for {len(decisions)} rows are pinned, but the batch has "
            f"{hidden.shape[0]}; a continuation must keep the rows of its prompts"
        )
