"""The page on adding a task: its row, its file and their tests, put where it says, work."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import drllm.tasks.published
from drllm.evaluation.lm_eval.folders import make_task_folder
from drllm.tasks.published.task import read_tasks
from drllm.tasks.registry import TASKS, describe_tasks, get_tasks, register

PAGE = Path(__file__).resolve().parents[3] / "docs" / "add-a-task.md"
ROW, ROW_TEST, MODULE, MODULE_TEST = re.findall(
    r"^```(?:python|yaml)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
)
DATA = {
    "swag": {
        "startphrase": "He",
        "label": 0,
        **{f"ending{place}": f"does {place}" for place in range(4)},
    },
    "headqa": {"qtext": "What hears?", "ra": 1, "answers": [{"atext": "ear"}, {"atext": "eye"}]},
}


@pytest.fixture(autouse=True)
def _added(tmp_path, monkeypatch):
    """Put the page's row and module in their places for one test."""
    before = {name: TASKS.get(name) for name in TASKS if name not in DATA}
    sys.modules.pop("drllm.tasks.published.headqa", None)  # whoever has added it for good
    monkeypatch.setattr(TASKS, "_entries", before)
    [task] = read_tasks(ROW)
    register(task)
    place, text = MODULE.split("\n", 1)
    assert place == "# src/drllm/tasks/published/headqa.py"
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "headqa.py").write_text(text, encoding="utf-8")
    paths = [str(folder), *drllm.tasks.published.__path__]
    monkeypatch.setattr(drllm.tasks.published, "__path__", paths)
    monkeypatch.setattr(TASKS, "_modules", ("drllm.tasks.published.*",))
    yield
    sys.modules.pop("drllm.tasks.published.headqa", None)
    vars(drllm.tasks.published).pop("headqa", None)


@pytest.mark.parametrize(("name", "rewards"), [("swag", 1), ("headqa", 2)])
def test_the_tasks_of_the_page_can_be_named_and_listed(name, rewards):
    assert [task.name for task in get_tasks(f"{name},arc")] == [name, "arc_easy", "arc_challenge"]
    [listed] = (row for row in describe_tasks() if row[0] == name)
    assert listed[1] == ", ".join(["loglikelihood", "letter"][:rewards])


@pytest.mark.parametrize(("name", "chance"), [("swag", 0.25), ("headqa", 0.5)])
def test_the_tasks_of_the_page_can_be_evaluated(name, chance, tmp_path, write_rows):
    write_rows(f"{name}/validation", [DATA[name]])
    [task], files = make_task_folder(
        get_tasks(name), split="test", limit=None, seed=0, data_dir=tmp_path
    )
    assert (task.num_questions, task.chance, task.metric, task.filter) == (1, chance, "acc", "none")
    assert f"{name}/{name}" in files.tasks[f"{name}.yaml"]["include"]


@pytest.mark.parametrize("text", [ROW_TEST, MODULE_TEST], ids=["swag", "headqa"])
def test_the_tests_of_the_page_pass(text, request):
    assert re.match(r"# tests/unit/tasks/test_(swag|headqa)\.py\n", text)
    namespace: dict[str, object] = {"__name__": "test_of_the_page"}
    exec(compile(text, "docs/add-a-task.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        assert callable(test)
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})
