"""The slow, obvious way of running a path, which everything fast is compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drllm.paths import to_path

LOGIT_TOLERANCE = 2e-5
"""Greatest difference of fp32 logits (standard deviation about 1.4) that batched arithmetic made
on these models: 6e-6 was measured, rounded up for other processors."""


class ListedModel:
    """A plain copy of a model whose layer list *is* the path; one unpadded row, no cache."""

    def __init__(self, model: Any, decisions: Sequence[int]) -> None:
        path = to_path(decisions)
        self.model = copy.deepcopy(model)
        layers = self.model.model.layers
        self.model.model.layers = nn.ModuleList([layers[index] for index in path])
        self.model.config.num_hidden_layers = len(path)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits of every position, `[T, V]`."""
        with torch.no_grad():
            return self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]

    def greedy(self, tokens: Sequence[int], num_new: int) -> list[int]:
        """Return the next tokens, each from a full recomputation of everything before it."""
        row = list(tokens)
        for _ in range(num_new):
            row.append(int(self.logits(row)[-1].argmax()))
        return row[len(tokens) :]


@pytest.fixture(scope="session")
def listed() -> type[ListedModel]:
    return ListedModel


@pytest.fixture(scope="session")
def logit_tolerance() -> float:
    return LOGIT_TOLERANCE
