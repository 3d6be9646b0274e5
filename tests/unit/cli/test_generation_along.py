"""`drllm generate --path`: every prompt along one static path."""

import json

import pytest

from drllm.cli.chat import chat
from drllm.cli.reply import PathSummary, Session
from drllm.config import GenerateConfig
from drllm.model.load import load
from drllm.model.prompts import PromptForm
from drllm.models.routed_model import RoutedModel
from drllm.paths import StaticPath
from slow_way import ListedModel

PATHS = {"4.00": [0, 1, 2, 4], "again": [0, 1, 2, 2, 3, 4, 5], "5.00": [0, 1, 3, 4, 5]}
PROMPTS = ["a metal", "ice?", "why"]


@pytest.fixture
def base(model_folder):
    return load(str(model_folder(num_layers=6)), device="cpu")


@pytest.fixture
def places(base, tmp_path):
    """A file for each path, with words that give the model too."""
    found = {}
    for name, layers in PATHS.items():
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"path": layers}))
        found[name] = ["--model", base.name, "--path", file]
    return found


def said_alone(base, path, prompt):
    tokens = ListedModel(base.model, path=path).greedy(base.tokenizer(prompt)["input_ids"], 6)
    end = base.tokenizer.eos_token_id
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    return base.tokenizer.decode(tokens, skip_special_tokens=True).strip()


COMMAND = "generate --device cpu --no-chat --max-new-tokens 6"


@pytest.mark.parametrize("name", ["4.00", "again"])
def test_one_prompt_is_answered_along_the_path_which_is_said_in_words(base, places, drllm, name):
    out = drllm(COMMAND, *places[name], PROMPTS[0]).out
    assert out.startswith(said_alone(base, PATHS[name], PROMPTS[0]).expandtabs() + "\n")
    assert f"path        {StaticPath(PATHS[name]).edits(6)}\n" in out
    assert "of 6 a forward pass" in out
    assert "█" not in out


def test_a_file_of_prompts_is_answered_along_the_path(base, places, drllm, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    said = drllm(COMMAND, *places["4.00"], "--file", file, "--batch-size", 2)
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [row["answer"] for row in answers] == [
        said_alone(base, PATHS["4.00"], prompt) for prompt in PROMPTS
    ]
    assert {tuple(row["route"]) for row in answers} == {(1, 1, 1, 0, 1, 0)}
    assert {row["executions"] for row in answers} == {4.0}
    assert "prompts     3 along one path" in said.err
    assert "skips layers 3 and 5" in said.err


def test_the_cost_of_the_path_is_said(places, drllm):
    out = drllm(COMMAND, *places["5.00"], "hello").out
    assert "path        skips layer 2\n" in out
    assert "executions  5.00 of 6 a forward pass (83 %)" in out


def test_a_chat_runs_every_turn_along_the_path(base, monkeypatch):
    from drllm.cli.terminal import Terminal

    said = []
    terminal = Terminal()
    monkeypatch.setattr(terminal, "say", lambda text="": said.append(text))
    monkeypatch.setattr(terminal, "note", said.append)
    turns = iter(["hello", "and now?"])

    def typed(_mark):
        for text in turns:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    path = StaticPath([0, 1, 1, 1, 3])
    with routed.fixed(path):
        along = PathSummary(path.edits(6), 4.5)
        config = GenerateConfig(max_new_tokens=2)
        chat(Session(routed, PromptForm(chat=True), config, terminal, along))
    assert said[0] == f"path        {path.edits(6)}"
    assert "a route of its own" not in said[1]
    assert [text.startswith("4.5 of 6 executions, ") for text in said if "tokens" in text] == [
        True,
        True,
    ]
