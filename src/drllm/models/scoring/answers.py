"""Generate greedy answers for many (prompt, decisions) pairs at once, each until it is graded.

First the prompts are read as packed rows. If paths of one prompt begin with the same layers, these
layers run once, also in later calls. If prompts begin with the same tokens, these are read once.
Then the answers are decoded as an ordinary routed batch.

Axes: P prompts, N pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.model.batching import MemoryBatcher, PathSize
from drllm.model.devices import on_device
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.generate import end_tokens
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.scoring.kl import KlFromFull
from drllm.models.scoring.prefix_cache import make_prefix_cache
from drllm.models.scoring.prefix_sharing import Pair, PlanPair, pack_rows
from drllm.models.scoring.requests import Outcome, Request, Tokens

PairGrader: TypeAlias = Callable[[int, str, bool], float | None]
"""A function that grades an answer. Its arguments are the place of the pair, the text so far, and
whether the text is complete. It returns the grade, or None if it can't grade the text yet. It may
return None for a complete text too; then the answer has no grade."""

MAX_IDLE_STEPS = 0.3
"""Finished rows are dropped when the work that was wasted on them exceeds this many decoding steps
of the whole batch. A step in which a quarter of the rows is finished wastes 0.25. Rows aren't
dropped at once, since to drop them means to copy the K and V of all other rows."""


class AnswerBatch:
    """Generates greedy answers to prompts, each under its own decisions.

    Args:
        routed: The model.
        tokenizer: Decodes the answers.
        contexts: The tokens of each prompt.
        state_cache_gb: See `ChoiceBatch`.
        paths_per_pass: See `ChoiceBatch`.

    Attributes:
        rows: The prompts as packed rows. A `ChoiceBatch` can continue from them.
    """

    def __init__(
        self,
        routed: RoutedModel,
        tokenizer: Any,
        contexts: Sequence[Tokens],
        state_cache_gb: float | None,
        *,
        paths_per_pass: int | None = None,
    ) -> None:
        self.routed = routed
        self.tokenizer = tokenizer
        self.states = make_prefix_cache(state_cache_gb, routed.model.device)
        requests = [Request(context) for context in contexts]
        self.rows = pack_rows(routed, requests, self.states, keep_kv=True)
        self._kl = KlFromFull(self.rows)
        self._batcher = MemoryBatcher(routed.model, self.states, paths_per_pass)
        self._lengths = torch.tensor([len(context) for context in contexts])
        self._cache_argument = cache_argument(routed.model)
        self._end_tokens = set(end_tokens(routed.model.generation_config.eos_token_id))

    def forget(self) -> None:
        """Drop all shared states, and the full path's distributions."""
        self._kl.forget()

    def answers(
        self,
        pairs: Sequence[Pair],
        max_new_tokens: Sequence[int],
        grader: PairGrader,
        *,
        kl: bool = False,
    ) -> list[Outcome]:
        """Generate an answer for every pair.

        An answer stops as soon as the grader has graded the text so far. The tokens are the same as
        from the routed model's greedy `generate`, but without logits processors: a repetition
        penalty in the model's generation settings isn't applied (docs/differences.md, D-19).

        Args:
            pairs: Pairs of a prompt's place and the decisions to run under.
            max_new_tokens: Maximum number of tokens of each answer, `[N]`.
            grader: The function that grades a text.
            kl: Whether to measure the KL from the full path too, while the prompts are read.
        """
        num_read = self.rows.packed.mask.shape[-1]
        num_new = max(max_new_tokens, default=0)
        num_logits = 1
        if kl:
            num_logits = num_read
        size = PathSize(num_read + num_new, num_logits, keeps_kv=True)

        def answer_part(places: Sequence[int]) -> list[Outcome]:
            drafts = [_Draft(place, pairs[place], max_new_tokens[place]) for place in places]
            return self._generate(drafts, grader, kl)

        return self._batcher.run(range(len(pairs)), size, answer_part)

    def _generate(self, drafts: list[_Draft], grader: PairGrader, kl: bool) -> list[Outcome]:
        """Generate answers in one batch: read the prompts, then decode token by token."""
        batch, logits, kls = self._read_prompts(drafts, kl)
        while True:
            highest, tokens = logits.float().max(dim=-1)  # [rows]
            logprobs = highest - logits.float().logsumexp(dim=-1)
            steps = zip(batch.drafts, tokens.tolist(), logprobs.tolist(), strict=True)
            for draft, token, logprob in steps:
                if not draft.is_finished:
                    self._extend(draft, token, logprob, grader)
            if all(draft.is_finished for draft in batch.drafts):
                break
            tokens = batch.drop_finished(tokens)
            logits = batch.step(tokens)
        return [draft.finish(kls.get(draft.pair)) for draft in drafts]

    def _read_prompts(
        self, drafts: list[_Draft], kl: bool
    ) -> tuple[_DecodingBatch, Tensor, dict[PlanPair, float | None]]:
        """Read the prompts.

        Returns:
            The batch to decode, the logits of the next tokens, `[N, V]`, and the KL of each pair.
        """
        pairs = [draft.pair for draft in drafts]
        to_run: list[PlanPair]  # each pair once; with KL also the full paths that are missing
        if kl:
            to_run = self._kl.add_full_paths(pairs)
            num_kept = [self.rows.packed.num_own[row] for row, _ in to_run]  # the prompt's tokens
        else:
            to_run = list(dict.fromkeys(pairs))
            num_kept = [1] * len(to_run)  # only the last token's logits
        kls: dict[PlanPair, float | None] = {}
        with self.rows.run(to_run, num_kept) as driver:
            last_logits = {}
            for pair, values in zip(to_run, driver.logits, strict=True):
                last_logits[pair] = values[-1]
            if kl:
                kls = self._kl.measure(to_run, driver.logits)
            logits = torch.stack([last_logits[pair] for pair in pairs])
            cache = driver.routed_cache(pairs)
        return self._make_batch(drafts, cache, logits.device), logits, kls

    def _make_batch(
        self, drafts: list[_Draft], cache: Cache, device: torch.device
    ) -> _DecodingBatch:
        """Make the batch that decodes some answers from the cache of their prompts."""
        prompts = [draft.pair[0] for draft in drafts]
        lengths = self._lengths[prompts][:, None]  # [N, 1]
        width = int(lengths.max())
        lengths = on_device(lengths, device)
        return _DecodingBatch(
            routed=self.routed,
            drafts=list(drafts),
            cache=cache,
            cache_argument=self._cache_argument,
            mask=(torch.arange(width, device=device) >= width - lengths).long(),
            positions=lengths - 1,
        )

    def _extend(self, draft: _Draft, token: int, logprob: float, grader: PairGrader) -> None:
        """Add a token to an answer, and grade the answer if the text can be graded yet."""
        draft.num_steps += 1
        draft.sum_logprobs += logprob
        is_end = token in self._end_tokens
        if not is_end:
            draft.tokens.append(token)
        draft.text = self.tokenizer.decode(draft.tokens, skip_special_tokens=True)
        is_complete = is_end or draft.num_steps == draft.max_new_tokens
        draft.grade = grader(draft.place, draft.text, is_complete)
        draft.is_finished = is_complete or draft.grade is not None


@dataclass(slots=True)
class _Draft:
    """An answer that is being generated."""

    place: int  # the place of the pair in the call of `answers`
    pair: Pair
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)  # without the end-of-sequence token
    text: str = ""
    num_steps: int = 0  # number of generated tokens, with the end-of-sequence token
    sum_logprobs: float = 0.0  # sum over the generated tokens, in nats
    grade: float | None = None
    is_finished: bool = False  # whether the answer is graded or complete

    def finish(self, kl: float | None) -> Outcome:
        """Return the outcome."""
        logprob = self.sum_logprobs / self.num_steps
        return Outcome(
            kl=kl,
            answer=self.text,
            tokens=tuple(self.tokens),
            grade=self.grade,
            logprob=logprob,
        )


@dataclass(eq=False)
class _DecodingBatch:
    """Answers that are generated together, as an ordinary routed batch with a cache.

    A row stays for some steps after its answer is finished (see `MAX_IDLE_STEPS`).
    """

    routed: RoutedModel
    drafts: list[_Draft]  # [rows]
    cache: Cache
    cache_argument: str  # the name of the model's argument for the cache
    mask: Tensor  # [rows, T], 1 for real tokens
    positions: Tensor  # [rows, 1], the position of each row's last token
    idle_steps: float = 0.0  # work on finished rows since rows were last dropped

    def drop_finished(self, tokens: Tensor) -> Tensor:
        """Drop the rows whose answers are finished, after `MAX_IDLE_STEPS` of work on them.

        `tokens` are the next token of each row, `[rows]`. Returns the tokens of the remaining rows.
        """
        active = [row for row, draft in enumerate(self.drafts) if not draft.is_finished]
        self.idle_steps += (len(self.drafts) - len(active)) / len(self.drafts)
        if self.idle_steps <= MAX_IDLE_STEPS:
            return tokens
        self.idle_steps = 0.0
        keep = on_device(active, tokens.device)
        self.cache.batch_select_indices(keep)
        self.mask = self.mask[keep]
        self.positions = self.positions[keep]
        self.drafts = [self.drafts[row] for row in active]
        return tokens[keep]

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token of each row, `[rows]`; return the next token's logits, `[rows, V]`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.drafts), 1)], dim=1)
        self.positions = self.positions + 1
        finished = [row for row, draft in enumerate(self.drafts) if draft.is_finished]
        if finished:
            # A finished row's output isn't used. At position 0 it can't exceed the model's maximum
            # length, nor change what depends on the largest position of the batch (such as RoPE
            # that scales with the length).
            self.positions[on_device(finished, self.positions.device)] = 0
        with torch.no_grad(), self.routed.injection.driven_by(self.routed.driver):
            logits: Tensor = self.routed.model(
                input_ids=tokens[:, None],
                attention_mask=self.mask,
                position_ids=self.positions,
                use_cache=True,
                **{self.cache_argument: self.cache},
            ).logits[:, -1]
        return logits
