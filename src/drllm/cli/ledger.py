"""What a run has done: each stage, what it was made from, what it wrote and how long it took.

Owns `run.manifest.json`, and telling whether a stage need not be run again. Leaves running stages
to `run_folder`. Loads no torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.cli import checks
from drllm.errors import RecordError
from drllm.records import SCHEMA_VERSION, sha256, write_atomically

LEDGER_FILE = "run.manifest.json"
LEDGER_SCHEMA = "drllm.run"


class Ledger:
    """`run.manifest.json`: what each stage was made from, what it wrote and how long it took.

    Args:
        folder: The run folder.

    Raises:
        RecordError: A ledger that is broken or of a future version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LEDGER_FILE
        self.stages: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            self.stages = dict(values["stages"])
            version = int(values["schema_version"])
            known = values["schema"] == LEDGER_SCHEMA and all(
                isinstance(stage, dict) for stage in self.stages.values()
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"{self.path} is broken; delete it, and finished stages are checked or made anew"
            ) from error
        if not known or version > SCHEMA_VERSION:
            raise RecordError(
                f"{self.path} isn't a ledger that this drllm reads (schema version up to "
                f"{SCHEMA_VERSION}); choose another --output-dir, or install a newer drllm"
            )

    def is_done(self, stage: str, made_from: Mapping[str, Any]) -> bool:
        """Tell whether a stage need not be run again."""
        entry = self.stages.get(stage, {})
        outputs = entry.get("outputs", {})
        return (
            bool(outputs)
            and entry.get("made_from") == made_from
            and all(checks.file_hash(self.folder / name) == sha for name, sha in outputs.items())
        )

    def begin(self, stage: str, made_from: Mapping[str, Any]) -> bool:
        """Note that a stage begins; tell whether an earlier attempt was made from the same."""
        same = self.stages.get(stage, {}).get("made_from") == made_from
        self.stages[stage] = {"made_from": dict(made_from)}
        self._write()
        return same

    def finish(self, stage: str, outputs: Sequence[Path], seconds: float) -> None:
        """Note what a stage has written."""
        hashes = {path.relative_to(self.folder).as_posix(): sha256(path) for path in outputs}
        self.stages[stage].update(outputs=hashes, seconds=round(seconds, 3))
        self._write()

    def outputs(self, stage: str) -> list[Path]:
        """Return the files that the last finished attempt at a stage wrote."""
        return [self.folder / name for name in self.stages.get(stage, {}).get("outputs", {})]

    def _write(self) -> None:
        values = {
            "schema": LEDGER_SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "drllm_version": importlib.metadata.version("drllm"),
            "stages": self.stages,
        }
        write_atomically(self.path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
