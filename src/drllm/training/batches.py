"""What several runs read for one step: each its own rows, in tensors with a leading [R].

Owns reading, padding, scaling and moving. Runs with fewer rows than others are filled up with
rows that count nothing. Leaves which rows to `split`.

Memory: R · B rows of L · W · D numbers, and one run's rows twice while they are read.

Axes: R runs, N targets, B rows, D hidden, L layers, W windows, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.training.examples import Examples, moments, shape
from drllm.training.plans import Plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What R runs learn from in a step, on the device of the routers.

    Attributes:
        means: `[R, L, B, W, D]`.
        windows: `[R, B, W]`: what each window contributes, one a row; nothing past `filled`.
        targets: `[R, B, L, C]`.
        labels: `[R, B, L]`: the target paths.
        shares: `[R, B]`: what each row contributes to its run's loss, one a run.
        sizes: `[R]`: rows that count, the first ones.
    """

    means: Tensor
    windows: Tensor
    targets: Tensor
    labels: Tensor
    shares: Tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """How a run's features are scaled: minus the mean, over the deviation, both `[L, D]`."""

    mean: Tensor
    deviation: Tensor


class Reader:
    """Reads batches for some runs.

    Args:
        examples: Where from.
        plans: `[R]`: the runs.
        dtype: Of the batches' numbers.
        device: Where they go.
    """

    def __init__(
        self,
        examples: Examples,
        plans: Sequence[Plan],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.examples = examples
        self.dtype, self.device = dtype, device
        _, self.L, self.W, self.D = shape(examples)
        self.targets = [plan.targets.to(dtype) for plan in plans]
        self.scales = _scales(examples, plans)

    def read(self, runs: Sequence[int], rows: Sequence[Sequence[int]]) -> Batch:
        """Return a batch.

        Args:
            runs: `[r]`: which of the runs.
            rows: `[r]`: the targets of each; none is empty.
        """
        sizes = tuple(len(part) for part in rows)
        R, B = len(runs), max(sizes)
        means = torch.empty(R, self.L, B, self.W, self.D, dtype=self.dtype)
        targets = torch.zeros(R, B, self.L, self.targets[0].shape[-1], dtype=self.dtype)
        labels = torch.zeros(R, B, self.L, dtype=torch.int64)
        filled = torch.ones(R, B, 1, dtype=torch.int64)
        shares = torch.zeros(R, B, dtype=self.dtype)
        read: dict[tuple[int, ...], int] = {}
        for place, (run, part, size) in enumerate(zip(runs, rows, sizes, strict=True)):
            index = list(part)
            # Settings that share a seed share their order, and what is read for it.
            twin = read.setdefault(tuple(index), place) if self.scales[run] is None else place
            if twin != place:
                means[place] = means[twin]
            else:
                means[place, :, :size] = self._means(run, index)
                means[place, :, size:] = 0
            targets[place, :size] = self.targets[run][index]
            labels[place, :size] = self.examples.labels[index]
            filled[place, :size, 0] = self.examples.filled[index]
            shares[place, :size] = 1 / size
        windows = (torch.arange(self.W) < filled).to(self.dtype) / filled  # [R, B, W]
        return Batch(
            means=means.to(self.device),
            windows=windows.to(self.device),
            targets=targets.to(self.device),
            labels=labels.to(self.device),
            shares=shares.to(self.device),
            sizes=sizes,
        )

    def _means(self, run: int, index: list[int]) -> Tensor:
        """Return one run's windows, scaled, as `[L, B, W, D]`."""
        means = self.examples.rows(index).transpose(0, 1)
        scale = self.scales[run]
        if scale is None:
            return means
        scaled = (means.double() - scale.mean[:, None, None]) / scale.deviation[:, None, None]
        return scaled.to(self.dtype)


def _scales(examples: Examples, plans: Sequence[Plan]) -> list[Scale | None]:
    """Return the scale of each run that wants one; runs with the same part share it."""
    known: dict[tuple[int, ...], Scale] = {}
    found: list[Scale | None] = []
    for plan in plans:
        if not plan.config.normalise_features:
            found.append(None)
            continue
        part = tuple(plan.trained)
        if part not in known:
            known[part] = Scale(*moments(examples, plan.trained))
        found.append(known[part])
    return found
