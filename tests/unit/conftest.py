"""What the tests of single modules share: data folders, and a hub of one's own."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from drllm.tasks.published import task as published

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
    monkeypatch.setattr(published, "_thinned", {})
    published._read_file.cache_clear()
    fake = FakeHub(datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    yield fake
    published._read_file.cache_clear()


@pytest.fixture(scope="session")
def rendered_by_the_harness():
    """A function that renders rows by a task file of the harness, wherever the set itself is.

    It returns the arguments of every request: context and continuation, where options are scored.
    `shown` are rows of worked examples; None as their number leaves it to the file.
    """

    def render(rows, file, shown=(), num_fewshot=0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
            import lm_eval.tasks
            from lm_eval.api.task import ConfigurableTask
            from lm_eval.tasks._yaml_loader import load_yaml

            config = load_yaml(Path(lm_eval.tasks.__file__).parent / file)
            uses = {"asked": rows, "shown": shown or rows}
            sets = {use: datasets.Dataset.from_list(each) for use, each in uses.items()}
            config |= {
                "custom_dataset": lambda **_: datasets.DatasetDict(sets),
                "tag": None,
                "training_split": None,
                "validation_split": None,
                "test_split": "asked",
                "fewshot_split": "shown",
            }
            if num_fewshot is not None:
                config["num_fewshot"] = num_fewshot
            task = ConfigurableTask(config=config)
            task.set_fewshot_seed(1234)
            task.build_all_requests(rank=0, world_size=1)
        return [instance.args for instance in task.instances]

    return render


@pytest.fixture
def cached():
    """A function that puts a folder into the hub's cache as OWNER/NAME, and returns that name."""
    repositories: list[Path] = []

    def put(folder, name):
        repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        repositories.append(repository)
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return name

    yield put
    for repository in repositories:
        shutil.rmtree(repository)
