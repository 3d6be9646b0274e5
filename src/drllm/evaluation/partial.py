"""What an evaluation has done so far, so that one that was interrupted goes on.

Owns the folder `partial/`: one file a system, written when the system is done, and the plan that
says which evaluation they belong to. Leaves what is run to the stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.evaluation.systems import System
from drllm.records import write_atomically

PLAN_FILE = "plan.json"


class Partial:
    """The systems of one evaluation that are done.

    Args:
        folder: Made when the first system is done.
        plan: What the evaluation is; plain JSON types.

    Raises:
        RecordError: The folder belongs to another evaluation.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        self._text = json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        file = folder / PLAN_FILE
        if file.is_file() and file.read_text(encoding="utf-8") != self._text:
            raise RecordError(
                f"{folder} holds what another evaluation has done so far (other settings, "
                f"routers or files); give the same ones to go on, another --output-dir, or delete "
                f"{folder}"
            )

    def once(self, name: str, run: Callable[[], System]) -> System:
        """Return what a system did: read it if it is done, else run it and keep it.

        Args:
            name: Of the system on a task, unlike all others of the evaluation.
            run: Does it.

        Raises:
            RecordError: A file that isn't what was written.
        """
        words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        file = self.folder / f"{words}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"
        if file.is_file():
            return _read(file)
        system = run()
        if not (self.folder / PLAN_FILE).is_file():
            write_atomically(self.folder / PLAN_FILE, self._text)
        write_atomically(file, json.dumps(dataclasses.asdict(system)) + "\n")
        return system

    def remove(self) -> None:
        """Delete the folder: what it held stands in the results now."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def _read(file: Path) -> System:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        system = System(**values)
    except (ValueError, TypeError) as error:
        raise RecordError(
            f"{file} is broken ({error}); delete it, and the system runs again"
        ) from error
    system.routes = [[tuple(row) for row in draw] for draw in system.routes]
    return system
