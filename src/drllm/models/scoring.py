"""Choice log-likelihoods for many (prompt, decisions) pairs at once.

Owns `ChoiceBatch`, which scores the continuations of each prompt under given decisions, or under
a policy, and which rows a question takes: one where its continuations can be packed, else one for
each. Paths of one prompt share what they have in common, within a call and across calls, and
prompts share what they begin with. Leaves how rows are laid out and run to `shared_rows`, and
what the numbers mean (reward, margin) to its callers.

Axes: P prompts, B rows, N pairs, T tokens, C continuations of a row, S scored tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drllm.errors import RoutingError
from drllm.models.damage import Damage
from drllm.models.passes import Passes, Price
from drllm.models.policies import Policy, PromptView
from drllm.models.prompts import encode, encode_continuation
from drllm.models.routed import RoutedModel
from drllm.models.shared_rows import Packed, Question, SharedRows, can_pack, pack, shared_rows
from drllm.models.sharing import Pair
from drllm.models.states import GIGABYTE, StateCache


def tokenised(tokenizer: Any, text: str, continuations: Sequence[str]) -> Question:
    """Return a rendered prompt and the continuations behind it as tokens."""
    return Question(
        encode(tokenizer, text),
        [encode_continuation(tokenizer, text, continuation) for continuation in continuations],
    )


@dataclass(frozen=True, slots=True)
class Score:
    """How one path scores the continuations of one prompt.

    Attributes:
        logprobs: Summed log-probability of each continuation, in nats.
        damage: Mean KL from the full path over the prompt's tokens, in nats; None where it
            wasn't asked for, or isn't finite.
    """

    logprobs: tuple[float, ...]
    damage: float | None = None


class _OncePerQuestion(Policy):
    """Asks another policy once for all rows of a question, which begin with the same context.

    Args:
        policy: What decides.
        places: For each question, its rows, side by side; together they are the batch.
    """

    def __init__(self, policy: Policy, places: Sequence[range]) -> None:
        self.policy = policy
        self.places = places

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        """Show the policy each question's first row, and return its answer for all of them."""
        first = torch.tensor([rows[0] for rows in self.places], device=prompts.hidden.device)
        shown = PromptView(prompts.hidden[first], prompts.readable[first], prompts.spans)
        decided = self.policy.decide(layer, shown)
        values = decided.tolist() if isinstance(decided, Tensor) else decided
        return [value for value, rows in zip(values, self.places, strict=True) for _ in rows]


class ChoiceBatch:
    """Questions whose continuations are scored.

    All continuations of a question stand behind one copy of its context, in one row (see `pack`),
    where the model's attention takes the mask that this needs. Where it takes none, or some layers
    see fewer tokens than a question has with all its continuations, each continuation stands in a
    plain row of its own, behind a context of its own. The numbers are the same.

    Args:
        routed: The model.
        questions: With at least one continuation each.
        state_cache_gb: Most memory for shared states, in GB.
        paths_per_pass: Most paths in a forward pass, counted row by row; None picks it by memory.
        contexts: Rows that hold the questions' contexts, with the states of their paths: only the
            continuations are run then, behind them. None runs the contexts here.

    Raises:
        RoutingError: A prompt or a continuation without tokens.

    Source: ours; the row that it stands for is lm-evaluation-harness' (context and continuation
        without its last token).
    """

    def __init__(
        self,
        routed: RoutedModel,
        questions: Sequence[Question],
        state_cache_gb: float,
        *,
        paths_per_pass: int | None = None,
        contexts: SharedRows | None = None,
    ) -> None:
        self.routed = routed
        self.questions = list(questions)
        self._check()
        self.states = contexts.states if contexts else StateCache(state_cache_gb * GIGABYTE)
        packs = can_pack(routed.model, self.questions)
        parts = [[question] if packs else question.apart() for question in self.questions]
        self._parts = list(itertools.chain.from_iterable(parts))  # [B], a row each
        ends = itertools.accumulate(map(len, parts))
        self._places = [
            range(end - len(rows), end) for end, rows in zip(ends, parts, strict=True)
        ]  # [P], the rows of each question
        # Contexts that were run are one a question; rows apart are more, and begin with their own.
        ahead = contexts if packs else None
        self._rows = shared_rows(routed, self._parts, self.states, contexts=ahead)
        self._damage = Damage(self._rows)
        self._passes = Passes(routed.model, self.states, paths_per_pass)
        self._whole_rows: Packed | None = None
        self._targets = [self._targets_of(part) for part in self._parts]

    def logprobs(self, pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
        """Return the summed log-probability of each continuation, in nats.

        Args:
            pairs: Question's place and decisions.

        Returns:
            For each pair the sums, in the order of the question's continuations.
        """
        return [score.logprobs for score in self.scores(pairs)]

    def scores(self, pairs: Sequence[Pair], *, damage: bool = False) -> list[Score]:
        """Return how each path scores its question's continuations.

        Args:
            pairs: Question's place and decisions.
            damage: Measure that too, in the same passes.
        """
        of_rows = [(row, path) for place, path in pairs for row in self._places[place]]
        self.states.executions_asked += sum(sum(decisions) for _, decisions in of_rows)
        packed = self._rows.packed
        most = max(
            behind + 1 + (own if damage else 0)
            for own, behind in zip(packed.num_own, packed.num_behind, strict=True)
        )
        price = Price(packed.num_columns, most)
        found = iter(self._passes.run(of_rows, price, lambda part: self._scores(part, damage)))
        each = [list(itertools.islice(found, len(self._places[place]))) for place, _ in pairs]
        return [
            Score(tuple(itertools.chain(*(s.logprobs for s in scores))), scores[0].damage)
            for scores in each
        ]

    def _scores(self, pairs: Sequence[Pair], damage: bool) -> list[Score]:
        """Return how each path scores its row; damage with the first row of a question alone."""
        num_own, num_behind = self._rows.packed.num_own, self._rows.packed.num_behind
        first = {places[0] for places in self._places} if damage else set()
        measured = self._damage.with_full([pair for pair in pairs if pair[0] in first])
        asked = list(dict.fromkeys([*measured, *pairs]))
        ahead = [num_own[row] - 1 if row in first else 0 for row, _ in asked]
        keep = [num + num_behind[row] + 1 for num, (row, _) in zip(ahead, asked, strict=True)]
        damages: dict[Pair, float | None] = {}
        with self._rows.run(asked, keep) as shared:
            each = list(zip(asked, ahead, shared.logits, strict=True))
            sums = self._sums([(pair[0], logits[num:]) for pair, num, logits in each])
            if measured:
                own = [logits[: num + 1] for _, num, logits in each[: len(measured)]]
                damages = self._damage.measure(measured, own)
        found = dict(zip(asked, sums, strict=True))
        return [Score(found[pair], damages.get(pair)) for pair in pairs]

    def routed_logprobs(self, policy: Policy) -> tuple[list[tuple[float, ...]], Tensor]:
        """Score every question once under a policy that decides on its prompt alone.

        The decisions are taken in the same pass that scores the continuations, and hold for them.

        Args:
            policy: What decides; it reads the contexts and never a continuation.

        Returns:
            The sums for each question, and the routes taken, `[P, L]`.
        """
        driver = self.routed.driver
        if len(self._parts) > len(self.questions):
            policy = _OncePerQuestion(policy, self._places)
        with driver.using(policy), driver.reading(self._whole().context):
            sums = self._all_sums()
        driver.last_route = [  # one row for each question
            tuple([layer[places[0]] for places in self._places]) for layer in driver.last_route
        ]
        return sums, self.routed.last_route

    def base_logprobs(self) -> list[tuple[float, ...]]:
        """Score every question once with the plain base model."""
        with self.routed.injection.untouched():
            return self._all_sums()

    def forget(self) -> None:
        """Give up all shared states."""
        self._damage.forget()
        self.states.forget()

    def _all_sums(self) -> list[tuple[float, ...]]:
        """Run whole rows once, and return the sums of every question."""
        rows = self._whole()
        with torch.no_grad():
            logits: Tensor = self.routed.model(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                position_ids=rows.positions,
                use_cache=False,
                logits_to_keep=max(rows.num_behind) + 1,
            ).logits
        sums = self._sums(
            [
                (row, logits[row, logits.shape[1] - num - 1 :])
                for row, num in enumerate(rows.num_behind)
            ]
        )
        return [tuple(itertools.chain(*(sums[row] for row in places))) for places in self._places]

    def _sums(self, scored: Sequence[tuple[int, Tensor]]) -> list[tuple[float, ...]]:
        """Return the sums of rows from their scored tokens' logits `[S, V]`."""
        sums = torch.cat([self._sum(row, logits) for row, logits in scored])
        values = iter(sums.tolist())  # at once: a device is waited for here
        counts = [len(self._parts[row].continuations) for row, _ in scored]
        return [tuple(itertools.islice(values, count)) for count in counts]

    def _sum(self, row: int, logits: Tensor) -> Tensor:
        """Return the summed log-probability of each continuation, `[C]`."""
        columns, targets, owners = self._targets[row]
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = values[columns, targets] - values.logsumexp(dim=1)[columns]
        num = len(self._parts[row].continuations)
        return torch.zeros(num, dtype=each.dtype, device=each.device).index_add(0, owners, each)

    def _check(self) -> None:
        for question in self.questions:
            if not question.context or not all(question.continuations):
                raise RoutingError("a prompt or one of its continuations has no tokens")

    def _whole(self) -> Packed:
        """Return the rows with nothing in front, laid out when first asked for."""
        if self._rows.front is None:
            return self._rows.packed
        if self._whole_rows is None:
            model = self.routed.model
            self._whole_rows = pack(self._parts, dtype=model.dtype, device=model.device)
        return self._whole_rows

    def _targets_of(self, question: Question) -> tuple[Tensor, ...]:
        """Return, for each token to predict, its scored column, its id and its continuation."""
        columns: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        column = 1  # the first scored column is the context's last token
        for owner, tokens in enumerate(question.continuations):
            inner = len(tokens) - 1
            columns += [0, *range(column, column + inner)]
            targets += list(tokens)
            owners += [owner] * len(tokens)
            column += inner
        device = self.routed.model.device
        return tuple(torch.tensor(each, device=device) for each in (columns, targets, owners))
