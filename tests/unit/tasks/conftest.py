"""What the tests of tasks share: the harness' own prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def rendered_by_the_harness() -> Callable[..., list[tuple[str, str]]]:
    """A function that returns context and continuation of every request of a zero-shot task."""

    def render(rows: list[dict[str, Any]], *files: str) -> list[tuple[str, str]]:
        """Render rows as a task of lm-evaluation-harness does.

        Args:
            rows: The rows of each of its splits.
            files: The task's YAML files below the harness' `tasks`, what is included first.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
            import lm_eval.tasks
            import yaml
            from lm_eval.api.task import ConfigurableTask

            folder = Path(lm_eval.tasks.__file__).parent
            config: dict[str, Any] = {}
            included = ""
            for file in files:
                loaded = yaml.safe_load((folder / file).read_text())
                assert Path(loaded.pop("include", included)).name == included
                included = Path(file).name
                config.update(loaded)
            splits = ("train", "validation", "dev", "test")
            sets = datasets.DatasetDict(
                {split: datasets.Dataset.from_list(rows) for split in splits}
            )
            task = ConfigurableTask(
                config={**config, "custom_dataset": lambda **_: sets, "num_fewshot": 0}
            )
            task.build_all_requests(limit=None, rank=0, world_size=1)
        return [instance.args for instance in task.instances]

    return render
