"""Many paths of many prompts in one forward pass, each shared prefix computed once.

Owns the `SharingDriver` and the bounded store of states it works with. A *state* is what a prompt
has become after a sequence of executed layers: skipping keeps the state, repeating builds on the
first pass, and two paths that agree so far meet in one state by themselves. Exact: a state's
value is what running that path alone gives, up to the last bits of batched arithmetic.

Axes: P prompts, N (prompt, decisions) pairs, U states run at once, T tokens, D hidden,
H heads, E head size.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.errors import RoutingError
from drllm.models.bypass import Bypass, identity
from drllm.models.cache import RoutedCacheLayer, entry_of
from drllm.models.injection import Forward
from drllm.models.layer_call import LayerCall
from drllm.paths import Decisions, Path, to_path

Pair: TypeAlias = tuple[int, Decisions]
"""A prompt's row and the decisions it runs under."""

Key: TypeAlias = tuple[int, Path]
"""A prompt's row and the layers executed so far."""


@dataclass(frozen=True, slots=True)
class State:
    """A prompt after some executions.

    Attributes:
        hidden: `[T, D]`.
        keys: `[H, T, E]`, the K of the last execution; None when K/V isn't kept.
        values: Likewise V.
    """

    hidden: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the state holds."""
        tensors = (self.hidden, self.keys, self.values)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class StateCache:
    """States by prompt and path, the least recently used given up when memory runs out.

    Args:
        max_bytes: Most memory that the states may hold together.
    """

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.executions_run = 0
        self.executions_asked = 0
        self._states: OrderedDict[Key, State] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: Key) -> State | None:
        """Return a state, or None if it was never kept or is gone."""
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        return state

    def put(self, key: Key, state: State) -> None:
        """Keep a state, giving up older ones if need be."""
        if key in self._states:
            return
        self._states[key] = state
        self.num_bytes += state.num_bytes
        while self.num_bytes > self.max_bytes and len(self._states) > 1:
            _, oldest = self._states.popitem(last=False)
            self.num_bytes -= oldest.num_bytes


class SharingDriver:
    """Runs the distinct states of all pairs, layer by layer, and hands the last ones on.

    The model's own loop carries the P prompts up to the last layer; there the driver returns the
    N final states in the order of the pairs, so that norm and head see these.

    Args:
        pairs: Prompt row and decisions of each result; rows index the batch of the forward pass.
        states: States of earlier passes over the same prompts; new ones are added.
        keep_kv: Keep K/V with each state, so that `routed_cache` can be built afterwards.
        keep_last: For each prompt, how many of its last tokens are wanted in the end. The driver
            then hands on these alone, `[1, sum, D]`, pair behind pair, so that the head computes
            nothing else; None hands on `[N, T, D]`.
        bypass: What a skipped layer leaves behind in this model.

    Raises:
        RoutingError: A bypass that changes anything: a skip would no longer keep its state.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        states: StateCache,
        *,
        keep_kv: bool = False,
        keep_last: Sequence[int] | None = None,
        bypass: Bypass = identity,
    ) -> None:
        if bypass is not identity:
            raise RoutingError(
                "paths can share their prefixes only where a skipped layer leaves its input as it "
                "is; make the RoutedModel without bypass=..."
            )
        self.pairs = list(pairs)
        self.states = states
        self.keep_kv = keep_kv
        self.keep_last = keep_last
        self._paths = [to_path(decisions) for _, decisions in self.pairs]
        self._used: dict[Key, State] = {}
        self._pristine: list[object] = []
        self._start = [self._deepest(row, path) for (row, _), path in self._zip()]
        states.executions_asked += sum(len(path) for path in self._paths)

    def begin(self, forward: Forward) -> None:
        """Refuse outputs that can't be right."""
        if forward.rejected:
            raise RoutingError(f"{', '.join(forward.rejected)} can't be given for shared paths")

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run every state that this layer brings about and that isn't known yet."""
        entry = None
        if self.keep_kv:
            if call.cache is None:
                raise RoutingError("keeping K/V needs a cache: run the forward with use_cache=True")
            entry = self._entry(call.cache, call.index)
        for count in range(2):
            wanted = self._wanted(call.index, count)
            if wanted:
                self._run(call, hidden, wanted, entry)
        if not call.is_last:
            return hidden
        final: list[Tensor] = [self._used[row, p].hidden for (row, _), p in self._zip()]
        if self.keep_last is None:
            return torch.stack(final)
        kept = [self.keep_last[row] for row, _ in self.pairs]
        return torch.cat([h[len(h) - num :] for h, num in zip(final, kept, strict=True)])[None]

    def end(self, forward: Forward) -> None:
        """Nothing is left to do."""

    def routed_cache(self, cache: Cache) -> Cache:
        """Turn the cache of the shared pass into that of an ordinary routed batch of N rows.

        Args:
            cache: The `past_key_values` that the forward pass returned.

        Returns:
            The same cache, its entries replaced by routed ones with each pair's K/V and decisions.
        """
        num_tokens = next(iter(self._used.values())).hidden.shape[0]
        for index, pristine in enumerate(self._pristine):
            entry = RoutedCacheLayer(pristine)
            entry.pin(tuple(decisions[index] for _, decisions in self.pairs))
            like = next(iter(self._used.values())).hidden
            if entry.shadow is not None:
                entry.lengthen_shadow(num_tokens, like)
            positions = {"cache_position": torch.arange(num_tokens, device=like.device)}
            for count, rows in enumerate(entry.rows):
                held = [self._used[self._key(pair, index, count)] for pair in rows]
                keys = torch.stack([state.keys for state in held if state.keys is not None])
                values = torch.stack([state.values for state in held if state.values is not None])
                entry.passes[count].update(keys, values, positions)
            cache.layers[index] = entry
        return cache

    # --- inside ---

    def _zip(self) -> zip[tuple[Pair, Path]]:
        return zip(self.pairs, self._paths, strict=True)

    def _deepest(self, row: int, path: Path) -> int:
        """Return how many executions of a path are known already, and hold on to their states."""
        known = 0
        for length in range(len(path), 0, -1):
            state = self.states.get((row, path[:length]))
            if state is not None:
                self._used[row, path[:length]] = state
                known = length
                break
        if self.keep_kv:  # every execution's K/V is needed, so a gap means running from there
            for length in range(1, known):
                state = self.states.get((row, path[:length]))
                if state is None:
                    return length - 1
                self._used[row, path[:length]] = state
        return known

    def _key(self, pair: int, layer: int, count: int) -> Key:
        """Return the state that a pair reaches with pass `count` of a layer."""
        row, decisions = self.pairs[pair]
        return row, self._paths[pair][: sum(decisions[:layer]) + count + 1]

    def _wanted(self, layer: int, count: int) -> list[Key]:
        keys: dict[Key, None] = {}  # a dict keeps the order of first mention
        for pair, (_, decisions) in enumerate(self.pairs):
            if decisions[layer] > count:
                key = self._key(pair, layer, count)
                if len(key[1]) > self._start[pair] and key not in self._used:
                    keys[key] = None
        return list(keys)

    def _run(self, call: LayerCall, prompts: Tensor, keys: list[Key], entry: object | None) -> None:
        rows = tuple(row for row, _ in keys)
        inputs = torch.stack(
            [self._used[row, path[:-1]].hidden if path[1:] else prompts[row] for row, path in keys]
        )  # [U, T, D]
        inner = None
        if entry is not None:
            assert call.cache is not None
            inner = copy.deepcopy(entry)
            call.cache.layers[call.index] = inner
        outputs = call.run(inputs, rows)
        self.states.executions_run += len(keys)
        for place, key in enumerate(keys):
            kept = (
                (inner.keys[place].clone(), inner.values[place].clone())  # type: ignore[attr-defined]
                if inner is not None
                else (None, None)
            )
            # A clone: a view would keep the whole batch alive as long as one of its states.
            state = State(outputs[place].clone(), *kept)
            self._used[key] = state
            self.states.put(key, state)

    def _entry(self, cache: Cache, index: int) -> object:
        if len(self._pristine) == index:
            self._pristine.append(copy.deepcopy(entry_of(cache, index)))
        return self._pristine[index]
