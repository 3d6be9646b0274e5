"""The table of tasks: names, lists of names, and what importing them costs."""

import subprocess
import sys

import pytest

from drllm.errors import TaskError
from drllm.tasks.base import Harness
from drllm.tasks.examples import Example
from drllm.tasks.registry import TASKS, describe_tasks, get_task, get_tasks, groups, is_task_name


def test_every_name_in_the_table_is_the_name_of_its_task():
    assert [get_task(name).name for name in TASKS] == list(TASKS)


def test_every_task_and_group_is_described_on_one_line():
    described = describe_tasks()
    assert [name for name, _, _ in described] == sorted([*TASKS, *groups()])
    for name, rewards, description in described:
        for task in get_tasks(name):
            assert rewards == ", ".join(task.rewards)
        assert description
        assert "\n" not in description


def test_a_comma_list_keeps_its_order():
    names = [task.name for task in get_tasks(" builtin_facts, arc_easy,")]
    assert names == ["builtin_facts", "arc_easy"]


def test_a_groups_name_stands_for_its_tasks_in_a_list_too():
    levels = [f"dart-{level}" for level in range(1, 6)]
    assert [task.name for task in get_tasks("arc")] == ["arc_easy", "arc_challenge"]
    assert [task.name for task in get_tasks("dart, gsm8k")] == [*levels, "gsm8k"]
    assert [task.name for task in get_tasks("dart-3")] == ["dart-3"]
    with pytest.raises(TaskError, match="'arc' stands for arc_easy, arc_challenge; name one"):
        get_task("arc")


def test_an_alias_is_the_task_itself():
    assert get_task("squadv2") is get_task("squad_v2")
    assert is_task_name("squadv2")
    assert "squadv2" not in TASKS
    with pytest.raises(TaskError, match="'squad_v2' is named twice"):
        get_tasks("squadv2,squad_v2")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("arc_esay", "'arc_esay'.*'arc_easy'"),
        ("drat", "'drat'.*'dart'"),
        (",", "no task is named"),
        ("arc_easy,arc_easy", "named twice"),
        ("dart-3,dart", "'dart-3' is named twice in 'dart-3,dart'"),
        ("absent.jsonl", "absent.jsonl doesn't exist"),
    ],
)
@pytest.mark.usefixtures("few_harness_tasks")
def test_a_list_that_names_no_usable_tasks_is_refused(names, message):
    with pytest.raises(TaskError, match=message):
        get_tasks(names)


def test_of_several_rewards_a_task_takes_the_first_that_fits_and_without_any_its_own():
    assert get_task("arc_easy").check_reward(None) == "loglikelihood"
    assert get_task("arc_easy").check_reward("letter,boxed") == "letter"
    assert get_task("dart-1").check_reward("letter,boxed") == "boxed"


def test_a_column_that_the_harness_needs_and_a_row_lacks_is_named():
    harness, example = Harness(columns=("goal", "sol1")), Example(question="?", answer="!")
    assert harness.make_row(example, {"goal": 1, "sol1": 2, "more": 3}) == {"goal": 1, "sol1": 2}
    with pytest.raises(TaskError, match="'sol1' is missing"):
        harness.make_row(example, {"goal": 1})


def test_making_and_grading_questions_loads_no_torch():
    code = """
import importlib, pkgutil, sys
import drllm.tasks
for module in pkgutil.walk_packages(drllm.tasks.__path__, "drllm.tasks."):
    importlib.import_module(module.name)
from drllm.tasks.registry import get_task
from drllm.tasks.rewards import grade
for name, reward in (("builtin_facts", "letter"), ("builtin_arithmetic", "boxed")):
    task = get_task(name)
    example = task.examples("test")[0]
    grade(task.prompt(example, reward), "\\\\boxed{\\\\frac{1}{2}}")
heavy = {"torch", "transformers", "datasets", "lm_eval", "sympy", "math_verify"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
