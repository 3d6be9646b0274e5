"""Task files of lm-evaluation-harness: where its own are, and how ours are written.

Owns the form of the files, with functions as `!function` names them. Leaves what is in them to
`table` and `folders`. The harness itself isn't loaded. Loads no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from drllm.errors import TaskError
from drllm.evaluation.harness.table import Function
from drllm.records import write_atomically


def harness_file(name: str) -> Path:
    """Return where the installed harness has a task file.

    Args:
        name: The file below the harness' `tasks`.

    Raises:
        TaskError: It has none of that name.
    """
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None, "lm_eval is a dependency"
    assert spec.origin is not None
    path = Path(spec.origin).parent / "tasks" / name
    if not path.is_file():
        raise TaskError(
            f"the installed lm_eval has no task file {name}; install lm-eval 0.4.13 or newer"
        )
    return path


def generation_kwargs(name: str) -> dict[str, Any]:
    """Return how a task file of the harness has answers generated.

    Raises:
        TaskError: The installed harness has no such file.
    """
    text = harness_file(name).read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.load(text, Loader=_Plain)["generation_kwargs"]
    return settings


class _Plain(yaml.SafeLoader):
    """Reads a task file of the harness with the names of functions as texts."""


_Plain.add_constructor("!function", lambda _loader, node: node.value)


class _Dumper(yaml.SafeDumper):
    """Writes a task file, functions as the harness names them."""


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", str(name))
)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a task file; a `Function` becomes what the harness imports.

    Raises:
        RecordError: A folder that can't be written.
    """
    text = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    write_atomically(path, text)
