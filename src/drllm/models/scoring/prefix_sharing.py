"""Run many paths of many prompts in one forward pass, and run each shared prefix only once.

A *state* is the hidden state of a row of tokens after some executions of layers. Two paths share
their states as long as they run the same layers. A state equals the state of the path run alone, up
to the last bits of batched arithmetic.

Axes: P rows of the batch, N (row, plan) pairs, U states run at once, T tokens, F past tokens,
D hidden, H heads, E head size, S kept tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from drllm.errors import RoutingError
from drllm.model.devices import on_device
from drllm.model.layers import can_split
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.injection import Driver, Forward, LayerCall
from drllm.models.routing.kv_cache import RoutedCacheLayer, find_entry
from drllm.models.scoring.packing import PackedBatch, pack
from drllm.models.scoring.padding import remove_padding, stack_left_padded
from drllm.models.scoring.prefix_cache import Key, PrefixCache, PrefixState
from drllm.models.scoring.requests import Request, Tokens
from drllm.paths import Decisions, Gap, Path, Plan, get_layers

Pair: TypeAlias = tuple[int, Decisions]
"""A prompt's row, and the decisions to run under."""

PlanPair: TypeAlias = tuple[int, Plan]
"""A prompt's row, and the plan to run: decisions or a static path."""

RowPath: TypeAlias = tuple[int, Path]
"""A row, and the layers that it has run so far. Together they identify a state."""

MAX_CPU_PADDING = 48
"""Maximum tokens of padding in one run of a layer on a CPU. More padding takes longer than a second
run of the layer, since every token costs time."""
MAX_PADDING = 4096  # maximum on other devices, where a run costs more time than its tokens
MIN_PREFIX = 8  # minimum length of a common prefix that is run in a pass of its own


@dataclass(eq=False)
class PackedRows:
    """Rows whose states under many paths are computed once and cached.

    The rows may have a *past* that isn't read again: K/V that other rows computed under the same
    path. The common prefix of a batch is the past of all its prompts. A prompt is the past of the
    continuations that are scored after it.
    """

    routed: RoutedModel
    packed: PackedBatch
    states: PrefixCache  # the cache of states; other packed rows may use the same cache
    keep_kv: bool = False  # whether K/V is kept, so that other rows can continue these rows
    past: PackedRows | None = None  # the rows that hold the past, with `keep_kv`
    past_rows: Sequence[int] = ()  # for each row, the row of `past` that it continues
    # The number that identifies these rows in the cache.
    number: int = field(default_factory=itertools.count().__next__, init=False)

    @contextmanager
    def run(
        self, pairs: Sequence[PlanPair], num_logits: Sequence[int]
    ) -> Iterator[PrefixSharingDriver]:
        """Compute the states of pairs, and hold these states inside the block.

        Cached states aren't computed again. The driver that the block gets has the logits.

        Args:
            pairs: Rows and the plans to run.
            num_logits: For each pair, the number of its last tokens whose logits are needed.
        """
        with ExitStack() as stack:
            past = None
            if self.past is not None:
                past_pairs = [(self.past_rows[row], plan) for row, plan in pairs]
                unique = list(dict.fromkeys(past_pairs))
                past = stack.enter_context(self.past.run(unique, [0] * len(unique)))
            driver = PrefixSharingDriver(self, pairs, num_logits, past)
            stack.callback(driver.release)
            if not driver.has_all_states or any(num_logits):
                self._forward(driver)
            yield driver

    def _forward(self, driver: PrefixSharingDriver) -> None:
        """Run the model once with the driver, and store the logits and the cache in the driver."""
        num_logits = list(driver.num_logits)
        logits_to_keep = 0  # all tokens that the last layer returns
        if not driver.drops_tokens:
            logits_to_keep = max(1, *num_logits)  # 0 would keep all tokens
        with torch.no_grad(), self.routed.injection.driven_by(driver):
            output = self.routed.model(
                input_ids=self.packed.ids,
                attention_mask=self.packed.mask,
                position_ids=self.packed.positions,
                use_cache=driver.uses_cache,
                logits_to_keep=logits_to_keep,
            )
        driver.cache = next((value for value in output.values() if isinstance(value, Cache)), None)
        if driver.drops_tokens:
            driver.logits = torch.split(output.logits[0], num_logits)
        else:
            driver.logits = [
                logits[len(logits) - num :]
                for logits, num in zip(output.logits, num_logits, strict=True)
            ]


@dataclass(frozen=True)
class _Past:
    """The past of some rows."""

    holder: PackedRows  # the rows that hold the past
    holder_rows: list[int]  # for each row, the row of `holder` that it continues
    num_tokens: list[int]  # for each row, the number of tokens in its past


def pack_rows(
    routed: RoutedModel,
    requests: Sequence[Request],
    states: PrefixCache,
    *,
    keep_kv: bool = False,
    contexts: PackedRows | None = None,
) -> PackedRows:
    """Pack requests as rows. Their past is `contexts`, or their common prefix, or there is none.

    Args:
        routed: The model.
        requests: One request for each row.
        states: The cache of states to use.
        keep_kv: Whether other rows will continue these rows.
        contexts: Rows that hold the requests' prompts, one row for each request; None without.
    """
    dtype = routed.model.dtype
    device = routed.model.device
    prompts = [request.context for request in requests]
    past = _choose_past(routed, prompts, states, contexts)
    if past is None:
        packed = pack(requests, dtype=dtype, device=device)
        return PackedRows(routed, packed, states, keep_kv)
    packed = pack(requests, num_past=past.num_tokens, dtype=dtype, device=device)
    return PackedRows(routed, packed, states, keep_kv, past.holder, past.holder_rows)


def _choose_past(
    routed: RoutedModel,
    prompts: Sequence[Tokens],
    states: PrefixCache,
    contexts: PackedRows | None,
) -> _Past | None:
    """Return the past of prompts: `contexts` if given, else a common prefix that is long enough.

    Returns None if there is no past, or if the model can't read a prompt in parts.
    """
    if not can_split(routed.model):
        return None
    if contexts is not None:
        # A prompt's last token is run again, since it predicts the continuation.
        num_tokens = [len(prompt) - 1 for prompt in prompts]
        return _Past(contexts, list(range(len(prompts))), num_tokens)
    if len(prompts) < 2:
        return None
    num_common = count_common_tokens(prompts)
    if num_common < MIN_PREFIX:
        return None
    prefix = Request(prompts[0][:num_common])
    packed = pack([prefix], dtype=routed.model.dtype, device=routed.model.device)
    holder = PackedRows(routed, packed, states, keep_kv=True)
    return _Past(holder, [0] * len(prompts), [num_common] * len(prompts))


def count_common_tokens(prompts: Sequence[Tokens]) -> int:
    """Count the first tokens that all prompts share, without the last token of any prompt."""
    num_common = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        num_common += 1
    shortest = min(map(len, prompts))
    return max(0, min(num_common, shortest - 1))


@dataclass(eq=False)
class PrefixSharingDriver(Driver):
    """Computes the distinct states of all pairs, layer by layer, and returns the final states.

    The model's own loop only carries the embeddings of the P rows from layer to layer. At each
    layer the driver computes the states that it can compute. At the last layer it returns the final
    state of each pair, in the order of the pairs, for the norm and the head. The driver holds the
    states of its pass until `release`.
    """

    rows: PackedRows
    pairs: Sequence[PlanPair]
    num_logits: Sequence[int]  # see `PackedRows.run`
    past: PrefixSharingDriver | None  # the driver that holds the rows' past under the same plans
    logits: Sequence[Tensor] = ()  # set after the pass: for each pair's last tokens, [S, V]
    cache: Cache | None = None  # set after the pass: the pass's cache, if it used a cache

    def __post_init__(self) -> None:
        packed = self.rows.packed
        # Whether the last layer returns only the tokens that need logits, `[1, sum, D]`, so that
        # the head computes nothing else. Otherwise it returns all tokens, `[N, T, D]`.
        self.drops_tokens = self.rows.routed.injection.can_drop_tokens
        self.uses_cache = self.rows.keep_kv or self.past is not None
        self.states = self.rows.states  # the cache of states
        self.lengths = [
            own + after for own, after in zip(packed.num_own, packed.num_after, strict=True)
        ]
        self._paths = {plan: get_layers(plan) for _, plan in self.pairs}
        self._bypass = self.rows.routed.bypass
        self._held: dict[RowPath, PrefixState] = {}  # the states that the pass holds
        self._calls: list[LayerCall] = []  # the calls of layers so far
        self._empty_entries: list[object] = []  # for each call, a copy of the layer's cache entry
        # For each pair, how many executions at the start of its path have a state already.
        self._num_done = [self._hold_start(row, self._paths[plan]) for row, plan in self.pairs]
        # Whether every state is cached, so that no layer has to run.
        self.has_all_states = self._num_done == [len(self._paths[plan]) for _, plan in self.pairs]

    def begin(self, forward: Forward) -> PrefixSharingDriver:
        """Start the pass; refuse outputs that would be wrong for shared paths."""
        if forward.requested_outputs:
            outputs = ", ".join(forward.requested_outputs)
            raise RoutingError(f"{outputs} can't be given for shared paths")
        return self

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Compute the states that can be computed now; at the last layer, return final states."""
        if self.uses_cache:
            if call.cache is None:
                raise RoutingError("keeping K/V needs a cache: run the forward with use_cache=True")
            self._empty_entries.append(copy.deepcopy(find_entry(call.cache, call.index)))
        self._calls.append(call)
        self._run_ready(call.index, hidden)
        if not call.is_last:
            return hidden
        return self._final_states(hidden, call.num_layers)

    def _final_states(self, embeddings: Tensor, num_layers: int) -> Tensor:
        """Return the last state of each pair, or only its tokens that need logits."""
        final = []
        gaps = []
        for (row, plan), num in zip(self.pairs, self.num_logits, strict=True):
            path = self._paths[plan]
            state = self._held[row, path].hidden
            if self.drops_tokens:
                state = state[len(state) - num :]
            final.append(state)
            gaps.append(Gap(path[-1], num_layers))
        if self._bypass is not None:
            final = self._cross(self._bypass, final, gaps, [row for row, _ in self.pairs])
        final = [state.to(embeddings.device) for state in final]
        if not self.drops_tokens:
            return stack_left_padded(final, embeddings.shape[1])
        return torch.cat(final)[None]

    def _run_ready(self, index: int, embeddings: Tensor) -> None:
        """Compute all states that can be computed once the model's loop has called a layer."""
        ready = self._find_ready(index)
        while ready:
            for layer, states in ready.items():
                for group in self._group_by_length(list(states), embeddings.device):
                    self._run_layer(layer, embeddings, group)
            ready = self._find_ready(index)

    def _find_ready(self, index: int) -> dict[int, dict[RowPath, None]]:
        """Return the states to compute next, by the layer that computes them.

        Layers up to `index` can be run, since the model's loop has called them. For each pair this
        is at most one state, since the following states are computed from it.
        """
        ready: dict[int, dict[RowPath, None]] = {}  # the inner dict is an ordered set
        for number, (row, plan) in enumerate(self.pairs):
            path = self._paths[plan]
            done = self._num_done[number]
            while done < len(path) and path[done] <= index:
                state = (row, path[: done + 1])
                if state not in self._held:
                    ready.setdefault(path[done], {})[state] = None
                    break
                done += 1
            self._num_done[number] = done
        return ready

    def release(self) -> None:
        """Allow the states of this pass to be evicted, and drop all references to its tensors.

        The layer calls refer back to the driver. So without `release`, logits and caches would stay
        in memory until the garbage collector runs.
        """
        self.states.release(self._key(row, path) for row, path in self._held)
        self._held.clear()
        self._calls.clear()
        self.logits = ()

    def kv(self, row: int, path: Path) -> tuple[Tensor, Tensor]:
        """Return K and V of a path's last execution after the past K and V, `[H, F + T, E]`."""
        state = self._held[row, path]
        assert state.keys is not None
        assert state.values is not None
        if self.past is None:
            return state.keys, state.values
        keys, values = self._past_kv(row, path)
        return torch.cat([keys, state.keys], dim=1), torch.cat([values, state.values], dim=1)

    def routed_cache(self, pairs: Sequence[Pair]) -> Cache:
        """Turn the pass's cache into the cache of an ordinary routed batch with some of the pairs.

        The new cache entries hold each pair's K/V and decisions.
        """
        assert self.cache is not None
        num_past = self.rows.packed.num_past
        num_tokens = max(num_past[row] + self.lengths[row] for row, _ in pairs)
        like = next(iter(self._held.values())).hidden
        positions = {"cache_position": torch.arange(num_tokens, device=like.device)}
        for index, empty_entry in enumerate(self._empty_entries):
            entry = RoutedCacheLayer(empty_entry)
            entry.pin(tuple(decisions[index] for _, decisions in pairs))
            if entry.shadow is not None:
                entry.lengthen_shadow(num_tokens, like)
            for repeat, places in enumerate(entry.rows):
                executions = [pairs[place] for place in places]
                keys, values = self._stack_kv(executions, index, repeat, num_tokens)
                entry.passes[repeat].update(keys, values, positions)
            self.cache.layers[index] = entry
        return self.cache

    def _stack_kv(
        self, pairs: Sequence[Pair], index: int, repeat: int, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one execution of a layer by some pairs, `[N, H, T, E]`.

        Args:
            pairs: The pairs.
            index: The layer.
            repeat: 0 for the first execution of the layer, 1 for the second.
            num_tokens: The number of tokens T, with padding on the left.
        """
        keys = []
        values = []
        for row, decisions in pairs:
            num_executions = sum(decisions[:index]) + repeat + 1  # up to and including this one
            row_keys, row_values = self.kv(row, self._paths[decisions][:num_executions])
            keys.append(row_keys)
            values.append(row_values)
        return stack_left_padded(keys, num_tokens), stack_left_padded(values, num_tokens)

    def _past_kv(self, row: int, path: Path) -> tuple[Tensor, Tensor]:
        """Return the past K and V of a row for a path's last execution, `[H, F, E]`."""
        assert self.past is not None
        keys, values = self.past.kv(self.rows.past_rows[row], path)
        num_past = self.rows.packed.num_past[row]
        return keys[:, :num_past], values[:, :num_past]

    def _hold_start(self, row: int, path: Path) -> int:
        """Hold the cached states from which a path continues; return how many executions they save.

        The longest cached prefix suffices. With `keep_kv` the K/V of every execution is needed, so
        a path continues from its first execution without a cached state.
        """
        num_saved = 0
        for length in range(len(path), 0, -1):
            if self._hold(row, path[:length]):
                num_saved = length
                break
        if self.rows.keep_kv:
            for length in range(1, num_saved):
                if not self._hold(row, path[:length]):
                    return length - 1
        return num_saved

    def _hold(self, row: int, path: Path) -> bool:
        """Hold a cached state until `release`; return whether the cache has it."""
        if (row, path) in self._held:
            return True
        state = self.states.get(self._key(row, path))
        if state is None:
            return False
        self._held[row, path] = state
        self.states.protect(self._key(row, path))
        return True

    def _key(self, row: int, path: Path) -> Key:
        """Return the key of a state in the cache."""
        return self.rows.number, row, path

    def _group_by_length(self, states: list[RowPath], device: torch.device) -> list[list[RowPath]]:
        """Divide states that one layer computes into groups of similar length.

        Each group is one run of the layer. A new group starts where padding would cost more time
        than another run.
        """
        max_padding = MAX_CPU_PADDING if device.type == "cpu" else MAX_PADDING
        groups: list[list[RowPath]] = []
        longest = 0  # tokens of the longest state of the last group
        padding = 0  # tokens of padding in the last group
        for state in sorted(states, key=lambda state: self.lengths[state[0]], reverse=True):
            length = self.lengths[state[0]]
            padding += longest - length
            if not groups or padding > max_padding:
                groups.append([])
                longest = length
                padding = 0
            groups[-1].append(state)
        return groups

    def _run_layer(self, layer: int, embeddings: Tensor, states: list[RowPath]) -> None:
        """Compute some states by running a layer on the states before them, and keep them."""
        call = self._calls[layer]
        inputs = self._stack_inputs(embeddings, states)  # [U, T, D]
        rows = tuple(row for row, _ in states)
        num_past = 0
        entry = None
        if self.uses_cache:
            # Not an entry of the model's own class: a sliding one drops old K/V.
            entry = DynamicLayer()
            assert call.cache is not None
            call.cache.layers[call.index] = entry
            if self.past is not None:
                num_past = self._put_past(entry, states)
        outputs = call.last_tokens(inputs.shape[1], num_past).run(inputs, rows)
        self.states.executions_run += len(states)
        self.states.tokens_run += sum(self.lengths[row] for row in rows)
        tensors = [outputs]
        if entry is not None and self.rows.keep_kv:
            tensors += [entry.keys, entry.values]
        self._keep(states, tensors)
        if entry is not None:
            assert call.cache is not None
            call.cache.layers[call.index] = self._empty_entries[call.index]

    def _stack_inputs(self, embeddings: Tensor, states: Sequence[RowPath]) -> Tensor:
        """Return what a layer reads to compute some states, `[U, T, D]`, padded on the left.

        A path's first execution reads the row's embeddings, and every other the state before it.
        """
        inputs = []
        gaps: list[Gap] = []
        for row, path in states:
            if len(path) > 1:
                inputs.append(self._held[row, path[:-1]].hidden)
                gaps.append(Gap(path[-2], path[-1]))
            else:
                inputs.append(embeddings[row, -self.lengths[row] :])
                gaps.append(Gap(-1, path[0]))
        if self._bypass is not None:
            inputs = self._cross(self._bypass, inputs, gaps, [row for row, _ in states])
        device = inputs[0].device  # states lie on two devices where the model changes its device
        return stack_left_padded([part.to(device) for part in inputs])

    def _cross(
        self,
        bypass: Bypass,
        parts: Sequence[Tensor],
        gaps: Sequence[Gap],
        rows: Sequence[int],
    ) -> list[Tensor]:
        """Apply the bypass to the states that cross a gap; return all states, `[T, D]` each.

        Args:
            bypass: What runs in place of skipped layers.
            parts: The last tokens of the states, or all their tokens.
            gaps: For each state, the layer that returned it and the layer that it enters; the
                embeddings come from layer -1. Neighbouring layers have no gap between them.
            rows: The row of each state.
        """
        crossed_states = list(parts)
        places_by_gap: dict[Gap, list[int]] = {}
        for place, gap in enumerate(gaps):
            if gap.next_layer > gap.layer + 1:
                places_by_gap.setdefault(gap, []).append(place)
        for gap, places in places_by_gap.items():
            lengths = [len(parts[place]) for place in places]
            states = torch.cat([parts[place] for place in places])
            is_first = torch.zeros(len(states), dtype=torch.bool)
            start = 0
            for place, length in zip(places, lengths, strict=True):
                # The first token of a prompt is in a part that has all tokens and no past.
                row = rows[place]
                has_first = self.rows.packed.num_past[row] == 0 and length == self.lengths[row]
                is_first[start : start + 1] = has_first and length > 0
                start += length
            outputs = bypass.cross(
                gap.layer, gap.next_layer, states, on_device(is_first, states.device)
            )
            for place, part in zip(places, torch.split(outputs, lengths), strict=True):
                crossed_states[place] = part
        return crossed_states

    def _put_past(self, entry: DynamicLayer, states: Sequence[RowPath]) -> int:
        """Put the past K and V of some states into a cache entry; return the number of tokens."""
        kv = [self._past_kv(row, path) for row, path in states]
        keys = stack_left_padded([keys for keys, _ in kv])
        values = stack_left_padded([values for _, values in kv])
        entry.update(keys, values)
        return keys.shape[2]

    def _keep(self, states: Sequence[RowPath], tensors: Sequence[Tensor]) -> None:
        """Cache the results of a run without padding: hidden states, and K and V if kept."""
        lengths = [self.lengths[row] for row, _ in states]
        parts = [remove_padding(tensor, lengths) for tensor in tensors]
        new_states = {}
        for (row, path), *values in zip(states, *parts, strict=True):
            state = PrefixState(*values)
            self._held[row, path] = state
            new_states[self._key(row, path)] = state
        self.states.put(new_states)
