"""What a fit reads: the routers' inputs with their labels, wherever they are kept.

Owns the few things that a set of features must offer, several sets as one, and what is computed of
one by reading it once from end to end. Leaves keeping it, in memory or in a file, to `features`,
and batches to `batches`.

Axes: N targets (or examples, where each is there several times), B rows, D hidden, L layers, W
windows, C = 3 decisions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from drllm.errors import RecordError

READ_AT_ONCE = 32
CONSTANT = 1e-5


class Examples(Protocol):
    """Routers' inputs along their target paths, in the order of the targets.

    Behind these there may be inputs along other routes of the same targets (`Aggregate`).
    """

    @property
    def num_targets(self) -> int:
        """How many targets there are: so many rows, the first ones, hold each of them once."""

    @property
    def labels(self) -> Tensor:
        """`[N, L]` int64: the target path's decisions."""

    @property
    def filled(self) -> Tensor:
        """`[N]`: how many windows hold tokens."""

    @property
    def questions(self) -> Sequence[str]:
        """`[N]`: the questions' texts; they decide what is held out."""

    @property
    def tasks(self) -> Sequence[str]:
        """`[N]`: the tasks' names."""

    def rows(self, index: Sequence[int]) -> Tensor:
        """Return some targets' windows, `[B, L, W, D]` in float32 on the CPU; zeros past `filled`.

        Nothing but the rows asked for need be in memory.
        """


class Aggregate:
    """Several sets of examples as one: the same targets along one route after the other.

    Args:
        parts: The first along the target paths, each target once; the others hold targets of the
            first alone, along other routes, with the same labels.

    Source: the aggregated data set of Ross et al. 2011 (arXiv 1011.0686), algorithm 3.1.
    """

    def __init__(self, parts: Sequence[Examples]) -> None:
        self.parts = list(parts)
        self.num_targets = parts[0].num_targets
        self.labels = torch.cat([part.labels for part in parts])
        self.filled = torch.cat([part.filled for part in parts])
        self.questions = [text for part in parts for text in part.questions]
        self.tasks = [name for part in parts for name in part.tasks]
        self._ends = list(itertools.accumulate(len(part.labels) for part in parts))

    def rows(self, index: Sequence[int]) -> Tensor:
        """Return some rows' windows, `[B, L, W, D]`, each read from its own part."""
        wanted = torch.as_tensor(index, dtype=torch.int64)
        owner = torch.bucketize(wanted, torch.tensor(self._ends), right=True)  # [B]
        means = self.parts[0].rows([])
        means = means.new_empty(len(wanted), *means.shape[1:])
        for number, (part, end) in enumerate(zip(self.parts, self._ends, strict=True)):
            mine = owner == number
            if bool(mine.any()):
                means[mine] = part.rows((wanted[mine] - (end - len(part.labels))).tolist())
        return means


def each_once(examples: Examples, rows: Sequence[int]) -> list[int]:
    """Return those of some rows that are a target along its own path, so that none counts twice."""
    return [row for row in rows if row < examples.num_targets]


def shape(examples: Examples) -> tuple[int, int, int, int]:
    """Return N, L, W and D; N counts all rows."""
    _, L, W, D = examples.rows([0]).shape
    return len(examples.labels), L, W, D


def digest(examples: Examples, soft: Tensor | None = None) -> str:
    """Return a hash of the targets: all but the means, whose last bits depend on the machine.

    Other routes of the same targets don't change it: they follow from the routers that took them.

    Args:
        examples: What is trained on.
        soft: `[N, L, C]` soft targets, where there are any.
    """
    N, (_, *sizes) = examples.num_targets, shape(examples)
    parts = ((N, *sizes), tuple(examples.questions[:N]), tuple(examples.tasks[:N]))
    numbers = (examples.filled[:N].tolist(), examples.labels[:N].tolist())
    softened = () if soft is None else (soft[:N].tolist(),)
    return hashlib.sha256(repr((parts, numbers, *softened)).encode()).hexdigest()


def sizes(examples: Examples) -> Tensor:
    """Return the mean size of each router's inputs, `[N, L]`: tells sets of means apart.

    Raises:
        RecordError: Means that are NaN or infinite, which no feature pass leaves behind.
    """
    found = torch.cat(
        [
            torch.stack([example.abs().mean(dim=(1, 2)) for example in means])
            for _, means in _in_parts(examples, range(len(examples.labels)))
        ]
    )
    finite = found.isfinite().all(dim=1).tolist()
    if not all(finite):
        raise RecordError(
            f"the features of question {examples.questions[finite.index(False)]!r} hold NaN or "
            f"infinity; pool them again"
        )
    return found


def moments(examples: Examples, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each component of each layer's filled windows.

    Every target counts the same, however many windows it fills, as in the loss. A component that
    hardly varies beside the size of its layer's states gets the deviation that is taken for hardly
    varying, so that dividing by it doesn't blow rounding up.

    Args:
        examples: What is trained on.
        index: The targets to count; not empty.

    Returns:
        Two tensors `[L, D]` in float64; no deviation is 0.
    """
    total = square = torch.zeros(())
    for part, means in _in_parts(examples, index):
        count = examples.filled[part].double()[:, None, None]  # [B, 1, 1]
        values = means.double()  # zeros past `filled`, so that plain sums are over filled windows
        total = total + (values.sum(dim=2) / count).sum(dim=0)  # [L, D]
        square = square + (values.square().sum(dim=2) / count).sum(dim=0)
    mean = total / len(index)
    variance = (square / len(index) - mean.square()).clamp(min=0.0)
    size = (square / len(index)).mean(dim=1, keepdim=True).sqrt()  # [L, 1]
    floor = torch.where(size > 0, CONSTANT * size, 1.0)
    return mean, torch.maximum(variance.sqrt(), floor)


def _in_parts(examples: Examples, index: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield a few rows at a time: which, and their means `[B, L, W, D]`."""
    for start in range(0, len(index), READ_AT_ONCE):
        part = list(index[start : start + READ_AT_ONCE])
        yield part, examples.rows(part)
