"""Training beyond teacher forcing: routers also learn from what they read along their own routes.

Owns the order of the rounds, where each one's routers lie, and going on after a kill. Leaves
pooling, training and what is said of them to its caller, and a single training to `loop`.

In teacher forcing a router reads the states that the target path leaves; in routing it reads those
that the routers before it made, mistakes and all. Round 0 is teacher forcing. Before each further
round every prompt is routed by the last round's routers, which read on the way what they will read
in routing; then new routers are trained from the same initial weights on all rounds' inputs, with
the question's labels unchanged. From anew and on all, not on with the last: that is what follows
the leader in the source, the schedule is that of one training, and the routers of a round follow
from files alone, so that a kill anywhere costs what the file under way had not kept.

So round r's routers are those of a training with r rounds: `round_0` beside the last ones is what
they are to be compared with. The routes of two seeds differ, and so their inputs; one seed's are
kept at a time, (rounds + 1) times those of the targets.

Where routers follow the target paths of all that they were trained on, there is no mistake to
learn from, and a round only trains longer; that is said.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.config import TrainConfig
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routers.stack import RouterStack
from drllm.records import SupervisionRecord
from drllm.training.checkpoint import SIZES_TOLERANCE
from drllm.training.examples import Aggregate, Examples, sizes
from drllm.training.feature_store import FEATURES_FOLDER, Store
from drllm.training.features import Features
from drllm.training.loop import Run, unfinished
from drllm.training.soft import soft_targets
from drllm.training.split import hold_out
from drllm.training.targets import reasons_of

logger = logging.getLogger(__name__)

FEW = 0.1
"""Share of the trained targets below which a round is said to have little to teach."""

Fit = Callable[[Examples, Sequence[Run], Tensor | None], object]
Pool = Callable[[Sequence[SupervisionRecord], Store, RouterStack], Features]


def train_in_rounds(
    features: Features,
    base_identity: Mapping[str, Any],
    runs: Sequence[Run],
    *,
    fit: Fit,
    pool: Pool,
) -> None:
    """Train runs of equal `on_policy_rounds`, round by round; what is finished isn't done again.

    Killed anywhere, the same call ends with the routers of an unbroken one, bit for bit on the
    same machine with the same number of threads.

    Args:
        features: The targets' inputs along their target paths, `records` with them.
        base_identity: As for `train_together`.
        runs: What is wanted, as for `train_together`.
        fit: Trains some runs on examples, with their soft targets where there are any.
        pool: Pools targets' inputs into a folder, along the routes of given routers.

    Raises:
        CheckpointError: A folder that holds routers, or a checkpoint, of another training.

    Source: Ross et al. 2011 (arXiv 1011.0686), algorithm 3.1 with β = 1 in round 0 and 0 after.
    """
    soft = _soft_of([features], runs)

    def left(wanted: Sequence[Run]) -> list[Run]:
        return unfinished(wanted, features, base_identity, soft=soft)

    left(runs)  # what holds another training is refused before the first round
    if wanted := left([_of_round(run, 0) for run in runs]):
        fit(features, wanted, soft)
    for run in runs:
        rounds = run.config.on_policy_rounds
        folders = [_of_round(run, number).output / FEATURES_FOLDER for number in range(rounds)]
        stores = [Store(folder, run.config.feature_dtype) for folder in folders]
        if rounds and left([run]):
            parts = [features]
            for number, store in enumerate(stores, start=1):
                before = load_routers(_of_round(run, number - 1).output)
                parts.append(pool(features.records, store, before))
                _say(features, parts[-1], run.config, number)
                if wanted := left([_of_round(run, number)]):
                    fit(Aggregate(parts), wanted, _soft_of(parts, [run]))
        for store in stores:
            store.remove()


def remove_rounds(output: Path) -> None:
    """Delete what earlier rounds have left beside a run's routers."""
    for folder in output.glob("round_*"):
        shutil.rmtree(folder)


def _of_round(run: Run, number: int) -> Run:
    """Return the training of one of a run's rounds; the last one is the run itself."""
    if number == run.config.on_policy_rounds:
        return run
    config = dataclasses.replace(run.config, on_policy_rounds=number)
    return Run(config, run.output / f"round_{number}")


def _say(features: Features, own: Features, config: TrainConfig, number: int) -> None:
    """Say what a round leaves out, and where it has next to nothing to teach."""
    if own.rejected:
        logger.warning(
            "along the routes of round %d, %d of %d targets are left out (%s)",
            number - 1,
            len(own.rejected),
            len(features.records),
            reasons_of(own.rejected),
        )
    trained, _ = hold_out(
        own.questions, config.validation_fraction, config.seed, len(features.records)
    )
    changed = len(trained) - _read_alike(features, own, trained)
    if changed < FEW * len(trained):
        logger.warning(
            "along the routes of round %d only %d of %d targets that are trained on are read "
            "otherwise than along their target paths, which the routers follow there already, so "
            "round %d has little to teach; give fewer epochs, dropout or more targets",
            number - 1,
            changed,
            len(trained),
            number,
        )


def _read_alike(features: Features, own: Features, rows: Sequence[int]) -> int:
    """Count targets whose routers read along their own routes what they read along the path."""
    places = {
        key: row for row, key in enumerate(zip(features.questions, features.tasks, strict=True))
    }
    theirs = [places[own.questions[row], own.tasks[row]] for row in rows]
    before, after = sizes(features)[theirs], sizes(own)[list(rows)]  # [B, L]
    return int(torch.isclose(after, before, rtol=SIZES_TOLERANCE, atol=0.0).all(dim=1).sum())


def _soft_of(parts: Sequence[Features], runs: Sequence[Run]) -> Tensor | None:
    """Return the soft targets of all parts' examples, where the runs want them."""
    if not runs[0].config.soft_targets:
        return None
    return torch.cat([soft_targets(part.records) for part in parts])
