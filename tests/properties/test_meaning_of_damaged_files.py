"""A changed file of JSON is read as what it says now, or refused with the file and the place.

Changed is a value, a key or an item. A change that has no meaning is read as before.
"""

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from meaning import Refusal, assert_sound, read_or_refuse, to_document
from mutations import Change, Place, change_document, shuffle_keys, write_otherwise

from drllm.cli.show_routers import MetricsHead, RouterSummary
from drllm.errors import RecordError
from drllm.models.routers.config import read_config
from drllm.pipeline.manifest import read_run_manifest
from drllm.records.codec import read_json, read_json_lines, write_json
from drllm.records.healed import read_healed
from drllm.records.latency import read_latency
from drllm.records.layers import Layers
from drllm.records.manifest import (
    manifest_path,
    new_manifest,
    read_manifest,
    read_records,
    to_lines,
)
from drllm.records.results import Sample, read_evaluation
from drllm.records.search import FailedQuestion, read_failed, read_search
from drllm.records.shrink import read_shrink
from drllm.records.static_paths import load_path, read_paths
from drllm.records.supervision import read_rejected, read_supervision
from drllm.reporting.run import Epoch

FILES = Path(__file__).parents[1] / "fixtures" / "0.1"
NUM_LAYERS = 4  # of the model that the files are for
SEEDS = range(8)  # of each reader; each seed changes another place
MORE_SEEDS = range(8, 200)


class Reader(NamedTuple):
    """What reads a file, and which file it is tried on.

    Attributes:
        file: A valid file, in a folder that is copied for each change.
        read: Reads a file; returns its record, or the records of its lines.
        has_free_keys: Whether the file may have keys that aren't read.
    """

    file: str
    read: Callable[[Path], Any]
    has_free_keys: bool = False


def read_one(kind: type) -> Callable[[Path], Any]:
    """Return a reader of a JSON file of one kind."""
    return lambda file: read_json(file, kind)


def read_lines(kind: type) -> Callable[[Path], list[Any]]:
    """Return a reader of JSON lines of one kind."""
    return lambda file: [record for _, record in read_json_lines(file, kind)]


def read_named_path(file: Path) -> dict[str, Any]:
    """Read a file that was written by hand; return its path as the file gives it."""
    path = load_path(file)
    static_path = path.path(NUM_LAYERS)
    if path.decisions is None:
        return {"path": static_path.layers}
    return {"decisions": static_path.decisions(NUM_LAYERS)}


def read_router_config(file: Path) -> dict[str, Any]:
    """Read the config of routers."""
    return dataclasses.asdict(read_config(file.parent))


def read_manifest_of(schema: str) -> Callable[[Path], Any]:
    """Return a reader of the manifest of records, or of features."""

    def read(file: Path) -> Any:
        records = file.name.removesuffix(".manifest.json") + ".jsonl"
        return read_manifest(file.with_name(records), schema)

    return read


READERS = {
    "manifest of a search": Reader("run/search.manifest.json", read_manifest_of("search")),
    "manifest of targets": Reader("run/supervision.manifest.json", read_manifest_of("supervision")),
    "manifest of samples": Reader("run/eval/samples.manifest.json", read_manifest_of("samples")),
    "manifest of features": Reader("features/features.manifest.json", read_manifest_of("features")),
    "search": Reader("run/search.jsonl", read_search),
    "failed questions": Reader("made/search.failed.jsonl", read_failed),
    "supervision": Reader("run/supervision.jsonl", read_supervision, has_free_keys=True),
    "rejected questions": Reader("run/supervision.rejected.jsonl", read_rejected),
    "samples": Reader("run/eval/samples.jsonl", lambda f: read_records(f, Sample, "samples")),
    "results": Reader("run/eval/builtin_facts.json", read_evaluation),
    "latency": Reader("run/eval/latency.json", lambda f: read_latency(f.parent)),
    "tuned": Reader("run/paths.json", read_paths),
    "healed": Reader("healed/path.json", read_healed),
    "refitted": Reader("refitted/path.json", read_healed),
    "shrink": Reader("smaller/shrink.json", read_shrink),
    "run": Reader("run/run.manifest.json", lambda f: read_run_manifest(f.parent)),
    "routers": Reader("run/routers/router_config.json", read_router_config, has_free_keys=True),
    "metrics": Reader("run/routers/metrics.jsonl", read_lines(Epoch), has_free_keys=True),
    "metrics, shown": Reader(
        "run/routers/metrics.jsonl", read_lines(MetricsHead), has_free_keys=True
    ),
    "routers, shown": Reader(
        "run/routers/router_config.json", read_one(RouterSummary), has_free_keys=True
    ),
    "layers": Reader("run/routers/layers.json", read_one(Layers)),
    "decisions": Reader("made/decisions.json", read_named_path),
    "layers of a path": Reader("made/layers.json", read_named_path),
}
"""Name → a valid file, and what reads it."""
CONTRADICTIONS = "isn't the adapter|times of|gap of its path|none of 'models'|lacks the key"
"""What refusals say of a value that contradicts another one."""
OF_RECORDS = ("run/search.jsonl", "run/supervision.jsonl", "run/eval/samples.jsonl")
"""The files whose manifest has their hash; without it they are the user's own."""
COUNTED = {
    "made/search.failed.jsonl": read_failed,
    "run/supervision.rejected.jsonl": read_rejected,
}
"""The files whose lines a manifest of other records counts, and what reads them."""


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> Path:
    """A folder with a valid file of each kind."""
    folder = tmp_path_factory.mktemp("valid") / "files"
    for name in ("run", "healed", "refitted", "smaller", "features"):
        shutil.copytree(FILES / name, folder / name)
    made = folder / "made"
    made.mkdir()
    (made / "decisions.json").write_text('{"decisions": [1, 0, 2, 1]}')
    (made / "layers.json").write_text('{"path": [0, 2, 2, 3]}')
    failed = [
        FailedQuestion(id=str(number), task="t", question="What?", error="none", attempts=3)
        for number in range(4)
    ]
    (made / "search.failed.jsonl").write_text(to_lines(failed))
    manifest = new_manifest("search", model={}, config={}, extra={"num_failed": len(failed)})
    write_json(made / "search.manifest.json", manifest)
    return folder


def copy_folder(relative: str, valid_files: Path, folder: Path) -> Path:
    """Copy the folder of a valid file; return the copy of the file.

    A file of records loses its manifest, which would refuse each change by its hash.
    """
    file = folder / Path(relative).name
    shutil.copytree((valid_files / relative).parent, folder)
    if relative in OF_RECORDS:
        manifest_path(file).unlink()
    return file


def read_document(file: Path) -> Any:
    """Return the JSON of a file; for JSON lines, a list."""
    text = file.read_text()
    if file.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def write_document(file: Path, document: Any) -> None:
    """Write the JSON of a file; a list to JSON lines."""
    if file.suffix == ".json":
        file.write_text(json.dumps(document))
    else:
        file.write_text("".join(json.dumps(line) + "\n" for line in document))


def write_same_document(file: Path, draw: random.Random) -> None:
    """Write the JSON of a file anew, with other white space and the keys in another order."""
    document = shuffle_keys(read_document(file), draw)
    if file.suffix == ".json":
        file.write_text(write_otherwise(document, draw))
    else:
        file.write_text(
            "\n".join(json.dumps(line) + draw.choice(("", " ", "\n")) for line in document)
        )


def change_line_or_document(file: Path, draw: random.Random) -> Change:
    """Return the changed JSON of a file, and the place; of JSON lines a place in one line."""
    document = read_document(file)
    if file.suffix == ".json":
        return change_document(document, draw)
    number = draw.randrange(len(document))
    line, place = change_document(document[number], draw)
    return Change([*document[:number], line, *document[number + 1 :]], (number, *place))


def read_changed(name: str, seed: int, valid_files: Path, folder: Path) -> None:
    """Change a copy of a valid file at one place of its JSON, and read it."""
    reader = READERS[name]
    file = copy_folder(reader.file, valid_files, folder / f"{name}-{seed}")
    schema = find_schema(read_document(file))
    document, place = change_line_or_document(file, random.Random(f"{name} {seed}"))
    write_document(file, document)
    record = read_or_refuse(reader.read, file)
    if isinstance(record, Refusal):
        assert_names_place(record, file, place)
        return
    assert_sound(document, record, has_free_keys=reader.has_free_keys)
    assert find_schema(to_document(record)) == schema


def find_schema(document: Any) -> Any:
    """Return the schema that a document names; None for other documents."""
    return document.get("schema") if isinstance(document, dict) else None


def assert_names_place(refusal: Refusal, file: Path, place: Place) -> None:
    """Assert that a refusal names the line of a change or, in a JSON file, a key on the way there.

    A key that was given another name is an unknown field under its new name. A value may contradict
    another value, which the refusal then names.
    """
    if file.suffix == ".jsonl":
        assert f"line {place[0] + 1}" in refusal
        return
    message = refusal.replace(str(file), "").replace("_", " ")
    keys = [key.removesuffix("s").replace("_", " ") for key in place if isinstance(key, str)]
    is_named = any(key in message for key in keys)
    assert is_named or re.search(f"unknown field|unknown key|{CONTRADICTIONS}", message), refusal


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read_as_it_is(name, valid_files, tmp_path):
    reader = READERS[name]
    file = copy_folder(reader.file, valid_files, tmp_path / name)
    record = reader.read(file)
    assert_sound(read_document(file), record, has_free_keys=reader.has_free_keys)


@pytest.mark.parametrize("name", READERS)
def test_a_change_without_meaning_is_read_as_before(name, valid_files, tmp_path):
    reader = READERS[name]
    for seed in range(5):
        file = copy_folder(reader.file, valid_files, tmp_path / f"{name}-{seed}")
        before = to_document(reader.read(file))
        write_same_document(file, random.Random(seed))
        assert to_document(reader.read(file)) == before


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_as_it_is_or_refused(name, valid_files, tmp_path):
    for seed in SEEDS:
        read_changed(name, seed, valid_files, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", READERS)
def test_many_more_changed_files_are_read_as_they_are_or_refused(name, valid_files, tmp_path):
    for seed in MORE_SEEDS:
        read_changed(name, seed, valid_files, tmp_path)


def drop_line(lines: list[str], number: int) -> list[str]:
    """Return lines without one of them."""
    return [*lines[:number], *lines[number + 1 :]]


@pytest.mark.parametrize("relative", OF_RECORDS)
def test_records_that_lost_or_gained_a_line_are_refused(relative, valid_files, tmp_path):
    reader = next(reader for reader in READERS.values() if reader.file == relative)
    shutil.copytree((valid_files / relative).parent, tmp_path / "copy")
    file = tmp_path / "copy" / Path(relative).name
    lines = file.read_text().splitlines(keepends=True)
    others = [drop_line(lines, number) for number in range(len(lines))]
    for changed in (*others, lines[::-1], [*lines, "\n"]):
        file.write_text("".join(changed))
        with pytest.raises(RecordError, match=rf"{file.name} was changed or cut off"):
            reader.read(file)


@pytest.mark.parametrize("relative", OF_RECORDS)
def test_a_manifest_that_counts_other_records_is_refused(relative, valid_files, tmp_path):
    reader = next(reader for reader in READERS.values() if reader.file == relative)
    shutil.copytree((valid_files / relative).parent, tmp_path / "copy")
    file = tmp_path / "copy" / Path(relative).name
    manifest = manifest_path(file)
    values = json.loads(manifest.read_text())
    for number in (0, -1, values["num_records"] + 1, True, 1.5, "3"):
        manifest.write_text(json.dumps({**values, "num_records": number}))
        with pytest.raises(RecordError, match=r"manifest\.json.*(records|num_records)"):
            reader.read(file)


@pytest.mark.parametrize("relative", COUNTED)
def test_questions_that_a_manifest_counts_and_that_lost_a_line_are_refused(
    relative, valid_files, tmp_path
):
    read = COUNTED[relative]
    shutil.copytree((valid_files / relative).parent, tmp_path / "copy")
    file = tmp_path / "copy" / Path(relative).name
    lines = file.read_text().splitlines(keepends=True)
    for number in range(len(lines)):
        file.write_text("".join(drop_line(lines, number)))
        with pytest.raises(RecordError, match=rf"{file.name} has \d questions, but the manifest"):
            read(file)
