"""`paths.json`, the static paths that `drllm tune` found; and any file that says which layers run.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from drllm.errors import PathError, RecordError, unknown_name
from drllm.paths import Decisions, StaticPath, check_decisions, to_path
from drllm.records.codec import decode, read_json, read_text
from drllm.records.healed import (
    HEALED_FILE,
    HEALED_SCHEMA,
    HealedPath,
    read_healed,
    refuse_parts_of_layers,
)
from drllm.records.identity import differ
from drllm.records.removed import (
    MENU_SCHEMA,
    certificate_ignored,
    refuse_menu,
    refuse_removed,
)
from drllm.records.results import Header, StepRecord
from drllm.statistics.verdicts import Differences

PATHS_SCHEMA, PATHS_FILE = "drllm.paths", "paths.json"
FIT, SELECT, TEST = PARTS = ("fit", "select", "test")
"""The parts of a task's questions: paths are fitted on the first, chosen on the second, and tested
on the third."""
IDENTITY = ("class", "num_layers", "hidden_size", "fingerprint", "id")
"""What is compared of the models' identities."""
FORMS = (
    '{"decisions": [1, 0, 2, …]}, {"path": [0, 2, 3, …]}, a paths.json of \'drllm tune\', or a '
    "folder of 'drllm heal'"
)


class PathScore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of a path on one part of a task's questions; `docs/formats.md` has the fields.

    The objective is the larger the better. `change` is its difference from the full path's, with
    the 95 % interval, and `against_full` has the differences of all that is reported.
    """

    task: str
    part: str
    num_questions: int
    objective: float
    change: tuple[float, float, float] | None = None
    accuracy: float | None = None
    text_loss: float | None = None
    against_full: Differences | None = None


class NamedPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One path of a `paths.json`, its cost in layer equivalents, and how it did.

    `dominated` says that a path which saves more does at least as well on `select`.
    """

    name: str
    steps: tuple[StepRecord, ...]
    executions: float
    dominated: bool = False
    measured: tuple[PathScore, ...] = ()

    @property
    def path(self) -> StaticPath:
        """The path itself."""
        return StaticPath(step.layer for step in self.steps)

    def on(self, task: str, part: str) -> PathScore | None:
        """Return its scores on a part of a task's questions; None where they aren't known."""
        for score in self.measured:
            if (score.task, score.part) == (task, part):
                return score
        return None


class StaticPaths(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `drllm tune` found: paths from the most executions to the fewest, the full one first.

    `divided` names the tasks whose own splits weren't used, so that their questions were divided
    anew; the objective is that of each task. The digest is that of all questions of all parts, the
    runtime says in what precision they were scored, `is_cut` that the time was over too early.
    `choice` is the certificate of earlier versions; nothing reads it.
    """

    tasks: tuple[str, ...]
    divided: tuple[str, ...] = ()
    objective: dict[str, str]
    num_layers: int
    runtime: dict[str, Any] = msgspec.field(default_factory=dict)
    questions_sha256: str = ""
    is_cut: bool = False
    paths: tuple[NamedPath, ...]
    choice: Any | msgspec.UnsetType = msgspec.UNSET

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the file beside its numbers, one sentence each."""
        sentences = []
        if self.divided:
            sets = ", ".join(self.divided)
            sentences.append(
                f"The questions of {sets} were divided anew, so test isn't the set's own test "
                f"split."
            )
        if self.choice is not msgspec.UNSET and self.choice is not None:
            sentences.append(certificate_ignored(self.drllm_version))
        return sentences

    def find(self, name: str | None, file: Path) -> NamedPath:
        """Return a path by name; a PathError without a name, or for one that there isn't."""
        names = [path.name for path in self.paths]
        if name is None:
            raise PathError(
                f"{file} has several paths; name one of them as {file}:NAME: {', '.join(names)}"
            )
        if name not in names:
            raise PathError(f"{file}: " + unknown_name("path", name, names))
        return self.paths[names.index(name)]


def check_model(record: StaticPaths | HealedPath, model: Mapping[str, Any], file: Path) -> None:
    """Refuse, by a PathError, a model that a record's paths weren't made for.

    `model` is its identity. A fingerprint recognises the same weights under another name; where one
    side has none, the names count.
    """
    expected = {**record.model, "num_layers": record.num_layers}
    known = [key for key in IDENTITY if expected.get(key) and model.get(key)]
    differences = []
    for key in known:
        if key == "id" and "fingerprint" in known:
            continue
        if differ(key, expected[key], model[key], str(file)):
            differences.append(f"{key} {expected[key]} (this model has {model[key]})")
    if differences:
        raise PathError(
            f"{file} has paths of {record.model.get('id') or 'another model'} with "
            f"{', '.join(differences)}; give that model as --model, or tune this one"
        )


def steps_to_write(path: StaticPath) -> tuple[StepRecord, ...]:
    """Return a path as it is written."""
    return tuple(StepRecord(layer=layer, adapter=path.adapter) for layer in path.layers)


def read_paths(file: Path) -> StaticPaths:
    """Read a `paths.json`, or refuse it by a RecordError."""
    found = read_json(file, StaticPaths)
    for path in found.paths:
        refuse_parts_of_layers(path.steps, file)
    return found


class _PlanFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path that somebody has written by hand."""

    decisions: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)] | None = None
    path: Annotated[tuple[int | StepRecord, ...], msgspec.Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if (self.decisions is None) == (self.path is None):
            raise ValueError("expected one of 'decisions' and 'path'")


@dataclass(frozen=True, slots=True)
class PathFile:
    """What a file says, before it is known how many layers the model has.

    It has `decisions` or a `static` path. `named` and `record` are the path and the whole of a
    `paths.json`; of a healed path there is a record too.
    """

    file: Path
    decisions: Decisions | None = None
    static: StaticPath | None = None
    named: NamedPath | None = None
    record: StaticPaths | HealedPath | None = None

    @property
    def is_healed(self) -> bool:
        """Whether it is a healed path."""
        return isinstance(self.record, HealedPath)

    def path_for(self, model: Mapping[str, Any]) -> StaticPath:
        """Return the path for a model of this identity.

        Only a `paths.json` and a healed path say which model they were made for; another model is a
        PathError.
        """
        if self.record is not None:
            check_model(self.record, model, self.file)
        return self.path(model["num_layers"])

    def path(self, num_layers: int) -> StaticPath:
        """Return the path for a model of L layers; values that it can't run are a PathError."""
        try:
            if self.static is not None:
                return self.static.check(num_layers)
            return StaticPath(to_path(check_decisions(self.decisions or (), num_layers)))
        except PathError as error:
            raise PathError(f"{self.file}: {error}") from error


def read_path(place: str) -> PathFile:
    """Read `FILE` or `FILE:NAME`: any of `FORMS`; the name is that of a path of a `paths.json`.

    Raises:
        RecordError: No such file, or another form.
        PathError: A name that there isn't, or a `paths.json` without a name.
    """
    content = _read(place)
    if content.paths is None:
        assert content.path is not None
        return content.path
    return _of_named(content.file, content.paths.find(content.name, content.file), content.paths)


def read_path_list(places: str, *, needs_names: bool = False) -> dict[str, PathFile]:
    """Read `FILE[:NAME],...`: paths by name, or by the stem of a file that names none.

    A `paths.json` without a name gives its paths but the full one and those marked as dominated,
    or, where names are needed, is a PathError that lists them. A name that occurs in several files
    gets a prefix: the folder, or the file where it isn't `paths.json`. If a path is there plain and
    healed, only the healed one gets a prefix.

    Raises:
        RecordError: As of `read_path`.
        PathError: As of `read_path`; no such path, or one that is there twice.
    """
    paths: list[tuple[str, PathFile]] = []
    for word in places.split(","):
        if word.strip():
            paths += _paths_of(_read(word.strip()), needs_names)
    names = [name for name, _ in paths]
    plain_names = [name for name, path in paths if not path.is_healed]
    by_name: dict[str, PathFile] = {}
    for name, path in paths:
        rivals = names if path.is_healed else plain_names
        full_name = name if rivals.count(name) == 1 else f"{_prefix_of(path, name)}:{name}"
        if full_name in by_name:
            raise PathError(
                f"{path.file}: a path called {name!r} is there twice; give each path once, "
                f"under a name of its own"
            )
        by_name[full_name] = path
    return by_name


def _prefix_of(path: PathFile, name: str) -> str:
    """Return what tells a path from another of its name: its folder, or its file."""
    if path.file.name in (PATHS_FILE, HEALED_FILE) or name == path.file.stem:
        return path.file.resolve().parent.name
    return path.file.stem


def _paths_of(content: _Content, needs_names: bool) -> list[tuple[str, PathFile]]:
    """Return the paths of a file by name: of a `paths.json` the named one, or those worth it."""
    if content.paths is None:
        assert content.path is not None
        return [(getattr(content.path.record, "name", content.file.stem), content.path)]
    record = content.paths
    if needs_names or content.name is not None:
        wanted = [record.find(content.name, content.file)]
    else:
        full = StaticPath(range(record.num_layers))
        wanted = [path for path in record.paths if not path.dominated and path.path != full]
    if not wanted:
        raise PathError(f"{content.file} holds no path but the full one; give a file with others")
    return [(path.name, _of_named(content.file, path, record)) for path in wanted]


@dataclass(frozen=True, slots=True)
class _Content:
    """What is in the file of `FILE[:NAME]`: a `paths.json`, or one path."""

    file: Path
    name: str | None
    paths: StaticPaths | None = None
    path: PathFile | None = None


def _read(place: str) -> _Content:
    file = Path(place)
    name = None
    if not file.exists() and ":" in place:
        before, _, name = place.rpartition(":")
        file = Path(before)
    refuse_menu(file)
    if (file / HEALED_FILE).is_file():
        file = file / HEALED_FILE
    text = read_text(file).strip()
    if f'"{MENU_SCHEMA}"' in text:  # under another name
        refuse_removed(file, "a menu of paths", "give the file of one of its paths")
    if f'"{PATHS_SCHEMA}"' in text:  # cut off or of a newer version, it is still no plan
        return _Content(file, name, paths=read_paths(file))
    if name is not None:
        raise RecordError(f"{file} isn't a paths.json, so it has no path called {name!r}")
    if f'"{HEALED_SCHEMA}"' in text:
        record = read_healed(file)
        path = PathFile(file, static=record.path, record=record)
        return _Content(file, name, path=path)
    return _Content(file, name, path=_read_plan(file, text))


def _read_plan(file: Path, text: str) -> PathFile:
    """Read a path that somebody has written by hand."""
    try:
        plan = decode(text, _PlanFile, str(file))
    except RecordError as error:
        raise RecordError(f"{error}; give {FORMS}") from error
    if plan.path is None:
        return PathFile(file, decisions=plan.decisions)
    steps = [StepRecord(layer=step) if isinstance(step, int) else step for step in plan.path]
    refuse_parts_of_layers(steps, file)
    try:
        return PathFile(file, static=StaticPath(step.layer for step in steps))
    except PathError as error:
        raise PathError(f"{file}: {error}") from error


def _of_named(file: Path, path: NamedPath, record: StaticPaths) -> PathFile:
    return PathFile(file, static=path.path, named=path, record=record)
