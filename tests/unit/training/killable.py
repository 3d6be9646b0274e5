"""A feature pass of a small model that can be run in a process of its own, and killed there.

`python killable.py` loads everything once and then forks a process for each line that it reads,
so that many can be killed in little time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import W, Watching
from transformers import LlamaConfig, LlamaForCausalLM

from drllm.records import SupervisionRecord
from drllm.training import feature_store as store_module
from drllm.training.feature_store import Store
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


def pool_slowly(folder: str, number: int, pause_s: float) -> None:
    """Pool with a pause behind each batch, committed one by one."""
    store_module.COMMIT_S = 0.0
    pool(Path(folder), number, on_progress=lambda done, total: time.sleep(pause_s))


def pool_and_die(folder: str, number: int, step: int) -> None:
    """Pool until a step, half done, ends this process; a step is a write or a wait for the disk."""
    store_module.COMMIT_S = 0.0
    steps = iter(range(step + 1))
    write, sync = Store._write, os.fsync

    def is_last() -> bool:
        return next(steps) == step

    def write_half(self: Store, place: int, values: np.ndarray[Any, Any]) -> None:
        if is_last():
            flat = values.reshape(-1)
            write(self, place, flat[: len(flat) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, place, values)

    def sync_never(file: int) -> None:
        if is_last():
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    Store._write = write_half  # type: ignore[method-assign]
    os.fsync = sync_never
    pool(Path(folder), number)


def serve() -> None:
    """For each line `[function, [arguments]]`: print the pid of what runs it, then how it ended."""
    for line in sys.stdin:
        name, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            globals()[name](*arguments)
            os._exit(0)  # an exception ends the loop as well, with another status
        say(pid)
        say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    say("ready")
    serve()
