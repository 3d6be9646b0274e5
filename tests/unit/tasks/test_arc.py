"""ARC: the prompt is the harness' own, the splits are disjoint."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.records import question_key
from drllm.tasks.arc import ARC_CHALLENGE, ARC_EASY
from drllm.tasks.base import Example, get_task
from drllm.tasks.multiple_choice import labelled_example

YAML = {
    "arc_easy": ("arc/arc_easy.yaml",),
    "arc_challenge": ("arc/arc_easy.yaml", "arc/arc_challenge.yaml"),
}


def ours(examples: list[Example]) -> list[tuple[str, str]]:
    prompts = [ARC_EASY.prompt(example, "loglikelihood") for example in examples]
    return [(prompt.text, text) for prompt in prompts for text in prompt.continuations]


def test_the_prompt_is_what_the_harness_renders_for_awkward_texts(rendered_by_the_harness) -> None:
    rows = [
        {
            "id": "1",
            "question": ' What is {{x}} in {question}?\nIt\'s "<b>" é \n ',
            "choices": {"text": ["a {b}", " c", "d\n"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        }
    ]
    examples = [labelled_example(row, "arc_easy") for row in rows]
    assert ours(examples) == rendered_by_the_harness(rows, *YAML["arc_easy"])


@pytest.mark.parametrize("task", [ARC_EASY, ARC_CHALLENGE], ids=lambda task: task.name)
def test_the_prompts_of_the_real_set_are_what_the_harness_renders(
    task: Any, data_dir: Path, rendered_by_the_harness
) -> None:
    with gzip.open(data_dir / task.name / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    examples = task.examples("test", data_dir)
    assert ours(examples) == rendered_by_the_harness(rows, *YAML[task.name])
    assert [example.gold for example in examples] == [
        row["choices"]["label"].index(row["answerKey"]) for row in rows
    ]


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_no_question_of_the_real_sets_is_in_two_splits(name: str, data_dir: Path) -> None:
    splits = {split: get_task(name).examples(split, data_dir) for split in SPLITS}
    keys = Counter(
        question_key(example.question) for examples in splits.values() for example in examples
    )
    assert max(keys.values()) == 1
    sizes = {split: len(examples) for split, examples in splits.items()}
    train = sizes["search"] + sizes["fit"] + sizes["select"]
    assert sizes["test"] == {"arc_easy": 570, "arc_challenge": 299}[name]
    assert train == {"arc_easy": 2243, "arc_challenge": 1118}[name]
    assert 0.55 < sizes["search"] / train < 0.65


def test_no_real_training_question_is_in_the_test_of_the_other_set(data_dir: Path) -> None:
    test = {question_key(e.question) for e in ARC_CHALLENGE.examples("test", data_dir)}
    for split in ("search", "fit", "select"):
        assert not test & {question_key(e.question) for e in ARC_EASY.examples(split, data_dir)}


def test_both_sets_come_from_one_repository_of_the_hub(hub) -> None:
    row = {
        "id": "q1",
        "question": "Which is cold?",
        "choices": {"text": ["fire", "ice"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    for config in ("ARC-Easy", "ARC-Challenge"):
        hub.files["allenai/ai2_arc", config, "validation"] = [{**row, "id": config}]
    assert [example.id for example in ARC_EASY.examples("test")] == ["ARC-Easy"]
    assert [example.id for example in ARC_CHALLENGE.examples("test")] == ["ARC-Challenge"]
