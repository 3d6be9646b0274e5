"""A whole run on a tiny model in a local folder, made once, for all tests of the command line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from drllm.cli import main

RECIPE = """\
model: {{model: {model}, device: cpu}}
search: {{dataset: builtin_facts, limit: 6, num_simulations: 6, block_size: 3}}
train: {{num_epochs: 2, warmup_steps: 0}}
evaluate: {{tasks: builtin_facts, limit: 6, num_random_draws: 2}}
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Keep torch on one thread: tiny models gain nothing from more, and the tests share cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A small recipe for the tiny model."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE.format(model=model_folder()))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of a whole run. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run") / "done"
    assert main(["run", str(recipe), "--output-dir", str(folder)]) == 0
    return folder


def _hear_interrupts() -> None:
    """Undo what a shell does to the commands it runs in the background: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start() -> Any:
    """A function that starts `python -m drllm …` in a process of its own."""
    running: list[Popen[str]] = []

    def begin(words: Sequence[str], cwd: Path | None = None) -> Popen[str]:
        process = Popen(
            [sys.executable, "-m", "drllm", *words],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=PIPE,
            stderr=PIPE,
            text=True,
            preexec_fn=_hear_interrupts,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()
