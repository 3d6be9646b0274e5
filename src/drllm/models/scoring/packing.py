"""Pack a prompt and its continuations into one row, or what is left of them after a past.

Axes: P rows, T tokens of a row, F past tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from drllm.models.base.devices import on_device

Tokens: TypeAlias = Sequence[int]

PADDING = -1
PROMPT = 0
"""What `_owners` says of a column; the continuations are counted from 1."""


@dataclass(frozen=True, slots=True)
class Request:
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

    def split(self) -> "list[Request]":
        """Return plain requests that ask the same: itself, or one for each continuation."""
        if self.is_plain:
            return [self]
        return [
            Request(self.context, [tokens], [first])
            for tokens, first in zip(self.continuations, self.scored_from, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Requests as rows that end in a common column; padding stands on the left.

    The mask is `[P, 1, T, F + T]`, added to attention scores; or `[P, T]`, which tokens are real,
    for plain requests without a past: any attention can take it, and keeps its own window.
    """

    ids: Tensor  # [P, T]
    positions: Tensor  # [P, T], each token's place in the prompt that it belongs to
    mask: Tensor
    context: Tensor  # [P, T], which columns hold the prompt's own tokens
    num_past: list[int]  # for each row, the past tokens of the prompt
    num_own: list[int]  # for each row, the prompt's other tokens
    num_after: list[int]  # for each row, its tokens after the prompt


def pack(
    requests: Sequence[Request],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_past: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay requests out as rows, the continuations of each after one copy of its prompt.

    The mask keeps continuations from seeing one another, and each continues at the position where
    the prompt ends, so every log-probability is what a row of its own would give. `num_past` says
    for each request how many tokens of its prompt are past ones, the last of F columns.
    """
    past = [0] * len(requests) if num_past is None else list(num_past)
    num_own = [len(request.context) - num for request, num in zip(requests, past, strict=True)]
    num_after = [request.num_after for request in requests]
    width = max(own + after for own, after in zip(num_own, num_after, strict=True))

    shape = (len(requests), width)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    owners = torch.full(shape, PADDING)
    for row, request in enumerate(requests):
        length = len(request.context)
        parts = [request.context[past[row] :]]
        parts += [tokens[:-1] for tokens in request.continuations]
        column = width - num_own[row] - num_after[row]
        for owner, tokens in enumerate(parts):
            columns = slice(column, column + len(tokens))
            position = past[row] if owner == PROMPT else length
            ids[row, columns] = torch.tensor(list(tokens), dtype=torch.long)
            positions[row, columns] = torch.arange(position, position + len(tokens))
            owners[row, columns] = owner
            column = columns.stop

    if num_past is None and all(request.is_plain for request in requests):
        mask = (owners != PADDING).long()
    else:
        mask = _additive_mask(owners, past, dtype)
    return PackedBatch(
        ids=on_device(ids, device),
        positions=on_device(positions, device),
        mask=on_device(mask, device),
        context=on_device(owners == PROMPT, device),
        num_past=past,
        num_own=num_own,
        num_after=num_after,
    )


def _additive_mask(owners: Tensor, num_past: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the mask `[P, 1, T, F + T]` of rows whose columns have these owners, `[P, T]`.

    A token sees the prompt and its own continuation up to itself, and the past of its row. Padding
    sees padding: a row of the mask without any key would give NaN.
    """
    P, T = owners.shape
    reader = owners[:, :, None]
    key = owners[:, None, :]
    is_allowed = (key == PROMPT) | (key == reader)  # [P, T, T]
    is_own_seen = is_allowed & torch.ones_like(is_allowed).tril()
    F = max(num_past)
    is_past = torch.arange(F) >= F - torch.tensor(num_past)[:, None]  # [P, F]
    is_past_seen = is_past[:, None].expand(P, T, F)
    is_seen = torch.cat([is_past_seen, is_own_seen], dim=2)[:, None]  # [P, 1, T, F + T]
    lowest = torch.finfo(dtype).min
    return torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, lowest)
