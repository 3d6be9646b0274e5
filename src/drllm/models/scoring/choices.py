"""Score the continuations of many (prompt, plan) pairs at once: log-likelihoods, KL, greedy flags.

`ChoiceBatch` scores the continuations of each prompt under given decisions, along static paths, or
under a policy. Paths of one prompt share their common prefixes, within a call and across
calls, and prompts share what they begin with.

Axes: P prompts, B rows, N pairs, T tokens, C continuations of a row, S scored tokens, V vocabulary.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.models.base.devices import on_device
from drllm.models.base.layers import can_pack
from drllm.models.routing.policies import PathPolicy, Policy, PromptView
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize, prefix_cache
from drllm.models.scoring.kl import KlFromFull
from drllm.models.scoring.packing import Request, pack
from drllm.models.scoring.prefix_sharing import PackedRows, PlanPair, packed_rows
from drllm.paths import adapter_of

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Score:
    """How one path scores the continuations of one prompt, in nats."""

    logprobs: tuple[float, ...]  # summed, of each continuation
    # Mean KL from the full path over the prompt's tokens; None if not requested, or not finite.
    kl: float | None = None
    # For each continuation, whether all its scored tokens are the likeliest; empty: not requested.
    greedy: tuple[bool, ...] = ()


def _join_scores(parts: Sequence[Score]) -> Score:
    """Return the score of a request from those of its rows; KL stands with the first."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    for part in parts:
        logprobs.extend(part.logprobs)
        greedy.extend(part.greedy)
    return Score(tuple(logprobs), parts[0].kl, tuple(greedy))


@dataclass(eq=False)
class _OncePerRequest(Policy):
    """Asks another policy once for all rows of a request, which begin with the same context."""

    policy: Policy
    rows_of: Sequence[range]  # the rows of each request, side by side; together they are the batch

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Show the policy each request's first row, and return its decision for all of them."""
        decisions = self.policy.decide(layer, self._shown(prompts))
        if isinstance(decisions, Tensor):
            decisions = decisions.tolist()
        return self._for_all(decisions)

    def _shown(self, prompts: PromptView) -> PromptView:
        first = [rows[0] for rows in self.rows_of]
        hidden = prompts.hidden[on_device(first, prompts.hidden.device)]
        readable = prompts.readable[on_device(first, prompts.readable.device)]
        return PromptView(hidden, readable, prompts.spans)

    def _for_all(self, values: Sequence[Value]) -> list[Value]:
        repeated: list[Value] = []
        for value, rows in zip(values, self.rows_of, strict=False):
            repeated += [value] * len(rows)
        return repeated


@dataclass(frozen=True, slots=True)
class _Targets:
    """The tokens that a row has to predict."""

    columns: Tensor  # for each, the scored column that predicts it
    ids: Tensor
    owners: Tensor  # for each, the number of its continuation


class ChoiceBatch:
    """Requests whose continuations are scored.

    All continuations of a request are packed into one row after one copy of its context (see
    `pack`) where the model's attention takes the mask that this needs. Where it takes none, or some
    layers see fewer tokens than a request has with all its continuations, each continuation gets a
    plain row of its own with a copy of the context. The numbers are the same.

    Source: ours; it equals lm-evaluation-harness' row (context and continuation without its last
        token).
    """

    def __init__(
        self,
        routed: RoutedModel,
        requests: Sequence[Request],
        state_cache_gb: float | None,
        *,
        paths_per_pass: int | None = None,
        contexts: PackedRows | None = None,
    ) -> None:
        """Lay the requests out as rows; nothing is run yet.

        Args:
            routed: The model.
            requests: What to score. A prompt or a continuation without tokens is a RoutingError.
            state_cache_gb: Maximum size of the cache of shared states in GB (see `prefix_cache`).
            paths_per_pass: Maximum rows of a forward pass, one for each path; None picks it by
                memory.
            contexts: Rows that hold the requests' contexts, with the states of their paths. Then
                only the continuations are run.
        """
        _refuse_empty(requests)
        self.routed = routed
        self.requests = list(requests)
        device = routed.model.device
        self.states = contexts.states if contexts else prefix_cache(state_cache_gb, device)

        packs = can_pack(routed.model, max(request.length for request in self.requests))
        self._parts: list[Request] = []  # [B], a row each
        self._rows_of: list[range] = []  # [P], the rows of each request
        for request in self.requests:
            parts = [request] if packs else request.split()
            first = len(self._parts)
            self._rows_of.append(range(first, first + len(parts)))
            self._parts += parts
        # `contexts` has a row for each request; unpacked rows are more, and read their own.
        past = contexts if packs else None
        self._rows = packed_rows(routed, self._parts, self.states, contexts=past)
        self._kl = KlFromFull(self._rows)
        self._batcher = MemoryBatcher(routed.model, self.states, paths_per_pass)
        self._targets = [self._targets_of(part) for part in self._parts]

    @property
    def shares_beginning(self) -> bool:
        """Whether the prompts begin alike, so that paths read their beginning once for all."""
        return self._rows.past is not None

    def forget(self) -> None:
        """Drop all shared states, and the full path's distributions."""
        self._kl.forget()

    def logprobs(self, pairs: Sequence[PlanPair]) -> list[tuple[float, ...]]:
        """Return, for each pair as in `scores`, the `logprobs` of its score."""
        return [score.logprobs for score in self.scores(pairs)]

    def scores(
        self, pairs: Sequence[PlanPair], *, kl: bool = False, greedy: bool = False
    ) -> list[Score]:
        """Score the continuations of a request along a plan, for each pair of its place and a plan.

        `kl` measures the mean KL from the full path too, `greedy` which continuations the path
        would generate. Pairs with an adapter run in passes of their own.
        """
        by_adapter: dict[str, list[PlanPair]] = {}
        for place, plan in pairs:
            by_adapter.setdefault(adapter_of(plan), []).append((place, plan))
        scores: dict[str, Iterator[Score]] = {}
        for adapter, group in by_adapter.items():
            scores[adapter] = iter(self._scores_of(group, kl=kl, greedy=greedy))
        return [next(scores[adapter_of(plan)]) for _, plan in pairs]

    def _scores_of(self, pairs: Sequence[PlanPair], *, kl: bool, greedy: bool) -> list[Score]:
        """Return the scores of pairs that all run with one adapter, or all without."""
        row_pairs: list[PlanPair] = []
        for place, plan in pairs:
            row_pairs += [(row, plan) for row in self._rows_of[place]]

        def score_rows(part: Sequence[PlanPair]) -> list[Score]:
            return self._score_rows(part, kl=kl, greedy=greedy)

        row_scores = iter(self._batcher.run(row_pairs, self._path_size(kl), score_rows))
        scores = []
        for place, _ in pairs:
            parts = list(itertools.islice(row_scores, len(self._rows_of[place])))
            scores.append(_join_scores(parts))
        return scores

    def routed_scores(self, policy: Policy) -> tuple[list[Score], Tensor]:
        """Score every request once under a policy, which reads its prompt and no continuation.

        Decisions are taken in the pass that scores. Returns how each request's continuations
        score, greedy ones named, and the routes, `[P, L]`.
        """
        # A static path is the same for all rows, and the driver has to see that it is one.
        if len(self._parts) > len(self.requests) and not isinstance(policy, PathPolicy):
            policy = _OncePerRequest(policy, self._rows_of)
        model = self.routed.model
        packed = self._rows.packed
        if self._rows.past is not None:  # whole rows, without a past
            packed = pack(self._parts, dtype=model.dtype, device=model.device)
        num_tokens = packed.ids.shape[1]
        num_kept = max(packed.num_after) + 1
        # On a CPU by index: a slice would lie scattered, and the head's product be slow. Elsewhere
        # by number: the head may be on another device than the tokens.
        last: Any = num_kept
        if packed.ids.device.type == "cpu":
            last = torch.arange(num_tokens - num_kept, num_tokens)
        driver = self.routed.driver
        with driver.using(policy), driver.reading(packed.context), torch.no_grad():
            logits: Tensor = model(
                input_ids=packed.ids,
                attention_mask=packed.mask,
                position_ids=packed.positions,
                use_cache=False,
                logits_to_keep=last,
            ).logits  # [B, S, V]
        rows = []
        for row, num_after in enumerate(packed.num_after):
            start = logits.shape[1] - num_after - 1
            rows.append((row, logits[row, start:]))
        row_scores = self._score_logits(rows, greedy=True)
        first = [rows[0] for rows in self._rows_of]  # a row for each request
        driver.keep([tuple([decisions[row] for row in first]) for decisions in driver.last])
        scores = [_join_scores([row_scores[row] for row in rows]) for rows in self._rows_of]
        return scores, self.routed.last_route

    def _path_size(self, kl: bool) -> PathSize:
        """Return the size of the largest path: with KL the prompt's logits are computed too."""
        packed = self._rows.packed
        num_logits = []
        for own, after in zip(packed.num_own, packed.num_after, strict=True):
            num_logits.append(after + own if kl else after)
        return PathSize(packed.mask.shape[-1], 1 + max(num_logits))

    def _score_rows(self, pairs: Sequence[PlanPair], *, kl: bool, greedy: bool) -> list[Score]:
        """Score each path's row in one pass; KL is measured on a request's first row alone."""
        num_own = self._rows.packed.num_own
        num_after = self._rows.packed.num_after
        kl_rows = {rows[0] for rows in self._rows_of} if kl else set()
        measured = self._kl.with_full([pair for pair in pairs if pair[0] in kl_rows])
        unique = list(dict.fromkeys([*measured, *pairs]))
        # How many tokens of the prompt are kept ahead of its last one.
        num_ahead = [num_own[row] - 1 if row in kl_rows else 0 for row, _ in unique]
        num_kept = [
            ahead + num_after[row] + 1 for ahead, (row, _) in zip(num_ahead, unique, strict=True)
        ]
        kls: dict[PlanPair, float | None] = {}
        with self._rows.run(unique, num_kept) as driver:
            passes = list(zip(unique, num_ahead, driver.logits, strict=True))
            scored = [(row, logits[ahead:]) for (row, _), ahead, logits in passes]
            scores = dict(zip(unique, self._score_logits(scored, greedy), strict=True))
            if measured:
                prompts = [logits[: ahead + 1] for _, ahead, logits in passes[: len(measured)]]
                kls = self._kl.measure(measured, prompts)
        return [replace(scores[pair], kl=kls.get(pair)) for pair in pairs]

    def _score_logits(self, rows: Sequence[tuple[int, Tensor]], greedy: bool) -> list[Score]:
        """Return the scores of rows from their scored tokens' logits `[S, V]`."""
        sums = []  # of each row [1, C], or [2, C] with the number of tokens that others beat
        for row, logits in rows:
            targets = self._targets[row]
            values = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # As lm-evaluation-harness has it: `logsumexp` is nearer to float64, and 1e-4 from it.
            summands = [values.log_softmax(dim=1)[targets.columns, targets.ids]]
            if greedy:
                is_beaten = values.argmax(dim=1)[targets.columns] != targets.ids
                summands.append(is_beaten.to(values.dtype))
            zeros = values.new_zeros(len(self._parts[row].continuations))
            added = [zeros.index_add(0, targets.owners, summand) for summand in summands]
            sums.append(torch.stack(added))
        logprobs, *beaten = torch.cat(sums, dim=1).tolist()  # at once: a device is waited for here

        scores: list[Score] = []
        start = 0
        for row, _ in rows:
            end = start + len(self._parts[row].continuations)
            flags: tuple[bool, ...] = ()
            if greedy:
                flags = tuple(count == 0 for count in beaten[0][start:end])
            scores.append(Score(tuple(logprobs[start:end]), greedy=flags))
            start = end
        return scores

    def _targets_of(self, request: Request) -> _Targets:
        """Return the tokens that a request's row has to predict."""
        columns: list[int] = []
        ids: list[int] = []
        owners: list[int] = []
        start = 1  # column 0 is the context's last token
        continuations = zip(request.continuations, request.scored_from, strict=True)
        for owner, (tokens, first) in enumerate(continuations):
            # Its first token is predicted by the context, the others by those before them.
            predictors = [0, *range(start, start + len(tokens) - 1)]
            columns += predictors[first:]
            ids += tokens[first:]
            owners += [owner] * (len(tokens) - first)
            start += len(tokens) - 1
        table = on_device([columns, ids, owners], self.routed.model.device)
        return _Targets(*table.unbind(0))


def _refuse_empty(requests: Sequence[Request]) -> None:
    for request in requests:
        continuations = zip(request.continuations, request.scored_from, strict=True)
        if not request.context or any(len(tokens) <= first for tokens, first in continuations):
            raise RoutingError("a prompt or one of its continuations has no tokens to score")
