"""What a search is made from, and which files of an earlier one it may go on from.

Owns the plan, which stands beside the committed blocks while a search is under way and in the
manifest afterwards, and the comparison of two plans. A search is complete with its manifest, not
before. Leaves searching and committing to `runner`. Loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.config import SearchConfig, Settings
from drllm.errors import ConfigError, RecordError
from drllm.records import read_manifest, read_search, write_atomically
from drllm.tasks.base import Example, Task

PLAN_FILE = "plan.json"
NOT_DECISIVE = ("output_dir", "data_dir", "state_cache_gb")
"""Settings that change no record: where files lie (the questions are compared) and memory."""


def decisive(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be equal for two results to be the same one."""
    return {name: v for name, v in settings.to_dict().items() if name not in NOT_DECISIVE}


def new_plan(
    blocks: Sequence[tuple[Task, Sequence[Example]]],
    config: SearchConfig,
    identity: Mapping[str, Any],
    runtime: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what must be equal for a search to be continued, or to count as this one.

    Args:
        blocks: The questions, by block, with the task that asks them.
        config: Settings of the search.
        identity: Which base model.
        runtime: How it runs: dtype, kind of device, attention code.
    """
    digest = hashlib.sha256()
    for task, examples in blocks:
        reward = task.check_reward(config.reward)
        for example in examples:
            for prompt in (task.prompt(example, reward), *task.retests(example, reward)):
                digest.update(repr(prompt).encode())
    return {
        "drllm_version": importlib.metadata.version("drllm"),
        "settings": decisive(config),
        "model": dict(identity),
        "runtime": dict(runtime),
        "prompts_sha256": digest.hexdigest(),
    }


def is_complete(output: Path, plan: Mapping[str, Any]) -> bool:
    """Tell whether a search of this plan lies there, whole and with its manifest.

    Raises:
        ConfigError: One that was made from something else.
        RecordError: One that was changed after it was written.
    """
    manifest = read_manifest(output, "search")
    if manifest is None:
        return False
    _compare(output, manifest.get("plan", {}), plan)
    read_search(output)
    return True


def open_blocks(parts: Path, plan: Mapping[str, Any], output: Path, num_blocks: int) -> None:
    """Prepare the folder of the committed blocks, or accept the one that is there.

    Args:
        parts: The folder.
        plan: Of the search that wants to go on.
        output: Where the whole search will be written. A file there without a manifest is ours
            only if every block is committed: then a kill came between file and manifest.
        num_blocks: Blocks in all.

    Raises:
        ConfigError: The blocks were made from something else.
        RecordError: The output holds a file that isn't ours.
    """
    path = parts / PLAN_FILE
    if output.exists() and not (path.exists() and len([*parts.glob("*.jsonl")]) >= num_blocks):
        raise RecordError(
            f"{output} exists without its manifest, so it can't be continued; "
            f"choose another --output-dir"
        )
    if path.exists():
        _compare(parts, _read(path), plan)
    else:
        write_atomically(path, json.dumps(plan, indent=2) + "\n")


def remove_blocks(parts: Path, plan: Mapping[str, Any]) -> None:
    """Delete the committed blocks of a search that is complete; those of another plan stay.

    The plan goes last, so that blocks that a kill leaves behind can still be told whose they are.
    """
    path = parts / PLAN_FILE
    if not parts.is_dir() or (path.exists() and _read(path) != plan):
        return
    blocks = [file for file in parts.iterdir() if file != path]
    if path.exists() or not blocks:
        for file in blocks:
            file.unlink()
        shutil.rmtree(parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RecordError(
            f"{path} is broken; delete the folder {path.parent}, and the search begins anew"
        ) from error


def _compare(where: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for old, new in zip(_named(stored), _named(wanted), strict=True):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise ConfigError(
                    f"{where} was made with {name} {old.get(name)!r}, this run has "
                    f"{new.get(name)!r}; choose another --output-dir, or the same settings"
                )
    if stored.get("prompts_sha256") != wanted["prompts_sha256"]:
        raise ConfigError(
            f"{where} was made from other questions or prompts; choose another --output-dir"
        )


def _named(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a plan that have names worth a message, the most telling first."""
    parts = [dict(plan.get(part, {})) for part in ("settings", "model", "runtime")]
    return [*parts, {"drllm_version": plan.get("drllm_version")}]
