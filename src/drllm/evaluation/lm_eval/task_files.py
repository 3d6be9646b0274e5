"""Task files of lm-evaluation-harness: where its own are, and how ours are written.

Owns the form of the files, with functions as `!function` names them, and writing a folder of them.
Leaves what is in them to `table` and `folders`. The harness itself isn't loaded. Loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.registry import Function
from drllm.records import write_atomically

ROWS, CACHE = "rows", "cache"
"""Places below a task folder: what is asked and shown, and what `datasets` makes of it."""


@dataclass
class FolderFiles:
    """The files of a task folder, before there is one.

    Attributes:
        tasks: Name of each task file → its content, where rows are given below the folder.
        rows: Name below the folder → text of each rows file; it is named by its content.
        num_questions: Name of each task that holds questions → how many.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    num_questions: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells these files from others, wherever they are: 16 hexadecimal digits."""
        text = json.dumps(self.tasks, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write the files; rows that are there already stay as they are.

        Args:
            folder: Where to; made if need be. Files of other names that are in it stay.

        Raises:
            RecordError: A folder that can't be written.
        """
        folder = folder.resolve()
        for name, text in self.rows.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != text.encode():
                write_atomically(path, text)
        for name, content in self.tasks.items():
            write_yaml(folder / name, _placed(content, folder))


def _placed(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a task file's content with its places below the folder made absolute."""
    if "dataset_kwargs" not in content:
        return content
    places = content["dataset_kwargs"]
    rows = {use: str(folder / name) for use, name in places["data_files"].items()}
    cache = str(folder / places["cache_dir"])
    return {**content, "dataset_kwargs": {"data_files": rows, "cache_dir": cache}}


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
