"""Whole records files: read line by line with line numbers, written atomically.

Owns reading, refusing what can't be trusted, and writing. Leaves a line's contents to `lines` and
what stands beside a file to `manifests`. Loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from drllm.errors import RecordError
from drllm.records.lines import (
    SearchRecord,
    SupervisionRecord,
    search_record,
    supervision_record,
    to_json,
)
from drllm.records.manifests import manifest_path, read_manifest, sha256
from drllm.records.splits import question_key

Record = TypeVar("Record")

KINDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "search": search_record,
    "supervision": supervision_record,
}

LEARNT_FROM = ("question", "prompt", "optimal_layer_config")
"""What has to be equal for two lines to be one target; a margin differs in its last bits."""


def read_search(path: Path | str) -> list[SearchRecord]:
    """Read and check a whole `search.jsonl`; see `read_lines` for what is refused."""
    return _read(Path(path), "search")


def read_supervision(path: Path | str) -> list[SupervisionRecord]:
    """Read and check a whole `supervision.jsonl`; see `read_lines` for what is refused.

    Raises:
        RecordError: Also when rows disagree on the number of layers, or one question of a task
            has two different targets, under whatever ids.
    """
    records: list[SupervisionRecord] = _read(Path(path), "supervision")
    layers = len(records[0].optimal_layer_config)
    first: dict[tuple[str, str], int] = {}
    for line, record in enumerate(records, start=1):
        if len(record.optimal_layer_config) != layers:
            raise RecordError(
                f"{path}, line {line}: 'optimal_layer_config' has "
                f"{len(record.optimal_layer_config)} layers, line 1 has {layers}; "
                f"a file holds the targets of one model"
            )
        earlier = first.setdefault((record.task, question_key(record.question)), line)
        if records[earlier - 1].optimal_layer_config != record.optimal_layer_config:
            raise RecordError(
                f"{path}, line {line}: the question stands already in line {earlier} with another "
                f"target (ids {records[earlier - 1].id!r} and {record.id!r} of task "
                f"{record.task!r}); keep one of them"
            )
    return records


def join_supervision(paths: Sequence[Path]) -> list[SupervisionRecord]:
    """Read several `supervision.jsonl` files as one, in this order.

    A target that stands in two of them counts once.

    Args:
        paths: The files, at least one; the shards of a search, say, or those of other tasks.

    Raises:
        RecordError: What `read_supervision` refuses of one file; a file named twice; files of
            different numbers of layers; one question with two targets, or one id with two
            questions or prompts, in two of the files.
    """
    joined: list[SupervisionRecord] = []
    by_id: dict[tuple[str, str], tuple[SupervisionRecord, Path]] = {}
    by_question: dict[tuple[str, str], tuple[SupervisionRecord, Path]] = {}
    for number, path in enumerate(paths):
        if path.resolve() in [earlier.resolve() for earlier in paths[:number]]:
            raise RecordError(f"{path} is given twice; name each supervision file once")
        for record in read_supervision(path):
            layers = len((joined or [record])[0].optimal_layer_config)
            if len(record.optimal_layer_config) != layers:
                raise RecordError(
                    f"{path} holds targets of {len(record.optimal_layer_config)} layers, "
                    f"{paths[0]} of {layers}; give files of one base model"
                )
            same, file = by_id.setdefault((record.task, record.id), (record, path))
            for name in LEARNT_FROM:
                if getattr(same, name) != getattr(record, name):
                    raise RecordError(
                        f"{path} and {file} differ in {name!r} of question {record.id!r} of task "
                        f"{record.task!r}; leave one of them out"
                    )
            if file != path:
                continue  # a copy
            asked = (record.task, question_key(record.question))
            other, file = by_question.setdefault(asked, (record, path))
            if other.optimal_layer_config != record.optimal_layer_config:
                raise RecordError(
                    f"{path} and {file} have one question of task {record.task!r} with two targets "
                    f"(ids {record.id!r} and {other.id!r}); leave one of them out"
                )
            joined.append(record)
    return joined


def _read(path: Path, kind: str) -> list[Any]:
    manifest = read_manifest(path, kind)
    records: list[Any] = []
    seen: dict[tuple[str, str], int] = {}
    for line, record in read_each(path, KINDS[kind]):
        key = (record.task, record.id)
        if key in seen:
            raise RecordError(
                f"{path}, line {line}: question {record.id!r} of task {record.task!r} stands "
                f"already in line {seen[key]}; keep one of them"
            )
        seen[key] = line
        records.append(record)
    if manifest is not None and manifest.get("sha256") != sha256(path):
        raise RecordError(
            f"{path} was changed or cut off after it was written (its manifest has another hash); "
            f"make it again, or delete {manifest_path(path).name} to use it as a file of your own"
        )
    return records


def read_each(
    path: Path, read: Callable[[Mapping[str, Any]], Record]
) -> Iterator[tuple[int, Record]]:
    """Yield `(line number, record)` for each line of a JSON lines file.

    Args:
        path: The file.
        read: Makes a record of a parsed line; its `RecordError` says what is wrong with it.

    Raises:
        RecordError: As `read_lines`, or that of `read` with file and line in front.
    """
    for line, row in read_lines(path):
        try:
            record = read(row)
        except RecordError as error:
            raise RecordError(f"{path}, line {line}: {error}") from error
        yield line, record


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(line number, object)` for each line of a JSON lines file.

    Raises:
        RecordError: A missing, empty or unreadable file; a line that is cut off, is not JSON, or
            is not an object. The message names file and line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "doesn't exist"
        raise RecordError(f"{path} {what}; give a .jsonl file that a stage has written")
    empty = True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                empty = False
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    cut = "is cut off" if not line.endswith("\n") else "is not JSON"
                    raise RecordError(
                        f"{path}, line {number}: the line {cut} ({error.msg}); make the file "
                        f"again, or delete the line"
                    ) from error
                if not isinstance(row, dict):
                    raise RecordError(f"{path}, line {number}: not a JSON object")
                yield number, row
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not a UTF-8 text file; give a .jsonl file") from error
    if empty:
        raise RecordError(f"{path} is empty; run the stage that writes it again")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old content or all of the new, never a part.

    Args:
        path: Its folder is made if need be.
        content: A text is written as UTF-8, its line ends as they are.

    Raises:
        RecordError: A folder that can't be written, a full disk, or a path that is a folder.
    """
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkstemp: its files, and so ours, could be read by their owner alone.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def clear_half_written(*files: Path) -> None:
    """Delete what kills have left behind while one of these files was written.

    Only for whoever alone writes them: another process' new content would be lost.
    """
    for file in files:
        for part in file.parent.glob(f".{file.name}.*"):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses while a file is written into an error of ours."""
    if path.is_dir():
        raise RecordError(f"can't write {path}: it is a folder; give the name of a file")
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"can't write {path}: {error.strerror}; choose a folder that you may write to"
        ) from error


def to_lines(records: Iterable[Any]) -> str:
    """Write records as the text of a JSON lines file."""
    return "".join(to_json(record) + "\n" for record in records)


def write_records(path: Path, records: Iterable[Any], manifest: Mapping[str, Any]) -> None:
    """Write a whole records file and the manifest beside it, each atomically.

    Args:
        path: The `.jsonl` file.
        records: What becomes one line each.
        manifest: From `new_manifest`; gets the number of records and the file's hash.
    """
    text = to_lines(records)
    if manifest_path(path).is_file():
        with _refusing(path):
            manifest_path(path).unlink()  # never a new file under an old manifest
    write_atomically(path, text)
    complete = {**manifest, "num_records": text.count("\n"), "sha256": sha256(path)}
    write_atomically(manifest_path(path), json.dumps(complete, indent=2, ensure_ascii=False) + "\n")
