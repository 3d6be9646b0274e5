"""The files of routers: replaced all at once or not at all, and never trusted."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from drllm.errors import CheckpointError
from drllm.models.routers.checkpoint import _read_weights as read_weights
from drllm.models.routers.checkpoint import _replace as replace
from drllm.models.routers.checkpoint import read_config

OLD = {
    "routers.safetensors": b"old weights",
    "router_config.json": b"old config",
    "README.md": b"old card",
}
NEW = {
    "routers.safetensors": b"new weights" * 100,
    "router_config.json": b"new config",
    "README.md": b"new card",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of routers with a file of somebody else's."""
    place = tmp_path / "routers"
    replace(place, OLD)
    (place / "metrics.jsonl").write_bytes(b"{}")
    return place


# --- writing -----------------------------------------------------------------------------------


def test_files_are_written_to_a_folder_that_is_made(tmp_path: Path) -> None:
    replace(tmp_path / "a" / "b", NEW)
    assert contents(tmp_path / "a" / "b") == NEW


def test_files_replace_those_that_are_there_and_leave_others(folder: Path) -> None:
    replace(folder, NEW)
    assert contents(folder) == {**NEW, "metrics.jsonl": b"{}"}


def test_files_are_as_readable_as_any_other(folder: Path) -> None:
    (folder / "plain").write_text("")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1


class Step:
    """Counts calls of an operation, and lets it fail at one of them."""

    def __init__(self, original: Any, fails_at: int, error: BaseException) -> None:
        self.original, self.fails_at, self.error = original, fails_at, error
        self.calls = 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *arguments: self(instance, *arguments)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.fails_at:
            raise self.error
        return self.original(*arguments)


FAILURES = [
    *(("fsync", step) for step in (1, 2, 3)),  # the disk is full while a file is written
    *(("replace", step) for step in range(1, 7)),  # three out of the way, three into place
]


@pytest.mark.parametrize(("operation", "step"), FAILURES)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_what_was_there(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    step: int,
    error: BaseException,
) -> None:
    before = contents(folder)
    owner: Any = os if operation == "fsync" else Path
    failing = Step(getattr(owner, operation), step, error)
    with monkeypatch.context() as patched:
        patched.setattr(owner, operation, failing)
        expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            replace(folder, NEW)
    assert failing.calls >= step
    assert contents(folder) == before
    if expected is CheckpointError:
        assert f"can't write routers to {folder}: No space left on device;" in str(caught.value)


@pytest.mark.parametrize(("operation", "step"), [("fsync", 2), ("replace", 2), ("replace", 3)])
def test_a_failure_in_an_empty_folder_leaves_it_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, step: int
) -> None:
    owner: Any = os if operation == "fsync" else Path
    with monkeypatch.context() as patched:
        patched.setattr(owner, operation, Step(getattr(owner, operation), step, OSError(5, "no")))
        with pytest.raises(CheckpointError):
            replace(tmp_path, NEW)
    assert contents(tmp_path) == {}


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let the system refuse larger files, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_the_system_refuses_leave_what_was_there(folder: Path) -> None:
    before = contents(folder)
    with files_of_at_most(100), pytest.raises(CheckpointError, match="File too large; free some"):
        replace(folder, NEW)
    assert contents(folder) == before


KILLED = """
import json, os, sys
from pathlib import Path
from drllm.models.routers.checkpoint import _replace as replace_files

OLD, NEW = ({name: text.encode() for name, text in json.loads(files).items()}
            for files in sys.argv[2:])
original = Path.replace
found = {}
for step in range(1, 7):
    folder = Path(sys.argv[1], str(step))
    replace_files(folder, OLD)
    child = os.fork()
    if child == 0:
        calls = 0
        def replace(source, target):
            global calls
            calls += 1
            if calls == step:
                os._exit(0)
            return original(source, target)
        Path.replace = replace
        replace_files(folder, NEW)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    whole = {path.name: path.read_text() for path in folder.glob("[!.]*")}
    found[step] = [status, whole]
print(json.dumps(found))
"""


def test_a_process_killed_while_files_change_places_leaves_no_mixture(tmp_path: Path) -> None:
    """Only a folder with a config is ever read, so old and new must never stand beside one."""
    old, new = ({name: text.decode() for name, text in files.items()} for files in (OLD, NEW))
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(old), json.dumps(new)],
        capture_output=True,
        text=True,
        check=True,
    )
    states = json.loads(child.stdout)
    assert len(states) == 6
    for status, whole in states.values():
        assert status == 0, "the process was not killed at this step"
        assert "router_config.json" not in whole or whole in (old, new)


def test_what_a_killed_save_left_behind_goes_with_the_next_one(folder: Path) -> None:
    for name in OLD:
        (folder / f".{name}.0123.new").write_bytes(b"half")
        (folder / f".{name}.0123.old").write_bytes(b"before")
    (folder / ".README.md.mine").write_bytes(b"not ours")
    replace(folder, NEW)
    assert set(contents(folder)) == {*NEW, "metrics.jsonl", ".README.md.mine"}


@pytest.mark.parametrize("name", OLD)
def test_a_folder_in_the_way_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=f"can't write routers to .*: {name} in it is a fold"):
        replace(folder, NEW)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_file_in_the_way_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "routers"):
        with pytest.raises(CheckpointError, match=r"can't write routers to .*; .*choose a folder"):
            replace(place, NEW)


# --- reading -----------------------------------------------------------------------------------


def refused(read: Any, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "nowhere has no router_config.json, since it doesn't exist; give a folder"),
        ("empty", "has no router_config.json, since it is empty; give"),
        ("photos", "has no router_config.json; give a folder that 'drllm train' has written"),
        ("base", "is it a base model? Then give it as --model"),
        ("routers/router_config.json", "is a file; give the folder of routers that holds"),
        (".", "did you mean "),  # a run's folder, which has the routers in it
    ],
)
def test_what_is_no_folder_of_routers_is_refused_with_what_may_be_meant(
    folder: Path, place: str, said: str
) -> None:
    for name in ("empty", "photos", "base"):
        (folder.parent / name).mkdir()
    (folder.parent / "photos" / "photo.jpg").touch()
    (folder.parent / "base" / "config.json").write_text("{}")
    assert said in refused(read_config, folder.parent / place)


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickled(value))]
)
def test_a_pickle_under_the_name_of_safetensors_is_not_opened(folder: Path, write: Any) -> None:
    write({"hidden_bias": torch.zeros(2)}, folder / "routers.safetensors")
    message = refused(read_weights, folder)
    assert "routers.safetensors is a pickle under another name; drllm opens no pickles" in message


def pickled(value: Any) -> bytes:
    return pickle.dumps(value)


def test_weights_whose_header_has_the_first_byte_of_a_pickle_are_read(folder: Path) -> None:
    tensors = {"x" * length: torch.zeros(1) for length in range(1, 3)}
    for length in range(256):
        content = save(tensors, {"note": "y" * length})
        if content[0] == 0x80:
            break
    assert content[0] == 0x80
    (folder / "routers.safetensors").write_bytes(content)
    assert set(read_weights(folder)[0]) == set(tensors)


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"GGUF" * 10, bytes(100)], ids=["empty", "JSON", "GGUF", "zeros"]
)
def test_weights_that_are_no_safetensors_are_refused(folder: Path, text: bytes) -> None:
    (folder / "routers.safetensors").write_bytes(text)
    assert "is broken or cut off" in refused(read_weights, folder)


def test_a_folder_in_place_of_the_weights_is_refused(folder: Path) -> None:
    (folder / "routers.safetensors").unlink()
    (folder / "routers.safetensors").mkdir()
    assert "has no routers.safetensors; is it a folder" in refused(read_weights, folder)
