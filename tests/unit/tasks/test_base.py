"""The table of tasks: names, lists of names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from drllm.errors import TaskError
from drllm.tasks.base import TASKS, describe_tasks, get_task, get_tasks


def test_every_name_in_the_table_is_the_name_of_its_task() -> None:
    assert [get_task(name).name for name in TASKS] == list(TASKS)


def test_every_task_is_described_on_one_line() -> None:
    described = describe_tasks()
    assert [name for name, _, _ in described] == sorted(TASKS)
    for name, rewards, description in described:
        assert rewards == ", ".join(get_task(name).rewards)
        assert description
        assert "\n" not in description


def test_a_comma_list_keeps_its_order() -> None:
    names = [task.name for task in get_tasks(" builtin_facts, arc_easy,")]
    assert names == ["builtin_facts", "arc_easy"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("arc_esay", "did you mean 'arc_easy'"),
        (",", "no task is named"),
        ("arc_easy,arc_easy", "named twice"),
        ("absent.jsonl", "absent.jsonl doesn't exist"),
    ],
)
def test_a_list_that_names_no_usable_tasks_is_refused(names: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        get_tasks(names)


def test_the_default_reward_is_the_first() -> None:
    assert get_task("builtin_facts").check_reward(None) == "loglikelihood"
    assert get_task("builtin_facts").check_reward("letter") == "letter"


def test_a_task_without_options_is_refused_where_options_are_scored() -> None:
    get_task("builtin_facts").check_options()
    with pytest.raises(TaskError, match=r"'builtin_arithmetic' has no options .*'drllm ls tasks'"):
        get_task("builtin_arithmetic").check_options()


def test_making_and_grading_questions_loads_no_torch() -> None:
    code = """
import importlib, pkgutil, sys
import drllm.tasks
for module in pkgutil.iter_modules(drllm.tasks.__path__):
    importlib.import_module(f"drllm.tasks.{module.name}")
from drllm.tasks.base import get_task
from drllm.tasks.grading import grade
for name, reward in (("builtin_facts", "letter"), ("builtin_arithmetic", "boxed")):
    task = get_task(name)
    example = task.examples("test")[0]
    grade(task.prompt(example, reward), "\\\\boxed{\\\\frac{1}{2}}")
heavy = {"torch", "transformers", "datasets", "lm_eval", "sympy", "math_verify"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
