"""Greedy answers for many (prompt, decisions) pairs at once, each until it can be graded.

Prompts are read as packed rows, so that paths of one prompt share their common prefixes, within a
call and across calls, and prompts share what they begin with; then they are decoded as an ordinary
routed batch with a cache of its own.

Axes: P prompts, N pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.models.routing.generate import end_tokens
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import MemoryBatcher, PathSize
from drllm.models.scoring.kl import KlFromFull
from drllm.models.scoring.packing import PackedRows, Question, Tokens, packed_rows
from drllm.models.scoring.prefix_cache import GIGABYTE, PrefixCache
from drllm.models.scoring.prefix_sharing import Pair

Grader: TypeAlias = Callable[[int, str, bool], float | None]
"""Called with a pair's place, its text so far, and whether that is all; None while undecided."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedily generated answer.

    Attributes:
        text: As far as it was generated.
        tokens: Its tokens, without the end-of-sequence token.
        grade: What the grader said.
        logprob: Mean log-probability of the tokens generated (with the end of sequence), in nats.
        kl: Mean KL from the full path over the prompt's tokens, in nats; None where it
            wasn't asked for, or isn't finite.
    """

    text: str
    tokens: tuple[int, ...]
    grade: float
    logprob: float
    kl: float | None = None


class AnswerBatch:
    """Prompts that are answered greedily, each pair under its own decisions.

    Args:
        routed: The model.
        tokenizer: Turns tokens into the text that is graded.
        contexts: The prompts' tokens.
        state_cache_gb: Maximum memory for shared states and their K/V, in GB.
        paths_per_pass: Maximum paths in a forward pass; None picks it by memory.

    Attributes:
        rows: The prompts' rows, with the states of their paths.
    """

    def __init__(
        self,
        routed: RoutedModel,
        tokenizer: Any,
        contexts: Sequence[Tokens],
        state_cache_gb: float,
        *,
        paths_per_pass: int | None = None,
    ) -> None:
        self.routed = routed
        self.tokenizer = tokenizer
        self.states = PrefixCache(state_cache_gb * GIGABYTE)
        questions = [Question(context) for context in contexts]
        self.rows: PackedRows = packed_rows(routed, questions, self.states, keep_kv=True)
        self._kl = KlFromFull(self.rows)
        self._batcher = MemoryBatcher(routed.model, self.states, paths_per_pass)
        self._lengths = torch.tensor([len(context) for context in contexts])
        self._ends = set(end_tokens(routed.model.generation_config.eos_token_id))
        self._cache_argument = cache_argument(routed.model)

    def answers(
        self,
        pairs: Sequence[Pair],
        max_new_tokens: Sequence[int],
        grader: Grader,
        *,
        kl: bool = False,
    ) -> list[Answer]:
        """Generate until every pair is graded.

        Args:
            pairs: Prompt's place and decisions.
            max_new_tokens: For each pair, the maximum tokens of its answer.
            grader: Grades the text so far; an answer stops as soon as it isn't None.
            kl: Measure that too, in the passes that read the prompts.

        Returns:
            One answer per pair, in order. As far as it goes, its text is what greedy `generate`
            of the routed model gives without logits processors: a repetition penalty in a model's
            generation settings is not applied (docs/differences.md, D-19).
        """
        self.states.executions_asked += sum(sum(decisions) for _, decisions in pairs)
        columns = self.rows.packed.num_columns
        size = PathSize(columns, columns if kl else 1, keeps_kv=True)

        def answered(places: Sequence[int]) -> list[Answer]:
            pending = [_Pending(place, pairs[place], max_new_tokens[place]) for place in places]
            return self._generate(pending, grader, kl)

        return self._batcher.run(range(len(pairs)), size, answered)

    def forget(self) -> None:
        """Drop all shared states."""
        self._kl.forget()
        self.states.forget()

    def _generate(self, pending: list[_Pending], grader: Grader, kl: bool) -> list[Answer]:
        """Answer the pairs of one pass."""
        everything = pending
        logits, cache, kls = self._read([each.pair for each in pending], kl)
        lengths = self._lengths[[each.pair[0] for each in pending]].to(logits.device)[:, None]
        width = int(lengths.max())
        mask = (torch.arange(width, device=logits.device) >= width - lengths).long()
        positions = lengths - 1
        while True:
            highest, best = logits.float().max(dim=-1)  # [rows]
            logprobs = highest - logits.float().logsumexp(dim=-1)
            for each, token, logprob in zip(pending, best.tolist(), logprobs.tolist(), strict=True):
                each.num_steps += 1
                each.logprob += logprob
                is_end = token in self._ends
                if not is_end:
                    each.tokens.append(token)
                each.text = self.tokenizer.decode(each.tokens, skip_special_tokens=True)
                is_all = is_end or each.num_steps == each.max_new_tokens
                each.grade = grader(each.place, each.text, is_all)
            left = [row for row, each in enumerate(pending) if each.grade is None]
            if not left:
                return [each.answer(kls.get(each.pair)) for each in everything]
            if len(left) < len(pending):
                keep = torch.tensor(left, device=best.device)
                cache.batch_select_indices(keep)
                best, mask, positions = best[keep], mask[keep], positions[keep]
                pending = [pending[row] for row in left]
            mask = torch.cat([mask, mask.new_ones(len(pending), 1)], dim=1)
            positions = positions + 1
            with torch.no_grad(), self.routed.injection.driven_by(self.routed.driver):
                logits = self.routed.model(
                    input_ids=best[:, None],
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    **{self._cache_argument: cache},
                ).logits[:, -1]

    def _read(
        self, pairs: Sequence[Pair], kl: bool
    ) -> tuple[Tensor, Cache, dict[Pair, float | None]]:
        """Return the prompts' last logits `[N, V]`, the routed cache of N rows, and the KL."""
        asked = self._kl.with_full(pairs) if kl else list(dict.fromkeys(pairs))
        keep = [self.rows.packed.num_own[row] if kl else 1 for row, _ in asked]
        with self.rows.run(asked, keep) as shared:
            last = {pair: values[-1] for pair, values in zip(asked, shared.logits, strict=True)}
            kls = self._kl.measure(asked, shared.logits) if kl else {}
            return torch.stack([last[pair] for pair in pairs]), shared.routed_cache(pairs), kls


@dataclass(slots=True)
class _Pending:
    """An unfinished answer."""

    place: int
    pair: Pair
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprob: float = 0.0
    num_steps: int = 0
    grade: float | None = None

    def answer(self, kl: float | None) -> Answer:
        assert self.grade is not None
        logprob = self.logprob / self.num_steps
        return Answer(self.text, tuple(self.tokens), self.grade, logprob, kl)
