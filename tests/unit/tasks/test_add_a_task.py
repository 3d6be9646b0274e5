"""The page on adding a task: its file, line, entry and test, put where it says, work."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import drllm.tasks
from drllm.evaluation.lm_eval import registry as table
from drllm.evaluation.lm_eval.folders import write_task_folder
from drllm.tasks.base import TASKS, describe_tasks, get_tasks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "add-a-task.md"
BLOCKS = re.findall(
    r"^```(?:python)?\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the page's module and line in their places for one test, and return its test module."""
    module, line, entry, test = BLOCKS
    first, rest = module.split("\n", 1)
    assert first == "# src/drllm/tasks/headqa.py"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "headqa.py").write_text(rest, encoding="utf-8")
    monkeypatch.setattr(drllm.tasks, "__path__", [*drllm.tasks.__path__, str(folder)])
    [(name, place)] = re.findall(r'^ {4}"(\w+)": "([\w.:]+)",$', line, re.MULTILINE)
    monkeypatch.setitem(TASKS, name, place)
    monkeypatch.setitem(table.TABLE, name, eval(f"{{{entry}}}", vars(table))[name])
    yield test
    sys.modules.pop("drllm.tasks.headqa", None)
    vars(drllm.tasks).pop("headqa", None)


def test_the_task_of_the_page_can_be_named_and_listed(added: str) -> None:
    assert [task.name for task in get_tasks("headqa,arc")] == [
        "headqa",
        "arc_easy",
        "arc_challenge",
    ]
    what = "exams of the health professions, four or five options (HEAD-QA)"
    listed = ("headqa", "loglikelihood, letter", what)
    assert listed in describe_tasks()


def test_the_task_of_the_page_can_be_evaluated(
    added: str, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    row = {"qtext": "What hears?", "ra": 1, "answers": [{"atext": "ear"}, {"atext": "eye"}]}
    write_rows("headqa/validation", [row])
    [task] = write_task_folder(
        get_tasks("headqa"),
        tmp_path / "folder",
        split="test",
        limit=None,
        seed=0,
        data_dir=tmp_path,
    )
    assert (task.num_questions, task.chance, task.metric_key) == (1, 0.5, "acc,none")
    [written] = (tmp_path / "folder").glob("*.yaml")
    assert "headqa/headqa_en.yaml" in written.read_text(encoding="utf-8")


def test_the_tests_of_the_page_pass(added: str, request: pytest.FixtureRequest) -> None:
    assert added.startswith("# tests/unit/tasks/test_headqa.py\n")
    namespace: dict[str, object] = {"__name__": "test_headqa"}
    exec(compile(added, "docs/add-a-task.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        assert callable(test)
        given = inspect.signature(test).parameters
        test(**{name: request.getfixturevalue(name) for name in given})
