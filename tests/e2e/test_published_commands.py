"""The published commands, one after the other, as their readers type them.

Underscores, flags and folders are those of the published README; a tiny model and a few invented
questions in the schemas of ARC and DART-Math stand in for the real ones.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.models.routers.config import read_config
from drllm.records.splits import find_split
from drllm.records.supervision import join_supervision, read_supervision

TRAIN = (
    "train --model_id MODEL --run_name drllm-tiny --num_epochs 25 --learning_rate 1e-3 "
    "--weight_decay 0.01 --warmup_steps 500 --gradient_accumulation 16 --num_windows 8"
)
FEWER = "--limit 4 --data_dir sets"
"""What is not published: a small sample, from files."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, small_harness: None) -> Path:
    """An empty working folder, with questions in `sets/`."""
    for task in ("arc_easy", "arc_challenge", "commonsense_qa"):
        for file in ("train", "validation"):
            write(f"sets/{task}/{file}.jsonl", [options(task, file, n) for n in range(12)])
    problems = []
    for level in (1, 2, 3, 4, 5):
        texts = (f"What is {number} + {level}?" for number in range(100))
        searched = next(text for text in texts if find_split(text, "own") == "search")
        problems.append({"query": searched, "gt_ans": "7", "level": level})
    write("sets/dart/train.jsonl", problems)
    return tmp_path


def write(place: str, rows: list[dict[str, Any]]) -> None:
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(task: str, file: str, number: int) -> dict[str, Any]:
    words = ["stone", "sea", "some wood", "a bird", "rain", "the far hills", "ice", "nothing"]
    texts = [words[(number + 3 * place) % 8] for place in range(4)]
    return {
        "id": f"{task}-{file}-{number}",
        "question": f"Which of these is number {number} of {task}, {file}?",
        "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }


def write_targets(place: str, *tasks: str, decisions: tuple[int, ...] = (1, 1, 0, 1)) -> None:
    """Write targets of one's own, one of each task that is named."""
    rows = [
        {"question": f"What is {n} of {task}?", "answer": "", "id": str(n), "task": task}
        for n, task in enumerate(tasks)
    ]
    write(place, [{**row, "optimal_layer_config": decisions} for row in rows])


@pytest.fixture
def command(model_folder: Callable[..., Path], drllm: Callable[..., Any]) -> Callable[..., str]:
    """A function that runs a command line, `MODEL` standing for the tiny model."""
    model = str(model_folder())
    return lambda words, status=0: drllm(words.replace("MODEL", model), status=status).err


@pytest.fixture
def refused(command: Callable[..., str]) -> Callable[[str], str]:
    """A function that returns the one line by which a command fails."""

    def line(words: str) -> str:
        [line] = command(words, status=2).splitlines()
        return line

    return line


@pytest.mark.thorough  # each of its commands is parsed by the tests above
def test_search_training_and_evaluation_chain(command: Callable[..., str], folder: Path):
    search = "--model MODEL --dataset arc,dart --output_dir data/mcts_paths --num_simulations 50"
    command(f"search {search} --budget 2 --device cpu --limit 2 --data_dir sets")
    command(f"{TRAIN} --device cpu")
    asked = "pretrained=checkpoints/drllm-tiny,dtype=bfloat16,num_windows=8"
    tasks = "--tasks arc_challenge,arc_easy --batch_size 1 --gen_kwargs max_new_tokens=256"
    evaluate = f"lm-eval run --model drllm --model_args {asked} {tasks} --cache_requests true"
    command(f"{evaluate} --device cpu --output_path out {FEWER}")

    targets = read_supervision("data/mcts_paths/supervision.jsonl")
    assert {"arc_easy", "arc_challenge"} <= {record.task for record in targets}
    config = read_config(folder / "checkpoints" / "drllm-tiny")
    assert sum(config.training["tasks"].values()) == len(targets)
    settings = config.training["settings"]
    assert (settings["num_epochs"], settings["gradient_accumulation"]) == (25, 16)
    assert (settings["learning_rate"], settings["weight_decay"]) == (1e-3, 0.01)
    [results] = folder.glob("out/*/results_*.json")
    written = json.loads(results.read_text())
    assert set(written["results"]) == {"arc_challenge", "arc_easy"}
    routed = written["config"]["drllm"]
    assert routed["prompts"] == 8
    assert 0 < routed["executions_a_forward"] <= 8


def test_targets_of_commonsense_are_added_by_the_command_that_the_message_names(command, refused):
    write_targets("data/supervision.jsonl", *["arc_easy"] * 4, decisions=(1, 0, 1, 1))
    line = refused(f"{TRAIN} --device cpu --with_commonsense")
    assert "data/commonsense_qa/supervision.jsonl, which doesn't exist" in line
    [search] = re.findall(r"drllm (search .* --budget 2)", line)
    command(f"{search} --device cpu {FEWER}")
    command(f"{TRAIN} --device cpu --with_commonsense")
    added = len(read_supervision("data/commonsense_qa/supervision.jsonl"))
    assert added > 0
    tasks = read_config(Path("checkpoints/drllm-tiny")).training["tasks"]
    assert tasks == {"arc_easy": 4, "commonsense_qa": added}


def test_without_targets_the_command_that_makes_them_is_named(refused, folder):
    before = sorted(folder.rglob("*"))
    line = refused(TRAIN)
    assert "neither data/mcts_paths/supervision.jsonl nor data/supervision.jsonl" in line
    search = r"drllm search --model \S+ --tasks arc,dart --output-dir data/mcts_paths "
    assert re.search(search, line)
    assert sorted(folder.rglob("*")) == before
    write("data/search.jsonl", [])  # a search that gave no targets isn't asked for again
    remedy = "drllm supervise --search data/search.jsonl --output-dir data/supervision.jsonl"
    assert remedy in refused(TRAIN)


def test_two_places_to_read_from_are_not_chosen_between(refused: Callable[[str], str]):
    for place in ("data", "data/mcts_paths"):
        write_targets(f"{place}/supervision.jsonl", "own")
    assert "give the file to train on as --supervision" in refused(TRAIN)


@pytest.mark.parametrize(
    ("main_tasks", "added_tasks", "says"),
    [
        ([], [], "data/squad_v2/supervision.jsonl, which doesn't exist; make them: drllm search"),
        (["squad_v2"], ["squad_v2"], "--with-squad has no effect"),
        ([], ["squad_v2", "arc_easy"], "holds arc_easy too; give the file as --supervision"),
    ],
    ids=["none", "there already", "of other tasks"],
)
def test_targets_that_cannot_be_added_are_refused(main_tasks, added_tasks, says, refused):
    write_targets("data/supervision.jsonl", "own", *main_tasks)
    if added_tasks:
        write_targets("data/squad_v2/supervision.jsonl", *added_tasks)
    assert says in refused(f"{TRAIN} --with_squad")
    assert not Path("checkpoints").exists()


def test_several_files_are_joined_and_a_target_of_two_counts_once(command, finished_run):
    found = finished_run / "supervision.jsonl"  # with the manifest of the tiny model
    shutil.copytree(finished_run, "run", ignore=shutil.ignore_patterns("routers", "eval"))
    write_targets("more.jsonl", "own", "own", "own")
    Path("twice.jsonl").write_text(found.read_text())
    files = [Path("run/supervision.jsonl"), Path("more.jsonl"), Path("twice.jsonl")]
    once = read_supervision(found)
    assert join_supervision(files)[: len(once)] == once

    words = f"--supervision {' '.join(map(str, files))} --num_epochs 1 --device cpu"
    command(f"train --model_id MODEL --run_name joined {words}")

    training = read_config(Path("checkpoints/joined")).training
    assert sum(training["tasks"].values()) == len(once) + 3
    assert training["rewards"] == ["loglikelihood"]
