"""Choice log-likelihoods for many (prompt, plan) pairs at once.

`ChoiceBatch` scores the continuations of each prompt under given decisions, along static paths, or
under a policy. Paths of one prompt share their common prefixes, within a call and across
calls, and prompts share what they begin with.

Axes: P prompts, B rows, N pairs, T tokens, C continuations of a row, S scored tokens, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.models.base.devices import on_device
from drllm.models.base.layers import can_pack
from drllm.models.routing.policies import Policy, PromptView
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize, prefix_cache
from drllm.models.scoring.kl import KlFromFull
from drllm.models.scoring.packing import Question, pack
from drllm.models.scoring.prefix_sharing import PackedRows, PlanPair, packed_rows

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Score:
    """How one path scores the continuations of one prompt, in nats."""

    logprobs: tuple[float, ...]  # summed, of each continuation
    # Mean KL from the full path over the prompt's tokens; None if not asked for, or not finite.
    kl: float | None = None
    # For each continuation, whether all its scored tokens are the likeliest; empty: not asked for.
    greedy: tuple[bool, ...] = ()


def _joined(parts: Sequence[Score]) -> Score:
    """Return the score of a question from those of its rows; KL stands with the first."""
    logprobs = itertools.chain(*(part.logprobs for part in parts))
    greedy = itertools.chain(*(part.greedy for part in parts))
    return Score(tuple(logprobs), parts[0].kl, tuple(greedy))


@dataclass(eq=False)
class _OncePerQuestion(Policy):
    """Asks another policy once for all rows of a question, which begin with the same context."""

    policy: Policy
    places: Sequence[range]  # the rows of each question, side by side; together they are the batch

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Show the policy each question's first row, and return its answer for all of them."""
        decided = self.policy.decide(layer, self._shown(prompts))
        return self._for_all(decided.tolist() if isinstance(decided, Tensor) else decided)

    def adapters(self, layer: int, prompts: PromptView) -> list[str]:
        """Return those that the policy chooses for the same rows, for all of them."""
        return self._for_all(self.policy.adapters(layer, self._shown(prompts)))

    def _shown(self, prompts: PromptView) -> PromptView:
        first = [rows[0] for rows in self.places]
        hidden, readable = prompts.hidden, prompts.readable
        hidden = hidden[on_device(first, hidden.device)]
        readable = readable[on_device(first, readable.device)]
        return PromptView(hidden, readable, prompts.spans, prompts.kept)

    def _for_all(self, values: Sequence[Value]) -> list[Value]:
        return [value for value, rows in zip(values, self.places, strict=False) for _ in rows]


class ChoiceBatch:
    """Questions whose continuations are scored.

    All continuations of a question are packed into one row after one copy of its context (see
    `pack`) where the model's attention takes the mask that this needs. Where it takes none, or some
    layers see fewer tokens than a question has with all its continuations, each continuation gets a
    plain row of its own with a copy of the context. The numbers are the same.

    Shared states take `state_cache_gb` GB at most (see `prefix_cache`). A forward pass has
    `paths_per_pass` rows at most, one for each path; None picks it by memory. Where `contexts` are
    rows that hold the questions' contexts, with the states of their paths, only the continuations
    are run. A prompt or a continuation without tokens is a RoutingError.

    Source: ours; it equals lm-evaluation-harness' row (context and continuation without its last
        token).
    """

    def __init__(
        self,
        routed: RoutedModel,
        questions: Sequence[Question],
        state_cache_gb: float | None,
        *,
        paths_per_pass: int | None = None,
        contexts: PackedRows | None = None,
    ) -> None:
        self.routed = routed
        self.questions = list(questions)
        for question in self.questions:
            each = zip(question.continuations, question.scored_from, strict=True)
            if not question.context or not all(len(tokens) > first for tokens, first in each):
                raise RoutingError("a prompt or one of its continuations has no tokens to score")
        device = routed.model.device
        self.states = contexts.states if contexts else prefix_cache(state_cache_gb, device)
        packs = can_pack(routed.model, max(question.length for question in self.questions))
        parts = [[question] if packs else question.apart() for question in self.questions]
        self._parts = list(itertools.chain.from_iterable(parts))  # [B], a row each
        ends = itertools.accumulate(map(len, parts))
        self._places = [
            range(end - len(rows), end) for end, rows in zip(ends, parts, strict=True)
        ]  # [P], the rows of each question
        # There is one given context a question; unpacked rows are more, and each has its own.
        given = contexts if packs else None
        self._rows = packed_rows(routed, self._parts, self.states, contexts=given)
        self._kl = KlFromFull(self._rows)
        self.forget = self._kl.forget
        self._batcher = MemoryBatcher(routed.model, self.states, paths_per_pass)
        self._targets = [self._targets_of(part) for part in self._parts]

    @property
    def shares_beginning(self) -> bool:
        """Whether the prompts begin alike, so that paths read their beginning once for all."""
        return self._rows.past is not None

    def logprobs(self, pairs: Sequence[PlanPair]) -> list[tuple[float, ...]]:
        """Return, for each pair as in `scores`, the `logprobs` of its score."""
        return [score.logprobs for score in self.scores(pairs)]

    def scores(
        self, pairs: Sequence[PlanPair], *, kl: bool = False, greedy: bool = False
    ) -> list[Score]:
        """Return how each pair of a question's place and plan scores its continuations."""
        of_rows = [(row, path) for place, path in pairs for row in self._places[place]]
        packed = self._rows.packed
        each = zip(packed.num_own, packed.num_after, strict=True)
        size = PathSize(packed.mask.shape[-1], 1 + max(after + kl * own for own, after in each))
        score = partial(self._scores, kl=kl, greedy=greedy)
        found = iter(self._batcher.run(of_rows, size, score))
        return [_joined([next(found) for _ in self._places[place]]) for place, _ in pairs]

    def _scores(self, pairs: Sequence[PlanPair], *, kl: bool, greedy: bool) -> list[Score]:
        """Return how each path scores its row; KL with the first row of a question alone."""
        num_own, num_after = self._rows.packed.num_own, self._rows.packed.num_after
        first = {places[0] for places in self._places} if kl else set()
        measured = self._kl.with_full([pair for pair in pairs if pair[0] in first])
        asked = list(dict.fromkeys([*measured, *pairs]))
        ahead = [num_own[row] - 1 if row in first else 0 for row, _ in asked]
        keep = [num + num_after[row] + 1 for num, (row, _) in zip(ahead, asked, strict=True)]
        kls: dict[PlanPair, float | None] = {}
        with self._rows.run(asked, keep) as shared:
            each = list(zip(asked, ahead, shared.logits, strict=True))
            scores = self._scored([(pair[0], logits[num:]) for pair, num, logits in each], greedy)
            if measured:
                own = [logits[: num + 1] for _, num, logits in each[: len(measured)]]
                kls = self._kl.measure(measured, own)
        found = dict(zip(asked, scores, strict=True))
        return [replace(found[pair], kl=kls.get(pair)) for pair in pairs]

    def routed_scores(self, policy: Policy) -> tuple[list[Score], Tensor]:
        """Score every question once under a policy, which reads its prompt and no continuation.

        Decisions are taken in the pass that scores. Returns how each question's continuations
        score, greedy ones named, and the routes taken, `[P, L]`.
        """
        driver = self.routed.driver
        if len(self._parts) > len(self.questions):
            policy = _OncePerQuestion(policy, self._places)
        rows, model = self._rows.packed, self.routed.model
        if self._rows.past is not None:  # whole rows, without a past
            rows = pack(self._parts, dtype=model.dtype, device=model.device)
        T, keep = rows.ids.shape[1], max(rows.num_after) + 1
        # On a CPU by index: a slice would lie scattered, and the head's product be slow. Elsewhere
        # by number: the head may be on another device than the tokens.
        last: Any = torch.arange(T - keep, T) if rows.ids.device.type == "cpu" else keep
        with driver.using(policy), driver.reading(rows.context), torch.no_grad():
            logits: Tensor = model(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                position_ids=rows.positions,
                use_cache=False,
                logits_to_keep=last,
            ).logits  # [B, S, V]
        starts = [logits.shape[1] - num - 1 for num in rows.num_after]
        parts = [(row, logits[row, start:]) for row, start in enumerate(starts)]
        scores = self._scored(parts, greedy=True)
        first = [places[0] for places in self._places]  # one for each question
        driver.keep([taken.of(first) for taken in driver.last])
        found = [_joined([scores[row] for row in places]) for places in self._places]
        return found, self.routed.last_route

    def _scored(self, rows: Sequence[tuple[int, Tensor]], greedy: bool) -> list[Score]:
        """Return the scores of rows from their scored tokens' logits `[S, V]`."""
        found = []
        for row, logits in rows:
            columns, targets, owners = self._targets[row]
            values = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # As lm-evaluation-harness has it: `logsumexp` is nearer to float64, and 1e-4 from it.
            each = [values.log_softmax(dim=1)[columns, targets]]
            if greedy:  # count the tokens that others beat
                each.append((values.argmax(dim=1)[columns] != targets).to(values.dtype))
            zeros = values.new_zeros(len(self._parts[row].continuations))
            found.append(torch.stack([zeros.index_add(0, owners, part) for part in each]))
        sums, *beaten = torch.cat(found, dim=1).tolist()  # at once: a device is waited for here
        scores: list[Score] = []
        end = 0
        for row, _ in rows:
            start, end = end, end + len(self._parts[row].continuations)
            flags = tuple(num == 0 for num in beaten[0][start:end]) if greedy else ()
            scores.append(Score(tuple(sums[start:end]), greedy=flags))
        return scores

    def _targets_of(self, question: Question) -> tuple[Tensor, ...]:
        """Return, for each token to predict, its scored column, its id and its continuation."""
        found: list[tuple[int, int, int]] = []
        column = 1  # the first scored column is the context's last token
        each = zip(question.continuations, question.scored_from, strict=True)
        for owner, (tokens, first) in enumerate(each):
            columns = [0, *range(column, column + len(tokens) - 1)]
            found += zip(columns[first:], tokens[first:], itertools.repeat(owner))
            column += len(tokens) - 1
        return on_device(found, self.routed.model.device).unbind(1)
