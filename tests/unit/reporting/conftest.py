"""Run folders, as written by `run_folder`, and a report about one with everything."""

from collections.abc import Callable
from pathlib import Path

import pytest

from drllm.reporting.run import Run, read_run
from drllm.reporting.stage import report
from run_folder import WHOLE, RunFolderWriter


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
    html, _ = report(folder.path)
    return html
