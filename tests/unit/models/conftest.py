"""What the tests of models share: the hub's cache, filled without a hub."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
