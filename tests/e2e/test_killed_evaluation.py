"""An evaluation that is killed again and again ends as one that nothing disturbed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main

SETTINGS = (
    *("--tasks", "builtin_arithmetic", "--limit", "7", "--batch-size", "1"),
    *("--baselines", "permuted-routes", "--num-random-draws", "2", "--num-texts", "2"),
    *("--latency-rounds", "0"),
)
NUM_BLOCKS = 7
"""Of each of three systems: answers are generated, and a batch is one question."""


def begun(processes: Any, words: list[str]) -> Any:
    process = processes.Process(target=main, args=(words,))
    process.start()
    return process


def outcome(folder: Path) -> tuple[Any, Any]:
    """Return what an evaluation wrote, without its times."""
    result = json.loads((folder / "builtin_arithmetic.json").read_text())
    rows = [{**row, "seconds": None} for row in result["systems"]]
    assert not (folder / "partial").exists()
    return {**result, "created": None, "systems": rows}, (folder / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.thorough)])
def test_an_evaluation_killed_at_random_questions_ends_as_an_undisturbed_one(
    kills: int, processes: Any, finished_run: Path, tmp_path: Path
):
    words = ["evaluate", "--routers", str(finished_run / "routers"), "--device", "cpu", *SETTINGS]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = begun(processes, [*words, "--output-dir", str(undisturbed)])
    whole.join()
    assert whole.exitcode == 0

    moments = random.Random(kills)
    inside = 0
    for after in sorted(moments.sample(range(1, 5 * NUM_BLOCKS // 2), kills)):
        process = begun(processes, [*words, "--output-dir", str(killed)])
        while num_blocks(killed / "partial") < after and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)  # 0: it was quicker than the kill
        inside += any((killed / "partial").glob("b*.*.json"))
    assert inside, "no kill came inside of a system"
    last = begun(processes, [*words, "--output-dir", str(killed)])
    last.join()
    assert last.exitcode == 0
    assert outcome(killed) == outcome(undisturbed)


def num_blocks(partial: Path) -> int:
    """Count the blocks that were answered, those of systems that are done included."""
    names = [path.name for path in partial.glob("b*.json")]
    parts = [name for name in names if name.count(".") > 1]
    return NUM_BLOCKS * (len(names) - len(parts)) + len(parts)
