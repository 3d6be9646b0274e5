"""How much a next-token loss is higher than another on the same texts, and what bounds it.

Owns the bound, and the words for a rise that isn't excluded. Leaves the formula to `statistics`,
which texts there are to `texts`, and what follows to `certified`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from drllm.errors import ConfigError
from drllm.evaluation.texts import FEWEST_TEXTS
from drllm.statistics.intervals import upper_bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """How much higher the next-token loss is than base's on the same texts.

    Attributes:
        num_texts: Texts read by both.
        loss_increase: Mean rise, in nats a token.
        greatest_increase: What the rise doesn't exceed with the confidence asked for; None where
            the texts bound it nowhere.
    """

    num_texts: int
    loss_increase: float
    greatest_increase: float | None

    @classmethod
    def of(
        cls,
        ours: Sequence[float],
        theirs: Sequence[float],
        *,
        confidence: float,
        seed: int,
        texts: str,
    ) -> Rise:
        """Return the rise from one set of losses to another.

        Args:
            ours: For each text, the loss under the setting, in nats a token.
            theirs: Base's.
            confidence: One-sided; in (0.5, 1).
            seed: Of the resampling of texts.
            texts: What they are, in words.

        Raises:
            ConfigError: Fewer than `FEWEST_TEXTS`.
            ValueError: Another number of texts on one side.
        """
        increases = [one - other for one, other in zip(ours, theirs, strict=True)]
        if len(increases) < FEWEST_TEXTS:
            raise ConfigError(
                f"{len(increases)} {texts} are too few to certify a depth; accuracy alone "
                f"certifies broken models, so give the next-token loss on at least {FEWEST_TEXTS}"
            )
        greatest = upper_bound(increases, seed, confidence=confidence)
        return cls(
            num_texts=len(increases),
            loss_increase=fmean(increases),
            greatest_increase=None if greatest == math.inf else greatest,
        )

    def failure(self, limit: float, where: str = "") -> str | None:
        """Say that a rise as large as the limit isn't excluded; None where it is.

        Args:
            limit: In nats a token.
            where: On which texts, in words behind "next-token loss".
        """
        if self.greatest_increase is None:
            return f"no rise of the next-token loss{where} is excluded by so few texts that differ"
        if self.greatest_increase < limit:
            return None
        return (
            f"next-token loss{where} up to {self.greatest_increase:.3f} nats a token higher is "
            f"not excluded"
        )
