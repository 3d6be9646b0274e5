"""Reads the targets of a training, and checks its settings. This module doesn't import torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from drllm.config import TrainConfig
from drllm.errors import RecordError
from drllm.records.supervision import SupervisionRecord, TargetSet, read_targets
from drllm.training.trackers import check_trackers

TargetSource: TypeAlias = "Sequence[SupervisionRecord] | Sequence[Path] | Path | str"
"""Where the targets of a training come from: files, or the result of `supervise`."""


def collect_targets(source: TargetSource, config: TrainConfig) -> TargetSet:
    """Check the settings of a training, and return its targets.

    Args:
        source: The targets, or their files.
        config: The settings.

    Raises:
        ConfigError: A setting has no effect, or a tracker isn't installed.
        RecordError: A file is missing or damaged, files don't fit together, or the source has both
            files and records.
    """
    config.check_effects()
    check_trackers(config.trackers)
    if isinstance(source, str | Path):
        return read_targets([Path(source)])
    files = [Path(item) for item in source if isinstance(item, str | Path)]
    if files and len(files) < len(source):
        raise RecordError("targets are given both as files and as records; give one of the two")
    if files:
        return read_targets(files)
    records: Any = source  # not copied, since the result of `supervise` has attributes
    return TargetSet(records)
