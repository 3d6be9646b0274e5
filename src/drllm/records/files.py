"""Whole records files: read line by line with line numbers, written atomically.

Owns reading, refusing what can't be trusted, and writing. Leaves a line's contents to `lines` and
what stands beside a file to `manifests`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from drllm.errors import RecordError
from drllm.records.codec import read_json_lines, sha256, write_atomically, write_json
from drllm.records.lines import (
    SearchRecord,
    SupervisionRecord,
    search_record,
    supervision_record,
    to_json,
)
from drllm.records.manifests import manifest_path, read_manifest
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
    """Yield `(line number, object)` for each line of a JSON lines file."""
    return read_json_lines(path, dict[str, Any])


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
        manifest_path(path).unlink()  # never a new file under an old manifest
    write_atomically(path, text)
    complete = {**manifest, "num_records": text.count("\n"), "sha256": sha256(path)}
    write_json(manifest_path(path), complete)
