"""Data that drllm has no word for, by the documented commands: search, train, gaps, learn."""

import json

import datasets
import pytest

from drllm.records.search import read_search

WORDS = ("blue", "green", "red", "black")
HUB = [
    {"q": f"Which colour is number {n}?", "of": {"text": [*WORDS]}, "n": n % 4} for n in range(90)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"My number is {n}."},
            {"role": "assistant", "content": "A fine one."},
            {"role": "user", "content": "And the next?"},
            {"role": "assistant", "content": str(n + 1)},
        ]
    }
    for n in range(90)
]
REWARD = "def reward(example, text):\n    return float(len(text) % 2)\n"


@pytest.fixture
def loop(drllm, model_folder, tmp_path, monkeypatch):
    """A function that takes a set through all commands; it returns the search's file."""
    monkeypatch.chdir(tmp_path)
    folder = model_folder()
    own = f"--model {folder} --device cpu"

    def run(dataset: str, *flags: str):
        drllm(f"search {own} --limit 8 --num-simulations 4 --dataset", dataset, *flags)
        drllm(f"train {own} --num-epochs 1 --num-windows 2 --router-width 4 --output routers")
        drllm(f"gaps {own} --layers 3 --output-dir gaps --tasks", dataset, *flags)
        words = f"learn {own} --skip gaps/paths.json:3 --minutes 0 --output-dir smaller"
        drllm(words, "--tasks", dataset, *flags)
        asked = f"evaluate {own} --routers routers --limit 4 --num-texts 2"
        return f"{asked} --baselines none --tasks", tmp_path / "data" / "search.jsonl"

    return run


def test_a_hub_set_with_columns_of_its_own(loop, drllm, monkeypatch):
    of_files = datasets.load_dataset

    def load_dataset(path, name=None, **others):
        if (path, name, others.get("split")) == ("owner/name", "small", "train"):
            return datasets.Dataset.from_list(HUB)
        return of_files(path, name, **others)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = ("--columns", "question=q,choices=of.text,answer=n")
    asked, file = loop("owner/name:small", *columns)
    assert {record.task for record in read_search(file)} == {"name_small"}
    assert "name_small, test: 4 questions" in drllm(asked, "owner/name:small", *columns).out


def test_a_file_of_conversations(loop, drllm, tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    asked, file = loop("chats.jsonl")
    for record in read_search(file):
        assert record.reward == "kl"
        assert record.full.reward == 0.5
        assert "A fine one." in record.prompt
        assert all(0 < path.reward < 0.5 for path in record.paths[1:])
    assert (tmp_path / "smaller" / "model.safetensors").exists()
    config = json.loads((tmp_path / "routers" / "router_config.json").read_text())
    assert config["training"]["rewards"] == ["kl"]
    (tmp_path / "own.py").write_text(REWARD)
    for reward, said in ((), "not evaluated"), (("--reward", "own.py:reward"), "a conversation"):
        assert said in drllm(asked, "chats.jsonl", *reward, status=2).err


def test_a_file_of_prompts_and_a_reward_function(loop, drllm, tmp_path):
    prompts = [{"prompt": f"Say {n} words."} for n in range(90)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "own.py").write_text(REWARD)
    asked, _ = loop("prompts.jsonl")
    assert (
        "prompts, test: 4 questions"
        in drllm(asked, "prompts.jsonl", "--reward", "own.py:reward").out
    )
