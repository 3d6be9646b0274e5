"""DART-Math: one question per problem, five levels, each split without the others' problems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.tasks.base import get_task, get_tasks
from drllm.tasks.dart import DART, DartTask
from drllm.tasks.grading import grade

PROBLEMS = 200
REPOSITORY = "hkust-nlp/dart-math-pool-math"


def problem(number: int) -> dict[str, Any]:
    answer = f"\\frac{{{number}}}{{7}}"
    return {"query": f"Divide {number} by $7$.", "gt_ans": answer, "level": number % 5 + 1}


def pool_row(number: int, sample: int) -> dict[str, Any]:
    """A row as the hub has it: one sampled solution, with the level in its metadata."""
    row = problem(number)
    return {
        "query": row["query"],
        "resp": f"Solution {sample}.",
        "gt_ans": row["gt_ans"],
        "query_id": f"MATH/train/{number}",
        "query_metadata": {"level": row["level"]},
        "ans_correct": True,
    }


@pytest.fixture
def pool(hub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with three solutions to each problem, the problems one after the other."""
    monkeypatch.setattr(DartTask, "_problems", {})
    hub.files[REPOSITORY, None, "train"] = [
        pool_row(number, sample) for sample in range(3) for number in range(PROBLEMS)
    ]
    return hub


def found(data_dir: Path | None = None) -> dict[tuple[str, str], list[str]]:
    return {
        (task.name, split): [example.question for example in task.examples(split, data_dir)]
        for task in DART
        for split in SPLITS
    }


def test_every_problem_of_the_pool_is_one_question_of_one_level_and_split(pool: Any) -> None:
    questions = found()
    everything = [question for part in questions.values() for question in part]
    assert len(everything) == len(set(everything)) == PROBLEMS
    for level, task in enumerate(DART, start=1):
        of_level = {problem(n)["query"] for n in range(PROBLEMS) if n % 5 + 1 == level}
        assert {q for split in SPLITS for q in questions[task.name, split]} == of_level
        assert questions[task.name, "search"]
        assert questions[task.name, "test"]


def test_the_pool_is_read_once_for_all_levels_and_splits(pool: Any) -> None:
    found()
    assert pool.asked == [(REPOSITORY, None, "train")]


@pytest.mark.parametrize("level", [None, 0, "missing"])
def test_problems_of_the_pool_without_a_level_are_passed_over_and_counted_once(
    pool: Any, caplog: pytest.LogCaptureFixture, level: Any
) -> None:
    expected = found()
    DartTask._problems.clear()
    metadata = {} if level == "missing" else {"level": level}
    for number, place in ((PROBLEMS, 0), (PROBLEMS + 1, 7)):
        for sample in range(3):
            row = {**pool_row(number, sample), "query_metadata": metadata}
            pool.files[REPOSITORY, None, "train"].insert(place, row)

    assert found() == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"{REPOSITORY} train: problems without a level from 1 to 5, which are passed over: 2"
    ]


def test_a_pool_in_which_no_problem_has_a_level_is_refused(pool: Any) -> None:
    for row in pool.files[REPOSITORY, None, "train"]:
        row["query_metadata"] = {"level": "Level 2"}

    with pytest.raises(TaskError, match=r"train, row 1: 'level' is 'Level 2'; expected a whole"):
        DART[1].examples("search")


def test_a_data_folder_holds_one_file_for_all_levels(
    pool: Any, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    write_rows("dart/train", [problem(number) for number in range(PROBLEMS)])
    assert found(tmp_path) == found()
    ids = [example.id for example in DART[2].examples("search", tmp_path)]
    assert ids == [example.id for example in DART[2].examples("search")]
    assert ids[0].startswith("train-")


def test_rows_of_one_problem_in_a_file_are_one_question(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = [problem(number) for number in range(50)]
    write_rows("dart/train", [row for row in rows for _ in range(3)])
    assert sum(len(part) for part in found(tmp_path).values()) == 50


def test_the_levels_are_tasks_and_together_a_group() -> None:
    assert [task.name for task in get_tasks("dart")] == [f"dart-{level}" for level in range(1, 6)]
    assert get_task("dart-3") is DART[2]


def test_the_answer_alone_is_asked_for_and_compared_by_value() -> None:
    example = DART[1].read(problem(1), "1")
    assert example is not None
    prompts = [DART[1].prompt(example, "boxed"), *DART[1].retests(example, "boxed")]
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert "Divide 1 by $7$." in prompt.text
        assert (prompt.chat, prompt.max_new_tokens) == (True, 15)
        assert grade(prompt, "\\boxed{\\dfrac17}") == 1.0
        assert grade(prompt, "\\boxed{7}") == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 6}, "'level' is 6; expected a whole number from 1 to 5"),
        ({"level": "Level 2"}, "'level' is 'Level 2'"),
        ({"gt_ans": ""}, "'gt_ans' is empty"),
        ({"query": 3}, "'query' is 3"),
    ],
)
def test_a_broken_row_is_named_whichever_level_is_asked_for(
    tmp_path: Path, write_rows: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = write_rows("dart/train", [problem(0), {**problem(1), **change}])
    for task in DART:
        with pytest.raises(TaskError) as caught:
            task.examples("search", tmp_path)
        assert str(caught.value).startswith(f"{path}, line 2: {message}")


def test_a_row_without_a_level_is_refused(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    write_rows("dart/train", [{"query": "1?", "gt_ans": "1"}])
    with pytest.raises(TaskError, match="'level' is None"):
        DART[0].examples("search", tmp_path)
