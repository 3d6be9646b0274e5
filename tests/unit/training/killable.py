"""A small model, its targets and trainings; and such work, killed in a process of its own."""

import os
import random
import signal
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small import IDENTITY, W, Watching, files_of, make_features
from transformers import LlamaConfig, LlamaForCausalLM

from drllm.config import TrainConfig
from drllm.model.load import BaseModel
from drllm.models.workers import open_workers
from drllm.records.supervision import SupervisionRecord
from drllm.training import stage
from drllm.training.feature_store import FeatureStore
from drllm.training.features import collect_features
from drllm.work.listener import Listener
from process_server import run_in_process

L, D, CONTEXT = 3, 8, 48


class Letters:
    """A tokenizer of one token a letter, none for a line."""

    bos_token = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text.strip("_ ")]}


def make_model(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=L,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_record(number: int, prompt: str, decisions: tuple[int, ...]) -> SupervisionRecord:
    return SupervisionRecord(
        question=f"about {prompt}",
        optimal_layer_config=decisions,
        answer="yes",
        prompt=prompt,
        id=f"q{number}",
    )


PATHS = [(1, 1, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0), (0, 0, 1)]


def make_records(number: int) -> list[SupervisionRecord]:
    """Prompts of 1 to 20 letters, none twice, along five paths in turn."""
    return [
        make_record(row, chr(65 + row) * (1 + 7 * row % 20), PATHS[row % len(PATHS)])
        for row in range(number)
    ]


MODEL = make_model()
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
)


def pool(folder, number=0, *, records=None, on_progress=lambda *_: None, on_note=print, **options):
    """Pool `number` targets into a folder, three a batch."""
    options = {"store": FeatureStore(folder), "batch_size": 3, **options}
    options["listener"] = Watching(on_progress, on_note)
    return pooled(records or make_records(number), **options)


def pooled(records, model=MODEL, **options):
    """Pool targets in this process, into a temporary folder by default; they stay mapped."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_workers(model, Letters(), CONFIG, Listener()) as workers,
    ):
        options = {"num_windows": W, "store": FeatureStore(Path(folder) / "features"), **options}
        return collect_features(workers, records, **options)


def train(folder, config=CONFIG, at=lambda *_: None, records=None) -> None:
    """Train seeds; `at` is called whenever something was done."""
    stage.train(BASE, records or make_records(N), config, folder, listener=Watching(at))


def kill(work: Callable[..., None], folder: Path, moment: int) -> None:
    """Do some work in a child on one thread, which kills itself at a moment.

    The work receives the folder, and a function to call at each moment at which a kill may come.
    """
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        left = [None] * moment
        work(folder, lambda *_: left.pop() if left else os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended before its moment"


def kill_and_go_on(work: Callable[..., None], folder: Path, kills: str) -> None:
    """Do some work unbroken, then several times killed at another moment and resumed.

    Since it forks, this needs a process of its own. The folder gets `unbroken/`, and one folder for
    each kill (`all`: at every moment), named after its moment.
    """
    torch.set_num_threads(1)
    moments: list[int] = []
    work(folder / "unbroken", lambda *_: moments.append(len(moments)))
    number = len(moments) if kills == "all" else int(kills)
    for moment in random.Random(0).sample(moments, number):
        kill(work, folder / str(moment), moment)
        work(folder / str(moment), lambda *_: None)


def run_script(*arguments: object) -> None:
    """Run `main` in a process of its own."""
    run_in_process(main, *map(str, arguments))


def kills_that_changed_nothing(folder: Path, num_files: int, name: str = "*") -> int:
    """Count kills; the files of a name must have ended as those of the unbroken work did."""
    folders = {path.name: files_of(path, name) for path in folder.iterdir()}
    unbroken = folders.pop("unbroken")
    assert len(unbroken) == num_files
    for moment, files in folders.items():
        assert files == unbroken, f"killed at {moment}"
    return len(folders)


@contextmanager
def at_files(at):
    """Call `at` before each wait for a file, and before each file is complete or deleted."""
    write, put, unlink = os.fsync, Path.replace, Path.unlink
    with (
        mock.patch("os.fsync", lambda file: (at(), write(file))),
        mock.patch.object(Path, "replace", lambda *paths: (at(), put(*paths))[1]),
        mock.patch.object(Path, "unlink", lambda *path, **how: (at(), unlink(*path, **how))),
    ):
        yield


def pool_until(folder: Path, at: Callable[..., Any]) -> None:
    """Pool two blocks."""
    with at_files(at):
        pool(folder, 4)


def pool_often_killed(folder: Path, kills: str) -> None:
    """Pool 60 targets, killed at random blocks and resumed in the same folder."""
    number = 60
    moments = random.Random(0)
    done = []

    def by_blocks(folder, at):
        pool(folder, number, on_progress=at)

    for _ in range(int(kills)):
        kill(by_blocks, folder / "killed", moments.randrange(1, 3))
        done.append(len(list((folder / "killed").glob("features-*.safetensors"))))
    for name in ("killed", "unbroken"):
        by_blocks(folder / name, lambda *_: None)
    assert 0 < done[0] < number / 3, "no kill came in the midst of it"
    assert done == sorted(done), "nothing that was done is done again"


def train_features(folder: Path, at: Callable[..., Any]) -> None:
    """Train on features, with two learning rates and shares held out."""
    config = replace(CONFIG, num_epochs=3, gradient_accumulation=10, warmup_steps=5, num_seeds=1)
    slow = replace(config, learning_rate=1e-3, seed=1, validation_fraction=0.1)
    soon = replace(config, num_epochs=5, learning_rate=0.3)
    with at_files(at):
        for name, config in {"slow": slow, "soon": replace(soon, validation_fraction=0.4)}.items():
            listener = Watching(at)
            stage.train_seed(make_features(40), IDENTITY, config, folder / name, listener=listener)


def train_seeds(folder: Path, at: Callable[..., Any]) -> None:
    """Train two seeds."""
    with at_files(at):
        train(folder, CONFIG, at)


def main(name: str, where: str, how_many: str) -> None:
    """Do the work of a name, killed so many times."""
    if name == "pool":
        kill_and_go_on(pool_until, Path(where) / "once", "all")
        pool_often_killed(Path(where) / "often", how_many)
    else:
        kill_and_go_on(globals()[name], Path(where), how_many)
