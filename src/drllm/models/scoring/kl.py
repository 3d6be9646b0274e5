"""KL divergence of a path's next-token distributions from the full path's, over a prompt's tokens.

Axes: T tokens of a prompt in one row, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drllm.models.scoring.prefix_sharing import PackedRows, PlanPair
from drllm.paths import Plan, full_decisions

SHARE_OF_MEMORY = 0.5
"""Maximum share of the memory for states that the full path's distributions may take."""


class KlFromFull:
    """Mean KL(full path's next-token distribution || the path's) over the tokens of rows' prompts.

    In fp32 (fp64 for a model in it). The tokens of a common prefix count for every prompt, and are
    measured once for all of them. The full path's distributions are kept for each row while they
    take no more than `SHARE_OF_MEMORY` of the memory for states; beyond that they are computed
    again from its last state in every pass.

    Source: ours; docs/decisions/0006.
    """

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows
        self._full = full_decisions(rows.routed.num_layers)
        # The full path's distributions on each row `[T, V]`, and their negative entropy `[T]`.
        self._distributions: dict[int, tuple[Tensor, Tensor]] = {}
        self._prefix = KlFromFull(rows.past) if rows.past is not None else None
        self._prefix_sums: dict[Plan, float] = {}

    def with_full(self, pairs: Sequence[PlanPair]) -> list[PlanPair]:
        """Return the pairs of a pass with the full paths that it needs, these first."""
        rows = dict.fromkeys(row for row, decisions in pairs if decisions != self._full)
        missing = [(row, self._full) for row in rows if row not in self._distributions]
        asked = [pair for pair in pairs if pair[1] == self._full]
        return list(dict.fromkeys([*missing, *asked, *pairs]))

    def measure(
        self, pairs: Sequence[PlanPair], logits: Sequence[Tensor]
    ) -> dict[PlanPair, float | None]:
        """Return the KL of the pairs of `with_full` by their tokens' logits `[T, V]`, if finite."""
        each = [self._sum(pair, values) for pair, values in zip(pairs, logits, strict=True)]
        sums: list[float] = torch.stack(each).tolist()  # at once: a device is waited for here
        held = sum(map(_num_bytes, self._distributions.values()))
        while self._distributions and held > SHARE_OF_MEMORY * self._rows.states.max_bytes:
            held -= self._drop(next(reversed(self._distributions)))
        num_prefix = 0
        if self._prefix is not None:
            num_prefix = self._prefix._rows.packed.num_own[0]
            self._measure_prefix([decisions for _, decisions in pairs], num_prefix)
        kls: dict[PlanPair, float | None] = {}
        for (row, decisions), own in zip(pairs, sums, strict=True):
            total = own + self._prefix_sums.get(decisions, 0.0)
            count = self._rows.packed.num_own[row] + num_prefix
            kls[row, decisions] = max(total / count, 0.0) if math.isfinite(total) else None
        return kls

    def forget(self) -> None:
        """Drop all shared states, and the full path's distributions."""
        self._rows.states.forget()
        for row in list(self._distributions):
            self._drop(row)
        if self._prefix is not None:
            self._prefix.forget()

    def _sum(self, pair: PlanPair, logits: Tensor) -> Tensor:
        """Return the sum over tokens of the full path's KL from a path, in nats, as a scalar."""
        row, decisions = pair
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if decisions != self._full:
            probabilities, negative_entropy = self._distributions[row]
            cross = (probabilities * values).sum(dim=-1) - values.logsumexp(dim=-1)
            return (negative_entropy - cross).sum()
        if row not in self._distributions:
            logprobs = values.log_softmax(dim=-1)
            probabilities = logprobs.exp()
            self._distributions[row] = probabilities, (probabilities * logprobs).sum(dim=-1)
            self._rows.states.count_other(_num_bytes(self._distributions[row]))
        return 0 * self._distributions[row][1].sum()  # not a number if that isn't

    def _measure_prefix(self, wanted: Sequence[Plan], length: int) -> None:
        """Measure the tokens that all prompts begin with, under paths not measured yet."""
        assert self._prefix is not None
        new = [(0, d) for d in dict.fromkeys(wanted) if d not in self._prefix_sums]
        if not new:
            return
        pairs = self._prefix.with_full(new)
        with self._prefix._rows.run(pairs, [length] * len(pairs)) as shared:
            measured = self._prefix.measure(pairs, shared.logits)
        for pair in new:
            kl = measured[pair]
            self._prefix_sums[pair[1]] = math.nan if kl is None else kl * length

    def _drop(self, row: int) -> int:
        num_bytes = _num_bytes(self._distributions.pop(row))
        self._rows.states.count_other(-num_bytes)
        return num_bytes


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
