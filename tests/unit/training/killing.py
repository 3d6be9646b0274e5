"""A training that is killed at random moments and resumed, as a script: FOLDER KILLS."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

from kills import At, kill_and_go_on
from small import IDENTITY, Watching, make_features

from drllm.config import TrainConfig
from drllm.training.stage import train_on

FEATURES = make_features(40)
CONFIG = TrainConfig(
    num_epochs=3, gradient_accumulation=10, num_windows=4, router_width=5, warmup_steps=5
)
CONFIGS = [
    replace(CONFIG, seed=1, dropout=0.3),
    replace(CONFIG, num_epochs=5, learning_rate=0.3, early_stopping=2, validation_fraction=0.4),
]


def train(folder: Path, at: At) -> None:
    """Train, and call `at` with a count at each step and before each file is complete."""
    counter = itertools.count()
    write, put = os.fsync, Path.replace
    with (
        mock.patch("os.fsync", lambda file: (at(next(counter)), write(file))),
        mock.patch.object(Path, "replace", lambda *paths: (at(next(counter)), put(*paths))),
    ):
        for number, config in enumerate(CONFIGS):
            watch = Watching(lambda *_: at(next(counter)))
            train_on(FEATURES, IDENTITY, config, folder / str(number), listener=watch)


if __name__ == "__main__":
    kill_and_go_on(train, Path(sys.argv[1]), sys.argv[2])
