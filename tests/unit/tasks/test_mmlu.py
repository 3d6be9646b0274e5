"""MMLU: the cloze form is the harness' own for every subject, the halves are disjoint."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.errors import TaskError
from drllm.records import question_key
from drllm.tasks.mmlu import MMLU

ROW = {"subject": "high_school_physics", "question": "Why?", "choices": list("abcd"), "answer": 2}
TEMPLATE = "mmlu/continuation/_continuation_template_yaml"


def subject_file(subject: str) -> str:
    return f"mmlu/continuation/mmlu_{subject}.yaml"


def ours(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    prompts = []
    for row in rows:
        example = MMLU.read(row, "1")
        prompts.append(MMLU.prompt(example, "loglikelihood"))
    return [(prompt.text, text) for prompt in prompts for text in prompt.continuations]


def test_the_prompt_is_what_the_harness_renders_for_awkward_texts(rendered_by_the_harness) -> None:
    row = {
        "subject": "high_school_physics",
        "question": ' What is {{x}} in {question}?\nIt\'s "<b>" é \n ',
        "choices": ["a {b}", " c", "d\n", "it's"],
        "answer": 3,
    }
    files = (TEMPLATE, subject_file("high_school_physics"))
    assert ours([row]) == rendered_by_the_harness([row], *files)


def test_the_prompts_of_the_real_set_are_what_the_harness_renders(
    data_dir: Path, rendered_by_the_harness
) -> None:
    with gzip.open(data_dir / "mmlu" / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    subjects = {row["subject"] for row in rows}
    assert len(subjects) == 57
    for subject in sorted(subjects):
        of_subject = [row for row in rows if row["subject"] == subject]
        rendered = rendered_by_the_harness(of_subject, TEMPLATE, subject_file(subject))
        assert ours(of_subject) == rendered, subject


def test_the_halves_of_the_real_file_are_disjoint(data_dir: Path) -> None:
    select, test = (MMLU.examples(split, data_dir) for split in ("select", "test"))
    assert (len(select), len(test)) == (726, 802)
    keys = {question_key(example.question) for example in (*select, *test)}
    assert len(keys) == 1528  # of 1531 rows; three questions stand there twice


def test_it_comes_from_the_validation_file_of_all_subjects(hub: Any) -> None:
    hub.files["cais/mmlu", "all", "validation"] = [
        {**ROW, "question": f"{number}?"} for number in range(40)
    ]
    ids = [example.id for split in ("select", "test") for example in MMLU.examples(split)]
    assert sorted(ids) == sorted(f"validation-{number}" for number in range(1, 41))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "'answer' is 4; expected an index from 0 to 3"),
        ({"answer": "C"}, "'answer' is 'C'"),
        ({"answer": True}, "'answer' is True"),
        ({"choices": ["a", " "]}, "'choices' holds ' '"),
        ({"subject": None}, "'subject' is None"),
    ],
)
def test_a_broken_row_is_named(
    tmp_path: Path, write_rows: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = write_rows("mmlu/validation", [{**ROW, "question": "1?"}, {**ROW, **change}])
    with pytest.raises(TaskError) as caught:
        MMLU.examples("test", tmp_path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
