"""Stages that are interrupted in many ways, and what their folders must hold afterwards."""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from killable_command import Command, Operation, read_operations


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, and what it does when its work is done.

    Attributes:
        command: Its command line. The model and the folder are added unless it names the model.
        kept: How the paths of the results begin that an interrupted run keeps, in the folder.
        when_done: What the same command says when all is done.
        status_when_done: Its exit status then.
        is_repeated: Whether it does the work again then, and writes equal files.
        other: Flags of other work, which the folder is refused for.
        refusal: What the message says then.
        compared: How the paths of the files begin that must equal those of an undisturbed run. The
            others hold measured times.
    """

    command: str
    kept: str
    when_done: str
    status_when_done: int = 0
    is_repeated: bool = False
    other: str
    refusal: str
    compared: str = ""


STAGES = {
    "search": Stage(
        command="search --dataset builtin_facts --limit 12 --block-size 3 --num-simulations 12",
        kept="search.partial/",
        when_done="nothing was searched again",
        other="--num-simulations 13",
        refusal="num_simulations 12, now 13",
    ),
    "features": Stage(
        command="train --supervision {inputs}/supervision.jsonl --num-epochs 2 "
        "--features {folder}/features",
        kept="features/features-",
        when_done="holds trained routers already",
        status_when_done=2,
        other="--num-windows 4 --output-dir {other}",
        refusal="num_windows 8, now 4",
    ),
    "train": Stage(
        command="train --supervision {inputs}/supervision.jsonl --num-epochs 3 --num-seeds 2",
        kept="seed_1/checkpoint",
        when_done="holds trained routers already",
        status_when_done=2,
        other="--num-epochs 4",
        refusal="holds trained routers already",
    ),
    "learn": Stage(
        command="learn --model {model} --skip 2 --tasks {inputs}/sums.jsonl --steps 12 "
        "--rank 2 --device cpu --output-dir {folder}/smaller",
        kept="smaller.work/",
        when_done="isn't empty; give the name of a new folder",
        status_when_done=2,
        other="--rank 3",
        refusal="isn't empty; give the name of a new folder",
        compared="smaller/model",
    ),
    "evaluate": Stage(
        command="evaluate --routers {routers} --paths {inputs}/plan.json "
        "--tasks builtin_arithmetic --limit 7 --batch-size 1 --num-texts 2 "
        "--baselines permuted-routes,greedy-by-loss --num-random-draws 2 "
        "--curve 0.1875 --num-calibration 4",
        kept="partial/",
        when_done="routed",
        is_repeated=True,
        other="--limit 6",
        refusal="limit 7, now 6",
    ),
    "shrink": Stage(
        command="shrink {model} {inputs}/sums.jsonl {folder}/smaller --layers 3 --minutes 0.00001 "
        "--device cpu",
        kept="smaller.work/",
        when_done="isn't empty; give the name of a new folder",
        status_when_done=2,
        other="--layers 2",
        refusal="isn't empty; give the name of a new folder",
        compared="smaller/model",
    ),
}

SECONDS = re.compile(rb'("seconds": ?)[\d.e+-]+')
DATE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
MEASURED = re.compile(rb'("(?:margin|kl)": ?)(-?[\d.e+-]+)')
"""Numbers whose last bits depend on which paths of a search run in one batch of the model."""


@dataclass(frozen=True)
class FileContent:
    """The content of a file.

    Attributes:
        text: The content without times, dates and the values of `MEASURED`. Hashes of the folder's
            files are replaced by the files' paths, and the folder's own path is left out.
        measured: The values of `MEASURED` in the files of a search.
    """

    text: bytes
    measured: list[float]


def read_contents(folder: Path, compared: str = "") -> dict[str, FileContent]:
    """Return the content of the files of a folder whose paths begin so, by path."""
    files = {path: text for path, text in read_files(folder).items() if path.startswith(compared)}
    paths = {hashlib.sha256(content).hexdigest(): path for path, content in files.items()}
    contents = {}
    for path, text in files.items():
        measured = []
        if path.startswith(("search.", "supervision.")):
            measured = [float(number) for _, number in MEASURED.findall(text)]
            text = MEASURED.sub(rb"\1null", text)
        text = SECONDS.sub(rb"\1null", text)
        text = DATE.sub(b"DATE", text)
        text = text.replace(str(folder).encode(), b"")
        for digest, other_path in paths.items():
            text = text.replace(digest.encode(), other_path.encode())
        contents[path] = FileContent(text, measured)
    return contents


def assert_same(contents: dict[str, FileContent], expected: dict[str, FileContent]) -> None:
    """Compare contents: measured numbers within 1e-4 (the design's words), all else exactly."""
    assert contents.keys() == expected.keys()
    for path, content in contents.items():
        assert content.text == expected[path].text, path
        assert content.measured == pytest.approx(expected[path].measured, abs=1e-4), path


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files by path; folders have none."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@dataclass(frozen=True)
class UndisturbedRun:
    """What a run does and writes that nothing interrupts.

    Attributes:
        contents: The content of its files, by path.
        seconds: How long it took.
        operations: Its operations on files.
        deletions: Those of them that delete a file or a folder.
    """

    contents: dict[str, FileContent]
    seconds: float
    operations: Sequence[Operation]
    deletions: Sequence[Operation]


def run_undisturbed(stage: Stage, command: Command) -> UndisturbedRun:
    list_file = command.log.with_name("operations.json")
    started = time.monotonic()
    command.run(list_file)
    seconds = time.monotonic() - started
    operations = read_operations(list_file)
    return UndisturbedRun(
        contents=read_contents(command.folder, stage.compared),
        seconds=seconds,
        operations=operations,
        deletions=[
            operation for operation in operations if operation.event in ("os.remove", "os.rmdir")
        ],
    )


def assert_done(
    stage: Stage, command: Command, expected: dict[str, FileContent], drllm: Callable[..., Any]
) -> None:
    """Check the files of a command that has ended; then start other work, and the same again."""
    assert_same(read_contents(command.folder, stage.compared), expected)
    files = read_files(command.folder)
    other_words = stage.other.format(other=command.folder.with_name("other")).split()
    message = drllm(command.words[0], *command.words[1:], *other_words, status=2).err
    assert stage.refusal in message
    assert read_files(command.folder) == files
    output = drllm(command.words[0], *command.words[1:], status=stage.status_when_done)
    assert stage.when_done in output.out + output.err
    if stage.is_repeated:
        assert_same(read_contents(command.folder), expected)
    else:
        assert read_files(command.folder) == files
