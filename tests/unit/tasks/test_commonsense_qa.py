"""CommonsenseQA: the hub's schema, the cloze form, the real file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drllm.config import SPLITS
from drllm.tasks.commonsense_qa import COMMONSENSE_QA

ROW = {
    "id": "row",
    "question": "Where would you look for a spoon?",
    "question_concept": "spoon",
    "choices": {"label": list("ABCDE"), "text": ["drawer", "tree", "river", "sky", "shoe"]},
    "answerKey": "A",
}


def test_training_questions_come_from_the_training_file_and_the_test_from_the_other(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = [{**ROW, "id": f"t{n}", "question": f"{n}?"} for n in range(30)]
    write_rows("commonsense_qa/train", rows)
    write_rows("commonsense_qa/validation", [ROW, {**ROW, "question": "7?"}])
    splits = {split: COMMONSENSE_QA.examples(split, tmp_path) for split in SPLITS}
    assert [example.id for example in splits["test"]] == ["row", "row"]
    trained = [example.id for split in SPLITS[:3] for example in splits[split]]
    assert sorted(trained) == sorted(f"t{n}" for n in range(30) if n != 7)


def test_it_is_asked_in_cloze_form_unless_letters_are_wanted(hub: Any) -> None:
    hub.files["tau/commonsense_qa", None, "validation"] = [ROW]
    (example,) = COMMONSENSE_QA.examples("test")
    cloze = COMMONSENSE_QA.prompt(example, COMMONSENSE_QA.check_reward(None))
    assert cloze.text == "Question: Where would you look for a spoon?\nAnswer:"
    assert cloze.continuations == (" drawer", " tree", " river", " sky", " shoe")
    assert "\nE. shoe\nAnswer:" in COMMONSENSE_QA.prompt(example, "letter").text
    assert len(COMMONSENSE_QA.retests(example, "loglikelihood")) == 4
    assert len(COMMONSENSE_QA.retests(example, "letter")) == 4


def test_the_harness_asks_for_a_letter_with_the_options_listed(rendered_by_the_harness) -> None:
    """What docs/differences.md says about it, D-21."""
    requests = rendered_by_the_harness([ROW], "commonsense_qa/default.yaml")
    assert [continuation for _, continuation in requests] == [" A", " B", " C", " D", " E"]
    assert "\nE. shoe\nAnswer:" in requests[0][0]


def test_the_real_file_is_read_whole(data_dir: Path) -> None:
    examples = COMMONSENSE_QA.examples("test", data_dir)
    assert len(examples) == 1221
    assert {len(example.choices) for example in examples} == {5}
