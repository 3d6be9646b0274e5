"""Choice log-likelihoods and greedy answers for many (prompt, decisions) pairs at once.

Owns the two ways of asking a model under given decisions: `ChoiceBatch` scores the continuations
of each prompt, `AnswerBatch` generates. Both prefill through `sharing`, so that paths of one
prompt share what they have in common, within a call and across calls. Leaves what the numbers
mean (reward, margin) to its callers.

Axes: P prompts, N pairs, T tokens, C continuations of a prompt, S scored columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.errors import RoutingError
from drllm.models.cache import cache_argument
from drllm.models.injection import Driver
from drllm.models.policies import Policy
from drllm.models.prompts import encode, encode_continuation, left_padded
from drllm.models.routed import RoutedModel
from drllm.models.sharing import Pair, SharingDriver, StateCache

Tokens: TypeAlias = Sequence[int]

Verdict: TypeAlias = Callable[[int, str, bool], float | None]
"""Called with a pair's place, its text so far, and whether that is all; None while undecided."""

GIGABYTE = 1e9

PAIRS_PER_PASS = 32
"""Pairs in one forward pass; bounds the logits held at once."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the continuations to score behind it, as tokens.

    Attributes:
        context: Tokens of the prompt, at least one.
        continuations: Tokens of each continuation, at least one each; empty to generate only.
    """

    context: Tokens
    continuations: Sequence[Tokens] = ()


def tokenised(tokenizer: Any, text: str, continuations: Sequence[str]) -> Question:
    """Return a rendered prompt and the continuations behind it as tokens."""
    return Question(
        encode(tokenizer, text),
        [encode_continuation(tokenizer, text, continuation) for continuation in continuations],
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedily generated answer.

    Attributes:
        text: As far as it was generated.
        tokens: Its tokens, without the end-of-sequence token.
        grade: What the verdict said.
        logprob: Mean log-probability of the tokens generated (with the end of sequence), in nats.
    """

    text: str
    tokens: tuple[int, ...]
    grade: float
    logprob: float


class ChoiceBatch:
    """Questions whose continuations are scored, packed into one row each.

    All continuations of a question stand behind one copy of its context. A mask keeps them from
    seeing one another and each continues at the position where the context ends, so every
    log-probability is what a row of its own would give. Rows end in a common column.

    Args:
        routed: The model.
        questions: With at least one continuation each.
        state_cache_gb: Most memory for shared states, in GB.

    Raises:
        RoutingError: An attention implementation that can't take such a mask, or a row that is
            longer than the sliding window of the model's attention, which the mask would undo.

    Source: ours; the row that it stands for is lm-evaluation-harness' (context and continuation
        without its last token).
    """

    def __init__(
        self, routed: RoutedModel, questions: Sequence[Question], state_cache_gb: float
    ) -> None:
        attention = routed.model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise RoutingError(
                f"choices are scored with a mask that attention {attention!r} can't take; "
                f"load the model with --attn-implementation sdpa (or eager)"
            )
        self.routed = routed
        self.questions = list(questions)
        self.states = StateCache(state_cache_gb * GIGABYTE)
        self._pack()

    def logprobs(self, pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
        """Return the summed log-probability of each continuation, in nats.

        Args:
            pairs: Question's place and decisions.

        Returns:
            For each pair the sums, in the order of the question's continuations.
        """
        return [
            sums
            for start in range(0, len(pairs), PAIRS_PER_PASS)
            for sums in self._logprobs(pairs[start : start + PAIRS_PER_PASS])
        ]

    def _logprobs(self, pairs: Sequence[Pair]) -> list[tuple[float, ...]]:
        driver = SharingDriver(
            pairs, self.states, keep_last=self._num_scored, bypass=self.routed.driver.bypass
        )
        logits = self._forward(driver, columns=0)[0]  # all kept tokens of all pairs behind another
        each = torch.split(logits, [self._num_scored[question] for question, _ in pairs])
        return [self._sums(question, part) for (question, _), part in zip(pairs, each, strict=True)]

    def routed_logprobs(self, policy: Policy) -> tuple[list[tuple[float, ...]], Tensor]:
        """Score every question once under a policy that decides on its prompt alone.

        The decisions are taken in the same pass that scores the continuations, and hold for them.

        Args:
            policy: What decides; it reads the contexts and never a continuation.

        Returns:
            The sums for each question, and the routes taken, `[P, L]`.
        """
        driver = self.routed.driver
        with driver.using(policy), driver.reading(self._readable):
            logits = self._forward(driver, columns=max(self._num_scored))
        return self._all_sums(logits), self.routed.last_route

    def base_logprobs(self) -> list[tuple[float, ...]]:
        """Score every question once with the plain base model."""
        with self.routed.injection.untouched():
            logits = self._forward(None, columns=max(self._num_scored))
        return self._all_sums(logits)

    def forget(self) -> None:
        """Give up all shared states."""
        self.states = StateCache(self.states.max_bytes)

    def _forward(self, driver: Driver | None, *, columns: int) -> Tensor:
        """Return the logits of the last columns (0: of all that the driver kept)."""
        injection = self.routed.injection
        with torch.no_grad(), injection.driven_by(driver) if driver else nullcontext():
            logits: Tensor = self.routed.model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                use_cache=False,
                logits_to_keep=columns,
            ).logits
        return logits

    def _all_sums(self, logits: Tensor) -> list[tuple[float, ...]]:
        """Return the sums of every question from the last columns of its row, `[P, S, V]`."""
        return [
            self._sums(row, logits[row, logits.shape[1] - num :])
            for row, num in enumerate(self._num_scored)
        ]

    def _sums(self, question: int, logits: Tensor) -> tuple[float, ...]:
        columns, targets, owners = self._targets[question]
        wanted = logits[columns]
        wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))  # [targets, V]
        each = wanted.gather(1, targets[:, None])[:, 0] - wanted.logsumexp(dim=1)
        num = len(self.questions[question].continuations)
        total = torch.zeros(num, dtype=each.dtype, device=each.device).index_add(0, owners, each)
        return tuple(total.tolist())

    def _pack(self) -> None:
        for question in self.questions:
            if not question.context or not all(question.continuations):
                raise RoutingError("a prompt or one of its continuations has no tokens")
        device = self.routed.model.device
        # The last token of a continuation is only predicted, never read.
        behind = [sum(len(c) - 1 for c in q.continuations) for q in self.questions]
        P = len(self.questions)
        T = max(len(q.context) + b for q, b in zip(self.questions, behind, strict=True))
        window = getattr(self.routed.model.config.get_text_config(), "sliding_window", None)
        if window is not None and window < T:
            raise RoutingError(
                f"a question and its choices have {T} tokens, but attention of this model slides "
                f"over {window}; choices can only be scored within the window"
            )
        ids = torch.zeros(P, T, dtype=torch.long)
        positions = torch.zeros(P, T, dtype=torch.long)
        readable = torch.zeros(P, T, dtype=torch.bool)
        # Padding sees itself alone: a row of the mask without any key would give NaN.
        seen = torch.eye(T, dtype=torch.bool).repeat(P, 1, 1)  # [P, T, T]
        self._targets: list[tuple[Tensor, ...]] = []
        for row, question in enumerate(self.questions):
            length = len(question.context)
            front = T - behind[row]  # where the context ends
            start = front - length
            ids[row, start:front] = torch.tensor(list(question.context))
            positions[row, start:front] = torch.arange(length)
            readable[row, start:front] = True
            seen[row, start:front, start:front] = torch.ones(length, length).tril().bool()
            columns: list[int] = []
            targets: list[int] = []
            owners: list[int] = []
            column = front
            for owner, tokens in enumerate(question.continuations):
                inner = len(tokens) - 1
                end = column + inner
                ids[row, column:end] = torch.tensor(list(tokens[:-1]), dtype=torch.long)
                positions[row, column:end] = torch.arange(length, length + inner)
                seen[row, column:end, start:front] = True
                seen[row, column:end, column:end] = torch.ones(inner, inner).tril().bool()
                # The row's scored columns start with the context's last one.
                columns += [0, *range(column - front + 1, end - front + 1)]
                targets += list(tokens)
                owners += [owner] * len(tokens)
                column = end
            indices = (columns, targets, owners)
            self._targets.append(tuple(torch.tensor(each, device=device) for each in indices))
        dtype = self.routed.model.dtype
        mask = torch.zeros(P, 1, T, T, dtype=dtype).masked_fill(
            ~seen[:, None], torch.finfo(dtype).min
        )
        self._num_scored = [count + 1 for count in behind]
        self._ids, self._positions = ids.to(device), positions.to(device)
        self._mask, self._readable = mask.to(device), readable.to(device)


class AnswerBatch:
    """Prompts that are answered greedily, each pair under its own decisions.

    Args:
        routed: The model.
        tokenizer: Turns tokens into the text that is judged.
        questions: Only their contexts are used.
        state_cache_gb: Most memory for shared states and their K/V, in GB.
    """

    def __init__(
        self,
        routed: RoutedModel,
        tokenizer: Any,
        questions: Sequence[Question],
        state_cache_gb: float,
    ) -> None:
        self.routed = routed
        self.tokenizer = tokenizer
        self.states = StateCache(state_cache_gb * GIGABYTE)
        device = routed.model.device
        self._ids, self._mask = left_padded([q.context for q in questions], device)
        self._positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        ends = routed.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._cache_argument = cache_argument(routed.model)

    def answers(
        self, pairs: Sequence[Pair], max_new_tokens: Sequence[int], verdict: Verdict
    ) -> list[Answer]:
        """Generate until the verdict on every pair is in.

        Args:
            pairs: Prompt's place and decisions.
            max_new_tokens: For each pair, the most tokens of its answer.
            verdict: Grades the text so far; an answer stops as soon as it isn't None.

        Returns:
            One answer per pair, in order. As far as it goes, its text is what greedy `generate`
            of the routed model gives without logits processors: a repetition penalty in a model's
            generation settings is not applied (docs/differences.md, D-19).
        """
        answers: list[Answer] = []
        for start in range(0, len(pairs), PAIRS_PER_PASS):
            part = slice(start, start + PAIRS_PER_PASS)
            answers += self._generate(pairs[part], max_new_tokens[part], verdict, start)
        return answers

    def _generate(
        self, pairs: Sequence[Pair], max_new_tokens: Sequence[int], verdict: Verdict, start: int
    ) -> list[Answer]:
        """Answer the pairs of one pass, the first of which stands at place `start` of them all."""
        logits, cache = self._prefill(pairs)
        rows = torch.tensor([row for row, _ in pairs], device=self._ids.device)
        mask = self._mask[rows]
        positions = self._positions[rows, -1:]
        tokens: list[list[int]] = [[] for _ in pairs]
        logprobs = [0.0] * len(pairs)
        done: dict[int, Answer] = {}
        active = list(range(len(pairs)))  # the pair behind each row of the shrinking batch
        for step in range(1, max(max_new_tokens) + 1):
            highest, best = logits.float().max(dim=-1)  # [rows]
            each = (highest - logits.float().logsumexp(dim=-1)).tolist()
            for place, token, logprob in zip(active, best.tolist(), each, strict=True):
                logprobs[place] += logprob
                finished = token in self._ends
                if not finished:
                    tokens[place].append(token)
                text = self.tokenizer.decode(tokens[place], skip_special_tokens=True)
                grade = verdict(start + place, text, finished or step == max_new_tokens[place])
                if grade is not None:
                    done[place] = Answer(text, tuple(tokens[place]), grade, logprobs[place] / step)
            going = [row for row, place in enumerate(active) if place not in done]
            if not going:
                break
            if len(going) < len(active):
                keep = torch.tensor(going, device=best.device)
                cache.batch_select_indices(keep)
                best, mask, positions = best[keep], mask[keep], positions[keep]
                active = [active[row] for row in going]
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            positions = positions + 1
            with torch.no_grad(), self.routed.injection.driven_by(self.routed.driver):
                logits = self.routed.model(
                    input_ids=best[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    **{self._cache_argument: cache},
                ).logits[:, -1]
        return [done[place] for place in range(len(pairs))]

    def forget(self) -> None:
        """Give up all shared states."""
        self.states = StateCache(self.states.max_bytes)

    def _prefill(self, pairs: Sequence[Pair]) -> tuple[Tensor, Any]:
        """Return the last token's logits `[N, V]` and the routed cache of N rows."""
        driver = SharingDriver(pairs, self.states, keep_kv=True, bypass=self.routed.driver.bypass)
        with torch.no_grad(), self.routed.injection.driven_by(driver):
            output = self.routed.model(
                input_ids=self._ids,
                attention_mask=self._mask,
                position_ids=self._positions,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = next(value for value in output.values() if isinstance(value, Cache))
        return output.logits[:, -1], driver.routed_cache(cache)
