"""A feature pass of a small model, and as a script the same, killed: FOLDER KILLS.

In `once/` each pass is killed at another moment, in `often/` one is killed again and again.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from kills import At, kill, kill_and_go_on
from safetensors import safe_open
from small import W, Watching
from transformers import LlamaConfig, LlamaForCausalLM

from drllm.records import SupervisionRecord
from drllm.training import feature_store as store_module
from drllm.training.feature_store import FEATURES_FILE, Store
from drllm.training.features import Features, collect

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


def pool(
    folder: Path,
    number: int,
    *,
    store: Store | None = None,
    model: Any = MODEL,
    windows: int = W,
    records: list[SupervisionRecord] | None = None,
    on_progress: Callable[..., Any] = lambda *_: None,
    on_note: Callable[[str], Any] = lambda text: None,
) -> Features:
    """Pool `number` targets into a folder, three a batch."""
    return collect(
        model,
        Letters(),
        make_records(number) if records is None else records,
        num_windows=windows,
        store=store or Store(folder),
        batch_size=3,
        listener=Watching(on_progress, on_note),
    )


def pool_until(folder: Path, at: At) -> None:
    """Pool; `at` is called with a count in the midst of each write and before each wait for it."""
    counter = itertools.count()
    write, sync = Store._write, os.fsync

    def write_in_halves(self: Store, place: int, values: np.ndarray[Any, Any]) -> None:
        flat = values.reshape(-1)
        half = len(flat) // 2
        write(self, place, flat[:half])
        at(next(counter))
        write(self, place + flat[:half].nbytes, flat[half:])

    with (
        mock.patch.object(store_module, "COMMIT_S", 0.0),
        mock.patch.object(Store, "_write", write_in_halves),
        mock.patch("os.fsync", lambda file: (at(next(counter)), sync(file))),
    ):
        pool(folder, 4)  # two batches


def pool_often_killed(folder: Path, kills: int) -> None:
    """Pool 60 targets, killed at random batches, going on in the same folder each time."""
    number, moments, done = 60, random.Random(0), []

    def by_batches(folder: Path, at: At) -> None:
        counter = itertools.count()
        with mock.patch.object(store_module, "COMMIT_S", 0.0):
            pool(folder, number, on_progress=lambda *_: at(next(counter)))

    for _ in range(kills):
        kill(by_batches, folder / "killed", moments.randrange(1, 3))
        with safe_open(folder / "killed" / FEATURES_FILE, framework="pt") as file:
            done.append(int((file.get_tensor("filled") != 0).sum()))
    for name in ("killed", "unbroken"):
        by_batches(folder / name, lambda count: None)
    assert 0 < done[0] < number, "no kill came in the midst of it"
    assert done == sorted(done), "nothing that was done is done again"


if __name__ == "__main__":
    kill_and_go_on(pool_until, Path(sys.argv[1]) / "once", "all")
    pool_often_killed(Path(sys.argv[1]) / "often", int(sys.argv[2]))
