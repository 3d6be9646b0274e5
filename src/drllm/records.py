"""The files between the stages: what a line holds, how it is written, read back and trusted.

Owns `search.jsonl`, `supervision.jsonl`, the manifest beside each, atomic writing, and the
assignment of questions to splits. Leaves what the numbers mean to the stages. `docs/formats.md`
describes the same formats for readers without Python. Loads no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import reprlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from drllm.errors import PathError, RecordError
from drllm.paths import Decisions, check_decisions, num_executions

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "math-verify")


# --- splits ------------------------------------------------------------------------------------


def split_of(question: str, origin: str) -> str:
    """Return the split that a question belongs to, from its text alone.

    The same text always lands in the same split, in whatever file, order or copy it turns up, so
    a question that was trained on can't be reported on.

    Args:
        question: The question's text; surrounding white space and case don't count.
        origin: `train` (divided 60/20/20 into search, fit, select), `validation` (all test),
            `single` for sets that are only evaluated (halved into select and test), or `own` for
            one set that serves every stage (50/10/15/25 into search, fit, select, test).

    Returns:
        One of `search`, `fit`, `select`, `test`.

    Source: ours.

    Example:
        >>> split_of("What is the boiling point of water?", "validation")
        'test'
    """
    if origin == "validation":
        return "test"
    digest = hashlib.sha256(question_key(question).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if origin == "train":
        return "search" if share < 0.6 else "fit" if share < 0.8 else "select"
    if origin == "single":
        return "select" if share < 0.5 else "test"
    if origin == "own":
        bounds = {"search": 0.5, "fit": 0.6, "select": 0.75, "test": 1.0}
        return next(split for split, bound in bounds.items() if share < bound)
    raise ValueError(f"origin {origin!r} is not train, validation, single or own")


def question_key(question: str) -> str:
    """Return the text under which two copies of a question count as the same one.

    Surrounding white space, line breaks and case don't count.

    Example:
        >>> question_key("  What is  ICE? ")
        'what is ice?'
    """
    return " ".join(question.split()).casefold()


# --- what a line holds -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Retest:
    """How a path fared when its question was asked in other ways.

    Attributes:
        passed: Other askings that were answered right.
        asked: Other askings in all.
        margin: Mean margin over them, in nats; None where a margin isn't defined.
        survived: Right in most of them, and the margin close enough to the full path's.
    """

    passed: int
    asked: int
    margin: float | None
    survived: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedPath:
    """One path that the search tried on one question.

    Attributes:
        decisions: `[L]`.
        simulation: 0 for the full path, else the simulation that tried it, from 1.
        reward: In [0, 1]; 1 is a right answer.
        margin: Graded score in nats, positive when right; None where not defined.
        executions: Cost in layer equivalents.
        answer: What was generated; None when choices were scored.
        retest: None unless the path was a candidate for supervision.
    """

    decisions: Decisions
    simulation: int
    reward: float
    margin: float | None
    executions: float
    answer: str | None = None
    retest: Retest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRecord:
    """All that the search found out about one question; one line of `search.jsonl`.

    Attributes:
        id: Unique within the task.
        task: The task's name.
        question: The question's text.
        prompt: The text that the model read.
        answer: The gold answer's text.
        reward: Name of the reward.
        num_layers: L.
        paths: Every distinct path tried, the full path first, then by simulation.
        seconds: Share of the block's wall time.
    """

    id: str
    task: str
    question: str
    prompt: str
    answer: str
    reward: str
    num_layers: int
    paths: tuple[TriedPath, ...]
    seconds: float

    @property
    def full(self) -> TriedPath:
        """The full path's own outcome."""
        return self.paths[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionRecord:
    """One target path to train routers on; one line of `supervision.jsonl`.

    Attributes:
        question: The question's text.
        optimal_layer_config: The target path's decisions, `[L]`.
        answer: The gold answer's text.
        prompt: The text that the routers read; the question itself where a file has none.
        id: Unique within the task.
        task: The task's name.
        executions: Cost of the target path in layer equivalents.
        improving: The full path failed and the target path doesn't.
        margin: The target path's margin in nats; None where not known.
    """

    question: str
    optimal_layer_config: Decisions
    answer: str
    prompt: str
    id: str
    task: str
    executions: float
    improving: bool
    margin: float | None = None


# --- one line to and from JSON -----------------------------------------------------------------


def to_json(record: Any) -> str:
    """Write a record as one line of JSON, without the newline.

    Raises:
        ValueError: A number that is not finite, which JSON can't hold; a margin that isn't
            defined is None.
    """
    return json.dumps(
        dataclasses.asdict(record), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )


def search_record(row: Mapping[str, Any]) -> SearchRecord:
    """Read one parsed line of `search.jsonl`.

    Raises:
        RecordError: What is missing or wrong, without file and line.
    """
    layers = _get(row, "num_layers", int)
    paths = tuple(_tried_path(path, layers) for path in _get(row, "paths", list))
    if not paths or paths[0].simulation != 0 or set(paths[0].decisions) != {1}:
        raise RecordError("'paths' doesn't start with the full path (simulation 0, all 1)")
    if len({path.decisions for path in paths}) != len(paths):
        raise RecordError("'paths' holds the same decisions twice")
    return SearchRecord(
        id=_get(row, "id", str),
        task=_get(row, "task", str),
        question=_text(row, "question"),
        prompt=_text(row, "prompt"),
        answer=_get(row, "answer", str),
        reward=_get(row, "reward", str),
        num_layers=layers,
        paths=paths,
        seconds=float(_get(row, "seconds", float)),
    )


def supervision_record(row: Mapping[str, Any]) -> SupervisionRecord:
    """Read one parsed line of `supervision.jsonl`, ours or anyone's.

    Only `question`, `optimal_layer_config` and `answer` must be there.

    Raises:
        RecordError: What is missing or wrong, without file and line.
    """
    question = _text(row, "question")
    try:
        decisions = check_decisions(_ints(row, "optimal_layer_config"))
    except PathError as error:
        raise RecordError(f"'optimal_layer_config': {error}") from error
    digest = hashlib.sha256(question.encode()).hexdigest()[:16]
    return SupervisionRecord(
        question=question,
        optimal_layer_config=decisions,
        answer=_get(row, "answer", str),
        prompt=_text(row, "prompt") if "prompt" in row else question,
        id=_get(row, "id", str) if "id" in row else digest,
        task=_get(row, "task", str) if "task" in row else "own",
        executions=float(num_executions(decisions)),
        improving=_get(row, "improving", bool) if "improving" in row else False,
        margin=_optional_float(row, "margin"),
    )


def _tried_path(row: Any, num_layers: int) -> TriedPath:
    if not isinstance(row, dict):
        raise RecordError("'paths' holds something that is not an object")
    try:
        decisions = check_decisions(_ints(row, "decisions"), num_layers)
    except PathError as error:
        raise RecordError(f"'paths': {error}") from error
    reward = float(_get(row, "reward", float))
    if not 0 <= reward <= 1:
        raise RecordError(f"'reward' is {reward}; it must be in [0, 1]")
    return TriedPath(
        decisions=decisions,
        simulation=_get(row, "simulation", int),
        reward=reward,
        margin=_optional_float(row, "margin"),
        executions=float(_get(row, "executions", float)),
        answer=None if row.get("answer") is None else _get(row, "answer", str),
        retest=None if row.get("retest") is None else _retest(_get(row, "retest", dict)),
    )


def _retest(row: Mapping[str, Any]) -> Retest:
    return Retest(
        passed=_get(row, "passed", int),
        asked=_get(row, "asked", int),
        margin=_optional_float(row, "margin"),
        survived=_get(row, "survived", bool),
    )


def _get(row: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    if key not in row:
        raise RecordError(
            f"{key!r} is missing (the line has: {', '.join(sorted(row)) or 'nothing'})"
        )
    value = row[key]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
        raise RecordError(f"{key!r} is {reprlib.repr(value)}; expected {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise RecordError(f"{key!r} is {value}; expected a finite number")
    return value


def _text(row: Mapping[str, Any], key: str) -> str:
    value: str = _get(row, key, str)
    if not value.strip():
        raise RecordError(f"{key!r} is empty")
    return value


def _optional_float(row: Mapping[str, Any], key: str) -> float | None:
    return None if row.get(key) is None else float(_get(row, key, float))


def _ints(row: Mapping[str, Any], key: str) -> list[int]:
    values = _get(row, key, list)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise RecordError(
                f"{key!r} holds {reprlib.repr(value)}; expected whole numbers 0, 1 or 2"
            )
    return list(values)


# --- whole files -------------------------------------------------------------------------------

Record = TypeVar("Record", SearchRecord, SupervisionRecord)
KINDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "search": search_record,
    "supervision": supervision_record,
}


def read_search(path: Path | str) -> list[SearchRecord]:
    """Read and check a whole `search.jsonl`; see `read_lines` for what is refused."""
    return _read(Path(path), "search")


def read_supervision(path: Path | str) -> list[SupervisionRecord]:
    """Read and check a whole `supervision.jsonl`; see `read_lines` for what is refused.

    Raises:
        RecordError: Also when rows disagree on the number of layers, or one question of a task
            has two different targets.
    """
    records: list[SupervisionRecord] = _read(Path(path), "supervision")
    layers = len(records[0].optimal_layer_config)
    for line, record in enumerate(records, start=1):
        if len(record.optimal_layer_config) != layers:
            raise RecordError(
                f"{path}, line {line}: 'optimal_layer_config' has "
                f"{len(record.optimal_layer_config)} layers, line 1 has {layers}; "
                f"a file holds the targets of one model"
            )
    return records


def _read(path: Path, kind: str) -> list[Any]:
    manifest = read_manifest(path, kind)
    records: list[Any] = []
    seen: dict[tuple[str, str], int] = {}
    for line, row in read_lines(path):
        try:
            record = KINDS[kind](row)
        except RecordError as error:
            raise RecordError(f"{path}, line {line}: {error}") from error
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
                        f"{path}, line {number}: the line {cut} ({error.msg})"
                    ) from error
                if not isinstance(row, dict):
                    raise RecordError(f"{path}, line {number}: not a JSON object")
                yield number, row
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is not a UTF-8 text file; give a .jsonl file") from error
    if empty:
        raise RecordError(f"{path} is empty; run the stage that writes it again")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old content or all of the new, never a part.

    Raises:
        RecordError: A folder that can't be written, a full disk, or a path that is a folder.
    """
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkstemp: its files, and so ours, could be read by their owner alone.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


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


def write_records(path: Path, records: Iterable[Any], manifest: Mapping[str, Any]) -> None:
    """Write a whole records file and the manifest beside it, each atomically.

    Args:
        path: The `.jsonl` file.
        records: What becomes one line each.
        manifest: From `new_manifest`; gets the number of records and the file's hash.
    """
    lines = [to_json(record) + "\n" for record in records]
    if manifest_path(path).is_file():
        with _refusing(path):
            manifest_path(path).unlink()  # never a new file under an old manifest
    write_atomically(path, "".join(lines))
    complete = {**manifest, "num_records": len(lines), "sha256": sha256(path)}
    write_atomically(manifest_path(path), json.dumps(complete, indent=2, ensure_ascii=False) + "\n")


# --- manifests ---------------------------------------------------------------------------------


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a records file lies: `search.jsonl` → `search.manifest.json`."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".manifest.json")


def new_manifest(
    schema: str,
    *,
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Gather what a reader needs to trust and reproduce a records file.

    Args:
        schema: `search`, `supervision`, …
        model: Identity of the base model (id, revision, class, num_layers, fingerprint).
        config: The resolved settings.
        inputs: Files that were read; their hashes are stored, by name where names differ.
        extra: More keys of the stage's own.
    """
    distinct = len({file.name for file in inputs}) == len(inputs)
    return {
        "schema": f"drllm.{schema}",
        "schema_version": SCHEMA_VERSION,
        "drllm_version": importlib.metadata.version("drllm"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": dict(model),
        "config": dict(config),
        "inputs": {file.name if distinct else str(file): sha256(file) for file in inputs},
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **(extra or {}),
    }


def read_manifest(path: Path, kind: str) -> dict[str, Any] | None:
    """Read the manifest beside a records file.

    Returns:
        The manifest, or None where there is none (a file of the user's own).

    Raises:
        RecordError: A broken manifest, one of another kind of file, or a future version.
    """
    beside = manifest_path(path)
    if not beside.is_file():
        return None
    try:
        manifest = json.loads(beside.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{beside} is not JSON; make {path.name} again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != f"drllm.{kind}":
        raise RecordError(
            f"{beside} says {schema!r}; expected 'drllm.{kind}'. Is it the right file?"
        )
    version = manifest.get("schema_version")
    if not isinstance(version, int) or not isinstance(manifest.get("model"), dict):
        raise RecordError(
            f"{beside} lacks 'schema_version' (a number) or 'model' (an object); "
            f"make {path.name} again"
        )
    if version > SCHEMA_VERSION:
        raise RecordError(
            f"{beside} has schema version {version}, this drllm reads up to {SCHEMA_VERSION}; "
            f"install a newer drllm"
        )
    return dict(manifest)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
