"""`drllm search` on a tiny model: dry run, shards, questions that fail, who writes where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from drllm.cli import main
from drllm.records import only_writer, read_search, to_lines


@pytest.fixture
def words(model_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    settings = ["--num-simulations", "6", "--limit", "10", "--block-size", "3"]
    model = ["--model", str(model_folder()), "--device", "cpu"]
    return ["search", *model, *settings, "--output-dir", str(tmp_path / "out")]


def test_a_dry_run_says_what_to_expect_and_writes_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "--dry-run", "--dataset", "builtin_facts,builtin_arithmetic"]) == 0

    out = capsys.readouterr().out
    for task in ("builtin_facts", "builtin_arithmetic"):
        [row] = [line.split() for line in out.splitlines() if line.split()[:1] == [task]]
        assert row[1:3] == ["10", "70"]
        assert float(row[3]) > 70  # executions
        assert float(row[4]) > 0  # hours
        assert float(row[5]) > 0  # MB
        assert f"measured on    21 paths of 3 questions of {task}" in out
    assert "as the model reads it:\nQuestion: " in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_right_about_paths_and_close_about_disk(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "--dry-run"]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "facts  " in line]
    assert main(words) == 0
    records = read_search(tmp_path / "out" / "search.jsonl")
    assert int(row[2]) == sum(len(record.paths) for record in records)
    size = len(to_lines(records).encode()) / 1e6
    assert float(row[5]) == pytest.approx(size, rel=0.25)


def test_a_dry_run_shares_the_time_out_among_workers(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*words, "--dry-run", "--executor", "ray", "--num-workers", "4"]) == 0
    assert " on 4 like it" in capsys.readouterr().out


def test_shards_are_joined_by_supervise(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files = [tmp_path / part / "search.jsonl" for part in ("whole", "1", "2")]
    for file, shard in zip(files, ([], ["--shard", "1/2"], ["--shard", "2/2"]), strict=True):
        assert main([*words, *shard, "--output-dir", str(file.parent)]) == 0
    whole, first, second = map(read_search, files)
    assert sorted(r.id for r in whole) == sorted(r.id for r in [*first, *second])
    joined = tmp_path / "joined.jsonl"

    command = ["supervise", "--search", str(files[1]), str(files[2]), "--output", str(joined)]
    assert main(command) == 0

    by_question = {
        json.loads(line)["question"]: json.loads(line)["optimal_layer_config"]
        for line in (tmp_path / "whole" / "supervision.jsonl").read_text().splitlines()
    }
    for line in joined.read_text().splitlines():
        row = json.loads(line)
        assert by_question.pop(row["question"]) == row["optimal_layer_config"]
    assert by_question == {}


def test_another_search_that_writes_there_is_answered_in_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with only_writer(tmp_path / "out", "search", "--output-dir"):
        assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drllm: another search is writing to {tmp_path / 'out'}; wait")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_yaml_file_can_ask_for_a_dry_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "settings.yaml").write_text("dry_run: true\n")
    assert main([*words, "--config", str(tmp_path / "settings.yaml")]) == 0
    assert "nothing was written" in capsys.readouterr().out
    (tmp_path / "settings.yaml").write_text("dry_run: maybe\n")
    assert main([*words, "--config", str(tmp_path / "settings.yaml")]) == 2
    assert "--dry-run is 'maybe'; give true or false" in capsys.readouterr().err
