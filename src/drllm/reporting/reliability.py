"""How far the routers' probabilities can be believed, read from `router_config.json`.

Owns reading and refusing. Leaves measuring to the training, and what is said of it to `trained`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drllm.reporting.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """What `calibration` of a router's config says.

    Attributes:
        temperature: That fits the held-out targets best; above 1 the routers were too sure.
        is_folded: Whether the weights have been divided by it.
        num_decisions: How many it was measured on.
        error_before: Expected calibration error, a share, at temperature 1.
        error_after: The same at the temperature.
        before: Mean probability of what was decided and share of hits, of decisions of like
            confidence, at temperature 1; empty where it wasn't kept.
        after: The same at the temperature.
    """

    temperature: float
    is_folded: bool
    num_decisions: int
    error_before: float
    error_after: float
    before: Sequence[tuple[float, float]]
    after: Sequence[tuple[float, float]]


def read_reliability(config: Fields) -> Reliability | None:
    """Read what a router's config says of it; None where no target was held out.

    Raises:
        RecordError: It can't be trusted.
    """
    training = config.optional_object("training")
    found = None if training is None else training.optional_object("calibration")
    if training is None or found is None:
        return None
    settings = training.optional_object("settings")
    return Reliability(
        temperature=found.number("temperature"),
        is_folded=settings is not None and settings.values.get("calibrate") is True,
        num_decisions=found.whole("num_decisions"),
        error_before=found.number("ece_before"),
        error_after=found.number("ece_after"),
        before=_points(found, "reliability_before"),
        after=_points(found, "reliability_after"),
    )


def _points(found: Fields, key: str) -> list[tuple[float, float]]:
    return [(part.number("confidence"), part.number("hits")) for part in found.objects(key)]
