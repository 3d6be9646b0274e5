"""A verb in processes that a launcher starts: refused, with the hint to use Ray."""

import pytest

import drllm
from drllm.cli import main
from drllm.config import ModelConfig


@pytest.mark.parametrize("verb", ["search", "train", "tune", "evaluate", "heal"])
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
    settings = {"num_fit": 8, "num_judged": 4, "max_skipped": 1}
    model = ModelConfig(model=str(model_folder()), device="cpu")
    drllm.tune(model, "builtin_facts", output_dir=tmp_path / "own", **settings)
    assert (tmp_path / "own" / "paths.json").exists()


def test_a_rank_without_other_processes_means_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["ls", "tasks"]) == 0
    assert "builtin_facts" in capsys.readouterr().out
