"""Many paths of many prompts in one forward pass, each shared prefix computed once.

A *state* is what a row of tokens is after a sequence of executions: skipping keeps the state,
repeating builds on the first execution, and two paths that agree so far share a state. Exact: a
state's value is what running that path alone gives, up to the last bits of batched arithmetic.

Axes: P rows of the batch, N (row, plan) pairs, U states run at once, T tokens, F past tokens,
D hidden, H heads, E head size, S kept tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from drllm.errors import RoutingError
from drllm.models.base.layers import can_split
from drllm.models.routing.injection import Driver, Forward, LayerCall
from drllm.models.routing.kv_cache import RoutedCacheLayer, entry_of
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.packing import PackedBatch, Request, Tokens, pack
from drllm.models.scoring.prefix_cache import PrefixCache, PrefixState
from drllm.paths import Decisions, Path, Plan, adapter_of, layers_of

Pair: TypeAlias = tuple[int, Decisions]  # a prompt's row and the decisions it runs under

PlanPair: TypeAlias = tuple[int, Plan]
"""A prompt's row and what it runs: decisions, or a static path."""

RowPath: TypeAlias = tuple[int, Path]  # a row and the layers that were executed so far

PADDING_WORTH_A_RUN = {"cpu": 48}
"""Tokens of padding that take as long as running a layer once more, by device: on a processor
every token costs, on the others time goes by the number of runs."""
MAX_PADDING = 4096  # the same on any other device
MIN_PREFIX = 8  # fewer common tokens than these aren't worth a pass of their own


@dataclass(eq=False)
class PackedRows:
    """Rows whose states under many paths are computed once and cached.

    They may have a *past* that isn't read again: the K/V that other rows computed under the same
    path. The common prefix of a batch is the past of all its prompts; a prompt is the past of the
    continuations that are scored after it.
    """

    routed: RoutedModel
    packed: PackedBatch
    states: PrefixCache  # rows with different pasts may share it
    keep_kv: bool = False  # so that these rows can be continued
    past: PackedRows | None = None  # which keep their K/V
    past_rows: Sequence[int] = ()  # for each row, which row its past is
    # Tells these rows from others whose states are in the same cache.
    number: int = field(default_factory=itertools.count().__next__, init=False)

    @contextmanager
    def run(
        self, pairs: Sequence[PlanPair], keep_last: Sequence[int]
    ) -> Iterator[PrefixSharingDriver]:
        """Run the states that are new; inside the block all states of these pairs are held.

        `keep_last` says for each pair how many of its last tokens' logits are wanted.
        """
        can_drop_tokens = self.routed.injection.can_drop_tokens
        with ExitStack() as stack:
            past = None
            if self.past is not None:
                before = list(dict.fromkeys((self.past_rows[row], path) for row, path in pairs))
                past = stack.enter_context(self.past.run(before, [0] * len(before)))
            driver = PrefixSharingDriver(self, pairs, keep_last if can_drop_tokens else None, past)
            stack.callback(driver.release)
            if not driver.knows_all or any(keep_last):
                with torch.no_grad(), self.routed.injection.driven_by(driver):
                    output = self.routed.model(
                        input_ids=self.packed.ids,
                        attention_mask=self.packed.mask,
                        position_ids=self.packed.positions,
                        use_cache=driver.uses_cache,
                        logits_to_keep=0 if can_drop_tokens else max(1, *keep_last),
                    )
                driver.cache = next((v for v in output.values() if isinstance(v, Cache)), None)
                if can_drop_tokens:
                    driver.logits = torch.split(output.logits[0], list(keep_last))
                else:
                    each = zip(output.logits, keep_last, strict=True)
                    driver.logits = [values[len(values) - num :] for values, num in each]
            yield driver


def packed_rows(
    routed: RoutedModel,
    questions: Sequence[Request],
    states: PrefixCache,
    *,
    keep_kv: bool = False,
    contexts: PackedRows | None = None,
) -> PackedRows:
    """Return the rows to run: after given contexts, after the common prefix, or whole."""
    where = {"dtype": routed.model.dtype, "device": routed.model.device}
    prompts = [question.context for question in questions]
    shared = prefix_length(prompts) if len(prompts) > 1 else 0
    past, past_rows, num_past = None, list[int](), None
    if can_split(routed.model) and (contexts is not None or shared >= MIN_PREFIX):
        if contexts is None:
            prefix = pack([Request(prompts[0][:shared])], **where)
            past, past_rows = PackedRows(routed, prefix, states, keep_kv=True), [0] * len(prompts)
            num_past = [shared] * len(prompts)
        else:
            # A context's last token is run again, since its logits are needed.
            past, past_rows = contexts, list(range(len(prompts)))
            num_past = [len(prompt) - 1 for prompt in prompts]
    packed = pack(questions, num_past=num_past, **where)
    return PackedRows(routed, packed, states, keep_kv, past, past_rows)


def prefix_length(prompts: Sequence[Tokens]) -> int:
    """Return how many tokens all prompts begin with; each keeps one of its own behind them."""
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return max(0, min(len(list(alike)), min(map(len, prompts)) - 1))


@dataclass(eq=False)
class PrefixSharingDriver(Driver):
    """Runs the distinct states of all pairs, layer by layer, and returns the last ones.

    The model's own loop carries the P rows up to the last layer; there the driver returns the
    final states in the order of the pairs, so that norm and head see these. The states of this
    pass are needed until `release`.
    """

    rows: PackedRows
    pairs: Sequence[PlanPair]  # of each result
    # For each pair, how many of its last tokens are wanted in the end. They alone are returned,
    # `[1, sum, D]`, so that the head computes nothing else; None returns all, `[N, T, D]`.
    keep_last: Sequence[int] | None
    past: PrefixSharingDriver | None  # ran the rows' past under the same paths, and holds it
    logits: Sequence[Tensor] = ()  # after the pass, for each pair, of its last tokens: [S, V]
    cache: Cache | None = None  # after the pass; None where none was used

    def __post_init__(self) -> None:
        packed = self.rows.packed
        self.uses_cache = self.rows.keep_kv or self.past is not None
        self.states = self.rows.states
        self.lengths = list(map(operator.add, packed.num_own, packed.num_after))
        self._paths = {plan: layers_of(plan) for _, plan in self.pairs}
        self._adapter = common_adapter([plan for _, plan in self.pairs])
        self._used: dict[RowPath, PrefixState] = {}
        self._calls: list[LayerCall] = []
        self._pristine: list[object] = []
        # For each pair, how many executions are known or were run.
        self._done = [self._deepest(row, self._paths[plan]) for row, plan in self.pairs]
        # Whether every state was known already, so that no layer has to run.
        self.knows_all = self._done == [len(self._paths[plan]) for _, plan in self.pairs]

    def adapter(self, cache: Cache | None) -> str:
        """See `Driver.adapter`."""
        return self._adapter

    def begin(self, forward: Forward) -> PrefixSharingDriver:
        """Start the pass; refuse outputs that can't be right."""
        if forward.rejected:
            raise RoutingError(f"{', '.join(forward.rejected)} can't be given for shared paths")
        return self

    def layer(self, call: LayerCall, hidden: Tensor) -> Tensor:
        """Run every state that can be run now and isn't known yet."""
        if self.uses_cache:
            if call.cache is None:
                raise RoutingError("keeping K/V needs a cache: run the forward with use_cache=True")
            self._pristine.append(copy.deepcopy(entry_of(call.cache, call.index)))
        self._calls.append(call)
        while wanted := self._wanted(call.index):
            for layer, states in wanted.items():
                for group in self._groups(list(states), hidden.device):
                    self._run(layer, hidden, group)
        if not call.is_last:
            return hidden
        each = (self._used[row, self._paths[plan]].hidden for row, plan in self.pairs)
        final = [states.to(hidden.device) for states in each]
        if self.keep_last is None:
            return left_padded_stack(final, hidden.shape[1])
        kept = [h[len(h) - num :] for h, num in zip(final, self.keep_last, strict=True)]
        return torch.cat(kept)[None]

    def _wanted(self, layer: int) -> dict[int, dict[RowPath, None]]:
        """Return the states to run next, by the layer that leads to them.

        A pair's next layer can be run once the loop has called it.
        """
        wanted: dict[int, dict[RowPath, None]] = {}  # dicts keep the order of first mention
        for number, (row, plan) in enumerate(self.pairs):
            path, done = self._paths[plan], self._done[number]
            while done < len(path) and path[done] <= layer:
                state = row, path[: done + 1]
                if state not in self._used:
                    wanted.setdefault(path[done], {})[state] = None
                    break
                done += 1
            self._done[number] = done
        return wanted

    def release(self) -> None:
        """Allow the states of this pass to be evicted, and let go of what else it holds.

        Its calls hold it in turn: logits and caches would wait for the garbage collector.
        """
        self.states.release(self._key(*used) for used in self._used)
        self._used.clear()
        self._calls.clear()
        self.logits = ()

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
        """Turn the pass's cache into that of an ordinary routed batch of some of its pairs.

        Its entries are replaced by routed ones with each pair's K/V and decisions.
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
                held = []
                for row, decisions in (pairs[place] for place in rows):
                    done = sum(decisions[:index]) + count + 1  # executions up to this one
                    held.append(self.kv(row, self._paths[decisions][:done]))
                keys, values = (left_padded_stack(t, num_tokens) for t in zip(*held, strict=True))
                entry.passes[count].update(keys, values, positions)
            self.cache.layers[index] = entry
        return self.cache

    def _past_kv(self, row: int, path: Path) -> tuple[Tensor, Tensor]:
        """Return a row's past K and V of a path's last execution, `[H, F, E]`."""
        assert self.past is not None
        keys, values = self.past.kv(self.rows.past_rows[row], path)
        num_past = self.rows.packed.num_past[row]
        return keys[:, :num_past], values[:, :num_past]

    def _deepest(self, row: int, path: Path) -> int:
        """Return how many executions of a path are cached, and keep their states."""
        lengths = range(len(path), 0, -1)
        known = next((length for length in lengths if self._hold(row, path[:length])), 0)
        if self.rows.keep_kv:  # every execution's K/V is needed, so a gap means running from there
            held = range(1, known)
            return next((n - 1 for n in held if not self._hold(row, path[:n])), known)
        return known

    def _hold(self, row: int, path: Path) -> bool:
        if (row, path) in self._used:
            return True
        state = self.states.get(self._key(row, path))
        if state is None:
            return False
        self._used[row, path] = state
        self.states.need(self._key(row, path))
        return True

    def _key(self, row: int, path: Path) -> tuple[int, str, int, Path]:
        """Return the key of a state in the cache: with another adapter it is another state."""
        return self.rows.number, self._adapter, row, path

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

    def _run(self, layer: int, prompts: Tensor, wanted: list[RowPath]) -> None:
        call = self._calls[layer]
        rows = tuple(row for row, _ in wanted)
        before = [
            self._used[row, path[:-1]].hidden if path[1:] else prompts[row, -self.lengths[row] :]
            for row, path in wanted
        ]
        device = before[0].device  # states before a layer on another device may lie on both
        inputs = left_padded_stack([part.to(device) for part in before])  # [U, T, D]
        num_past, entry = 0, None
        if self.uses_cache:
            # Not an entry of the model's own class: one that slides drops what isn't seen again.
            entry = DynamicLayer()
            assert call.cache is not None
            call.cache.layers[call.index] = entry
        if entry is not None and self.past is not None:
            kv = [self._past_kv(row, path) for row, path in wanted]
            keys, values = (left_padded_stack(parts) for parts in zip(*kv, strict=True))
            num_past = keys.shape[2]
            entry.update(keys, values)
        cut = call.last_tokens(inputs.shape[1], num_past)
        outputs = cut.run(inputs, rows)
        self.states.executions_run += len(wanted)
        self.states.tokens_run += sum(self.lengths[row] for row in rows)
        kept = [outputs]
        if entry is not None and self.rows.keep_kv:
            kept += [entry.keys, entry.values]
        lengths = [self.lengths[row] for row in rows]
        states = map(PrefixState, *(without_padding(values, lengths) for values in kept))
        found = dict(zip(wanted, states, strict=True))
        self._used |= found
        self.states.put({self._key(*state): found[state] for state in wanted})
        if entry is not None:
            assert call.cache is not None
            call.cache.layers[call.index] = self._pristine[call.index]


def common_adapter(plans: Sequence[Plan]) -> str:
    """Return the adapter that plans run with, empty for none; a RoutingError where they differ."""
    names = {adapter_of(plan) for plan in plans}
    if len(names) > 1:
        raise RoutingError(
            "a healed path can't run in one batch with another path, since its adapter is switched "
            "on for the whole model; score it in a call of its own"
        )
    return names.pop() if names else ""


def left_padded_stack(parts: Sequence[Tensor], num_tokens: int = 0) -> Tensor:
    """Return tensors `[..., T_i, D]` as one of at least so many tokens, padded on the left."""
    lengths = [part.shape[-2] for part in parts]
    T = max(num_tokens, *lengths)
    if min(lengths) == T:
        return torch.stack([*parts])
    # One copy of all: a GPU takes as long to be told of a small operation as a layer's.
    zeros = parts[0].new_zeros(*parts[0].shape[:-2], T - min(lengths), parts[0].shape[-1])
    padded = [each for part in parts for each in (zeros[..., : T - part.shape[-2], :], part)]
    whole = torch.cat(padded, dim=-2)  # [..., U * T, D]
    return whole.view(*whole.shape[:-2], len(parts), T, -1).movedim(-3, 0)


def without_padding(values: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Return the last tokens of each row of `[U, ..., T, D]`, in one new tensor without others."""
    parts = [row[..., -length:, :] for row, length in zip(values, lengths, strict=True)]
    return torch.split(torch.cat(parts, dim=-2), list(lengths), dim=-2)
