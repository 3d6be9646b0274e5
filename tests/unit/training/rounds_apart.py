"""Rounds of a small model that are killed at random moments and gone on with: FOLDER KILLS."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from killable import MODEL, Letters, W, make_records
from kills import At, kill_and_go_on
from torch import Tensor

from drllm.config import TrainConfig
from drllm.models.base.identity import describe
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import SupervisionRecord
from drllm.training import feature_store as store_module
from drllm.training.examples import Examples
from drllm.training.feature_store import Store
from drllm.training.features import Features, collect
from drllm.training.loop import Run, train_together
from drllm.training.on_policy import train_in_rounds

N = 20
IDENTITY = {"id": "org/tiny", "revision": "main", **describe(MODEL)}
CONFIG = TrainConfig(
    num_epochs=2,
    learning_rate=0.05,
    gradient_accumulation=8,
    num_windows=W,
    router_width=5,
    warmup_steps=0,
    validation_fraction=0.2,
    num_seeds=2,
    on_policy_rounds=2,
)
KILLED = replace(CONFIG, on_policy_rounds=1)


def pool_own(
    records: Sequence[SupervisionRecord],
    store: Store | None,
    routers: RouterStack | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Pool targets of the small model."""
    routed = RoutedModel(MODEL)
    try:
        return collect(
            routed,
            Letters(),
            records,
            num_windows=W,
            routers=routers,
            store=store,
            batch_size=7,
            on_progress=on_progress,
        )
    finally:
        routed.detach()


def train(
    folder: Path,
    config: TrainConfig = CONFIG,
    at: Callable[[], None] = lambda: None,
    pool: Callable[..., Features] = pool_own,
    fit: Callable[..., Any] = train_together,
) -> None:
    """Train in rounds as the command line does; `at` is called whenever something was done."""

    def pooled(records: Any, store: Store, routers: RouterStack | None = None) -> Features:
        return pool(records, store, routers, on_progress=lambda *_: at())

    def fitted(examples: Examples, runs: Sequence[Run], soft: Tensor | None) -> None:
        fit(examples, IDENTITY, runs, soft=soft, on_progress=lambda *_: at())

    store = Store(folder / "features")
    features = pooled(make_records(N), store)
    runs = [Run(settings, place) for place, settings in config.by_seed(folder).items()]
    train_in_rounds(features, IDENTITY, runs, fit=fitted, pool=pooled)
    store.remove()


def train_until(folder: Path, at: At) -> None:
    """Train, and call `at` with a count at each step, batch, and before each file is complete."""
    store_module.COMMIT_S = 0.0
    counter = itertools.count()
    write, put, unlink = os.fsync, Path.replace, Path.unlink

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        at(next(counter))
        unlink(path, missing_ok)

    with (
        mock.patch("os.fsync", lambda file: (at(next(counter)), write(file))),
        mock.patch.object(Path, "replace", lambda *paths: (at(next(counter)), put(*paths))),
        mock.patch.object(Path, "unlink", unlinked),
    ):
        train(folder, KILLED, at=lambda: at(next(counter)))


if __name__ == "__main__":
    kill_and_go_on(train_until, Path(sys.argv[1]), int(sys.argv[2]))
