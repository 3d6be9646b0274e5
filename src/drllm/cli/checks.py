"""What is refused before a base model is loaded or anything is written.

Owns the checks of names, questions and places that no single stage owns, and of targets against
the model they are to be used with. Leaves reading files to their modules. Loads no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.config import EvaluateConfig, SearchConfig, TrainConfig
from drllm.errors import ConfigError, RecordError
from drllm.evaluation.questions import chosen_on
from drllm.records import read_manifest, sha256
from drllm.search.questions import questions_of
from drllm.tasks.base import Task, choose, get_task, get_tasks


def tasks_to_search(config: SearchConfig) -> list[Task]:
    """Return the tasks, once it is sure that they can be searched.

    Raises:
        ConfigError: A shard that makes no sense, settings of Ray without Ray, or of the tree
            with another strategy; a reward named twice.
        TaskError: An unknown task, a reward that it can't grade, or no questions to be had.
    """
    tasks = get_tasks(config.dataset)
    questions_of(tasks, config)
    return tasks


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers that can't be told of the training; loads torch only where there are any.

    Raises:
        ConfigError: One that isn't known or installed.
    """
    if config.trackers:
        from drllm.training.trackers import check_trackers as check

        check(config.trackers)


def check_named_once(folders: Sequence[Path], flag: str) -> None:
    """Refuse a folder that is given twice, under whatever name.

    Raises:
        ConfigError: Naming it.
    """
    seen = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ConfigError(f"{flag} names {folder} twice; name each folder once")
        seen.add(folder.resolve())


def evaluation_digests(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return, by task, a hash of the questions that an evaluation would ask."""
    found = {
        task.name: questions_digest(
            [task],
            config.split_of(task.name),
            config.data_dir,
            config.limit_of(task.name),
            config.seed,
        )
        for task in tasks
    }
    if config.worked_answers is not None:
        worked = get_task(config.worked_answers)
        for split in (chosen_on(worked, config), config.split_of(worked.name)):
            found[f"worked answers of {worked.name}, {split}"] = questions_digest(
                [worked], split, config.data_dir, config.num_texts, config.seed
            )
    return found


def questions_digest(
    tasks: Sequence[Task], split: str, data_dir: str | None, limit: int | None, seed: int
) -> str:
    """Return a hash of the questions that a stage would use."""
    folder = None if data_dir is None else Path(data_dir)
    digest = hashlib.sha256()
    for task in tasks:
        for example in choose(task.examples(split, folder), limit, seed):
            digest.update(repr(example).encode())
    return digest.hexdigest()


def check_supervision_model(supervision: Sequence[Path], ours: Mapping[str, Any]) -> None:
    """Refuse targets that were searched with another base model.

    Args:
        supervision: The files; one without a manifest says nothing about its model.
        ours: Identity of the base model to be trained on.

    Raises:
        RecordError: Another number of layers or fingerprint; another id alone doesn't matter.
    """
    for file in supervision:
        manifest = read_manifest(file, "supervision")
        theirs: dict[str, Any] = {} if manifest is None else manifest["model"]
        for name in ("num_layers", "fingerprint"):
            if name in theirs and theirs[name] != ours[name]:
                raise RecordError(
                    f"{file} holds targets of {theirs.get('id', 'another model')!r} ({name} "
                    f"{theirs[name]}), the base model {ours['id']!r} has {name} {ours[name]}; give "
                    f"the model that they were searched with, or search with this one"
                )


def rewards_of(supervision: Sequence[Path]) -> list[str]:
    """Return the rewards that the prompts of supervision files were made for, where known."""
    found: dict[str, None] = {}
    for file in supervision:
        rewards = (read_manifest(file, "supervision") or {}).get("rewards")
        if isinstance(rewards, list):
            found.update(dict.fromkeys(str(reward) for reward in rewards))
    return list(found)


def file_hash(path: Path) -> str:
    """Return a file's hash; empty for one that isn't there."""
    return sha256(path) if path.is_file() else ""
