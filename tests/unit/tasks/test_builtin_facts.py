"""`builtin_facts`: enough questions, disjoint facts, fair options, the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.records import question_key
from drllm.tasks.base import get_task
from drllm.tasks.builtin_facts import BUILTIN_FACTS, RELATIONS, distractors, rows
from drllm.tasks.fact_tables import table
from drllm.tasks.grading import score_choices
from drllm.tasks.multiple_choice import labelled_example

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel

ALL = [row for split in SPLITS for row in rows(split)]
BY_NAME = {relation.name: relation for relation in RELATIONS}


def fact_of(row: dict[str, Any]) -> tuple[str, str]:
    relation, subject, _ = row["id"].rsplit("-", 2) if row["id"].count("-") == 2 else parts(row)
    return relation, subject


def parts(row: dict[str, Any]) -> tuple[str, str, str]:
    """Take apart an id whose subject holds dashes."""
    relation, rest = row["id"].split("-", 1)
    subject, direction = rest.rsplit("-", 1)
    return relation, subject, direction


def test_there_are_enough_questions_in_every_split() -> None:
    sizes = {split: len(rows(split)) for split in SPLITS}
    assert sum(sizes.values()) >= 400
    assert sizes["search"] >= 150
    assert sizes["test"] >= 120
    assert min(sizes.values()) >= 40


def test_no_fact_is_in_two_splits_whichever_way_round_it_is_asked() -> None:
    homes: dict[tuple[str, str], str] = {}
    for split in SPLITS:
        for row in rows(split):
            assert homes.setdefault(fact_of(row), split) == split
    assert len(homes) == sum(len(relation.facts) for relation in RELATIONS)


def test_no_two_questions_have_the_same_text_or_id() -> None:
    assert max(Counter(question_key(row["question"]) for row in ALL).values()) == 1
    assert max(Counter(row["id"] for row in ALL).values()) == 1


def test_every_row_is_in_the_arc_schema_with_four_different_options() -> None:
    for row in ALL:
        assert row["choices"]["label"] == ["A", "B", "C", "D"]
        assert len({text.casefold() for text in row["choices"]["text"]}) == 4
        example = labelled_example(row, "builtin_facts")
        assert example.gold == "ABCD".index(row["answerKey"])


def test_the_task_hands_out_the_rows_in_their_order() -> None:
    assert get_task("builtin_facts") is BUILTIN_FACTS
    for split in SPLITS:
        examples = BUILTIN_FACTS.examples(split)
        assert [example.id for example in examples] == [row["id"] for row in rows(split)]
        assert examples == BUILTIN_FACTS.examples(split)


def test_the_right_option_is_the_fact_and_the_others_come_from_the_same_column() -> None:
    for row in ALL:
        name, _, direction = parts(row)
        relation = BY_NAME[name.replace("_", " ")]
        texts = row["choices"]["text"]
        right = texts["ABCD".index(row["answerKey"])]
        column = set(relation.facts if direction == "backward" else relation.facts.values())
        assert set(texts) <= column
        for text in texts:
            if direction == "forward":
                (subject,) = (s for s in relation.facts if s.replace(" ", "_") == parts(row)[1])
                assert (relation.facts[subject] == text) == (text == right)
                assert text not in relation.also.get(subject, ())
            else:
                answer = relation.facts[right]
                assert (relation.facts[text] == answer) == (text == right)
                assert answer not in relation.also.get(text, ())


def test_the_right_option_stands_equally_often_in_each_place() -> None:
    for split in SPLITS:
        places = Counter(row["answerKey"] for row in rows(split))
        assert max(places.values()) - min(places.values()) <= 1


def test_the_first_questions_of_a_split_mix_the_relations() -> None:
    assert len({parts(row)[0] for row in rows("search")[:40]}) >= 12


def test_relations_are_asked_in_several_wordings() -> None:
    starts = Counter(" ".join(row["question"].split()[:3]) for row in ALL)
    assert len(starts) >= 60
    assert max(starts.values()) < 0.2 * len(ALL)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.name)
def test_a_table_can_be_asked_as_it_says(relation: Any) -> None:
    answers = list(relation.facts.values())
    assert relation.forward or relation.backward
    if relation.backward:
        assert len(set(answers)) == len(answers)
    assert set(relation.also) <= set(relation.facts)
    for subject, others in relation.also.items():
        assert others <= set(answers)
        assert relation.facts[subject] not in others
    for subject in relation.facts:
        for backward in {bool(relation.backward), not relation.forward}:
            assert len(distractors(relation, subject, backward)) >= 3


def test_every_process_makes_the_same_questions() -> None:
    code = "import json; from drllm.tasks.builtin_facts import rows; print(json.dumps(rows('fit')))"
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(made.stdout) == list(rows("fit"))


def test_a_table_with_a_subject_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'cow' stands twice"):
        table("cow = calf\ncow = kid")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(TaskError, match="unknown split 'train'"):
        BUILTIN_FACTS.examples("train")


def test_the_demo_model_knows_some_of_the_answers_and_not_all(smollm2: BaseModel) -> None:
    """Of all questions it has 62 % right, 53 to 67 by split; this looks at some of the test."""
    import torch

    rewards = []
    for example in BUILTIN_FACTS.examples("test")[:40]:
        prompt = BUILTIN_FACTS.prompt(example, "loglikelihood")
        context = len(smollm2.tokenizer(prompt.text)["input_ids"])
        texts = [prompt.text + continuation for continuation in prompt.continuations]
        batch = smollm2.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids = batch["input_ids"][:, context:]
        with torch.inference_mode():
            logits = smollm2.model(**batch).logits[:, context - 1 : -1].log_softmax(-1)
        logprobs = logits.gather(-1, ids[..., None])[..., 0] * batch["attention_mask"][:, context:]
        rewards.append(score_choices(logprobs.sum(-1).tolist(), prompt)[0])
    assert 0.4 <= sum(rewards) / len(rewards) <= 0.8
