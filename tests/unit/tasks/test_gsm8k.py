"""GSM8K: the number behind the mark is the answer, asked for without a chain of thought."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.grading import grade
from drllm.tasks.gsm8k import GSM8K


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234,500", "1234500"),
        ("A loss.\n#### -12 ", "-12"),
        ("#### not yet\n#### 0.5", "0.5"),
    ],
)
def test_the_answer_is_the_number_behind_the_last_mark(solution: str, answer: str) -> None:
    assert GSM8K.read({"question": "How many?", "answer": solution}, "1").answer == answer


@pytest.mark.parametrize("solution", ["7", "seven ####", "####7"])
def test_a_solution_without_a_final_number_is_refused(solution: str) -> None:
    with pytest.raises(TaskError, match="doesn't end in '#### ' and a number"):
        GSM8K.read({"question": "How many?", "answer": solution}, "1")


def test_the_number_alone_is_asked_for_in_a_box_and_again_in_two_other_templates() -> None:
    example = GSM8K.read({"question": "How many?", "answer": "#### 1,200"}, "1")
    prompts = [GSM8K.prompt(example, "boxed"), *GSM8K.retests(example, "boxed")]
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert "How many?" in prompt.text
        assert (prompt.reward, prompt.chat, prompt.max_new_tokens) == ("boxed", True, 15)
        assert grade(prompt, "\\boxed{1,200}") == 1.0
    with pytest.raises(TaskError, match="it takes boxed"):
        GSM8K.prompt(example, "exact")


def test_the_real_training_file_is_divided_and_nothing_is_lost(data_dir: Path) -> None:
    sizes = {split: len(GSM8K.examples(split, data_dir)) for split in SPLITS[:3]}
    assert sizes == {"search": 4473, "fit": 1520, "select": 1480}
    for example in GSM8K.examples("fit", data_dir):
        assert float(example.answer) == int(float(example.answer))


def test_without_the_test_file_the_test_is_refused_and_the_search_is_not(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(20)]
    write_rows("gsm8k/train", rows)
    assert GSM8K.examples("search", tmp_path)
    with pytest.raises(TaskError, match=r"gsm8k.test\.jsonl or \.jsonl\.gz \(its questions for te"):
        GSM8K.examples("test", tmp_path)
