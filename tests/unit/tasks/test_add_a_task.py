"""The page on adding a task: its file, its line and its test, put where it says, work."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import drllm.tasks
from drllm.tasks.base import TASKS, describe_tasks, get_tasks

PAGE = Path(__file__).resolve().parents[3] / "docs" / "add-a-task.md"
BLOCKS = re.findall(
    r"^```(?:python)?\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the page's module and line in their places for one test, and return its test module."""
    module, line, test = BLOCKS
    first, rest = module.split("\n", 1)
    assert first == "# src/drllm/tasks/piqa.py"
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "piqa.py").write_text(rest, encoding="utf-8")
    monkeypatch.setattr(drllm.tasks, "__path__", [*drllm.tasks.__path__, str(folder)])
    [(name, place)] = re.findall(r'^ {4}"(\w+)": "([\w.:]+)",$', line, re.MULTILINE)
    monkeypatch.setitem(TASKS, name, place)
    yield test
    sys.modules.pop("drllm.tasks.piqa", None)
    vars(drllm.tasks).pop("piqa", None)


def test_the_task_of_the_page_can_be_named_and_listed(added: str) -> None:
    assert [task.name for task in get_tasks("piqa,arc")] == ["piqa", "arc_easy", "arc_challenge"]
    listed = ("piqa", "loglikelihood, letter", "how to do everyday things, two options (PIQA)")
    assert listed in describe_tasks()


def test_the_tests_of_the_page_pass(added: str, request: pytest.FixtureRequest) -> None:
    assert added.startswith("# tests/unit/tasks/test_piqa.py\n")
    namespace: dict[str, object] = {"__name__": "test_piqa"}
    exec(compile(added, "docs/add-a-task.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        assert callable(test)
        given = inspect.signature(test).parameters
        test(**{name: request.getfixturevalue(name) for name in given})
