"""Several processes of a launcher: `lm-eval` shares them, other verbs refuse, scripts go on alone.

`test_lm_eval.py` compares the numbers of two processes with those of one.
"""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import drllm
from drllm.cli import main
from drllm.cli.verbs import VERBS
from drllm.evaluation.lm_eval.model import _join_processes

MOST_S = 240.0
ONE_OF_SEVERAL = """
import os, sys
from drllm.cli import main
os.environ.update(environment)
sys.stderr = open(said, "w", buffering=1)
sys.exit(main(words))
"""
ON_RAY = {"search", "train", "evaluate"}
FLAGS = {
    "evaluate": "--routers none",
    "export": "--skip 1 --output-dir none",
    "generate": "--routers none Why?",
    "learn": "--skip 1 --output-dir none",
    "ls": "tasks",
    "report": "none",
    "run": "none.yaml --output-dir none",
    "show": "none",
    "shrink": "none none.jsonl none",
    "supervise": "--search none.jsonl --output none.jsonl",
    "train": "--supervision none.jsonl",
    "bundle": "none --output-dir none",
}


@pytest.fixture
def run_in_two(processes: Any, tmp_path: Path) -> Callable[[list[str]], list[int]]:
    """A function that runs a command in two processes, as torchrun starts them."""

    def run(words: list[str]) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        pair = []
        for rank in ("0", "1"):
            environment = {**place, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
            given = {"words": words, "environment": environment, "said": str(tmp_path / rank)}
            pair.append(processes.Process(target=exec, args=(ONE_OF_SEVERAL, given)))
            pair[-1].start()
        for process in pair:
            process.join(MOST_S)
        return [process.exitcode for process in pair]

    return run


def test_what_is_wrong_with_an_lm_eval_is_said_by_all_in_the_same_line(run_in_two, tmp_path):
    model = f"pretrained={tmp_path / 'none'},num_windows=8"
    words = ["lm-eval", "run", "--model", "drllm", "--model_args", model, "--device", "cpu"]
    assert run_in_two([*words, "--tasks", "builtin_facts", "--split", "test"]) == [2, 2]
    said = [(tmp_path / rank).read_text().splitlines()[-1] for rank in "01"]
    assert said[0] == said[1]
    assert str(tmp_path / "none") in said[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_other_verb_is_refused_in_several_processes(verb, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([verb, *FLAGS.get(verb, "").split()]) == 2
    [line] = capsys.readouterr().err.splitlines()
    command = f"drllm {verb}"
    if verb in ON_RAY:
        command += " --executor ray"
    assert f"drllm {verb} runs in one process, and WORLD_SIZE is 2" in line
    assert line.endswith(f"start it without a launcher: {command} …")


def test_a_script_of_ones_own_works_alone_in_each_process(monkeypatch, model_folder, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    base = drllm.load(str(model_folder()), device="cpu")
    drllm.search_paths(base, "builtin_facts", limit=2, num_simulations=2, output_dir=tmp_path)
    assert (tmp_path / "search.jsonl").exists()


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), ("WORLD_SIZE", "2")])
def test_one_of_the_two_variables_alone_means_nothing(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert main(["ls", "tasks"]) == 0
    assert "builtin_facts" in capsys.readouterr().out


def test_the_harness_model_joins_no_others_where_the_world_size_alone_is_set(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _join_processes("cpu") is None
