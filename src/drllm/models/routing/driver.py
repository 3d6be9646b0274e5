"""The drivers of a routed model, which run the layers of each forward pass.

A model has one `RoutingDriver`, which starts a `RoutedPass` for each forward pass. The pass asks
the policy for decisions once, pins them, runs each layer on the rows that execute it, and records
the route. `PathPass` runs a static path, whose layers may be in any order.

Axes: B rows, T tokens, D hidden, K keys, L layers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.errors import RoutingError
from drllm.model.devices import on_device
from drllm.models.routers.stack import Spans
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.context import Override
from drllm.models.routing.injection import Driver, Forward, LayerCall
from drllm.models.routing.kv_cache import RoutedCacheLayer, abort_pass, routed_entry
from drllm.models.routing.policies import FullPolicy, PathPolicy, Policy, PromptView
from drllm.paths import StaticPath

RowDecisions: TypeAlias = tuple[int, ...]
"""The decisions of all rows at one layer, `[B]`."""


class GenerateCall(NamedTuple):
    """One call of `generate`."""

    copies: int  # number of neighbouring rows with the same prompt: its beams or its answers
    decisions: dict[int, RowDecisions]  # by layer; empty if a cache holds them


# What the blocks of a `RoutingDriver` set: `using`, `prompt_lengths`, `reading` and `generating`.
_policy: Override[Policy] = Override("policy")
_lengths: Override[Tensor] = Override("prompt lengths")
_readable: Override[Tensor] = Override("readable tokens")
_generate: Override[GenerateCall] = Override("generate call")


class RoutingDriver(Driver):
    """Runs every row's plan, layer by layer.

    The policy decides once, when a row's prompt passes through the model. The decisions are then
    pinned in the cache, or in the `generate` call if there is no cache, and all later tokens follow
    them. A layer isn't computed for the rows that skip it.

    Args:
        policy: The policy; None runs every layer once.
        bypass: What runs in place of a skipped layer; None leaves the state as it is.
    """

    def __init__(self, policy: Policy | None = None, bypass: Bypass | None = None) -> None:
        self.policy: Policy = policy or FullPolicy()
        self.bypass = bypass
        # The last routes `[L]`: of any thread, of each thread, and of a compiled graph.
        self._last_of_all: list[RowDecisions] = []
        self._last_by_thread: WeakKeyDictionary[threading.Thread, list[RowDecisions]]
        self._last_by_thread = WeakKeyDictionary()
        self._last_traced: list[RowDecisions] = []

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_last_by_thread"]  # threads can't be copied or pickled
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._last_by_thread = WeakKeyDictionary()

    @property
    def last_route(self) -> list[RowDecisions]:
        """The route of this thread's last prompts, `[L]`.

        If this thread ran no prompts, this is the last route of any thread.
        """
        if self._last_traced:
            return self._last_traced
        return self._last_by_thread.get(threading.current_thread()) or self._last_of_all

    def set_last_route(self, route: list[RowDecisions]) -> None:
        """Set the last route of this thread."""
        if torch.compiler.is_compiling():  # a graph can't tell threads apart
            self._last_traced = route
            return
        self._last_traced = []
        self._last_of_all = route
        self._last_by_thread[threading.current_thread()] = route

    def using(self, policy: Policy) -> AbstractContextManager[None]:
        """Let another policy decide inside the block."""
        return _policy.set(self, policy)

    def prompt_lengths(self, lengths: Tensor) -> AbstractContextManager[None]:
        """Let policies read only the first `lengths[b]` real tokens of row b inside the block."""
        return _lengths.set(self, lengths)

    def reading(self, readable: Tensor) -> AbstractContextManager[None]:
        """Let policies read only the tokens marked in `[B, T]` bool inside the block."""
        return _readable.set(self, readable)

    def generating(self, copies: int) -> AbstractContextManager[None]:
        """Treat the block as one `generate` call.

        The policy decides once for the neighbouring rows that are copies of one prompt.
        """
        return _generate.set(self, GenerateCall(copies, {}))

    @property
    def current_policy(self) -> Policy:
        """The policy that decides now."""
        return _policy.get(self) or self.policy

    @property
    def has_prompt_lengths(self) -> bool:
        """Whether the caller gave the lengths of the prompts."""
        return _lengths.get(self) is not None

    def begin(self, forward: Forward) -> RoutedPass:
        """Start a pass. Refuse outputs that would be wrong if some rows skip or repeat a layer."""
        if forward.requested_outputs and not isinstance(self.current_policy, FullPolicy):
            outputs = ", ".join(forward.requested_outputs)
            raise RoutingError(
                f"{outputs} can't be returned under routing: layers run zero, one or two times on "
                f"some of the rows; use policy=FullPolicy() to get the outputs of the base model"
            )
        return RoutedPass(self, forward)


class RoutedPass(Driver):
    """One forward pass under a policy."""

    def __init__(self, driver: RoutingDriver, forward: Forward) -> None:
        self.driver = driver
        # `forward` isn't kept: it holds this pass, and only the garbage collector frees a cycle.
        self.attention_mask = forward.attention_mask
        self.policy = driver.current_policy
        self.generate = _generate.get(driver)
        self.copies = 1 if self.generate is None else self.generate.copies
        # The decisions made in this pass, `[L]` at its end; empty if they were pinned earlier.
        self.route: list[RowDecisions] = []
        self._readable: Tensor | None = None  # [prompts, T]; see `PromptView`
        # Whether every row has a real token: a scalar on the device. None if there is nothing to
        # check: the policy doesn't read the prompt, or the scalar was checked already.
        self._has_prompts: Tensor | None = None
        self._spans: dict[tuple[int, torch.device], Spans] = {}
        # The decisions by layer of a policy that doesn't read the prompt, made all at once.
        self._by_layer: dict[int, RowDecisions] = {}
        self._has_begun = False
        self._cache: Cache | None = None
        self._reads_prompt = True  # whether nothing was pinned in the cache before
        # Which tokens are first ones, for the bypass, [B, T]; None if none is.
        self._is_first: Tensor | None = None
        self._static_pass: PathPass | None = None  # runs the layers instead if there is a path

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run each row as often as its decision says, `[B, T, D]` to `[B, T, D]`."""
        if not self._has_begun:
            self._has_begun = True
            if self.driver.bypass is not None:
                self._is_first = _find_first_tokens(self.attention_mask, call, hidden)
            self._begin(call, hidden)
        if self._static_pass is not None:
            return self._static_pass.layer(call, hidden)
        entry = None if call.cache is None else routed_entry(call.cache, call.index)
        decisions = self._find_decisions(entry, call.index)
        if decisions is None:
            decisions = self._decide(call, hidden)
            if entry is not None:
                entry.pin(decisions)
            elif self.generate is not None:
                self.generate.decisions[call.index] = decisions
        check_rows(decisions, hidden)
        return self._execute(call, hidden, decisions, entry)

    def compiles(self, cache: Cache | None) -> bool:
        """See `Driver.compiles`."""
        if self.policy.reads_prompt:
            return False
        return cache is None or _find_pinned_entry(cache) is not None

    def end(self) -> None:
        """Record the route if decisions were made in this pass."""
        if self.route:
            self.driver.set_last_route(self.route)
        if self._static_pass is not None:
            self._static_pass.end()

    def abort(self) -> None:
        """See `Driver.abort`. Some layers may have stored the tokens in the cache."""
        if self._cache is not None:
            abort_pass(self._cache, reads_prompt=self._reads_prompt)

    def _begin(self, call: LayerCall, hidden: Tensor) -> None:
        """Use what earlier passes left in the cache, and find the static path if there is one."""
        entry = None if call.cache is None else routed_entry(call.cache, call.index)
        if entry is not None:
            entry.check_complete()
            self._cache = call.cache
            self._reads_prompt = entry.decisions is None
        is_compiling = torch.compiler.is_compiling()
        if entry is not None and not is_compiling:
            call.forward.indices = entry.indices  # the same rows run at the next token
        if entry is None or entry.decisions is None:  # nothing is pinned yet
            self._static_pass = self._begin_path(call, hidden)
            return
        if not (call.forward.requested_outputs or is_compiling):
            call.forward.pinned_cache = call.cache
        if entry.path is not None:
            self._static_pass = self._make_path_pass(entry.path)

    def _begin_path(self, call: LayerCall, hidden: Tensor) -> PathPass | None:
        """Return a pass along the policy's static path, and record its route.

        Return None if the policy has no path.
        """
        if not isinstance(self.policy, PathPolicy):
            return None
        path = self.policy.path
        counts = Counter(path.layers)
        num_rows = hidden.shape[0]
        route = [(counts[layer],) * num_rows for layer in range(call.num_layers)]
        self.driver.set_last_route(route)
        return self._make_path_pass(path)

    def _make_path_pass(self, path: StaticPath) -> PathPass:
        return PathPass(path, bypass=self.driver.bypass, is_first=self._is_first)

    def _find_decisions(self, entry: RoutedCacheLayer | None, layer: int) -> RowDecisions | None:
        """Return the decisions that were made for a layer; None if the policy has to decide now."""
        if layer < len(self.route):  # a checkpointed layer, recomputed in the backward pass
            return self.route[layer]
        if entry is not None:
            return entry.decisions
        if self.generate is not None:
            return self.generate.decisions.get(layer)
        return None

    def _decide(self, call: LayerCall, hidden: Tensor) -> RowDecisions:
        """Let the policy decide for all rows at a layer, and add the decisions to the route."""
        if self._readable is None:
            self._prepare(call, hidden)
        decisions = self._by_layer.get(call.index)
        if decisions is None:
            decisions = self._ask_policy(call.index, hidden)
        if call.is_last:
            decisions = self._execute_at_least_once(decisions)
        self.route.append(decisions)
        return decisions

    def _prepare(self, call: LayerCall, hidden: Tensor) -> None:
        """Find the tokens that the policy may read.

        A policy that doesn't read the prompt decides for all layers now. Between two layers it
        would take several times as long, since matrix products evict its code from the caches of
        the processor.
        """
        if self.policy.reads_prompt:
            readable = _readable_tokens(self.driver, self.attention_mask, hidden)
            self._readable = readable[:: self.copies]
            self._has_prompts = readable.any(dim=1).all()
            return
        all_tokens = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        self._readable = all_tokens[:: self.copies]
        for layer in range(call.index, call.num_layers):
            self._by_layer[layer] = self._ask_policy(layer, hidden)

    def _execute_at_least_once(self, decisions: RowDecisions) -> RowDecisions:
        """Let a row that skipped all layers before the last one execute the last one.

        Otherwise the row would answer from its embeddings (D-10).
        """
        checked = list(decisions)
        for row, value in enumerate(decisions):
            if not value and not any(layer[row] for layer in self.route):
                checked[row] = 1
        return tuple(checked)

    def _ask_policy(self, layer: int, hidden: Tensor) -> RowDecisions:
        """Return the policy's decisions at a layer for all rows, and check them.

        The policy decides for one row per prompt, and the copies of the row get the same decisions.
        """
        B = hidden.shape[0]
        copies = self.copies
        if B % copies:
            raise RoutingError(
                f"the batch has {B} rows, which can't be {copies} for each prompt; give generate() "
                f"one row per prompt"
            )
        assert self._readable is not None
        prompts = PromptView(hidden[::copies], self._readable, self._spans)
        decisions = self._to_numbers(self.policy.decide(layer, prompts))
        if len(decisions) * copies != B or not all(value in (0, 1, 2) for value in decisions):
            raise RoutingError(
                f"the policy gave {list(decisions)} at layer {layer}; expected one of 0, 1, 2 "
                f"for each of {B // copies} prompts"
            )
        row_decisions: list[int] = []
        for value in decisions:
            row_decisions += [int(value)] * copies
        return tuple(row_decisions)

    def _to_numbers(self, decisions: Tensor | Sequence[int]) -> Sequence[int]:
        """Return a layer's decisions as numbers. At the first layer, refuse rows without a prompt.

        If the decisions are on a device, they are copied to the host together with the result of
        this check, so that the host waits only once.
        """
        has_prompts = self._has_prompts
        self._has_prompts = None
        if has_prompts is None:
            return decisions.tolist() if isinstance(decisions, Tensor) else decisions
        if isinstance(decisions, Tensor) and decisions.dim() == 1:
            values = torch.cat([decisions, has_prompts.to(decisions)[None]]).tolist()
            numbers = values[:-1]
            is_complete = bool(values[-1])
        else:
            numbers = decisions.tolist() if isinstance(decisions, Tensor) else list(decisions)
            is_complete = bool(has_prompts)
        if not is_complete:
            raise RoutingError("a row of the batch has no real token; every row needs a prompt")
        return numbers

    def _execute(
        self,
        call: LayerCall,
        hidden: Tensor,
        decisions: RowDecisions,
        entry: RoutedCacheLayer | None,
    ) -> Tensor:
        """Run a layer on each row as often as its decision says.

        A row that skips it keeps its state, or gets what the bypass gives.
        """
        if entry is not None and entry.shadow is not None:
            entry.lengthen_shadow(hidden.shape[1], hidden)
        for count in range(max(decisions)):
            if entry is None:
                rows = tuple([row for row, value in enumerate(decisions) if value > count])
            else:
                rows = entry.begin_pass(count)
            try:
                hidden = _run_rows(call, hidden, rows)
            finally:
                if entry is not None:
                    entry.end_pass()
        if self.driver.bypass is not None and not all(decisions):
            rows = tuple([row for row, value in enumerate(decisions) if not value])
            hidden = _bypass_rows(self.driver.bypass, call, hidden, self._is_first, rows)
        return hidden


def _bypass_rows(
    bypass: Bypass,
    call: LayerCall,
    hidden: Tensor,
    is_first: Tensor | None,
    rows: tuple[int, ...],
) -> Tensor:
    """Let the bypass of a layer stand in for it on some rows of `[B, T, D]`."""
    if len(rows) == hidden.shape[0]:
        return bypass.skip(call.index, hidden, is_first)
    index = call.forward.index(rows, hidden.device)
    if is_first is not None:
        is_first = is_first.to(hidden.device).index_select(0, index)
    output = bypass.skip(call.index, hidden.index_select(0, index), is_first)
    return hidden.index_copy(0, index, output)


def _find_first_tokens(mask: Any, call: LayerCall, hidden: Tensor) -> Tensor | None:
    """Return which tokens of a pass are the first real ones of their rows, bool `[B, T]`.

    Return None if no token can be.

    Args:
        mask: The caller's attention mask, as in `Forward.attention_mask`.
        call: The call of the first layer, before the layer runs.
        hidden: The embeddings, `[B, T, D]`.
    """
    B, T = hidden.shape[:2]
    if mask is None:
        if call.cache is not None and routed_entry(call.cache, call.index).get_seq_length() > 0:
            return None
        is_first = torch.zeros(B, T, dtype=torch.bool, device=hidden.device)
        is_first[:, 0] = True
        return is_first
    if not isinstance(mask, Tensor):
        raise RoutingError(
            "an attention mask of this kind doesn't say which tokens are padding, which a bypass "
            "has to know; give a mask of ones and zeros"
        )
    if mask.dim() == 2:
        is_real = mask.bool()
        is_first = is_real & (is_real.cumsum(dim=1) == 1)
        return is_first[:, -T:].expand(B, T)
    # A first real token sees itself and nothing else. Padding may look the same, which does no
    # harm.
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # [B, T, K]
    return (sees.sum(dim=2) == 1).expand(B, T)


def _find_pinned_entry(cache: Cache) -> RoutedCacheLayer | None:
    """Return the entry of the first layer if decisions are pinned in it, else None."""
    first = cache.layers[0] if cache.layers else None
    if isinstance(first, RoutedCacheLayer) and first.decisions is not None:
        return first
    return None


def _run_rows(call: LayerCall, hidden: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Run a layer once on some rows of `[B, T, D]`; the others keep their state."""
    if len(rows) == hidden.shape[0]:
        return call.run(hidden)
    index = call.forward.index(rows, hidden.device)
    output = call.run(hidden.index_select(0, index), rows)
    hidden = hidden.to(output.device)  # layers may be on different devices
    return hidden.index_copy(0, call.forward.index(rows, output.device), output)


def _readable_tokens(driver: RoutingDriver, mask: Any, hidden: Tensor) -> Tensor:
    """Return which tokens of this pass the policy may read, `[B, T]` bool."""
    B = hidden.shape[0]
    readable = _readable.get(driver)
    if readable is None:
        readable = _real_tokens(mask, hidden)
    readable = readable.to(hidden.device).expand(hidden.shape[:2])
    lengths = _lengths.get(driver)
    if lengths is None:
        return readable
    lengths = on_device(lengths, hidden.device)
    real = readable.sum(dim=1)
    if lengths.shape != (B,) or bool(((lengths < 1) | (lengths > real)).any()):
        raise RoutingError(
            f"prompt_lengths is {lengths.tolist()}; expected one length for each of {B} "
            f"rows, from 1 to its number of real tokens ({real.tolist()})"
        )
    return readable & (readable.cumsum(dim=1) <= lengths[:, None])


def _real_tokens(mask: Any, hidden: Tensor) -> Tensor:
    """Return which tokens aren't padding, according to the attention mask, `[B, T]` bool."""
    B, T = hidden.shape[:2]
    if mask is None:
        return torch.ones(B, T, dtype=torch.bool, device=hidden.device)
    if not isinstance(mask, Tensor):
        raise RoutingError(
            "an attention mask of this kind doesn't say which tokens are padding; give a mask of "
            "ones and zeros, or a fixed plan"
        )
    if mask.dim() == 2:
        return mask[:, -T:].bool()
    # A real token sees itself, whatever window the layer has, and nothing after it. Padding sees
    # nothing, or all keys if the softmax must stay finite. With a static cache K > T, and the keys
    # after T aren't filled yet.
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # [B, T, K]
    sees_itself = sees[:, :, :T].diagonal(dim1=1, dim2=2)
    sees_later = sees.triu(1).any(dim=2)
    return sees_itself & ~sees_later


class PathPass(Driver):
    """One forward pass along a static path, which all rows run.

    The model's loop calls the layers in order, but the path may run them in another order. A step
    of the path runs as soon as the earlier steps have run and the loop has called the step's layer.
    So if the path repeats a block of layers, the block runs again when the loop calls the last
    layer of the block. A step gets the arguments that the loop gave to its layer, so it has the
    right masks and positions, whatever the config says. With a cache, each execution of a layer has
    its own pass in the layer's entry.

    Args:
        path: The path.
        num_run: How many layers of the path have run already, in another pass.
        bypass: What runs in place of a layer that the path leaves out; None for nothing.
        is_first: Which tokens are the first real ones, for the bypass, `[B, T]`; None if none is.
    """

    def __init__(
        self,
        path: StaticPath,
        num_run: int = 0,
        bypass: Bypass | None = None,
        is_first: Tensor | None = None,
    ) -> None:
        self.path = path
        self._bypass = bypass
        self._is_first = is_first
        self._last_layer = path.layers[num_run - 1] if num_run else -1
        # Layers still to run, the next one last.
        self._remaining = list(reversed(path.layers[num_run:]))
        self._calls: list[LayerCall] = []  # the calls of the loop so far, by layer
        self._entries: list[RoutedCacheLayer | None] = []  # the cache entries of these layers
        self._num_run: Counter[int] = Counter()  # executions so far, by layer

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run the layers of the path that can be run now, `[B, T, D]` to `[B, T, D]`."""
        if call.module.training and getattr(call.module, "gradient_checkpointing", False):
            raise RoutingError(
                "layers along a static path can't be recomputed one by one; switch gradient "
                "checkpointing off"
            )
        self._calls.append(call)
        self._entries.append(self._entry(call, hidden))
        while self._remaining and self._remaining[-1] <= call.index:
            layer = self._remaining.pop()
            hidden = self._cross(layer, hidden)
            hidden = self._run(layer, hidden)
            self._last_layer = layer
        if call.is_last:
            hidden = self._cross(call.num_layers, hidden)
        return hidden

    def _cross(self, next_layer: int, hidden: Tensor) -> Tensor:
        """Let the bypass stand in for the layers between the last one that ran and the next."""
        if self._bypass is None or next_layer <= self._last_layer + 1:
            return hidden
        return self._bypass.cross(self._last_layer, next_layer, hidden, self._is_first)

    def end(self) -> None:
        """Drop the calls, which hold the pass and the cache in memory."""
        self._calls.clear()
        self._entries.clear()

    def _entry(self, call: LayerCall, hidden: Tensor) -> RoutedCacheLayer | None:
        """Return the cache entry of a layer with the path pinned in it; None without a cache."""
        if call.cache is None:
            return None
        entry = routed_entry(call.cache, call.index)
        if entry.decisions is None:
            count = self.path.layers.count(call.index)
            entry.pin((count,) * hidden.shape[0], self.path)
        check_rows(entry.decisions or (), hidden)
        if entry.shadow is not None:
            entry.lengthen_shadow(hidden.shape[1], hidden)
        return entry

    def _run(self, layer: int, hidden: Tensor) -> Tensor:
        """Run a layer once more, `[B, T, D]` to `[B, T, D]`."""
        entry = self._entries[layer]
        if entry is None:
            return self._calls[layer].run(hidden)
        entry.begin_pass(self._num_run[layer])
        self._num_run[layer] += 1
        try:
            return self._calls[layer].run(hidden)
        finally:
            entry.end_pass()


def check_rows(decisions: Sequence[int], hidden: Tensor) -> None:
    """Refuse a batch that has more or fewer rows than the pinned decisions."""
    if len(decisions) != hidden.shape[0]:
        raise RoutingError(
            f"decisions for {len(decisions)} rows are pinned, but the batch has "
            f"{hidden.shape[0]}; a continuation must keep the rows of its prompts"
        )
