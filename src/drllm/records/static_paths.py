"""The file `paths.json` of `drllm tune`, and readers for every kind of file with static paths.

`FORMS` lists the kinds. Axes: L layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import msgspec

from drllm.errors import PathError, RecordError, unknown_name
from drllm.paths import Decisions, StaticPath, check_decisions, to_path
from drllm.records.codec import decode, read_text
from drllm.records.healed import (
    HEALED_FILE,
    HEALED_SCHEMA,
    HealedPath,
    check_steps,
    read_healed,
    refuse_parts_of_layers,
)
from drllm.records.identity import differ
from drllm.records.manifest import Executions, NumLayers, check_runtime
from drllm.records.removed import (
    MENU_SCHEMA,
    note_ignored_certificate,
    refuse_menu,
    refuse_removed,
)
from drllm.records.results import Header, StepRecord, read_result_file, refuse_duplicates
from drllm.statistics.differences import Differences
from drllm.statistics.ranges import Count, Share

PATHS_SCHEMA = "drllm.paths"
PATHS_FILE = "paths.json"
FULL = "full"  # the name of the full path

FIT = "fit"
SELECT = "select"
TEST = "test"
PARTS = (FIT, SELECT, TEST)
"""The parts of a task's questions: paths are fitted on the first, chosen on the second, and tested
on the third."""
OBJECTIVES = ("gold_logprob", "next_token_loss", "kl")
"""What a path may preserve; see `TuneConfig`."""
IDENTITY = ("class", "num_layers", "hidden_size", "fingerprint", "id")
"""The fields in which the identities of two models are compared; see `check_model`."""
FORMS = (
    '{"decisions": [1, 0, 2, …]}, {"path": [0, 2, 3, …]}, a paths.json of \'drllm tune\', or a '
    "folder of 'drllm heal'"
)
"""The kinds of files with a path, for messages."""
WITHOUT = re.compile(r"\s*without\s*[: ]\s*(?P<layers>.*)", re.DOTALL)
"""How a path is given as the layers that it leaves out; `without 13-15` is also its name."""
LAYERS = re.compile(r"\s*(?P<first>[0-9]{1,4})\s*(-\s*(?P<last>[0-9]{1,4})\s*)?")
"""One layer, or a range of layers with both ends."""


class PathScore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scores of a path on one part of a task's questions; `docs/formats.md` has the fields.

    A larger objective is better. `change` is the objective minus the objective of the full path,
    with the 95 % interval. `against_full` has the differences of accuracy and next-token loss.
    """

    task: str
    part: str
    num_questions: Count
    objective: float
    change: tuple[float, float, float] | None = None
    accuracy: Share | None = None
    text_loss: float | None = None
    against_full: Differences | None = None


class NamedPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One path of a `paths.json`, its cost in layer equivalents, and its scores.

    Attributes:
        name: The name.
        steps: The layers that it runs.
        executions: Its cost.
        dominated: Whether another path saves more and does at least as well on `select`.
        measured: Its scores as it is: the layers are left out, and nothing is changed.
        repaired: Its scores with its refit, as `drllm heal` solves it; empty without a repair.
    """

    name: str
    steps: tuple[StepRecord, ...]
    executions: Executions
    dominated: bool = False
    measured: tuple[PathScore, ...] = ()
    repaired: tuple[PathScore, ...] = ()

    @property
    def path(self) -> StaticPath:
        """The path itself."""
        return StaticPath(step.layer for step in self.steps)

    def on(self, task: str, part: str) -> PathScore | None:
        """Return the path's scores on a part of a task's questions; None if there are none.

        If the path was repaired, these are its scores with its refit.
        """
        return _find_score(self.repaired or self.measured, task, part)

    def plain_on(self, task: str, part: str) -> PathScore | None:
        """Return the path's scores without a repair; None if there are none."""
        return _find_score(self.measured, task, part)


def _find_score(scores: Sequence[PathScore], task: str, part: str) -> PathScore | None:
    """Return the scores on a part of a task's questions; None if there are none."""
    for score in scores:
        if (score.task, score.part) == (task, part):
            return score
    return None


class StaticPaths(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of `drllm tune`: paths from the most executions to the fewest, the full one first.

    Attributes:
        tasks: The tasks that the paths were tuned on.
        divided: The tasks whose own splits weren't used. Their questions were divided again.
        objective: Task → the name of its objective.
        num_layers: L of the model.
        runtime: Device and precision of the scores.
        questions_sha256: The digest of all questions of all parts.
        prompts_sha256: The digest of the questions as the model read them; empty in older files.
        is_cut: Whether the search ended early because its time was over.
        repair: How paths were repaired when they were chosen: `refit`, or an empty text.
        refit_tokens: The number of tokens of the texts that paths were refitted on.
        texts_sha256: The digest of the texts and questions that paths were repaired with.
        paths: The paths.
        choice: The certificate of an earlier version; it is ignored.
    """

    tasks: tuple[str, ...]
    divided: tuple[str, ...] = ()
    objective: dict[str, str]
    num_layers: NumLayers
    runtime: dict[str, Any] = msgspec.field(default_factory=dict)
    questions_sha256: str = ""
    prompts_sha256: str = ""
    is_cut: bool = False
    repair: str = ""
    refit_tokens: Count = 0
    texts_sha256: str = ""
    paths: tuple[NamedPath, ...]
    choice: Any | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        check_runtime(self.runtime)
        refuse_duplicates("path", [path.name for path in self.paths])
        for task in self.tasks:
            if task not in self.objective:
                names = ", ".join(self.objective) or "nothing"
                raise ValueError(
                    f"'tasks' names {task!r}, and 'objective' has {names}; the file was changed, "
                    f"so tune again"
                )
            if self.objective[task] not in OBJECTIVES:
                raise ValueError(
                    f"'objective' of {task!r} is {self.objective[task]!r}; expected one of "
                    f"{', '.join(OBJECTIVES)}"
                )

    @property
    def notes(self) -> list[str]:
        """Notes for readers of the file's numbers, one sentence each."""
        sentences = []
        if self.divided:
            sets = ", ".join(self.divided)
            sentences.append(
                f"The questions of {sets} were divided again, so test isn't the set's own test "
                f"split."
            )
        if self.repair:
            sentences.append(
                "Paths were chosen with their refit, which 'drllm heal --minutes 0' solves. Plain "
                "paths only leave layers out, as export and generate run them; a refit restores "
                "the full path, so a plain path may also do better on a task."
            )
        if self.choice is not msgspec.UNSET and self.choice is not None:
            sentences.append(note_ignored_certificate(self.drllm_version))
        return sentences

    def find(self, name: str | None, file: Path) -> NamedPath:
        """Return a path by its name; raise a PathError if the name is missing or unknown."""
        names = [path.name for path in self.paths]
        if name is None:
            raise PathError(
                f"{file} has several paths; name one of them as {file}:NAME: {', '.join(names)}"
            )
        if name not in names:
            raise PathError(f"{file}: " + unknown_name("path", name, names))
        return self.paths[names.index(name)]


def check_model(record: StaticPaths | HealedPath, model: Mapping[str, Any], file: Path) -> None:
    """Raise a PathError if the paths of a record weren't made for this model.

    Models with equal fingerprints are the same, whatever their names. The names are compared only
    if a model has no fingerprint.

    Args:
        record: The content of the file.
        model: The model's identity.
        file: The file, for messages.
    """
    expected = {**record.model, "num_layers": record.num_layers}
    comparable = [key for key in IDENTITY if expected.get(key) and model.get(key)]
    if "fingerprint" in comparable and "id" in comparable:
        comparable.remove("id")
    differences = [
        f"{key} {expected[key]} (this model has {model[key]})"
        for key in comparable
        if differ(key, expected[key], model[key], str(file))
    ]
    if differences:
        raise PathError(
            f"{file} has paths of {record.model.get('id') or 'another model'} with "
            f"{', '.join(differences)}; give that model as --model, or tune this model"
        )


def steps_to_write(path: StaticPath) -> tuple[StepRecord, ...]:
    """Convert a path to the steps that a file holds."""
    return tuple(StepRecord(layer=layer, adapter=path.adapter) for layer in path.layers)


def read_paths(file: Path) -> StaticPaths:
    """Read a `paths.json`; raise a RecordError if that fails."""
    record = read_result_file(file, StaticPaths, PATHS_SCHEMA)
    for path in record.paths:
        refuse_parts_of_layers(path.steps, file)
        check_steps(path, record.num_layers, file)
    return record


class _HandwrittenPath(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a file that was written by hand: the decisions or the path, not both."""

    decisions: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)] | None = None
    path: Annotated[tuple[int | StepRecord, ...], msgspec.Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if (self.decisions is None) == (self.path is None):
            raise ValueError("expected one of 'decisions' and 'path'")


@dataclass(frozen=True, slots=True)
class PathFile:
    """One path that was read from a file, before the number of the model's layers is known.

    The path may also be given as layers to leave out; then there is no file.

    Attributes:
        file: The file. For layers to leave out, what was given, such as `without:13,14`.
        decisions: The decisions, if the file gives decisions; then `static` is None.
        static: The path, if the file gives its layers; then `decisions` is None.
        skipped: The layers to leave out, sorted; then `decisions` and `static` are None.
        named: The path with its scores, if the file is a `paths.json`.
        record: The whole `paths.json`, or the record of a healed path; None for a file that was
            written by hand.
    """

    file: Path
    decisions: Decisions | None = None
    static: StaticPath | None = None
    skipped: tuple[int, ...] = ()
    named: NamedPath | None = None
    record: StaticPaths | HealedPath | None = None

    @property
    def name(self) -> str:
        """The name of the path: that in its file, else the file's own without its ending."""
        if self.skipped:
            return f"without {_list_ranges(self.skipped)}"
        if isinstance(self.record, HealedPath):
            return self.record.name
        if self.named is not None:
            return self.named.name
        return self.file.stem

    @property
    def note(self) -> str:
        """Say that the path was chosen with its refit and is run without it; else empty."""
        if self.named is None or not self.named.repaired:
            return ""
        return (
            f"{self.named.name} of {self.file} was chosen with a refit, and runs here without it; "
            f"'drllm heal --path {self.file}:{self.named.name} --minutes 0' solves the refit"
        )

    @property
    def is_healed(self) -> bool:
        """Whether the file holds a healed path."""
        return isinstance(self.record, HealedPath)

    def path_for(self, model: Mapping[str, Any]) -> StaticPath:
        """Return the path for a model with this identity.

        Raises PathError if the model can't run the path, or if the file names another model. A file
        that was written by hand names no model.
        """
        if self.record is not None:
            check_model(self.record, model, self.file)
        return self.path(model["num_layers"])

    def path(self, num_layers: int) -> StaticPath:
        """Return the path for a model of L layers.

        Raises PathError if the model can't run the path.
        """
        try:
            if self.static is not None:
                return self.static.check(num_layers)
            if self.skipped:
                return _leave_out(self.skipped, num_layers)
            return StaticPath(to_path(check_decisions(self.decisions or (), num_layers)))
        except PathError as error:
            raise PathError(f"{self.file}: {error}") from error


def load_path(place: Path | str) -> PathFile:
    """Read the path in `FILE` or `FILE:NAME`, for `RoutedModel.fixed`, `export` and `evaluate`.

    FILE is any of `FORMS`. NAME is the name of a path in a `paths.json`. `without:13,14` or
    `without:13-14` is the path that leaves out these layers; no file is read. The model isn't
    needed yet: the path is checked against the model that is to run it.

    Raises:
        RecordError: The file doesn't exist, or is of another kind.
        PathError: The name is unknown, or is missing for a `paths.json`; or the layers to leave
            out aren't numbers.

    Example:
        >>> with routed.fixed(drllm.load_path("healed/")):  # doctest: +SKIP
        ...     routed.generate(**inputs)
    """
    content = _read_content(str(place))
    if content.paths is None:
        assert content.path is not None
        return content.path
    path = content.paths.find(content.name, content.file)
    return _make_path_file(content.file, path, content.paths)


def read_path_list(
    places: str | Sequence[str], *, needs_names: bool = False
) -> dict[str, PathFile]:
    """Read the paths in `FILE[:NAME],...`, by name.

    A `paths.json` without NAME gives all its paths, except the full path and dominated paths. A
    path in a file that was written by hand gets the stem of the file as its name, and
    `without:13,14,15` is called `without 13-15`. `_make_distinct` adds a prefix to names that occur
    more than once.

    Args:
        places: `FILE`, `FILE:NAME` or `without:LAYERS`; see `load_path`. Either a list, or a text
            in which they are separated by commas.
        needs_names: Whether to refuse a `paths.json` without NAME; the message lists the names.

    Raises:
        RecordError: As for `load_path`.
        PathError: As for `load_path`; or a path is given twice.
    """
    if isinstance(places, str):
        places = split_path_list(places)
    paths: list[tuple[str, PathFile]] = []
    for place in places:
        paths += _list_paths(_read_content(place), needs_names)
    return _make_distinct(paths)


def split_path_list(places: str) -> list[str]:
    """Split a list of paths at its commas, except at those between layers to leave out.

    Example:
        >>> split_path_list("paths.json:skip2,without:13,14,healed/")
        ['paths.json:skip2', 'without:13,14', 'healed/']
    """
    parts: list[str] = []
    for part in places.split(","):
        if parts and WITHOUT.fullmatch(parts[-1]) and LAYERS.fullmatch(part):
            parts[-1] += f",{part.strip()}"
        elif part.strip():
            parts.append(part.strip())
    return parts


def _make_distinct(paths: Sequence[tuple[str, PathFile]]) -> dict[str, PathFile]:
    """Return the paths by name; names that occur more than once get a prefix.

    If the same name stands for a plain path and a healed path, only the healed path gets a prefix.
    Layers to leave out never get one.

    Raises PathError if two paths have the same name and the same prefix.
    """
    names = [name for name, _ in paths]
    plain_names = [name for name, path in paths if not path.is_healed]
    by_name: dict[str, PathFile] = {}
    for name, path in paths:
        compared_names = names if path.is_healed else plain_names
        full_name = name
        if compared_names.count(name) > 1 and not path.skipped:
            full_name = f"{_choose_prefix(path, name)}:{name}"
        if full_name in by_name:
            raise PathError(
                f"{path.file}: a path called {name!r} is there twice; give each path once, "
                f"under a name of its own"
            )
        by_name[full_name] = path
    return by_name


def _choose_prefix(path: PathFile, name: str) -> str:
    """Return what tells a path from other paths with its name: the file's folder, or the file.

    The file's stem is used if it says more than the usual file names or the path's name.
    """
    if path.file.name in (PATHS_FILE, HEALED_FILE) or name == path.file.stem:
        return path.file.resolve().parent.name
    return path.file.stem


def _list_paths(content: _Content, needs_names: bool) -> list[tuple[str, PathFile]]:
    """Return the paths of a file with their names; see `read_path_list`."""
    if content.paths is None:
        assert content.path is not None
        return [(content.path.name, content.path)]
    record = content.paths
    if needs_names or content.name is not None:
        paths = [record.find(content.name, content.file)]  # refuses a missing name
    else:
        full = StaticPath(range(record.num_layers))
        paths = [path for path in record.paths if not path.dominated and path.path != full]
    if not paths:
        raise PathError(f"{content.file} has only the full path; give a file with other paths")
    return [(path.name, _make_path_file(content.file, path, record)) for path in paths]


@dataclass(frozen=True, slots=True)
class _Content:
    """The content of the file in `FILE[:NAME]`: either `paths` or `path` is set."""

    file: Path
    name: str | None  # NAME
    paths: StaticPaths | None = None  # the content of a `paths.json`
    path: PathFile | None = None  # the only path of another file


def _read_content(place: str) -> _Content:
    """Read the file in `FILE` or `FILE:NAME`, or the layers in `without:LAYERS`.

    Raises RecordError also if the system refuses to look for the file.
    """
    try:
        return _find_content(place)
    except OSError as error:
        raise RecordError(f"can't read {place}: {error.strerror or error}") from error


def _find_content(place: str) -> _Content:
    layers = WITHOUT.fullmatch(place)
    if layers is not None and not Path(place).exists():
        file = Path(place.strip())
        skipped = _parse_layers(layers["layers"], file)
        return _Content(file, None, path=PathFile(file, skipped=skipped))
    if place.lstrip().startswith(("{", "[")):
        raise RecordError(
            f"{place} is given as the file of a path; write it into a .json file, and give the file"
        )
    file = Path(place)
    name = None
    if not file.exists() and ":" in place:
        before, _, name = place.rpartition(":")
        file = Path(before)
        _refuse_misspelt_without(file, name)
    refuse_menu(file)
    if (file / HEALED_FILE).is_file():
        file = file / HEALED_FILE
    text = read_text(file).strip()
    if f'"{MENU_SCHEMA}"' in text:  # a menu in a file of another name
        refuse_removed(file, "a menu of paths", "give the file of one of its paths")
    # The text is searched for its schema, so that a broken file is refused as what it is.
    if f'"{PATHS_SCHEMA}"' in text:
        return _Content(file, name, paths=read_paths(file))
    if name is not None:
        raise RecordError(f"{file} isn't a paths.json, so it has no path called {name!r}")
    if f'"{HEALED_SCHEMA}"' in text:
        record = read_healed(file)
        path = PathFile(file, static=record.path, record=record)
        return _Content(file, name, path=path)
    return _Content(file, name, path=_read_handwritten(file, text))


def _refuse_misspelt_without(file: Path, layers: str) -> None:
    """Refuse a name such as `withot:3`, which is no file and nearly `without:3`."""
    if file.exists() or not get_close_matches(str(file), ["without"]):
        return
    raise PathError(f"there is no file {file}; did you mean 'without:{layers}'?")


def _parse_layers(text: str, place: Path) -> tuple[int, ...]:
    """Return the layers in a list such as `3,13-15`, sorted, each once; `place` is for messages."""
    layers: set[int] = set()
    for part in text.split(","):
        match = LAYERS.fullmatch(part)
        if match is None:
            raise PathError(
                f"{place}: {part.strip()!r} isn't a layer; give the layers to leave out, for "
                f"example without:13,14,15 or without:13-15"
            )
        first = int(match["first"])
        last = int(match["last"] or first)
        if last < first:
            raise PathError(
                f"{place}: {part.strip()!r} is an empty range; give the smaller layer first"
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _list_ranges(layers: Sequence[int]) -> str:
    """Write sorted layers as `3,13-15`; a range has at least three layers."""
    parts: list[str] = []
    start = 0
    for place, layer in enumerate(layers, start=1):
        if place < len(layers) and layers[place] == layer + 1:
            continue
        run = layers[start:place]
        if len(run) > 2:
            parts.append(f"{run[0]}-{run[-1]}")
        else:
            parts += [str(member) for member in run]
        start = place
    return ",".join(parts)


def _leave_out(skipped: Sequence[int], num_layers: int) -> StaticPath:
    """Return the path of a model of L layers that leaves out some layers.

    Raises PathError if the model lacks a layer, or if no layer is left.
    """
    for layer in skipped:
        if layer >= num_layers:
            raise PathError(
                f"the model has no layer {layer}; give layers from 0 to {num_layers - 1}"
            )
    layers = [layer for layer in range(num_layers) if layer not in skipped]
    if not layers:
        raise PathError("all layers are left out; at least one layer must be executed")
    return StaticPath(layers)


def _read_handwritten(file: Path, text: str) -> PathFile:
    """Read a path that was written by hand."""
    try:
        content = decode(text, _HandwrittenPath, str(file))
    except RecordError as error:
        raise RecordError(f"{error}; give {FORMS}") from error
    if content.path is None:
        return PathFile(file, decisions=content.decisions)
    steps: list[StepRecord] = []
    for step in content.path:
        if isinstance(step, int):
            step = StepRecord(layer=step)
        steps.append(step)
    refuse_parts_of_layers(steps, file)
    try:
        return PathFile(file, static=StaticPath(step.layer for step in steps))
    except PathError as error:
        raise PathError(f"{file}: {error}") from error


def _make_path_file(file: Path, path: NamedPath, record: StaticPaths) -> PathFile:
    """Return one path of a `paths.json`."""
    return PathFile(file, static=path.path, named=path, record=record)
