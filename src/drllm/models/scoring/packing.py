"""Pack each prompt and its continuations into one row of a batch.

A row may have a *past*: the prompt's first tokens. Their K/V is known, so they aren't in the row.

Axes: P rows, T tokens of a row, F past tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.model.devices import on_device
from drllm.models.scoring.requests import Request

PADDING = -1
PROMPT = 0
"""The owner of a column of a row says what the column holds. Continuations are numbered from 1."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Requests as rows of one batch, padded on the left.

    The mask is `[P, 1, T, F + T]` and is added to attention scores. If all requests are plain and
    without a past, the mask is `[P, T]` instead, 1 for real tokens. Every model takes such an
    ordinary mask, even a model with windows.
    """

    ids: Tensor  # [P, T]
    positions: Tensor  # [P, T], each token's position in its prompt and continuation
    mask: Tensor  # [P, 1, T, F + T] or [P, T]
    context: Tensor  # [P, T], true for the prompt's tokens
    num_past: list[int]  # for each row, the number of the prompt's tokens in the past
    num_own: list[int]  # for each row, the number of the prompt's tokens in the row
    num_after: list[int]  # for each row, the number of tokens after the prompt


def pack(
    requests: Sequence[Request],
    *,
    dtype: torch.dtype,
    device: torch.device,
    num_past: Sequence[int] | None = None,
) -> PackedBatch:
    """Lay requests out as rows: one copy of a prompt, then all its continuations.

    The mask hides the continuations from one another. The positions of each continuation follow the
    prompt's last position. So every log-probability is the same as if the continuation had a row of
    its own.

    Args:
        requests: One request for each row.
        dtype: The dtype of an additive mask.
        device: The device of the batch.
        num_past: For each request, the number of the prompt's tokens in the past; None if there is
            no past. The K/V of the past has F columns, and is padded on the left too.
    """
    past = [0] * len(requests)
    if num_past is not None:
        past = list(num_past)
    num_own = [len(request.context) - num for request, num in zip(requests, past, strict=True)]
    num_after = [request.num_after for request in requests]
    width = max(own + after for own, after in zip(num_own, num_after, strict=True))

    shape = (len(requests), width)
    ids = torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    owners = torch.full(shape, PADDING)
    for row, request in enumerate(requests):
        parts = [request.context[past[row] :]]
        parts += [tokens[:-1] for tokens in request.continuations]
        column = width - num_own[row] - num_after[row]
        for owner, tokens in enumerate(parts):
            columns = slice(column, column + len(tokens))
            position = len(request.context)
            if owner == PROMPT:
                position = past[row]
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
    """Return the additive mask `[P, 1, T, F + T]` of rows with columns of the owners `[P, T]`.

    A token sees the past of its row. It also sees the tokens of the prompt and of its own
    continuation, up to itself. Padding sees padding, since attention that sees nothing gives NaN.
    """
    P, T = owners.shape
    reader = owners[:, :, None]
    key = owners[:, None, :]
    is_allowed = (key == PROMPT) | (key == reader)  # [P, T, T]
    is_row_seen = is_allowed.tril()
    F = max(num_past)
    is_past = torch.arange(F) >= F - torch.tensor(num_past)[:, None]  # [P, F]
    is_past_seen = is_past[:, None].expand(P, T, F)
    is_seen = torch.cat([is_past_seen, is_row_seen], dim=2)[:, None]  # [P, 1, T, F + T]
    lowest = torch.finfo(dtype).min
    return torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, lowest)
