"""SQuAD 2.0: the passage is in the prompt, any of the answers is right, or that there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.grading import grade, normalise
from drllm.tasks.squad_v2 import SQUAD_V2, UNANSWERABLE


def row(*answers: str, question: str = "Where is the mill?") -> dict[str, Any]:
    """A row of the hub's schema."""
    return {
        "id": question,
        "title": "Mills",
        "context": "The old mill stands by the Green River, near the town.",
        "question": question,
        "answers": {"text": list(answers), "answer_start": [0] * len(answers)},
    }


def test_any_of_the_given_answers_is_right() -> None:
    example = SQUAD_V2.read(row("the Green River", "by the Green River", "The Green River"), "1")
    assert example is not None
    assert (example.answer, example.other_answers) == ("the Green River", ("by the Green River",))
    prompt = SQUAD_V2.prompt(example, "exact")
    assert grade(prompt, "The Green River.") == 1.0
    assert grade(prompt, "by the Green River") == 1.0
    assert grade(prompt, "the river") == 0.0
    assert grade(prompt, UNANSWERABLE) == 0.0


def test_a_question_without_an_answer_is_right_with_the_word_that_the_prompt_asks_for() -> None:
    example = SQUAD_V2.read(row(), "1")
    assert example is not None
    for prompt in (SQUAD_V2.prompt(example, "exact"), *SQUAD_V2.retests(example, "exact")):
        assert UNANSWERABLE in prompt.text
        assert grade(prompt, "Unanswerable.") == 1.0
        assert grade(prompt, "the Green River") == 0.0


def test_it_is_asked_and_asked_again_with_its_passage() -> None:
    example = SQUAD_V2.read(row("the {Green} River"), "1")
    assert example is not None
    prompts = [SQUAD_V2.prompt(example, "exact"), *SQUAD_V2.retests(example, "exact")]
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert example.context in prompt.text
        assert example.question in prompt.text
        assert (prompt.reward, prompt.chat) == ("exact", True)
    for reward in ("boxed", "loglikelihood"):
        with pytest.raises(TaskError, match="it takes exact"):
            SQUAD_V2.prompt(example, reward)


def test_every_right_answer_has_room(tiny_tokenizer: Any) -> None:
    longest = "a word " * 12
    example = SQUAD_V2.read(row("the mill", longest), "1")
    assert example is not None
    room = SQUAD_V2.prompt(example, "exact").max_new_tokens
    assert room > len(tiny_tokenizer(longest, add_special_tokens=False)["input_ids"])


def test_an_answer_that_is_nothing_but_marks_is_left_out() -> None:
    assert SQUAD_V2.read(row(".", "''"), "1") is None
    example = SQUAD_V2.read(row(".", "mill"), "1")
    assert example is not None
    assert (example.answer, example.other_answers) == ("mill", ())


def test_the_training_file_is_searched_and_the_validation_file_is_the_test(hub: Any) -> None:
    rows = [row("mill", question=f"{number}?") for number in range(30)]
    hub.files["rajpurkar/squad_v2", None, "train"] = rows
    hub.files["rajpurkar/squad_v2", None, "validation"] = [row(question="4?"), row(question="x?")]
    splits = {split: [e.id for e in SQUAD_V2.examples(split)] for split in SPLITS}
    assert splits["test"] == ["4?", "x?"]
    trained = [name for split in SPLITS[:3] for name in splits[split]]
    assert sorted(trained) == sorted(f"{number}?" for number in range(30) if number != 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": ["mill"]}, "expected an object with 'text'"),
        ({"answers": {"text": "mill"}}, "expected a list of texts"),
        ({"context": ""}, "'context' is empty"),
    ],
)
def test_a_broken_row_is_named(
    tmp_path: Path, write_rows: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = write_rows("squad_v2/validation", [row("mill"), {**row("mill"), **change}])
    with pytest.raises(TaskError) as caught:
        SQUAD_V2.examples("test", tmp_path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)


def test_the_real_part_has_questions_with_and_without_answers(data_dir: Path) -> None:
    examples = SQUAD_V2.examples("test", data_dir)
    assert len(examples) == 1000
    answerable = [example for example in examples if example.answer != UNANSWERABLE]
    assert len(answerable) == 462
    assert sum(bool(example.other_answers) for example in answerable) > 100
    for example in answerable:
        for answer in (example.answer, *example.other_answers):
            assert normalise(answer) in " ".join(example.context.split()).casefold()
            assert grade(SQUAD_V2.prompt(example, "exact"), answer) == 1.0
