"""A small set of features, and the identity of the base model they stand for."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drllm.training.features import Features

sys.path.insert(0, str(Path(__file__).parent))  # helpers, which scripts use too

L, W, D = 3, 4, 6


IDENTITY: dict[str, Any] = {
    "id": "org/tiny",
    "revision": "main",
    "class": "LlamaForCausalLM",
    "num_layers": L,
    "hidden_size": D,
    "fingerprint": "0123456789abcdef",
}


def make_features(
    num_targets: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Features:
    """Features from which the labels can be learned: the first component gives them away."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(
        torch.tensor([0.3, 0.6, 0.1]), num_targets * L, replacement=True, generator=generator
    ).view(num_targets, L)
    labels[labels.sum(dim=1) == 0, -1] = 1
    means = torch.randn(num_targets, L, W, D, generator=generator).to(dtype)
    means[..., 0] += 4 * (labels[..., None] - 1)
    filled = torch.randint(1, W + 1, (num_targets,), generator=generator)
    for row, number in enumerate(filled.tolist()):
        means[row, :, number:] = 0
    return Features(
        means=means,
        filled=filled,
        labels=labels,
        questions=tuple(f"question {row}" for row in range(num_targets)),
        tasks=tuple("odd" if row % 2 else "even" for row in range(num_targets)),
    )


@pytest.fixture
def features_of() -> Callable[..., Features]:
    return make_features


@pytest.fixture
def identity() -> dict[str, Any]:
    return dict(IDENTITY)
