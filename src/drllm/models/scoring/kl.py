"""Measure how far a path's next-token distributions are from the full path's: KL divergence.

Axes: T tokens of a prompt in one row, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.models.scoring.prefix_sharing import PackedRows, PlanPair
from drllm.paths import Plan, full_decisions, get_adapter

SHARE_OF_MEMORY = 0.5
"""Maximum share of the memory for states that the full path's distributions may take."""


@dataclass(frozen=True, slots=True)
class _Distributions:
    """The full path's next-token distributions on a row."""

    probabilities: Tensor  # [T, V]
    negative_entropy: Tensor  # [T]

    @property
    def num_bytes(self) -> int:
        return self.probabilities.nbytes + self.negative_entropy.nbytes


class KlFromFull:
    """Measures the mean KL(full path || path) of next-token distributions over a prompt's tokens.

    Computations are in fp32 (in fp64 for a model in fp64). The tokens of a common prefix count for
    every prompt, but are measured only once. The full path's distributions on a row are kept while
    all kept distributions fit into `SHARE_OF_MEMORY` of the memory for states. Distributions that
    aren't kept are computed again in every pass, from the full path's last state.

    Source: ours; docs/decisions/0006.
    """

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows
        self._full = full_decisions(rows.routed.num_layers)
        self._distributions: dict[int, _Distributions] = {}  # by row
        self._prefix = KlFromFull(rows.past) if rows.past is not None else None
        self._prefix_sums: dict[Plan, float] = {}

    def with_full(self, pairs: Sequence[PlanPair]) -> list[PlanPair]:
        """Return the pairs of a pass, with the full paths for the comparison in front.

        A full path runs without an adapter. If the pairs have an adapter, this method runs the full
        paths in a pass of their own.
        """
        missing: list[PlanPair] = []  # full paths whose distributions aren't known yet
        full: list[PlanPair] = []  # full paths among the pairs
        for row, plan in pairs:
            if plan == self._full:
                full.append((row, plan))
            elif row not in self._distributions:
                missing.append((row, self._full))
        if missing and get_adapter(pairs[0][1]):
            self._run_full(list(dict.fromkeys(missing)))
            missing = []
        return list(dict.fromkeys([*missing, *full, *pairs]))

    def _run_full(self, pairs: Sequence[PlanPair]) -> None:
        """Run the full path on rows, and keep the distributions."""
        packed = self._rows.packed
        num_kept = [packed.num_own[row] + packed.num_after[row] for row, _ in pairs]
        with self._rows.run(pairs, num_kept) as driver:
            for pair, logits in zip(pairs, driver.logits, strict=True):
                self._sum(pair, logits[: packed.num_own[pair[0]]])

    def measure(
        self, pairs: Sequence[PlanPair], logits: Sequence[Tensor]
    ) -> dict[PlanPair, float | None]:
        """Return the mean KL of each pair in nats per token; None for a KL that isn't finite.

        Args:
            pairs: The pairs that `with_full` returned.
            logits: The logits of each pair's tokens, `[T, V]`.
        """
        scalars = [self._sum(pair, values) for pair, values in zip(pairs, logits, strict=True)]
        sums: list[float] = torch.stack(scalars).tolist()  # one wait for the device
        self._limit_memory()
        num_prefix = 0
        if self._prefix is not None:
            num_prefix = self._prefix._rows.packed.num_own[0]
            self._measure_prefix([plan for _, plan in pairs], num_prefix)
        kls: dict[PlanPair, float | None] = {}
        for (row, plan), row_sum in zip(pairs, sums, strict=True):
            total = row_sum + self._prefix_sums.get(plan, 0.0)
            num_tokens = self._rows.packed.num_own[row] + num_prefix
            kls[row, plan] = max(total / num_tokens, 0.0) if math.isfinite(total) else None
        return kls

    def forget(self) -> None:
        """Drop all shared states, and the full path's distributions."""
        self._rows.states.forget()
        for row in list(self._distributions):
            self._drop(row)
        if self._prefix is not None:
            self._prefix.forget()

    def _sum(self, pair: PlanPair, logits: Tensor) -> Tensor:
        """Return KL(full path || path) summed over a row's tokens, in nats, as a scalar tensor."""
        row, plan = pair
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if plan == self._full:
            if row not in self._distributions:
                self._keep(row, values)
            return 0 * self._distributions[row].negative_entropy.sum()  # 0, or NaN if not finite
        full = self._distributions[row]
        cross = (full.probabilities * values).sum(dim=-1) - values.logsumexp(dim=-1)
        return (full.negative_entropy - cross).sum()

    def _keep(self, row: int, logits: Tensor) -> None:
        """Keep the full path's distributions on a row."""
        logprobs = logits.log_softmax(dim=-1)
        probabilities = logprobs.exp()
        distributions = _Distributions(probabilities, (probabilities * logprobs).sum(dim=-1))
        self._distributions[row] = distributions
        self._rows.states.count_other(distributions.num_bytes)

    def _limit_memory(self) -> None:
        """Drop the newest distributions until the others fit into their share of the memory."""
        max_bytes = SHARE_OF_MEMORY * self._rows.states.max_bytes
        num_bytes = sum(row.num_bytes for row in self._distributions.values())
        while self._distributions and num_bytes > max_bytes:
            newest = next(reversed(self._distributions))
            num_bytes -= self._drop(newest)

    def _measure_prefix(self, plans: Sequence[Plan], length: int) -> None:
        """Measure the KL on the prompts' common beginning, for plans without a measurement."""
        assert self._prefix is not None
        new = [(0, plan) for plan in dict.fromkeys(plans) if plan not in self._prefix_sums]
        if not new:
            return
        pairs = self._prefix.with_full(new)
        with self._prefix._rows.run(pairs, [length] * len(pairs)) as driver:
            kls = self._prefix.measure(pairs, driver.logits)
        for pair in new:
            kl = kls[pair]
            self._prefix_sums[pair[1]] = math.nan if kl is None else kl * length

    def _drop(self, row: int) -> int:
        """Drop a row's distributions; return how many bytes they took."""
        num_bytes = self._distributions.pop(row).num_bytes
        self._rows.states.count_other(-num_bytes)
        return num_bytes
