"""Many paths of many prompts in one forward pass, each shared prefix computed once.

A *state* is what a row of tokens is after a sequence of executed layers: skipping keeps the state,
repeating builds on the first execution, and two paths that agree so far share a state. Exact: a
state's value is what running that path alone gives, up to the last bits of batched arithmetic.

Axes: P rows of the batch, N (row, decisions) pairs, U states run at once, T tokens, F past tokens,
D hidden, H heads, E head size, S kept tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from drllm.errors import RoutingError
from drllm.models.routing.driver import Bypass, identity
from drllm.models.routing.injection import Driver, Forward, LayerCall
from drllm.models.routing.kv_cache import RoutedCacheLayer, entry_of
from drllm.models.scoring.prefix_cache import PrefixCache, PrefixState
from drllm.paths import Decisions, Path, to_path

Pair: TypeAlias = tuple[int, Decisions]
"""A prompt's row and the decisions it runs under."""

RowPath: TypeAlias = tuple[int, Path]
"""A row and the layers executed so far."""

PADDING_WORTH_A_RUN = {"cpu": 48}
"""Tokens of padding that take as long as running a layer once more, by device: on a processor
every token costs, on the others time goes by the number of runs."""
MAX_PADDING = 4096
"""The same on any other device."""


class PrefixSharingDriver(Driver):
    """Runs the distinct states of all pairs, layer by layer, and returns the last ones.

    The model's own loop carries the P rows up to the last layer; there the driver returns the
    final states in the order of the pairs, so that norm and head see these.

    Args:
        pairs: Row and decisions of each result; rows index the batch of the forward pass.
        states: States of earlier passes over the same rows; new ones are added. Those of this
            pass are needed until `release`.
        lengths: For each row of the batch, its tokens; padding stands before them.
        keep_last: For each pair, how many of its last tokens are wanted in the end. The driver
            returns these alone, `[1, sum, D]`, pair after pair, so that the head computes nothing
            else; None returns all of them, `[N, T, D]`.
        rows_number: Tells these rows from others whose states are in the same cache.
        keep_kv: Keep K/V with each state, for `routed_cache` and for rows that continue these.
        past: What ran the rows that these continue under the same paths, and still holds their
            states; None where these begin with their prompt.
        past_rows: For each row that continues one, which row that is.
        num_past: For each row that continues one, how many of its tokens.
        bypass: What a skipped layer passes on in this model.

    Attributes:
        logits: After the pass, for each pair, those of its last tokens, `[S, V]`.
        cache: After the pass, its cache; None where none was used.

    Raises:
        RoutingError: A bypass that changes anything: a skip would no longer keep its state.
    """

    logits: Sequence[Tensor] = ()
    cache: Cache | None = None

    def __init__(
        self,
        pairs: Sequence[Pair],
        states: PrefixCache,
        lengths: Sequence[int],
        keep_last: Sequence[int] | None,
        *,
        rows_number: int = 0,
        keep_kv: bool = False,
        past: PrefixSharingDriver | None = None,
        past_rows: Sequence[int] = (),
        num_past: Sequence[int] = (),
        bypass: Bypass = identity,
    ) -> None:
        if bypass is not identity:
            raise RoutingError(
                "paths can share their prefixes only where a skipped layer passes its input on as "
                "it is; make the RoutedModel without bypass=..."
            )
        self.pairs = list(pairs)
        self.states = states
        self.lengths = lengths
        self.keep_last = keep_last
        self.rows_number = rows_number
        self.keep_kv = keep_kv
        self.past = past
        self.past_rows = past_rows
        self.num_past = num_past
        self._uses_cache = keep_kv or past is not None
        self._paths = {decisions: to_path(decisions) for _, decisions in self.pairs}
        self._used: dict[RowPath, PrefixState] = {}
        self._pristine: list[object] = []
        self._start = [self._deepest(row, self._paths[d]) for row, d in self.pairs]

    @property
    def knows_all(self) -> bool:
        """Whether every state was known already, so that no layer has to run."""
        return all(
            start == len(self._paths[d])
            for start, (_, d) in zip(self._start, self.pairs, strict=True)
        )

    def begin(self, forward: Forward) -> PrefixSharingDriver:
        """Start the pass; refuse outputs that can't be right."""
        if forward.rejected:
            raise RoutingError(f"{', '.join(forward.rejected)} can't be given for shared paths")
        return self

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run every state that ends with this layer and isn't known yet."""
        if self._uses_cache:
            if call.cache is None:
                raise RoutingError("keeping K/V needs a cache: run the forward with use_cache=True")
            self._pristine.append(copy.deepcopy(entry_of(call.cache, call.index)))
        for count in range(2):
            reached = [
                (self._row_path(pair, call.index, count), start)
                for pair, start in zip(self.pairs, self._start, strict=True)
                if pair[1][call.index] > count
            ]
            # A dict keeps the order of first mention.
            wanted = {s: None for s, start in reached if len(s[1]) > start and s not in self._used}
            for group in self._groups(list(wanted), hidden.device):
                self._run(call, hidden, group)
        if not call.is_last:
            return hidden
        final = [self._used[row, self._paths[d]].hidden for row, d in self.pairs]
        if self.keep_last is None:
            return left_padded_stack(final, hidden.shape[1])
        kept = [h[len(h) - num :] for h, num in zip(final, self.keep_last, strict=True)]
        return torch.cat(kept)[None]

    def release(self) -> None:
        """Allow the states of this pass to be evicted."""
        self.states.release((self.rows_number, *used) for used in self._used)
        self._used.clear()

    def kv(self, row: int, path: Path) -> tuple[Tensor, Tensor]:
        """Return K and V of a path's last execution, `[H, F + T, E]`, past ones included."""
        state = self._used[row, path]
        assert state.keys is not None
        assert state.values is not None
        if self.past is None:
            return state.keys, state.values
        keys, values = self._past_kv(row, path)
        return torch.cat([keys, state.keys], dim=1), torch.cat([values, state.values], dim=1)

    def routed_cache(self, pairs: Sequence[Pair]) -> Cache:
        """Turn the cache of the shared pass into that of an ordinary routed batch of N rows.

        Args:
            pairs: Those of this pass's pairs that continue, in the order wanted.

        Returns:
            The same cache, its entries replaced by routed ones with each pair's K/V and decisions.
        """
        assert self.cache is not None
        num_tokens = max(self.kv(row, self._paths[d])[0].shape[1] for row, d in pairs)
        like = next(iter(self._used.values())).hidden
        positions = {"cache_position": torch.arange(num_tokens, device=like.device)}
        for index, pristine in enumerate(self._pristine):
            entry = RoutedCacheLayer(pristine)
            entry.pin(tuple(decisions[index] for _, decisions in pairs))
            if entry.shadow is not None:
                entry.lengthen_shadow(num_tokens, like)
            for count, rows in enumerate(entry.rows):
                held = [self.kv(*self._row_path(pairs[place], index, count)) for place in rows]
                keys, values = (left_padded_stack(t, num_tokens) for t in zip(*held, strict=True))
                entry.passes[count].update(keys, values, positions)
            self.cache.layers[index] = entry
        return self.cache

    def _past_kv(self, row: int, path: Path) -> tuple[Tensor, Tensor]:
        """Return a row's past K and V of a path's last execution, `[H, F, E]`."""
        assert self.past is not None
        keys, values = self.past.kv(self.past_rows[row], path)
        return keys[:, : self.num_past[row]], values[:, : self.num_past[row]]

    def _deepest(self, row: int, path: Path) -> int:
        """Return how many executions of a path are cached, and keep their states."""
        lengths = range(len(path), 0, -1)
        known = next((length for length in lengths if self._hold(row, path[:length])), 0)
        if self.keep_kv:  # every execution's K/V is needed, so a gap means running from there
            held = range(1, known)
            return next((n - 1 for n in held if not self._hold(row, path[:n])), known)
        return known

    def _hold(self, row: int, path: Path) -> bool:
        if (row, path) in self._used:
            return True
        state = self.states.get((self.rows_number, row, path))
        if state is None:
            return False
        self._used[row, path] = state
        self.states.need((self.rows_number, row, path))
        return True

    def _row_path(self, pair: Pair, layer: int, count: int) -> RowPath:
        """Return the state that a pair reaches with pass `count` of a layer."""
        row, decisions = pair
        return row, self._paths[decisions][: sum(decisions[:layer]) + count + 1]

    def _groups(self, wanted: list[RowPath], device: torch.device) -> list[list[RowPath]]:
        """Split states that could run at once into groups of like length.

        A new group begins where the padding of the last one would cost more than another run.
        """
        most = PADDING_WORTH_A_RUN.get(device.type, MAX_PADDING)
        groups: list[list[RowPath]] = []
        padding = 0
        for state in sorted(wanted, key=lambda state: self.lengths[state[0]], reverse=True):
            padding += self.lengths[groups[-1][0][0]] - self.lengths[state[0]] if groups else 0
            if not groups or padding > most:
                groups.append([])
                padding = 0
            groups[-1].append(state)
        return groups

    def _run(self, call: LayerCall, prompts: Tensor, wanted: list[RowPath]) -> None:
        """Run the layer on states of like length."""
        rows = tuple(row for row, _ in wanted)
        before = [
            self._used[row, path[:-1]].hidden if path[1:] else prompts[row, -self.lengths[row] :]
            for row, path in wanted
        ]
        inputs = left_padded_stack(before)  # [U, T, D]
        num_past, entry = 0, None
        if self._uses_cache:
            # Not an entry of the model's own class: one that slides drops what isn't seen again.
            entry = DynamicLayer()
            assert call.cache is not None
            call.cache.layers[call.index] = entry
        if entry is not None and self.past is not None:
            kv = [self._past_kv(row, path) for row, path in wanted]
            keys, values = (left_padded_stack(parts) for parts in zip(*kv, strict=True))
            num_past = keys.shape[2]
            entry.update(keys, values)
        outputs = call.last_tokens(inputs.shape[1], num_past).run(inputs, rows)
        self.states.executions_run += len(wanted)
        self.states.tokens_run += sum(self.lengths[row] for row in rows)
        for place, (row, path) in enumerate(wanted):
            # Clones: a view would keep the whole batch alive as long as one of its states.
            kept = [outputs[place]]
            if entry is not None and self.keep_kv:
                kept += [entry.keys[place], entry.values[place]]
            state = PrefixState(*(t[..., -self.lengths[row] :, :].clone() for t in kept))
            self._used[row, path] = state
            self.states.put((self.rows_number, row, path), state)
        if entry is not None:
            assert call.cache is not None
            call.cache.layers[call.index] = self._pristine[call.index]


def left_padded_stack(parts: Sequence[Tensor], num_tokens: int = 0) -> Tensor:
    """Return tensors `[..., T_i, D]` as one of at least so many tokens, padded on the left."""
    longest = max(num_tokens, *(part.shape[-2] for part in parts))
    if all(part.shape[-2] == longest for part in parts):
        return torch.stack(list(parts))
    stacked = parts[0].new_zeros(len(parts), *parts[0].shape[:-2], longest, parts[0].shape[-1])
    for place, part in enumerate(parts):
        stacked[place, ..., longest - part.shape[-2] :, :] = part
    return stacked
