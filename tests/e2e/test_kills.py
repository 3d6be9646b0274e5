"""A search, tuning, healing or evaluation that is killed ends as an undisturbed one."""

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main
from drllm.records.search import read_search
from drllm.search import CHUNKS_FOLDER, count_kept_batches

MOST_S = 120.0
QUESTIONS = 24


@pytest.fixture
def words(model_folder: Callable[..., Path]) -> list[str]:
    settings = ["--dataset", "builtin_facts", "--limit", str(QUESTIONS), "--block-size", "1"]
    return ["search", "--model", str(model_folder()), "--device", "cpu", *settings]


def run_command(words: list[str]) -> None:
    """Run a command in this process, and end with its status."""
    sys.exit(main(words))


def begun(processes: Any, words: list[str]) -> Any:
    process = processes.Process(target=run_command, args=(words,))
    process.start()
    return process


def to_the_end(processes: Any, words: list[str]) -> float:
    """Run a command in a process of its own and return its seconds."""
    started = time.monotonic()
    process = begun(processes, words)
    process.join(MOST_S)
    assert process.exitcode == 0
    return time.monotonic() - started


@pytest.mark.thorough
@pytest.mark.parametrize(("kills", "simulations"), [(3, 8), (20, 50)])
def test_a_search_killed_at_random_moments_ends_as_an_undisturbed_one(
    kills, simulations, processes, words, tmp_path, assert_same_run
):
    words = [*words, "--num-simulations", str(simulations), "--output-dir"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    to_the_end(processes, [*words, str(undisturbed)])
    moments = random.Random(kills)
    done: list[int] = []
    for num_batches in sorted(moments.choices(range(QUESTIONS), k=kills)):
        process = begun(processes, [*words, str(killed)])
        while count_kept_batches(killed / CHUNKS_FOLDER) < num_batches and process.is_alive():
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.5))
        process.kill()
        process.join(MOST_S)
        assert process.exitcode in (-9, 0)  # 0: it was quicker than the kill
        if process.exitcode == -9:
            done.append(count_kept_batches(killed / CHUNKS_FOLDER))
    to_the_end(processes, [*words, str(killed)])

    assert any(0 < batches < QUESTIONS for batches in done), f"no kill came in its midst: {done}"
    expected, found = (read_search(folder / "search.jsonl") for folder in (undisturbed, killed))
    assert_same_run(found, expected)
    names = [sorted(path.name for path in folder.iterdir()) for folder in (killed, undisturbed)]
    assert names[0] == names[1], "nothing half-written is left behind"


@pytest.mark.thorough  # tuning/test_run interrupts one in this process
@pytest.mark.parametrize("kills", [1, 8])
def test_a_tuning_killed_at_random_moments_ends_as_an_undisturbed_one(
    kills, processes, model_folder, tmp_path
):
    settings = (
        "--tasks builtin_facts --num-fit 30 --num-judged 24 --max-skipped 2 --max-loss 10 --beam 2 "
        "--device cpu"
    )
    words = ["tune", "--model", str(model_folder()), *settings.split(), "--output-dir"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    to_the_end(processes, [*words, str(undisturbed)])
    moments = random.Random(kills)
    kept = killed / "paths.partial"
    inside = 0
    for after in sorted(moments.choices(range(1, 9), k=kills)):
        process = begun(processes, [*words, str(killed)])
        while len(list(kept.glob("*.json"))) < after and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)  # 0: it was quicker than the kill
        inside += kept.exists()
    assert inside, "no kill came in its midst"
    to_the_end(processes, [*words, str(killed)])
    expected, found = (
        json.loads((each / "paths.json").read_text()) for each in (undisturbed, killed)
    )
    assert {**found, "created": None} == {**expected, "created": None}
    assert [path.name for path in killed.iterdir()] == [path.name for path in undisturbed.iterdir()]


@pytest.mark.thorough  # tuning/test_heal interrupts one in this process
def test_a_healing_killed_at_random_moments_ends_with_the_adapter_of_an_undisturbed_one(
    processes, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("drllm.tuning.heal.SAVE_SECONDS", 0.0)  # the processes are forks
    plan = tmp_path / "plan.json"
    plan.write_text('{"decisions": [1, 0, 1, 1]}')
    settings = "--tasks builtin_facts --limit 20 --steps 60 --rank 2 --num-held-out 4 --device cpu"
    words = ["heal", "--model", str(model_folder()), "--path", str(plan), *settings.split()]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    to_the_end(processes, [*words, "--output-dir", str(undisturbed)])
    moments = random.Random(0)
    for _ in range(3):
        process = begun(processes, [*words, "--output-dir", str(killed)])
        while not (killed / "heal.partial").exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.join()
    to_the_end(processes, [*words, "--output-dir", str(killed)])
    names = [sorted(path.name for path in folder.iterdir()) for folder in (killed, undisturbed)]
    assert names[0] == names[1]
    expected, found = (
        (folder / "adapter_model.safetensors").read_bytes() for folder in (undisturbed, killed)
    )
    assert found == expected


SETTINGS = (
    *("--tasks", "builtin_arithmetic", "--limit", "7", "--batch-size", "1"),
    *("--baselines", "permuted-routes", "--num-random-draws", "2", "--num-texts", "2"),
)
NUM_BLOCKS = 7
"""Of each of three systems: answers are generated, and a batch is one question."""


def outcome(folder: Path) -> tuple[Any, Any]:
    """Return what an evaluation wrote, without its times."""
    result = json.loads((folder / "builtin_arithmetic.json").read_text())
    rows = [{**row, "seconds": None} for row in result["systems"]]
    assert not (folder / "partial").exists()
    return {**result, "created": None, "systems": rows}, (folder / "samples.jsonl").read_bytes()


@pytest.mark.thorough  # evaluation/test_run interrupts some in this process
@pytest.mark.parametrize("kills", [1, 15])
def test_an_evaluation_killed_at_random_questions_ends_as_an_undisturbed_one(
    kills, processes, finished_run, tmp_path
):
    words = ["evaluate", "--routers", str(finished_run / "routers"), "--device", "cpu", *SETTINGS]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    to_the_end(processes, [*words, "--output-dir", str(undisturbed)])
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
    to_the_end(processes, [*words, "--output-dir", str(killed)])
    assert outcome(killed) == outcome(undisturbed)


def num_blocks(partial: Path) -> int:
    """Count the blocks that were answered, those of systems that are done included."""
    names = [path.name for path in partial.glob("b*.json")]
    parts = [name for name in names if name.count(".") > 1]
    return NUM_BLOCKS * (len(names) - len(parts)) + len(parts)
