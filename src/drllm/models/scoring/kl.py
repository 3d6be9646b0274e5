"""Measure the KL divergence of a path's next-token distributions from the full path's.

Axes: T tokens of a prompt in one row, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drllm.models.scoring.prefix_sharing import PackedRows, PlanPair
from drllm.paths import Plan, full_decisions

SHARE_OF_MEMORY = 0.5
"""Maximum share of the memory for states that all distributions of full paths may take together."""


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

    Source: ours; docs/decisions.md.
    """

    def __init__(self, rows: PackedRows) -> None:
        self._rows = rows
        self._full = full_decisions(rows.routed.num_layers)
        self._distributions: dict[int, _Distributions] = {}  # by row
        # Measures the rows' common prefix; None if they have none.
        self._prefix = KlFromFull(rows.past) if rows.past is not None else None
        self._prefix_sums: dict[Plan, float] = {}  # the KL summed over the common prefix

    def add_full_paths(self, pairs: Sequence[PlanPair]) -> list[PlanPair]:
        """Return the pairs to run in a pass that measures the KL of some pairs, each pair once.

        Full paths come first, since the other paths are compared with them. A full path is added
        for each row whose distributions aren't kept.
        """
        missing: list[PlanPair] = []  # full paths whose distributions aren't kept
        full: list[PlanPair] = []  # full paths among the pairs
        for row, plan in pairs:
            if plan == self._full:
                full.append((row, plan))
            elif row not in self._distributions:
                missing.append((row, self._full))
        return list(dict.fromkeys([*missing, *full, *pairs]))

    def measure(
        self, pairs: Sequence[PlanPair], logits: Sequence[Tensor]
    ) -> dict[PlanPair, float | None]:
        """Return the mean KL of each pair in nats per token; None for a KL that isn't finite.

        Args:
            pairs: The pairs that `add_full_paths` returned.
            logits: The logits of the prompt's tokens in each pair's row, `[T, V]`.
        """
        scalars = []
        for (row, plan), values in zip(pairs, logits, strict=True):
            scalars.append(self._sum_kl(row, plan, values))
        row_sums: list[float] = torch.stack(scalars).tolist()  # one wait for the device
        self._limit_memory()
        num_prefix = 0
        if self._prefix is not None:
            num_prefix = self._prefix._rows.packed.num_own[0]
            self._measure_prefix([plan for _, plan in pairs], num_prefix)
        kls: dict[PlanPair, float | None] = {}
        for (row, plan), row_sum in zip(pairs, row_sums, strict=True):
            total = row_sum + self._prefix_sums.get(plan, 0.0)
            num_tokens = self._rows.packed.num_own[row] + num_prefix
            kls[row, plan] = None
            if math.isfinite(total):
                kls[row, plan] = max(total / num_tokens, 0.0)  # rounding may give less than 0
        return kls

    def forget(self) -> None:
        """Drop all shared states, and the full path's distributions."""
        self._rows.states.forget()
        for row in list(self._distributions):
            self._drop_distributions(row)
        if self._prefix is not None:
            self._prefix.forget()

    def _sum_kl(self, row: int, plan: Plan, logits: Tensor) -> Tensor:
        """Return KL(full path || path) summed over a row's tokens, in nats, as a scalar tensor.

        For the full path itself, its distributions are kept if necessary. The sum is 0, or NaN if
        the distributions aren't finite.
        """
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if plan == self._full:
            if row not in self._distributions:
                self._keep_distributions(row, values)
            return 0 * self._distributions[row].negative_entropy.sum()
        full = self._distributions[row]
        negative_cross_entropy = (full.probabilities * values).sum(dim=-1) - values.logsumexp(
            dim=-1
        )
        return (full.negative_entropy - negative_cross_entropy).sum()

    def _keep_distributions(self, row: int, logits: Tensor) -> None:
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
            num_bytes -= self._drop_distributions(newest)

    def _measure_prefix(self, plans: Sequence[Plan], num_tokens: int) -> None:
        """Measure the KL on the common prefix of `num_tokens`, for plans without a measurement."""
        assert self._prefix is not None
        new = [(0, plan) for plan in dict.fromkeys(plans) if plan not in self._prefix_sums]
        if not new:
            return
        pairs = self._prefix.add_full_paths(new)
        with self._prefix._rows.run(pairs, [num_tokens] * len(pairs)) as driver:
            kls = self._prefix.measure(pairs, driver.logits)
        for row, plan in new:
            kl = kls[row, plan]
            self._prefix_sums[plan] = math.nan
            if kl is not None:
                self._prefix_sums[plan] = kl * num_tokens

    def _drop_distributions(self, row: int) -> int:
        """Drop a row's distributions; return how many bytes they took."""
        num_bytes = self._distributions.pop(row).num_bytes
        self._rows.states.count_other(-num_bytes)
        return num_bytes
