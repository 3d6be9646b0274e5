"""`drllm search` on a tiny model: dry run, shards, questions that fail, who writes where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.records.manifest import to_lines
from drllm.records.places import only_writer
from drllm.records.search import read_search


@pytest.fixture
def search(model_folder: Callable[..., Path], tmp_path: Path, drllm: Any) -> Callable[..., Any]:
    """A function that searches with a tiny model, to `out` unless told otherwise."""
    model = f"--model {model_folder()} --device cpu"
    command = f"search --dataset builtin_facts {model} --num-simulations 6 --limit 10"
    place = ["--block-size", "3", "--output-dir", tmp_path / "out"]
    return lambda *words, status=0: drllm(command, *place, *words, status=status)


def test_a_dry_run_says_what_to_expect_and_writes_nothing(search, tmp_path: Path):
    out = search("--dry-run", "--dataset", "builtin_facts,builtin_arithmetic").out
    for task in ("builtin_facts", "builtin_arithmetic"):
        [row] = [line.split() for line in out.splitlines() if line.split()[:1] == [task]]
        assert row[1:3] == ["10", "70"]
        assert float(row[3]) > 70  # executions
        assert float(row[4]) > 0  # hours
        assert float(row[5]) > 0  # MB
        assert f"measured on    21 paths of 3 questions of {task}" in out
    assert "as the model reads it:\nQuestion: " in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_right_about_paths_and_close_about_disk(search, tmp_path: Path):
    out = search("--dry-run").out
    [row] = [line.split() for line in out.splitlines() if "facts  " in line]
    search()
    records = read_search(tmp_path / "out" / "search.jsonl")
    assert int(row[2]) == sum(len(record.paths) for record in records)
    size = len(to_lines(records).encode()) / 1e6
    assert float(row[5]) == pytest.approx(size, rel=0.25)


def test_a_dry_run_shares_the_time_out_among_workers(search):
    assert " on 4 like it" in search("--dry-run", "--executor", "ray", "--num-workers", "4").out


def test_shards_are_joined_by_supervise(search, tmp_path: Path, drllm):
    files = [tmp_path / part / "search.jsonl" for part in ("whole", "1", "2")]
    for file, shard in zip(files, ([], ["--shard", "1/2"], ["--shard", "2/2"]), strict=True):
        search(*shard, "--output-dir", file.parent)
    whole, first, second = map(read_search, files)
    assert sorted(r.id for r in whole) == sorted(r.id for r in [*first, *second])
    joined = tmp_path / "joined.jsonl"
    drllm("supervise --search", *files[1:], "--output", joined)
    by_question = {
        json.loads(line)["question"]: json.loads(line)["optimal_layer_config"]
        for line in (tmp_path / "whole" / "supervision.jsonl").read_text().splitlines()
    }
    for line in joined.read_text().splitlines():
        row = json.loads(line)
        assert by_question.pop(row["question"]) == row["optimal_layer_config"]
    assert by_question == {}


def test_another_search_that_writes_there_is_answered_in_one_line(search, tmp_path: Path):
    with only_writer(tmp_path / "out", "search", "--output-dir"):
        [line] = search(status=2).err.splitlines()
    assert line.startswith(f"drllm: another search is writing to {tmp_path / 'out'}; wait")
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_can_ask_for_a_dry_run(search, tmp_path: Path):
    file = tmp_path / "settings.yaml"
    file.write_text("dry_run: true\n")
    assert "nothing was written" in search("--config", file).out
    file.write_text("dry_run: maybe\n")
    said = search("--config", file, status=2).err
    assert "--dry-run is 'maybe'; give true or false" in said
