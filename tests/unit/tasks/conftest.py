"""What the tests of tasks share: data folders, a hub of one's own, the harness' own prompts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows to a file of a data folder, `TASK/FILE`, and returns it."""

    def write(place: str, rows: list[Any]) -> Path:
        path = tmp_path / f"{place}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


class FakeHub:
    """Stands in for `datasets.load_dataset`.

    Attributes:
        files: (repository, configuration, split) → rows, or the error to raise.
        asked: What was asked for, in order.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str | None, str], Any] = {}
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, path: str, name: str | None = None, *, split: str) -> Any:
        import datasets

        self.asked.append((path, name, split))
        rows = self.files[path, name, split]
        if isinstance(rows, Exception):
            raise rows
        return datasets.Dataset.from_list(rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub whose files the test puts there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


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
