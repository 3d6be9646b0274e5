"""Packing: a prompt and its continuations in one row, or what is left of it after a past.

Axes: P rows, T tokens of a row, F past tokens.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from drllm.models.base.devices import on_device

Tokens: TypeAlias = Sequence[int]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the continuations to score after it, as tokens."""

    context: Tokens  # tokens of the prompt, at least one
    # Tokens of each continuation, at least one each; empty to generate only.
    continuations: Sequence[Tokens] = ()
    # For each continuation, how many of its first tokens are read without being scored, fewer than
    # it has; empty for none. They belong to one continuation alone, so they are no part of the
    # prompt: of a gap that is filled, the text of the filling.
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

    def apart(self) -> "list[Question]":
        """Return plain questions that ask the same: itself, or one for each continuation."""
        if self.is_plain:
            return [self]
        each = zip(self.continuations, self.scored_from, strict=True)
        return [Question(self.context, [tokens], [num]) for tokens, num in each]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Questions as rows that end in a common column; padding stands on the left.

    The mask is `[P, 1, T, F + T]`, added to attention scores; or `[P, T]`, which tokens are real,
    for plain questions without a past: any attention can take it, and keeps its own window.
    """

    ids: Tensor  # [P, T]
    positions: Tensor  # [P, T], each token's place in the prompt that it belongs to
    mask: Tensor
    context: Tensor  # [P, T], which columns hold the prompt's own tokens
    num_past: list[int]  # for each row, the past tokens of the prompt
    num_own: list[int]  # for each row, the prompt's other tokens
    num_after: list[int]  # for each row, its tokens after the prompt


def pack(
    questions: Sequence[Question],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_past: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay questions out, the continuations of each after one copy of its prompt.

    The mask keeps continuations from seeing one another, and each continues at the position where
    the prompt ends, so every log-probability is what a row of its own would give. `num_past` says
    for each question how many tokens of its prompt are past ones, the last of F columns.
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
    ids, positions, mask, context = (
        on_device(each, device) for each in (ids, positions, mask, owner == 0)
    )
    return PackedBatch(ids, positions, mask, context, past, num_own, num_after)
