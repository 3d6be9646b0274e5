"""On-policy rounds: routers also learn from what they read along their own routes (DAgger).

In teacher forcing a router reads the states that the target path leaves; in routing it reads those
that the routers before it made, mistakes and all. Round 0 is teacher forcing. Before each further
round every prompt is routed by the last round's routers, and what they read on the way is pooled;
then new routers are trained from the same initial weights on all rounds' inputs, with the
question's labels unchanged. So a round's routers follow from files alone, and they are those of a
training with that number of rounds: compare `round_0` with the last ones to see what rounds give.

Source: Ross et al. 2011 (arXiv 1011.0686), algorithm 3.1 with β = 1 in round 0 and 0 after.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from drllm.config import TrainConfig
from drllm.training.checkpoint import SIZES_TOLERANCE
from drllm.training.features import Features, sizes
from drllm.training.targets import reasons_of
from drllm.training.trainer import divide

logger = logging.getLogger(__name__)

FEW = 0.1
"""Share of the trained targets below which a round is said to have little to teach."""


def rounds_of(output: Path, config: TrainConfig) -> list[tuple[Path, TrainConfig]]:
    """Return folder and settings of a training's rounds; the last is the training itself."""
    last = config.on_policy_rounds
    earlier = [
        (output / f"round_{number}", dataclasses.replace(config, on_policy_rounds=number))
        for number in range(last)
    ]
    return [*earlier, (output, config)]


def say_what_is_new(features: Features, own: Features, config: TrainConfig, number: int) -> None:
    """Warn of targets that a round leaves out, and of a round with little to teach.

    Args:
        features: Along the target paths.
        own: Along the routes of the last round's routers.
        config: The training's settings.
        number: Of the round.
    """
    if own.rejected:
        logger.warning(
            f"along the routes of round {number - 1}, {len(own.rejected)} of "
            f"{features.num_targets} targets are left out ({reasons_of(own.rejected)})"
        )
    trained, _ = divide(own.questions, config, features.num_targets)
    names = zip(features.questions, features.tasks, strict=True)
    places = {name: row for row, name in enumerate(names)}
    theirs = [places[own.questions[row], own.tasks[row]] for row in trained]
    before, after = sizes(features)[theirs], sizes(own)[trained]  # [B, L]
    alike = torch.isclose(after, before, rtol=SIZES_TOLERANCE, atol=0.0).all(dim=1)
    changed = len(trained) - int(alike.sum())
    if changed < FEW * len(trained):
        logger.warning(
            f"along the routes of round {number - 1} only {changed} of {len(trained)} targets that "
            f"are trained on are read otherwise than along their target paths, which the routers "
            f"follow there already, so round {number} has little to teach; give fewer epochs, "
            f"dropout or more targets"
        )
