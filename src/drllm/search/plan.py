"""What a search is made from: the plan, and when two plans are the same search.

The plan stands beside the committed blocks while a search is under way and in the manifest
afterwards. A search is complete with its manifest, not before. Leaves searching to `runner` and the
committed blocks to `commits`. Loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.config import SearchConfig
from drllm.config.settings import Settings
from drllm.errors import ConfigError
from drllm.records import read_manifest, read_search
from drllm.search.questions import Block

NOT_DECISIVE = (
    *("output_dir", "data_dir"),  # where files lie; the questions are compared
    *("state_cache_gb", "paths_per_pass"),  # memory
    *("executor", "num_workers", "ray_address"),  # who does the work
    "latency_rounds",  # how often time is measured, beside the records
)
"""Settings that change no record."""


def decisive(settings: Settings) -> dict[str, Any]:
    """Return the settings that must be equal for two results to be the same one."""
    return {name: v for name, v in settings.to_dict().items() if name not in NOT_DECISIVE}


def new_plan(
    blocks: Sequence[Block],
    texts: Iterable[str | None],
    config: SearchConfig,
    identity: Mapping[str, Any],
    runtime: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what must be equal for a search to be continued, or to count as this one.

    Args:
        blocks: The questions.
        texts: What the model reads of each question, its chat template included, in order; None
            where the template refuses a prompt.
        config: Settings of the search.
        identity: Which base model.
        runtime: How it runs: dtype, kind of device, attention code.
    """
    prompts, rendered = hashlib.sha256(), hashlib.sha256()
    for block in blocks:
        task = block.task
        reward = task.check_reward(config.reward)
        for example in block.examples:
            for prompt in (task.prompt(example, reward), *task.retests(example, reward)):
                prompts.update(repr(prompt).encode())
    for text in texts:
        rendered.update(repr(text).encode())
    return {
        "drllm_version": importlib.metadata.version("drllm"),
        "settings": decisive(config),
        "model": dict(identity),
        "runtime": dict(runtime),
        "num_blocks": len(blocks),
        "prompts_sha256": prompts.hexdigest(),
        "rendered_sha256": rendered.hexdigest(),
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
    compare(output, manifest.get("plan", {}), plan)
    read_search(output)
    return True


def compare(where: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on from a search with another plan.

    Args:
        where: What the stored plan belongs to, for the message.
        stored: The plan of an earlier search.
        wanted: The plan of this one.

    Raises:
        ConfigError: Naming the first difference: a setting, the model, how it runs, the version,
            or else the questions.
    """
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
    if stored.get("rendered_sha256") != wanted["rendered_sha256"]:
        raise ConfigError(
            f"{where} was made with another chat template: the same prompts read otherwise; "
            f"choose another --output-dir"
        )


def _named(plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a plan that have names worth a message, the most telling first."""
    parts = [dict(plan.get(part, {})) for part in ("settings", "model", "runtime")]
    return [*parts, {"drllm_version": plan.get("drllm_version")}]
