"""Rounds of a small model that are killed at random moments and resumed: FOLDER KILLS."""

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
from small import Watching

from drllm.config import TrainConfig
from drllm.models.base.load import BaseModel
from drllm.training import feature_store as store_module
from drllm.training import stage
from drllm.training.features import Features, collect

N = 20
BASE = BaseModel(MODEL, Letters(), "org/tiny", "main")
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


def pool_own(records: Sequence[Any], **options: Any) -> Features:
    """Pool targets of the small model."""
    return collect(MODEL, Letters(), records, num_windows=W, **options)


def train(
    folder: Path,
    config: TrainConfig = CONFIG,
    at: Callable[[], None] = lambda: None,
    records: Sequence[Any] | None = None,
) -> None:
    """Train; `at` is called whenever something was done."""
    records = make_records(N) if records is None else records
    stage.train(BASE, records, config, folder, listener=Watching(lambda *_: at()))


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
    kill_and_go_on(train_until, Path(sys.argv[1]), sys.argv[2])
