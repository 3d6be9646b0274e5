"""Task files of the harness that can run code are refused unless they are trusted."""

import pytest

from drllm.config import EvaluateConfig, HealConfig, SearchConfig, TuneConfig
from drllm.errors import TaskError
from drllm.evaluation.questions import select_tasks as select_tasks_to_evaluate
from drllm.search.questions import select_tasks
from drllm.tasks.registry import get_task, get_tasks
from drllm.tasks.task_code import refuse_code
from drllm.tuning.data_splits import split_tasks
from drllm.tuning.heal_texts import read_sources

PLAIN = """
task: mine
dataset_path: json
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
"""
CODE = {
    "function": "process_docs: !function utils.process\n",
    "script": "dataset_path: ./load.py\n",
    "remote code": "dataset_kwargs: {trust_remote_code: true}\n",
    "template": "doc_to_text: \"{{ ''.__class__.__mro__ }}\"\n",
}


@pytest.fixture
def task_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(PLAIN)
    return file


def test_a_file_of_data_alone_is_taken(task_file):
    refuse_code(task_file)


@pytest.mark.parametrize("code", CODE.values(), ids=CODE)
def test_code_in_the_file_is_refused(task_file, code):
    task_file.write_text(PLAIN + code)
    with pytest.raises(TaskError, match="--trust-task-code"):
        refuse_code(task_file)


def test_code_in_a_file_of_the_folder_is_refused(task_file):
    (task_file.parent / "parts").mkdir()
    (task_file.parent / "parts" / "other.yml").write_text(CODE["function"])
    with pytest.raises(TaskError, match=r"other\.yml has !function"):
        refuse_code(task_file)


def test_code_in_an_included_file_is_refused_also_outside_of_the_folder(tmp_path, task_file):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "task.yaml").write_text("include: ../base\n")
    (tmp_path / "base").write_text("include: inner/task.yaml\n" + CODE["function"])
    with pytest.raises(TaskError, match="base has !function"):
        refuse_code(inner / "task.yaml")


READERS = {
    "get_task": lambda name: get_task(name),
    "get_tasks": lambda name: get_tasks(name),
    "search": lambda name: select_tasks(SearchConfig(dataset=name)),
    "tune": lambda name: split_tasks(TuneConfig(tasks=name)),
    "heal": lambda name: read_sources(HealConfig(tasks=name)),
    "evaluate": lambda name: select_tasks_to_evaluate(EvaluateConfig(tasks=name)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_stage_takes_it_before_it_is_trusted(task_file, read):
    task_file.write_text(PLAIN + CODE["function"])
    with pytest.raises(TaskError, match="has !function"):
        read(str(task_file))
