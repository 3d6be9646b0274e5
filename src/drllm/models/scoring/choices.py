"""Score the continuations of many (prompt, plan) pairs at once: log-likelihoods, KL, greedy flags.

The layers run under decisions, along static paths, or under a policy. The paths of one prompt share
their common prefixes, within a call and across calls. The prompts share their common beginning.

Axes: P prompts, B rows, N pairs, T tokens, C continuations of a row, S scored tokens, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.model.batching import MemoryBatcher, PathSize
from drllm.model.devices import on_device
from drllm.model.layers import can_pack
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import PathPolicy, Policy, PromptView
from drllm.models.scoring.kl import KlFromFull
from drllm.models.scoring.packing import PackedBatch, pack
from drllm.models.scoring.prefix_cache import make_prefix_cache
from drllm.models.scoring.prefix_sharing import PackedRows, PlanPair, pack_rows
from drllm.models.scoring.requests import Outcome, Request


def _join_outcomes(parts: Sequence[Outcome]) -> Outcome:
    """Join the outcomes of a request's rows; the first row gives the KL."""
    logprobs: list[float] = []
    greedy: list[bool] = []
    for part in parts:
        logprobs.extend(part.logprobs)
        greedy.extend(part.greedy)
    return Outcome(tuple(logprobs), tuple(greedy), parts[0].kl)


@dataclass(eq=False)
class _OncePerRequest(Policy):
    """Decides for the first row of each request, and gives the decision to its other rows.

    All rows of a request have the same context.
    """

    policy: Policy
    request_rows: Sequence[range]  # the rows of each request; together they are all rows

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Let the policy decide for the first rows, and repeat its decisions."""
        decisions = self.policy.decide(layer, self._first_rows(prompts))
        if isinstance(decisions, Tensor):
            decisions = decisions.tolist()
        repeated: list[int] = []
        for decision, rows in zip(decisions, self.request_rows, strict=False):
            repeated += [decision] * len(rows)
        return repeated

    def _first_rows(self, prompts: PromptView) -> PromptView:
        """Return the view of each request's first row."""
        first = [rows[0] for rows in self.request_rows]
        hidden = prompts.hidden[on_device(first, prompts.hidden.device)]
        readable = prompts.readable[on_device(first, prompts.readable.device)]
        return PromptView(hidden, readable, prompts.spans)


@dataclass(frozen=True, slots=True)
class _Targets:
    """The tokens that a row has to predict."""

    columns: Tensor  # for each token, the place of the logits that predict it
    ids: Tensor  # the ids of the tokens
    owners: Tensor  # for each token, the number of its continuation


class ChoiceBatch:
    """Scores the continuations of a batch of requests.

    All continuations of a request are packed into one row, after one copy of the context (see
    `pack`). This needs a special attention mask. Some models can't use the mask, and in some models
    a layer sees fewer tokens than the row has. Then each continuation gets a row of its own with a
    copy of the context. The scores are the same.

    Source: ours; the scores are the same as in lm-evaluation-harness, where a row has the context
        and one continuation without its last token.
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
        """Lay the requests out as rows; no layer runs yet.

        Args:
            routed: The model.
            requests: The prompts and their continuations.
            state_cache_gb: Maximum size of the cache of shared states in GB; None for a default
                (see `make_prefix_cache`).
            paths_per_pass: Maximum number of paths in a forward pass; None for as many as
                fit into memory.
            contexts: Rows that hold the requests' contexts with the states of their paths. Only
                the continuations are run after these rows. None runs the contexts too.

        Raises:
            RoutingError: A prompt or a continuation has no tokens.
        """
        _refuse_empty(requests)
        self.routed = routed
        self.requests = list(requests)
        if contexts is not None:
            self.states = contexts.states
        else:
            self.states = make_prefix_cache(state_cache_gb, routed.model.device)

        packs = can_pack(routed.model, max(request.length for request in self.requests))
        self._row_requests: list[Request] = []  # [B], what each row holds
        self._request_rows: list[range] = []  # [P], the rows of each request
        for request in self.requests:
            parts = [request] if packs else request.split()
            first = len(self._row_requests)
            self._request_rows.append(range(first, first + len(parts)))
            self._row_requests += parts
        # `contexts` has one row for each request, so without packing it doesn't fit these rows.
        past = contexts if packs else None
        self._rows = pack_rows(routed, self._row_requests, self.states, contexts=past)
        self._kl = KlFromFull(self._rows)
        self._batcher = MemoryBatcher(routed.model, self.states, paths_per_pass)
        self._targets = [self._find_targets(request) for request in self._row_requests]

    @property
    def shares_beginning(self) -> bool:
        """Whether a path reads the prompts' common beginning only once for all prompts."""
        return self._rows.past is not None

    def forget(self) -> None:
        """Drop all shared states, and the full path's distributions."""
        self._kl.forget()

    def logprobs(self, pairs: Sequence[PlanPair]) -> list[tuple[float, ...]]:
        """Score pairs as `scores` does, and return only the log-probabilities."""
        return [score.logprobs for score in self.scores(pairs)]

    def scores(
        self, pairs: Sequence[PlanPair], *, kl: bool = False, greedy: bool = False
    ) -> list[Outcome]:
        """Score the continuations of requests along plans.

        Args:
            pairs: Pairs of a request's place and the plan to run.
            kl: Whether to measure the mean KL from the full path too.
            greedy: Whether to tell which continuations the path would generate greedily.

        Returns:
            The outcome of each pair.
        """
        row_pairs: list[PlanPair] = []
        for place, plan in pairs:
            row_pairs += [(row, plan) for row in self._request_rows[place]]

        def score_rows(part: Sequence[PlanPair]) -> list[Outcome]:
            return self._score_rows(part, kl=kl, greedy=greedy)

        row_scores = iter(self._batcher.run(row_pairs, self._path_size(kl), score_rows))
        scores = []
        for place, _ in pairs:
            parts = list(itertools.islice(row_scores, len(self._request_rows[place])))
            scores.append(_join_outcomes(parts))
        return scores

    def routed_scores(self, policy: Policy) -> tuple[list[Outcome], Tensor]:
        """Score every request once under a policy.

        The policy reads the prompt but not the continuations. It decides in the pass that scores.

        Returns:
            The outcome of each request, with its `greedy` flags, and the routes, `[P, L]`.
        """
        # A `PathPolicy` isn't wrapped: its path is the same for all rows, and the driver has to
        # recognise it.
        if len(self._row_requests) > len(self.requests) and not isinstance(policy, PathPolicy):
            policy = _OncePerRequest(policy, self._request_rows)
        packed = self._rows.packed
        if self._rows.past is not None:  # under a policy the rows hold whole prompts
            model = self.routed.model
            packed = pack(self._row_requests, dtype=model.dtype, device=model.device)
        logits = self._compute_logits(packed, policy)
        row_logits = []
        for row, num_after in enumerate(packed.num_after):
            start = logits.shape[1] - num_after - 1
            row_logits.append((row, logits[row, start:]))
        row_scores = self._score_logits(row_logits, greedy=True)

        first_rows = [rows[0] for rows in self._request_rows]
        route = []  # [L], for each layer the decisions of all requests
        for decisions in self.routed.driver.last_route:
            first_decisions = tuple([decisions[row] for row in first_rows])
            route.append(first_decisions)
        self.routed.driver.set_last_route(route)
        scores = [_join_outcomes(row_scores[rows.start : rows.stop]) for rows in self._request_rows]
        return scores, self.routed.last_route

    def _compute_logits(self, packed: PackedBatch, policy: Policy) -> Tensor:
        """Run the model under a policy; return the logits `[B, S, V]` of each row's last tokens.

        S is one more than the largest number of tokens that a row has after its prompt.
        """
        num_tokens = packed.ids.shape[1]
        num_kept = max(packed.num_after) + 1
        # `logits_to_keep` is a list of indices on a CPU, since a slice isn't contiguous and the
        # head's product would be slow. On other devices it is a number, since the head may be on
        # another device than the tokens.
        last: Any = num_kept
        if packed.ids.device.type == "cpu":
            last = torch.arange(num_tokens - num_kept, num_tokens)
        driver = self.routed.driver
        with driver.using(policy), driver.reading(packed.context), torch.no_grad():
            logits: Tensor = self.routed.model(
                input_ids=packed.ids,
                attention_mask=packed.mask,
                position_ids=packed.positions,
                use_cache=False,
                logits_to_keep=last,
            ).logits
        return logits

    def _path_size(self, kl: bool) -> PathSize:
        """Return the size of the largest path. With `kl` it includes the prompt's logits."""
        packed = self._rows.packed
        num_logits = []
        for own, after in zip(packed.num_own, packed.num_after, strict=True):
            if kl:
                num_logits.append(own + after)
            else:
                num_logits.append(after)
        return PathSize(packed.mask.shape[-1], 1 + max(num_logits))

    def _score_rows(self, pairs: Sequence[PlanPair], *, kl: bool, greedy: bool) -> list[Outcome]:
        """Score each path's row in one pass; KL is measured only on a request's first row."""
        num_own = self._rows.packed.num_own
        num_after = self._rows.packed.num_after
        kl_rows: set[int] = set()
        if kl:
            kl_rows = {rows[0] for rows in self._request_rows}
        kl_pairs = self._kl.add_full_paths([pair for pair in pairs if pair[0] in kl_rows])
        num_kl = len(kl_pairs)
        unique = list(dict.fromkeys([*kl_pairs, *pairs]))  # begins with `kl_pairs`
        # The scores need logits from the prompt's last token on. KL needs all the prompt's logits.
        num_ahead = []  # for each pair, the number of logits ahead of the prompt's last token
        num_kept = []  # for each pair, the number of logits to compute
        for row, _ in unique:
            ahead = 0
            if row in kl_rows:
                ahead = num_own[row] - 1
            num_ahead.append(ahead)
            num_kept.append(ahead + 1 + num_after[row])
        kls: dict[PlanPair, float | None] = {}
        with self._rows.run(unique, num_kept) as driver:
            row_logits = []
            for (row, _), ahead, logits in zip(unique, num_ahead, driver.logits, strict=True):
                row_logits.append((row, logits[ahead:]))
            scores = dict(zip(unique, self._score_logits(row_logits, greedy), strict=True))
            if kl_pairs:
                prompt_logits = []
                for ahead, logits in zip(num_ahead[:num_kl], driver.logits[:num_kl], strict=True):
                    prompt_logits.append(logits[: ahead + 1])
                kls = self._kl.measure(kl_pairs, prompt_logits)
        return [replace(scores[pair], kl=kls.get(pair)) for pair in pairs]

    def _score_logits(self, rows: Sequence[tuple[int, Tensor]], greedy: bool) -> list[Outcome]:
        """Return the outcomes of rows. Each row comes with its scored tokens' logits, `[S, V]`."""
        sums = []
        for row, logits in rows:
            sums.append(self._sum_by_continuation(row, logits, greedy))
        table = torch.cat(sums, dim=1).tolist()  # one wait for the device

        scores: list[Outcome] = []
        start = 0
        for row, _ in rows:
            end = start + len(self._row_requests[row].continuations)
            flags: tuple[bool, ...] = ()
            if greedy:
                flags = tuple(num_beaten == 0 for num_beaten in table[1][start:end])
            scores.append(Outcome(tuple(table[0][start:end]), flags))
            start = end
        return scores

    def _sum_by_continuation(self, row: int, logits: Tensor, greedy: bool) -> Tensor:
        """Sum the log-probabilities of a row's scored tokens by continuation, `[1, C]`.

        With `greedy` the result is `[2, C]`. Its second row is the number of tokens of a
        continuation for which another token is likelier.
        """
        targets = self._targets[row]
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # `log_softmax` as in lm-evaluation-harness. `logsumexp` is nearer to float64, but differs
        # from the harness by 1e-4.
        summands = [values.log_softmax(dim=1)[targets.columns, targets.ids]]
        if greedy:
            is_beaten = values.argmax(dim=1)[targets.columns] != targets.ids
            summands.append(is_beaten.to(values.dtype))
        zeros = values.new_zeros(len(self._row_requests[row].continuations))
        return torch.stack([zeros.index_add(0, targets.owners, summand) for summand in summands])

    def _find_targets(self, request: Request) -> _Targets:
        """Find the tokens that a request's row has to predict."""
        columns: list[int] = []
        ids: list[int] = []
        owners: list[int] = []
        # The logits begin at the context's last token. The read tokens of the continuations follow.
        start = 1
        continuations = zip(request.continuations, request.scored_from, strict=True)
        for owner, (tokens, first) in enumerate(continuations):
            # The context predicts the first token, and every token the next one. The last token of
            # a continuation predicts nothing, so it isn't read.
            predictors = [0, *range(start, start + len(tokens) - 1)]
            columns += predictors[first:]
            ids += tokens[first:]
            owners += [owner] * (len(tokens) - first)
            start += len(tokens) - 1
        table = torch.tensor([columns, ids, owners], dtype=torch.long)
        return _Targets(*on_device(table, self.routed.model.device).unbind(0))


def _refuse_empty(requests: Sequence[Request]) -> None:
    """Refuse a request without tokens to read or to score."""
    for request in requests:
        continuations = zip(request.continuations, request.scored_from, strict=True)
        if not request.context or any(len(tokens) <= first for tokens, first in continuations):
            raise RoutingError("a prompt has no tokens, or a continuation has no tokens to score")
