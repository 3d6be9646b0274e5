"""Processes that a launcher starts divide a stage, and end with the files of one process."""

import importlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import drllm
from drllm.cli import main
from drllm.config import ModelConfig

MOST_S = 240.0
ONE_OF_SEVERAL = """
import functools, importlib, json, os, sys
from drllm import processes
from drllm.cli import main
os.environ.update(environment)
for module, name, value in small:
    setattr(importlib.import_module(module), name, value)
share, numbers = processes.share, []
def counted(jobs):
    numbers.append(len(jobs))
    return share(jobs)
importlib.import_module("drllm.records.resume").share = counted
if words[0] == "evaluate":  # the harness takes seconds to import
    import lm_eval.tasks
    small_manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    lm_eval.tasks.TaskManager = small_manager
sys.stdout, sys.stderr = (open(f"{said}.{kind}", "w", buffering=1) for kind in ("out", "err"))
status = main(words)
open(f"{said}.shared", "w").write(json.dumps(numbers))
sys.exit(status)
"""
SMALL = [
    ("drllm.evaluation.systems", "MIN_BLOCK_SIZE", 2),
]
"""So that there are several pieces of work to divide."""
MEASURED = {"seconds", "created", "created_at", "latency", "routers"}
"""What two runs never have in common: times, and where they lie."""


@pytest.fixture
def begin(processes: Any, tmp_path: Path) -> Callable[[list[str]], list[Any]]:
    """A function that starts a command in two processes, as torchrun does."""

    def begin_both(words: list[str]) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        pair = []
        for rank in ("0", "1"):
            environment = {**place, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
            given = {"words": words, "environment": environment, "said": str(tmp_path / rank)}
            given["small"] = SMALL
            pair.append(processes.Process(target=exec, args=(ONE_OF_SEVERAL, given)))
            pair[-1].start()
        return pair

    return begin_both


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the work of this process, too, into small pieces."""
    for module, name, value in SMALL:
        monkeypatch.setattr(importlib.import_module(module), name, value)


def assert_divided(folder: Path) -> None:
    """Check that both processes had pieces to do, more than once."""
    shared = [json.loads((folder / f"{rank}.shared").read_text()) for rank in "01"]
    assert shared[0] == shared[1]
    assert shared[0].count(2) > 1


def ended(pair: list[Any]) -> list[int]:
    for process in pair:
        process.join(MOST_S)
    return [process.exitcode for process in pair]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in MEASURED}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def results_in(folder: Path) -> dict[str, Any]:
    found = {
        path.name: without_times(json.loads(path.read_text())) for path in folder.glob("*.json")
    }
    found.pop("latency.json", None)
    found.pop("samples.manifest.json", None)
    return found | {path.name: path.read_text() for path in folder.glob("samples.jsonl")}


EVALUATE = "evaluate --device cpu --tasks builtin_facts,builtin_arithmetic --limit 7 --batch-size 2"


@pytest.mark.thorough
def test_an_evaluation_in_two_processes_writes_the_results_of_one(
    begin, finished_run, tmp_path, small_harness
):
    words = [*EVALUATE.split(), "--routers", str(finished_run / "routers"), "--output-dir"]
    assert main([*words, str(tmp_path / "one")]) == 0
    assert ended(begin([*words, str(tmp_path / "two")])) == [0, 0]
    assert results_in(tmp_path / "two") == results_in(tmp_path / "one")
    assert_divided(tmp_path)


def test_what_is_wrong_is_said_by_all_in_the_same_line(begin, tmp_path):
    words = [*EVALUATE.split(), "--routers", str(tmp_path / "none"), "--output-dir", str(tmp_path)]
    assert ended(begin(words)) == [2, 2]
    said = [(tmp_path / f"{rank}.err").read_text().splitlines()[-1] for rank in "01"]
    assert said[0] == said[1]
    assert str(tmp_path / "none") in said[0]


@pytest.mark.parametrize("verb", ["search", "train", "tune", "heal"])
def test_a_verb_that_divides_nothing_is_refused_in_several_processes(verb, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = {"heal": ["--path", "none.json:skip2"], "train": ["--supervision", "none.jsonl"]}
    assert main([verb, *given.get(verb, [])]) == 2
    said = capsys.readouterr().err
    assert f"drllm {verb} runs in one process, and WORLD_SIZE is 2" in said
    assert ("--executor ray" in said) == (verb != "heal")


def test_processes_of_a_script_of_ones_own_share_nothing_unless_told_to(
    monkeypatch, model_folder, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("drllm.processes.divides", False)
    settings = {"num_fit": 8, "num_judged": 4, "max_skipped": 1}
    model = ModelConfig(model=str(model_folder()), device="cpu")
    drllm.tune(model, "builtin_facts", output_dir=tmp_path / "own", **settings)
    assert (tmp_path / "own" / "paths.json").exists()


def test_a_rank_without_other_processes_means_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["ls", "tasks"]) == 0
    assert "builtin_facts" in capsys.readouterr().out
