"""A training that is killed at random moments and resumed, as a script: FOLDER KILLS.

A process of its own, since it forks: each child, on one thread, kills itself at its moment.
Leaves `unbroken/` in the folder, and one folder for each kill, named after its moment.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from conftest import D, L, make_features
from drllm.config import TrainConfig
from drllm.training.loop import Run, train_together

FEATURES = make_features(40)
IDENTITY = {
    "id": "org/tiny",
    "revision": "main",
    "class": "LlamaForCausalLM",
    "num_layers": L,
    "hidden_size": D,
    "fingerprint": "0123456789abcdef",
}
CONFIG = TrainConfig(
    num_epochs=4, gradient_accumulation=8, num_windows=4, router_width=5, warmup_steps=5
)
CONFIGS = [
    CONFIG,
    replace(CONFIG, seed=1, gradient_accumulation=10, dropout=0.3),
    replace(CONFIG, num_epochs=6, learning_rate=0.3, early_stopping=2, validation_fraction=0.4),
]


def train(folder: Path, at: Callable[[int], None]) -> None:
    """Train, and call `at` with a count at each step and before each file is complete."""
    counter = itertools.count()
    write, put = os.fsync, Path.replace
    runs = [Run(config, folder / str(number)) for number, config in enumerate(CONFIGS)]
    with (
        mock.patch("os.fsync", lambda file: (at(next(counter)), write(file))),
        mock.patch.object(Path, "replace", lambda *paths: (at(next(counter)), put(*paths))),
    ):
        train_together(FEATURES, IDENTITY, runs, on_progress=lambda *_: at(next(counter)))


def kill_at(moment: int) -> Callable[[int], None]:
    def at(count: int) -> None:
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    moments: list[int] = []
    train(folder / "unbroken", moments.append)
    for moment in random.Random(0).sample(moments, kills):
        child = os.fork()
        if child == 0:
            train(folder / str(moment), kill_at(moment))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended before its moment"
        train(folder / str(moment), lambda count: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
