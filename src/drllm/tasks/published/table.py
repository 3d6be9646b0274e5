"""Registers the rows of `sets.yaml` as tasks. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from drllm.tasks.base import OPTIONS_REWARD, Form, Function, Harness
from drllm.tasks.forms import BOXED, Generated, Options
from drllm.tasks.published import readers
from drllm.tasks.published.task import PublishedTask
from drllm.tasks.registry import register

SETS = Path(__file__).with_name("sets.yaml")


class _Loader(yaml.SafeLoader):
    """Reads functions that the harness is to call as it writes them."""


_Loader.add_constructor("!function", lambda _, node: Function(node.value))


def task_of(name: str, row: dict[str, Any]) -> PublishedTask:
    """Return the task that a row of `sets.yaml` describes."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    read = fields.pop("read")
    reader = getattr(readers, read) if isinstance(read, str) else readers.Columns(**read)
    harness = fields.pop("harness", None)
    thin_out = fields.pop("thin_out", None)
    return PublishedTask(
        name=name,
        read=reader,
        form=_form(fields.pop("form", None)),
        harness=None if harness is None else _harness(harness),
        thin_out=None if thin_out is None else getattr(readers, thin_out),
        **fields,
    )


def _form(given: str | dict[str, Any] | None) -> Form | None:
    if given is None or isinstance(given, str):
        return {None: None, "options": Options(), "boxed": BOXED}[given]
    kind = Options if OPTIONS_REWARD in given["rewards"] else Generated
    return kind(
        rewards=tuple(given["rewards"]),
        template=given["template"],
        other_templates=tuple(given["other_templates"]),
    )


def _harness(given: dict[str, Any]) -> Harness:
    columns = given["columns"]
    found = getattr(readers, columns) if isinstance(columns, str) else tuple(columns)
    return Harness(**{**given, "columns": found, "notes": tuple(given.get("notes", ()))})


for _name, _row in yaml.load(SETS.read_text(encoding="utf-8"), Loader=_Loader).items():
    register(task_of(_name, _row))
