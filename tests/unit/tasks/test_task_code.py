"""Task files of the harness can run code, so no stage takes one that isn't trusted."""

import pytest

from drllm.config import EvaluateConfig, SearchConfig, ShrinkConfig
from drllm.errors import TaskError
from drllm.evaluation.questions import select_tasks as select_tasks_to_evaluate
from drllm.search.questions import select_tasks
from drllm.tasks.parts import read_questions
from drllm.tasks.registry import get_task, get_tasks

READERS = {
    "get_task": lambda name: get_task(name),
    "get_tasks": lambda name: get_tasks(name),
    "search": lambda name: select_tasks(SearchConfig(dataset=name)),
    "shrink": lambda name: read_questions(ShrinkConfig(tasks=name)),
    "evaluate": lambda name: select_tasks_to_evaluate(EvaluateConfig(tasks=name)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_no_stage_takes_a_task_file_that_is_not_trusted(tmp_path, read):
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\ndataset_path: json\n")
    with pytest.raises(TaskError, match="give --trust-task-code"):
        read(str(file))
