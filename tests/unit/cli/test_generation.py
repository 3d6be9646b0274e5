"""Files of prompts and of answers, and the settings of draws, of `drllm generate`."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drllm.cli import main
from drllm.cli.answers import to_line
from drllm.cli.generation_inputs import PromptRow, read_prompts
from drllm.cli.reply import Reply
from drllm.config import GenerateConfig
from drllm.errors import RecordError, TaskError
from drllm.model.prompts import PromptForm
from drllm.models.routing.batch_generation import GeneratedAnswer


def write(path: Path, *rows: Any) -> Path:
    """Write rows as JSON lines; a text stands for itself."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


TALK = [{"role": "user", "content": "Hi."}, {"role": "user", "content": "Who am I?"}]


def test_rows_ask_by_prompt_question_or_messages_gzipped_or_not(tmp_path: Path):
    path = write(
        tmp_path / "p.jsonl",
        {"id": "sky", "prompt": "Why is the sky blue?"},
        "",
        {"question": "What is ice?", "answer": "frozen water"},
        {"messages": TALK, "id": 7},
    )

    asked = read_prompts(path)

    gzipped = tmp_path / "p.jsonl.gz"
    gzipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_prompts(gzipped) == asked
    assert [(row.line, row.id, row.prompt) for row in asked] == [
        (1, "sky", "Why is the sky blue?"),
        (3, "line-3", "What is ice?"),
        (4, 7, TALK),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "cut off"),
        ('["a"]', "array"),
        ({"text": "a", "n": 1}, "none of prompt, question, messages"),
        ({"prompt": "a", "question": "b"}, "both 'prompt' and 'question'"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"question": 3}, "'question' is 3"),
        ({"prompt": "a", "id": None}, "'id' is None"),
        ({"prompt": "a", "id": "first"}, "'first'"),
        ({"messages": []}, r"'messages' is \[\]"),
        ({"messages": ["a"]}, "'messages' holds 'a'"),
        ({"messages": [{"role": "user"}]}, "'content' is missing"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "id": "first"}, row)
    with pytest.raises((TaskError, RecordError), match=message) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}, line 2")


def test_messages_are_refused_where_no_chat_template_is_used(tmp_path: Path, capsys):
    path = write(tmp_path / "p.jsonl", {"messages": TALK})
    assert main(["generate", "--no-chat", "--file", str(path)]) == 2
    assert "line 1: 'messages' need the chat template" in capsys.readouterr().err


def test_an_answer_is_one_line_with_its_cost():
    answer = GeneratedAnswer(prompt="as put", text="as given", tokens=(5, 6, 2), route=(1, 0, 2))
    line = to_line(PromptRow(1, "a", "Was ist »Eis«?"), " Wasser.\n", answer)
    assert line.count("\n") == line.endswith("\n")
    assert "»Eis«" in line
    told = {"id": "a", "prompt": "Was ist »Eis«?", "answer": "Wasser.", "route": [1, 0, 2]}
    assert json.loads(line) == {**told, "executions": 3.0, "tokens": 3}
    assert json.loads(to_line(PromptRow(2, 3, TALK), "Ann", answer))["messages"] == TALK


def test_the_flags_say_all_about_the_draws_of_which_there_are_none_without_a_temperature():
    assert GenerateConfig().sampling_options() == {"do_sample": False, "num_beams": 1}
    config = GenerateConfig(temperature=0.7, top_p=0.9, seed=3)
    expected = {"do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert config.sampling_options() == expected
    assert GenerateConfig(temperature=0.7).sampling_options() == {**expected, "top_p": 1.0}


def test_what_may_begin_the_next_prompt_is_held_back():
    shown: list[str] = []
    out = SimpleNamespace(is_terminal=True, print=lambda text, **_: shown.append(text))
    screen: Any = SimpleNamespace(out=out)
    tokenizer = SimpleNamespace(decode=lambda tokens, **_: "".join(map(chr, tokens)))
    routed: Any = SimpleNamespace(tokenizer=tokenizer)
    reply = Reply(routed, PromptForm(chat=False, template="Question: {prompt}"), screen)
    for token in ["", *"4\nQuest"]:
        reply.put(torch.tensor([*map(ord, token)]))
    assert "".join(shown) == ""


def test_a_prompt_that_is_not_utf_8_is_refused(drllm):
    assert (
        r"PROMPT '\udcff bad' is not a UTF-8 text" in drllm("generate", "\udcff bad", status=2).err
    )


def test_a_file_of_prompts_that_is_missing_is_one_line_beside_an_older_output(drllm, tmp_path):
    output = write(tmp_path / "answers.jsonl", {"answer": "42"})
    missing = tmp_path / "missing.jsonl"
    words = ["--file", missing, "--output-dir", output]
    [line] = drllm("generate", *words, status=2).err.splitlines()
    assert f"{missing} doesn't exist" in line
    assert json.loads(output.read_text()) == {"answer": "42"}
