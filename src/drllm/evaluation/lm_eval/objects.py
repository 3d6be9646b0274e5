"""Make task objects of lm-evaluation-harness ("the harness") from the leaves of a task.

The harness calls a function for the rows (`custom_dataset`), so nothing is written and read back.
"""

import importlib
import importlib.resources
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.leaves import Leaf
from drllm.tasks.base import Function
from drllm.work.listener import quiet

NO_SOURCE = {"dataset_path": None, "dataset_name": None, "dataset_kwargs": None}
"""Settings that turn off the data set of an included task file."""
NOT_FOR_OBJECTS = ("tag", "group", "task_list")
"""Settings of a task file that only say how the task is found by name."""


def make_task_objects(leaves: Sequence[Leaf]) -> dict[str, ConfigurableTask]:
    """Make the harness' task of each leaf.

    The tasks ask, show and grade exactly as those that the harness reads from a task folder.

    Returns:
        Name of a leaf → its task.

    Raises:
        TaskError: A column of the rows holds values of different types.
    """
    with quiet("lm_eval"), redirect_stderr(io.StringIO()):
        return {leaf.name: _make_task(leaf) for leaf in leaves}


def _make_task(leaf: Leaf) -> ConfigurableTask:
    """Make the harness' task of one leaf."""
    config: dict[str, Any] = {}
    if leaf.file:
        file = f"{importlib.resources.files('lm_eval')}/tasks/{leaf.file}"
        config.update(load_yaml(file, resolve_func=True))
    config.update(_import_functions(leaf.make_settings(NO_SOURCE)))
    for name in NOT_FOR_OBJECTS:
        config.pop(name, None)
    datasets = {use: _make_dataset(leaf.name, rows) for use, rows in leaf.rows.items() if rows}
    # The harness calls it with the task's metadata.
    config["custom_dataset"] = lambda **_metadata: datasets
    return ConfigurableTask(config=config)


def _import_functions(setting: Any) -> Any:
    """Return a copy of a setting with the functions that it names."""
    if isinstance(setting, Function):
        module, _, name = setting.rpartition(".")
        return getattr(importlib.import_module(module), name)
    if isinstance(setting, Mapping):
        return {name: _import_functions(value) for name, value in setting.items()}
    if isinstance(setting, (list, tuple)):
        return [_import_functions(value) for value in setting]
    return setting


def _make_dataset(name: str, rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Make a data set of the rows of a leaf. A column that a row lacks is None there."""
    names = dict.fromkeys(column for row in rows for column in row)  # in order, each once
    columns = {column: [row.get(column) for row in rows] for column in names}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are of these kinds
        raise TaskError(
            f"task {name!r} has rows that can't be put into a table ({error}); give the values of "
            f"each column the same type"
        ) from error
