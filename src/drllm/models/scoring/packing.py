"""Packing: a prompt and its continuations in one row, and the pass of rows under many paths.

A row may have a *past* that it doesn't read again: the K/V that another row computed under the same
path. The common prefix of a batch is the past of all its prompts; a prompt is the past of the
continuations that are scored after it.

Axes: P rows, N pairs, T tokens of a row, F past tokens, S kept tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drllm.models.base.capabilities import can_split
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_cache import PrefixCache
from drllm.models.scoring.prefix_sharing import Pair, PrefixSharingDriver

Tokens: TypeAlias = Sequence[int]

MIN_PREFIX = 8
"""Fewer common tokens than these aren't worth a pass of their own."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the continuations to score after it, as tokens.

    Attributes:
        context: Tokens of the prompt, at least one.
        continuations: Tokens of each continuation, at least one each; empty to generate only.
        num_unscored: For each continuation, how many of its first tokens are read without being
            scored, fewer than it has; empty for none. They belong to one continuation alone, so
            they are no part of the prompt: of a gap that is filled, the text of the filling.
    """

    context: Tokens
    continuations: Sequence[Tokens] = ()
    num_unscored: Sequence[int] = ()

    @property
    def scored_from(self) -> list[int]:
        """For each continuation, its first scored token."""
        return list(self.num_unscored) or [0] * len(self.continuations)

    @property
    def num_after(self) -> int:
        """Tokens after the context that are read: the last of a continuation is only predicted."""
        return sum(len(tokens) - 1 for tokens in self.continuations)

    @property
    def length(self) -> int:
        """Tokens that are read, all continuations after one copy of the prompt."""
        return len(self.context) + self.num_after

    @property
    def is_plain(self) -> bool:
        """Whether all that is read is one ordinary text: at most one continuation is read."""
        return sum(len(tokens) > 1 for tokens in self.continuations) <= 1

    def apart(self) -> list[Question]:
        """Return plain questions that ask the same: itself, or one for each continuation."""
        if self.is_plain:
            return [self]
        each = zip(self.continuations, self.scored_from, strict=True)
        return [Question(self.context, [tokens], [num]) for tokens, num in each]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Questions as rows that end in a common column; padding stands on the left.

    Attributes:
        ids: `[P, T]`.
        positions: `[P, T]`, each token's place in the prompt that it belongs to.
        mask: `[P, 1, T, F + T]`, added to attention scores; or `[P, T]`, which tokens are real, for
            plain questions without a past: any attention can take it, and keeps its own window.
        context: `[P, T]`, which columns hold the prompt's own tokens.
        num_past: For each row, the past tokens of the prompt.
        num_own: For each row, the prompt's other tokens.
        num_after: For each row, its tokens after the prompt.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    context: Tensor
    num_past: list[int]
    num_own: list[int]
    num_after: list[int]

    @property
    def lengths(self) -> list[int]:
        """For each row, its tokens."""
        return [own + after for own, after in zip(self.num_own, self.num_after, strict=True)]

    @property
    def num_columns(self) -> int:
        """F + T."""
        return self.mask.shape[-1]


def pack(
    questions: Sequence[Question],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_past: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay questions out, the continuations of each after one copy of its prompt.

    The mask keeps continuations from seeing one another, and each continues at the position where
    the prompt ends, so every log-probability is what a row of its own would give.

    Args:
        questions: At least one.
        dtype: Of the mask.
        device: Where the rows lie.
        num_past: For each question, how many tokens of its prompt are past ones, the last of F
            columns; None for none.
    """
    past = [0] * len(questions) if num_past is None else list(num_past)
    num_own = [len(q.context) - num for q, num in zip(questions, past, strict=True)]
    num_after = [question.num_after for question in questions]
    shape = len(questions), max(map(operator.add, num_own, num_after))
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    owner = torch.full(shape, -1)  # 0 for the prompt, 1 for its first continuation; -1 for padding
    for row, (question, own, after) in enumerate(zip(questions, num_own, num_after, strict=True)):
        length, start = len(question.context), shape[1] - own - after
        parts = [question.context[length - own :], *(c[:-1] for c in question.continuations)]
        for number, tokens in enumerate(parts):
            columns = slice(start, start + len(tokens))
            first = length if number else length - own
            ids[row, columns] = torch.tensor(list(tokens), dtype=torch.long)
            positions[row, columns] = torch.arange(first, first + len(tokens))
            owner[row, columns] = number
            start = columns.stop
    if num_past is None and all(question.is_plain for question in questions):
        mask = (owner >= 0).long()
    else:
        # Padding sees padding: a row of the mask without any key would give NaN.
        seen_by, seen = owner[:, :, None], owner[:, None, :]
        own_seen = torch.ones_like(seen == seen_by).tril() & ((seen == 0) | (seen == seen_by))
        F = max(past)
        past_seen = torch.arange(F) >= F - torch.tensor(past)[:, None]  # [P, F]
        past_seen = past_seen[:, None].expand(*shape, F)
        is_seen = torch.cat([past_seen, own_seen], dim=2)[:, None]  # [P, 1, T, F + T]
        mask = torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, torch.finfo(dtype).min)
    ids, positions, mask, context = (t.to(device) for t in (ids, positions, mask, owner == 0))
    return PackedBatch(ids, positions, mask, context, past, num_own, num_after)


class PackedRows:
    """Rows whose states under many paths are computed once and cached.

    Args:
        routed: The model.
        packed: The rows.
        states: Where states are cached; rows with different pasts may share it.
        keep_kv: Keep K/V too, so that these rows can be continued.
        past: The rows that are the past of these, which keep their K/V, and which one each row has.
    """

    _numbers = itertools.count()

    def __init__(
        self,
        routed: RoutedModel,
        packed: PackedBatch,
        states: PrefixCache,
        *,
        keep_kv: bool = False,
        past: tuple[PackedRows, Sequence[int]] | None = None,
    ) -> None:
        self.routed = routed
        self.packed = packed
        self.states = states
        self.keep_kv = keep_kv
        self.past = past
        self.number = next(self._numbers)

    @contextmanager
    def run(self, pairs: Sequence[Pair], keep_last: Sequence[int]) -> Iterator[PrefixSharingDriver]:
        """Run the states that are new; inside the block all states of these pairs are held.

        Args:
            pairs: Row and decisions.
            keep_last: For each pair, how many of its last tokens' logits are wanted.

        Returns:
            What ran the pass, with its logits and its cache.
        """
        can_drop_tokens = self.routed.injection.can_drop_tokens
        with ExitStack() as stack:
            rows, places = self.past or (None, ())
            past = None
            if rows is not None:
                before = list(dict.fromkeys((places[row], decisions) for row, decisions in pairs))
                past = stack.enter_context(rows.run(before, [0] * len(before)))
            driver = PrefixSharingDriver(
                pairs,
                self.states,
                self.packed.lengths,
                keep_last if can_drop_tokens else None,
                rows_number=self.number,
                keep_kv=self.keep_kv,
                past=past,
                past_rows=places,
                num_past=self.packed.num_past,
                bypass=self.routed.driver.bypass,
            )
            stack.callback(driver.release)
            if not driver.knows_all or any(keep_last):
                with torch.no_grad(), self.routed.injection.driven_by(driver):
                    output = self.routed.model(
                        input_ids=self.packed.ids,
                        attention_mask=self.packed.mask,
                        position_ids=self.packed.positions,
                        use_cache=self.keep_kv or past is not None,
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
    questions: Sequence[Question],
    states: PrefixCache,
    *,
    keep_kv: bool = False,
    contexts: PackedRows | None = None,
) -> PackedRows:
    """Return the rows to run: after given contexts, after the common prefix, or whole.

    The common prefix is what all prompts begin with: instructions, a system prompt, examples. A
    prompt always keeps a token of its own after it.

    Args:
        routed: The model.
        questions: At least one.
        states: Where states are cached.
        keep_kv: Keep K/V too, so that these rows can be continued.
        contexts: Rows that hold the questions' contexts, if there are any.
    """
    where = {"dtype": routed.model.dtype, "device": routed.model.device}
    prompts = [question.context for question in questions]
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    shared = min(len(list(alike)), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
    past, num_past = None, None
    if can_split(routed.model) and (contexts is not None or shared >= MIN_PREFIX):
        if contexts is None:
            prefix = pack([Question(prompts[0][:shared])], **where)
            past = PackedRows(routed, prefix, states, keep_kv=True), [0] * len(prompts)
            num_past = [shared] * len(prompts)
        else:
            # A context's last token is run again, since its logits are needed.
            past = contexts, list(range(len(prompts)))
            num_past = [len(prompt) - 1 for prompt in prompts]
    packed = pack(questions, num_past=num_past, **where)
    return PackedRows(routed, packed, states, keep_kv=keep_kv, past=past)
