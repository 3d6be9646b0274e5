"""Sets that are only evaluated: what their rows mean, in either schema, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drllm.errors import TaskError
from drllm.records import question_key
from drllm.tasks.agieval import AGIEVAL, PARTS
from drllm.tasks.aime24 import AIME24
from drllm.tasks.base import TASKS, get_task, get_tasks
from drllm.tasks.gpqa_diamond import GPQA_DIAMOND
from drllm.tasks.published import EvaluatedTask
from drllm.tasks.truthfulqa import TRUTHFULQA
from drllm.tasks.winogrande import WINOGRANDE

AGIEVAL_ROW = {"query": "Q: Why? A:", "choices": ["(A)ice", "(B)fire"], "gold": [1]}
AIME_ROW = {"ID": "I-1", "Problem": "What is 7 times 6?", "Answer": 42}
GPQA_ROW = {
    "Question": "What is heavy?",
    "Correct Answer": " Lead [title] it is\n",
    "Incorrect Answer 1": "Air",
    "Incorrect Answer 2": "Oil",
    "Incorrect Answer 3": "Cork",
}
TRUTHFULQA_ROW = {
    "question": "What falls?",
    "mc1_targets": {"choices": ["Up", "Down", "Sky"], "labels": [0, 1, 0]},
}
WINOGRANDE_ROW = {
    "sentence": "Ann helps Eve since _ is ill.",
    "option1": "Ann",
    "option2": "Eve",
    "answer": "2",
}
ROWS: dict[str, dict[str, Any]] = {
    "agieval": AGIEVAL_ROW,
    "aime24": AIME_ROW,
    "gpqa_diamond": GPQA_ROW,
    "truthfulqa": TRUTHFULQA_ROW,
    "winogrande": WINOGRANDE_ROW,
}


@pytest.mark.parametrize("name", [n for n in TASKS if isinstance(get_task(n), EvaluatedTask)])
def test_a_search_is_refused_by_name(name: str) -> None:
    task = get_task(name)
    example = WINOGRANDE.read(WINOGRANDE_ROW, "1")
    for ask in (
        lambda: task.check_reward(None),
        lambda: task.check_reward("loglikelihood"),
        lambda: task.prompt(example, "loglikelihood"),
        lambda: task.retests(example, "loglikelihood"),
    ):
        with pytest.raises(TaskError, match=f"'{name}' is only evaluated and can't be searched"):
            ask()
    assert task.description.endswith("evaluation only)")


def test_the_name_under_which_squad_is_evaluated_elsewhere_is_accepted() -> None:
    assert get_task("squadv2") is get_task("squad_v2")
    with pytest.raises(TaskError, match="'squad_v2' is named twice"):
        get_tasks("squadv2,squad_v2")


@pytest.mark.parametrize("name", ROWS)
def test_the_one_file_is_halved(name: str, tmp_path: Path, write_rows: Any) -> None:
    task = get_task(name)
    assert isinstance(task, EvaluatedTask)
    key = next(
        k for k in ("query", "Problem", "Question", "question", "sentence") if k in ROWS[name]
    )
    rows = [{**ROWS[name], key: f"{ROWS[name][key]} ({place})"} for place in range(40)]
    [file] = task.files
    write_rows(f"{name}/{file}", rows)
    select, test = (task.examples(split, tmp_path) for split in ("select", "test"))
    assert len(select) + len(test) == 40
    assert min(len(select), len(test)) > 8
    keys = {question_key(example.question) for example in (*select, *test)}
    assert len(keys) == 40
    assert [e for e, _ in task.shots("test", tmp_path)] == select
    assert [e for e, _ in task.shots("select", tmp_path)] == test
    with pytest.raises(TaskError, match="is only evaluated and has no questions for 'search'"):
        task.examples("search", tmp_path)


def test_agieval_is_all_of_its_parts(hub: Any) -> None:
    for part in PARTS:
        hub.files[f"hails/agieval-{part}", None, "test"] = [
            {**AGIEVAL_ROW, "query": f"Q: {part} {place}? A:"} for place in range(4)
        ]
    asked = [e for split in ("select", "test") for e in AGIEVAL.examples(split)]
    assert len({example.id for example in asked}) == 4 * len(PARTS)
    assert {path for path, _, _ in hub.asked} == {f"hails/agieval-{part}" for part in PARTS}


def test_a_set_of_the_hub_and_one_of_a_folder_may_name_their_file_differently(hub: Any) -> None:
    hub.files["Maxwell-Jia/AIME_2024", None, "train"] = [AIME_ROW]
    hub.files["Idavidrein/gpqa", "gpqa_diamond", "train"] = [GPQA_ROW]
    for task in (AIME24, GPQA_DIAMOND):
        assert sum(len(task.examples(split)) for split in ("select", "test")) == 1


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_gpqas_options_stand_in_an_order_of_the_questions_own(order: tuple[int, ...]) -> None:
    from_hub = GPQA_DIAMOND.read(GPQA_ROW, "1")
    texts = [GPQA_ROW["Correct Answer"], "Air", "Oil", "Cork"]
    row = {
        "question": GPQA_ROW["Question"],
        "choices": [texts[place] for place in order],
        "answer": order.index(0),
    }
    assert GPQA_DIAMOND.read(row, "1") == from_hub
    assert from_hub.gold is not None
    assert from_hub.choices[from_hub.gold] == from_hub.answer == "Lead. it is"
    golds = {GPQA_DIAMOND.read({**GPQA_ROW, "Question": f"{n}?"}, "1").gold for n in range(40)}
    assert golds == {0, 1, 2, 3}


def test_truthfulqas_true_option_comes_first() -> None:
    example = TRUTHFULQA.read(TRUTHFULQA_ROW, "1")
    assert (example.choices, example.gold) == (("Down", "Up", "Sky"), 0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("agieval", {"gold": [2]}, r"'gold' is \[2\]; expected an index from 0 to 1"),
        ("agieval", {"gold": []}, r"'gold' is \[\]"),
        ("agieval", {"gold": None}, "'gold' is None"),
        ("agieval", {"gold": [True]}, r"'gold' is \[True\]"),
        ("aime24", {"Answer": "x + 1"}, "'Answer' is 'x . 1'; expected a whole number"),
        ("gpqa_diamond", {"Incorrect Answer 2": ""}, "'Incorrect Answer 2' is empty"),
        ("truthfulqa", {"mc1_targets": None}, "'mc1_targets' is None; expected an object"),
        (
            "truthfulqa",
            {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}},
            r"'labels' is \[1, 1\]; expected 2 of them, a single 1",
        ),
        ("winogrande", {"sentence": "No gap."}, "'sentence' has no gap"),
        ("winogrande", {"sentence": "A gap _"}, "'sentence' has no gap"),
        ("winogrande", {"answer": 2}, "'answer' is 2; expected '1' or '2'"),
    ],
)
def test_a_broken_row_is_named(
    tmp_path: Path, write_rows: Any, name: str, change: dict[str, Any], message: str
) -> None:
    task = get_task(name)
    assert isinstance(task, EvaluatedTask)
    [file] = task.files
    write_rows(f"{name}/{file}", [ROWS[name], {**ROWS[name], **change}])
    with pytest.raises(TaskError, match=f"line 2: {message}"):
        task.examples("test", tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("agieval", {"question": "?", "choices": ["a", "b"], "answer": 2}, "'answer' is 2"),
        ("gpqa_diamond", {"question": "?", "choices": list("abcd"), "answer": "a"}, "'answer' is"),
        ("gpqa_diamond", {"question": "?", "choices": ["a", "b"], "answer": 0}, "has 2 entries"),
        ("aime24", {"problem": "?"}, "'answer' is None"),
    ],
)
def test_a_broken_row_of_a_folders_own_schema_is_named(
    name: str, row: dict[str, Any], message: str
) -> None:
    task = get_task(name)
    assert isinstance(task, EvaluatedTask)
    with pytest.raises(TaskError, match=message):
        task.read(row, "1")


def test_the_real_winogrande_file_is_halved_without_loss(data_dir: Path) -> None:
    sizes = [len(WINOGRANDE.examples(split, data_dir)) for split in ("select", "test")]
    assert sum(sizes) == 1267
    assert min(sizes) > 570
