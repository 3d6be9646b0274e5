"""KL divergence of a path's next-token distributions from the full path's, over a prompt's tokens.

Axes: T tokens of a prompt in one row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.models.scoring.packing import PackedRows
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions, full_decisions

SHARE_OF_MEMORY = 0.5
"""Maximum share of the memory for states that the full path's distributions may take."""


@dataclass(frozen=True, slots=True)
class FullDistributions:
    """The full path's next-token distributions on a row.

    Attributes:
        probabilities: `[T, V]`.
        negative_entropy: `[T]`, the mean of its own log-probability, in nats.
    """

    probabilities: Tensor
    negative_entropy: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> FullDistributions:
        """Return the distributions of logits `[T, V]`."""
        logprobs = logits.log_softmax(dim=-1)
        probabilities = logprobs.exp()
        return cls(probabilities, (probabilities * logprobs).sum(dim=-1))

    @property
    def num_bytes(self) -> int:
        """Memory that they hold."""
        return self.probabilities.nbytes + self.negative_entropy.nbytes

    def divergence(self, logits: Tensor) -> Tensor:
        """Return the sum over tokens of KL(these || those of the logits), in nats, as a scalar."""
        cross = (self.probabilities * logits).sum(dim=-1) - logits.logsumexp(dim=-1)
        return (self.negative_entropy - cross).sum()


class KlFromFull:
    """Mean KL(full path's next-token distribution || the path's) over the tokens of a prompt.

    In fp32 (fp64 for a model in it). The tokens of a common prefix count for every prompt, and are
    measured once for all of them. The full path's distributions are kept for each row while they
    take no more than `SHARE_OF_MEMORY` of the memory for states; beyond that they are computed
    again from its last state in every pass.

    Args:
        rows: The rows whose prompts are measured.

    Source: ours; docs/decisions/0006.
    """

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows
        self._num_layers = rows.routed.num_layers
        self._full = full_decisions(self._num_layers)
        self._distributions: dict[int, FullDistributions] = {}
        self._prefix = KlFromFull(rows.past[0]) if rows.past is not None else None
        self._prefix_sums: dict[Decisions, float] = {}

    def with_full(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs of a pass with the full paths that it needs, these first."""
        rows = dict.fromkeys(row for row, decisions in pairs if decisions != self._full)
        missing = [(row, self._full) for row in rows if row not in self._distributions]
        asked = [pair for pair in pairs if pair[1] == self._full]
        return list(dict.fromkeys([*missing, *asked, *pairs]))

    def measure(self, pairs: Sequence[Pair], logits: Sequence[Tensor]) -> dict[Pair, float | None]:
        """Return each path's KL; None where a number isn't finite.

        Args:
            pairs: As `with_full` gave them.
            logits: Those of the prompt's own tokens, `[T, V]`.
        """
        each = [self._sum(pair, values) for pair, values in zip(pairs, logits, strict=True)]
        sums: list[float] = torch.stack(each).tolist()  # at once: a device is waited for here
        self._trim()
        if self._prefix is not None:
            self._measure_prefix([decisions for _, decisions in pairs])
        kls: dict[Pair, float | None] = {}
        for (row, decisions), own in zip(pairs, sums, strict=True):
            total = own + self._prefix_sums.get(decisions, 0.0)
            count = self._num_tokens(row)
            finite = math.isfinite(total)
            kls[row, decisions] = max(total / count, 0.0) if finite else None
        return kls

    def forget(self) -> None:
        """Drop the full path's distributions."""
        for row in list(self._distributions):
            self._drop(row)
        if self._prefix is not None:
            self._prefix.forget()

    def _num_tokens(self, row: int) -> int:
        count = self._rows.packed.num_own[row]
        return count + (self._prefix._num_tokens(0) if self._prefix is not None else 0)

    def _sum(self, pair: Pair, logits: Tensor) -> Tensor:
        row, decisions = pair
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if decisions != self._full:
            return self._distributions[row].divergence(values)
        if row not in self._distributions:
            self._distributions[row] = FullDistributions.of(values)
            self._rows.states.count_other(self._distributions[row].num_bytes)
        return 0 * self._distributions[row].negative_entropy.sum()  # not a number if that isn't

    def _measure_prefix(self, wanted: Sequence[Decisions]) -> None:
        """Measure the tokens that all prompts begin with, under paths not measured yet."""
        assert self._prefix is not None
        assert self._rows.past is not None
        new = list(dict.fromkeys(d for d in wanted if d not in self._prefix_sums))
        if not new:
            return
        length = self._prefix._num_tokens(0)
        pairs = self._prefix.with_full([(0, decisions) for decisions in new])
        with self._rows.past[0].run(pairs, [length] * len(pairs)) as shared:
            measured = self._prefix.measure(pairs, shared.logits)
        for decisions in new:
            kl = measured[0, decisions]
            self._prefix_sums[decisions] = math.nan if kl is None else kl * length

    def _trim(self) -> None:
        """Drop the newest distributions if all of them take too much memory."""
        states = self._rows.states
        total = sum(each.num_bytes for each in self._distributions.values())
        while self._distributions and total > SHARE_OF_MEMORY * states.max_bytes:
            row = next(reversed(self._distributions))
            total -= self._distributions[row].num_bytes
            self._drop(row)

    def _drop(self, row: int) -> None:
        self._rows.states.count_other(-self._distributions.pop(row).num_bytes)
