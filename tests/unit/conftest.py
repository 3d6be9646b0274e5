"""What the tests of single modules share: data folders, and a hub of one's own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drllm.tasks.published.task import forget


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
    """Stands in for `datasets.load_dataset`, apart from files of this machine.

    Attributes:
        files: (repository, configuration, split) → rows, or the error to raise.
        asked: What was asked for, in order.
        load_files: `datasets.load_dataset` itself.
    """

    def __init__(self, load_files: Callable[..., Any]) -> None:
        self.files: dict[tuple[str, str | None, str], Any] = {}
        self.asked: list[tuple[str, str | None, str]] = []
        self.load_files = load_files

    def load_dataset(
        self, path: str, name: str | None = None, *, split: str = "", **others: Any
    ) -> Any:
        import datasets

        if path == "json":
            return self.load_files(path, name, **others)
        self.asked.append((path, name, split))
        rows = self.files[path, name, split]
        if isinstance(rows, Exception):
            raise rows
        return datasets.Dataset.from_list(rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub whose files the test puts there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    forget()
    fake = FakeHub(datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    yield fake
    forget()
