"""A search that is killed again and again, at any moment, ends as one that nothing disturbed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main
from drllm.records import read_search
from drllm.search import CHUNKS_FOLDER, num_batches_kept

MOST_S = 120.0
QUESTIONS = 24


@pytest.fixture
def words(model_folder: Callable[..., Path]) -> list[str]:
    settings = ["--limit", str(QUESTIONS), "--block-size", "1"]
    return ["search", "--model", str(model_folder()), "--device", "cpu", *settings]


def to_the_end(processes: Any, words: list[str]) -> float:
    """Run a search in a process of its own and return its seconds."""
    started = time.monotonic()
    process = processes.Process(target=main, args=(words,))
    process.start()
    process.join(MOST_S)
    assert process.exitcode == 0
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("kills", "simulations"), [(3, 8), pytest.param(20, 50, marks=pytest.mark.thorough)]
)
def test_a_search_killed_at_random_moments_ends_as_an_undisturbed_one(
    kills: int,
    simulations: int,
    processes: Any,
    words: list[str],
    tmp_path: Path,
    assert_same_run: Callable[..., None],
):
    words = [*words, "--num-simulations", str(simulations), "--output-dir"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = to_the_end(processes, [*words, str(undisturbed)])
    idle = to_the_end(processes, [*words, str(undisturbed)])  # it is complete: nothing to search
    moments = random.Random(kills)
    done: list[int] = []
    while len(done) < kills:
        process = processes.Process(target=main, args=([*words, str(killed)],))
        process.start()
        process.join(moments.uniform(idle / 2, idle + 2 * (whole - idle) / kills))
        process.kill()
        process.join(MOST_S)
        assert process.exitcode in (-9, 0)  # 0: it was quicker than the kill
        if process.exitcode == -9:
            done.append(num_batches_kept(killed / CHUNKS_FOLDER))
    to_the_end(processes, [*words, str(killed)])

    assert any(0 < batches < QUESTIONS for batches in done), f"no kill came in its midst: {done}"
    expected, found = (read_search(folder / "search.jsonl") for folder in (undisturbed, killed))
    assert_same_run(found, expected)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (killed, undisturbed)]
    assert names[0] == names[1], "nothing half-written is left behind"
