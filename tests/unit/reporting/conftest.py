"""Run folders, as written by `run_folder`, and the reports about them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from drllm.records.results import Evaluation, StepRecord
from drllm.reporting.run import Run, read_run
from drllm.reporting.sections import build_document
from drllm.reporting.stage import report as write_report
from drllm.reporting.stage import to_markdown
from run_folder import WHOLE, RunFolderWriter


@pytest.fixture(scope="session")
def with_paths() -> Callable[..., Evaluation]:
    """A function that adds static paths to a result, from the most layers to the fewest."""

    def add(evaluation: Evaluation, number: int, *, routed: bool = True) -> Evaluation:
        paths = []
        for n in range(1, number + 1):
            accuracy = 0.6 - 0.3 * n / number
            score = {"accuracy": accuracy, "interval": (accuracy - 0.05, accuracy + 0.05)}
            path = replace(evaluation.systems[1], name=f"skip{n}", executions=12.0 - n, **score)
            paths.append(path)
        named = {path.name: (StepRecord(layer=0),) for path in paths}
        others = evaluation.systems if routed else evaluation.systems[:1]
        return replace(evaluation, systems=(*others, *reversed(paths)), paths=named, curve=())

    return add


@pytest.fixture(scope="session")
def whole() -> dict[str, Any]:
    """What to give `RunFolderWriter.evaluation` for a curve and a test of limits."""
    return WHOLE


@pytest.fixture(scope="session")
def text_of() -> Callable[..., str]:
    """A function that returns the Markdown about some folders, which takes no drawing."""

    def render(*folders: Path) -> str:
        return to_markdown(build_document([read_run(folder) for folder in folders]), "figures")

    return render


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolderWriter]:
    """Return a maker of run folders: `new_folder(name="run", num_layers=4, seed=0)`."""

    def new(name: str = "run", num_layers: int = 4, seed: int = 0) -> RunFolderWriter:
        path = tmp_path_factory.mktemp("made") / name
        path.mkdir()
        return RunFolderWriter(path, num_layers, seed)

    return new


@pytest.fixture
def folder(new_folder: Callable[..., RunFolderWriter]) -> RunFolderWriter:
    """Return an empty folder of 4 layers."""
    return new_folder()


@pytest.fixture(scope="session")
def run(new_folder: Callable[..., RunFolderWriter]) -> Run:
    """Return one run as read, of 12 layers."""
    return read_run(new_folder("run", 12, 3).everything(**WHOLE))


@pytest.fixture(scope="session")
def page(new_folder: Callable[..., RunFolderWriter]) -> Path:
    """Return the page of one report with everything, paths too, of a model of 30 layers."""
    folder = new_folder("run", 30, 1)
    folder.everything(**WHOLE)
    folder.static_paths()
    html, _ = write_report(folder.path)
    return html


@pytest.fixture(scope="session")
def report(page: Path) -> tuple[str, str]:
    """Return the HTML and the Markdown of that report, for tests that only look at it."""
    beside = page.with_suffix(".md")
    return page.read_text(encoding="utf-8"), beside.read_text(encoding="utf-8")
