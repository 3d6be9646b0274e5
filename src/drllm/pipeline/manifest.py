"""The manifest of a run folder: from what each stage was made, and what it wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from drllm.errors import RecordError
from drllm.records import codec
from drllm.statistics.ranges import Amount, Count

RUN_FILE = "run.manifest.json"


class StageState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The state of one stage in `run.manifest.json` (docs/formats.md).

    Attributes:
        made_from: The settings and the hashes of inputs that the stage's results depend on.
        outputs: The hash of each file that the stage wrote; empty until the stage ends.
        seconds: The time that the stage took.
    """

    made_from: dict[str, Any]
    outputs: dict[str, str] = {}
    seconds: Amount = 0.0


class RunManifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`run.manifest.json`: the inputs, the outputs and the time of each stage."""

    schema: Literal["drllm.run"] = "drllm.run"
    schema_version: Count = codec.SCHEMA_VERSION
    drllm_version: str = ""
    stages: dict[str, StageState] = {}

    def is_done(self, stage: str, made_from: Mapping[str, Any], folder: Path) -> bool:
        """Tell whether a stage is finished, and its inputs and outputs are unchanged.

        Args:
            stage: The name of the stage.
            made_from: What the stage would be made from now.
            folder: The run folder.
        """
        state = self.stages.get(stage)
        if state is None or not state.outputs or state.made_from != made_from:
            return False
        return all(hash_file(folder / name) == digest for name, digest in state.outputs.items())


def read_run_manifest(folder: Path) -> RunManifest:
    """Read the `run.manifest.json` of a folder; return an empty manifest if there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        return RunManifest()
    try:
        return codec.read_json(path, RunManifest)
    except RecordError as error:
        raise RecordError(
            f"{error}; delete {path}: the next run then checks each stage, or repeats it"
        ) from error


def hash_file(path: Path) -> str:
    """Return the hash of a file, or an empty text if the file doesn't exist."""
    return codec.sha256(path) if path.is_file() else ""
