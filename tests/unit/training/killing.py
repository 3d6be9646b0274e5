"""A training that is killed at random moments and resumed, as a script: FOLDER KILLS."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

from kills import At, kill_and_go_on

from conftest import IDENTITY, make_features
from drllm.config import TrainConfig
from drllm.training.loop import Run, train_together

FEATURES = make_features(40)
CONFIG = TrainConfig(
    num_epochs=4, gradient_accumulation=8, num_windows=4, router_width=5, warmup_steps=5
)
CONFIGS = [
    CONFIG,
    replace(CONFIG, seed=1, gradient_accumulation=10, dropout=0.3),
    replace(CONFIG, num_epochs=6, learning_rate=0.3, early_stopping=2, validation_fraction=0.4),
]


def train(folder: Path, at: At) -> None:
    """Train, and call `at` with a count at each step and before each file is complete."""
    counter = itertools.count()
    write, put = os.fsync, Path.replace
    runs = [Run(config, folder / str(number)) for number, config in enumerate(CONFIGS)]
    with (
        mock.patch("os.fsync", lambda file: (at(next(counter)), write(file))),
        mock.patch.object(Path, "replace", lambda *paths: (at(next(counter)), put(*paths))),
    ):
        train_together(FEATURES, IDENTITY, runs, on_progress=lambda *_: at(next(counter)))


if __name__ == "__main__":
    kill_and_go_on(train, Path(sys.argv[1]), int(sys.argv[2]))
