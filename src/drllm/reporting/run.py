"""Reads a run folder: records, router metrics, results and manifests.

Missing files are listed in `Run.absent`. A file that can't be trusted, or that belongs to another
model than the other files, raises an error with the file's name. Axes: L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict

from drllm.errors import RecordError
from drllm.models.routers.places import CONFIG_FILE, WEIGHTS_FILE
from drllm.records import results
from drllm.records.codec import (
    Version,
    describe_invalid,
    read_json,
    read_json_lines,
    read_text,
    sha256,
)
from drllm.records.identity import have_same_weights
from drllm.records.latency import Latency, read_latency
from drllm.records.layers import LAYERS_FILE, Layers
from drllm.records.manifest import manifest_path, read_manifest
from drllm.records.search import SEARCH_FILE, SearchRecord, read_search
from drllm.records.supervision import SUPERVISION_FILE, SupervisionRecord, read_supervision
from drllm.statistics.ranges import Count, Share


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportSource:
    """A file that a report is made from; the report lists all these files in a table.

    `manifest` says how the file was made. It is empty if the file has no manifest.
    """

    name: str
    sha256: str
    manifest: Mapping[str, Any]


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `routers/metrics.jsonl`: the metrics of one split after one epoch.

    Metrics that the report doesn't draw aren't read.
    """

    epoch: Count
    split: Literal["train", "validation"]
    macro_f1: Share | None = None
    accuracy: Share | None = None
    routers_loss: float | None = None


class TaskSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of a task, or of all tasks, in the summary of targets; others aren't read."""

    questions: int
    base_correct: int
    valid_before_retest: int
    valid_after_retest: int
    saving_before_retest: int
    saving_after_retest: int
    improving_before_retest: int
    improving_after_retest: int
    targets: int
    improving_targets: int | None = None


class TargetSummary(TaskSummary, frozen=True, kw_only=True):
    """The summary in the manifest of targets, as far as it is shown. Older files lack some."""

    rejected: dict[str, int]
    class_counts: tuple[int, int, int]
    copies: int = 0
    executions: float | None = None
    wrong_targets: int | None = None
    tasks: dict[str, TaskSummary] = {}


@dataclass(slots=True, kw_only=True)
class Run:
    """The content of a run folder; missing parts are empty or None.

    Attributes:
        num_layers: L; it is the same in all files.
        model: The base model's identity, from the first file that names a model.
        layers: How the saved routers agree with their targets, layer by layer.
        sources: The files that were read.
        absent: A line for each file that is missing.
        is_eval_folder: Whether results lie in the folder itself, where `drllm evaluate` writes
            them, and not in `eval/`.
    """

    folder: Path
    num_layers: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    search: Sequence[SearchRecord] = ()
    supervision: Sequence[SupervisionRecord] = ()
    router_config: Mapping[str, Any] = field(default_factory=dict)
    epochs: Sequence[Epoch] = ()
    layers: Layers | None = None
    evaluations: Sequence[results.Result] = ()
    latency: Latency | None = None
    recipe: str | None = None
    sources: list[ReportSource] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    is_eval_folder: bool = False

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def has_training(self) -> bool:
        """Whether the folder has a search, targets or routers."""
        return bool(self.search or self.supervision or self.router_config or self.epochs)

    @property
    def summary(self) -> Mapping[str, Any]:
        """The counts in the manifest of the targets."""
        return self.find_manifest(SUPERVISION_FILE).get("summary") or {}

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader should know before trusting the numbers."""
        inputs = self.find_manifest(SUPERVISION_FILE).get("inputs") or {}
        digests = [source.sha256 for source in self.sources if source.name == SEARCH_FILE]
        if SEARCH_FILE not in inputs or not digests or digests == [inputs[SEARCH_FILE]]:
            return []
        return [
            "The targets in supervision.jsonl were made from another search.jsonl than the one in "
            "this folder, so the numbers of the search and of the targets don't belong together."
        ]

    def find_manifest(self, name: str) -> Mapping[str, Any]:
        """Return the manifest of a source by its name; empty if there is no source or manifest."""
        for source in self.sources:
            if source.name == name:
                return source.manifest
        return {}


def read_run(folder: Path) -> Run:
    """Read a folder of `drllm run` or `drllm evaluate`; any part of the folder may be missing.

    Raises:
        RecordError: The folder has nothing to report, a file can't be trusted, or files belong to
            different models.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "doesn't exist"
        raise RecordError(f"{folder} {state}; give a folder that 'drllm run' has written")
    run = Run(folder=folder)
    _read_records(run)
    _read_routers(run)
    _read_results(run)
    _read_recipe(run)
    _refuse_empty(run)
    _refuse_other_routers(run)
    run.num_layers = _find_num_layers(run)
    run.model = _find_model(run)
    return run


def _has_file(run: Run, name: str, content: str) -> bool:
    """Tell whether a file of the run exists; list a missing file as absent."""
    if (run.folder / name).exists():
        return True
    run.absent.append(f"{name} ({content})")
    return False


def _add_source(run: Run, name: str, record: msgspec.Struct | None = None) -> None:
    """List a file as a source.

    The manifest of a records file lies beside it. A file of results is its own manifest; then
    `record` is the content of the file.
    """
    path = run.folder / name
    manifest: Mapping[str, Any] = {}
    if record is not None:
        manifest = asdict(record)
    elif path.suffix == ".jsonl":
        manifest = read_manifest(path, path.stem) or {}
    run.sources.append(ReportSource(name=name, sha256=sha256(path), manifest=manifest))


def _read_records(run: Run) -> None:
    if _has_file(run, SEARCH_FILE, "what the search found"):
        run.search = list(read_search(run.folder / SEARCH_FILE))
        _add_source(run, SEARCH_FILE)
    if _has_file(run, SUPERVISION_FILE, "the targets"):
        run.supervision = read_supervision(run.folder / SUPERVISION_FILE)
        _add_source(run, SUPERVISION_FILE)
        check_summary(run.find_manifest(SUPERVISION_FILE), run.folder / SUPERVISION_FILE)


def check_summary(manifest: Mapping[str, Any], file: Path) -> None:
    """Raise RecordError if the summary in a manifest of targets lacks counts, or has wrong ones.

    Args:
        manifest: The manifest; a file of the user's own has none.
        file: The file of targets, for the message.
    """
    if not manifest.get("summary"):
        return
    try:
        msgspec.convert(manifest["summary"], TargetSummary)
    except msgspec.ValidationError as error:
        raise RecordError(
            f"{manifest_path(file)}: 'summary': {describe_invalid(error)}; make {file.name} again"
        ) from error


def _read_routers(run: Run) -> None:
    folder = run.folder / "routers"
    if _has_file(run, f"routers/{CONFIG_FILE}", "the routers"):
        path = folder / CONFIG_FILE
        run.router_config = read_json(path, dict[str, Any])
        if not isinstance(run.router_config.get("num_layers"), int):
            raise RecordError(f"{path}: 'num_layers' is missing, or no whole number")
        _add_source(run, f"routers/{CONFIG_FILE}")
    if _has_file(run, "routers/metrics.jsonl", "their metrics"):
        epochs = [epoch for _, epoch in read_json_lines(folder / "metrics.jsonl", Epoch)]
        run.epochs = sorted(epochs, key=lambda epoch: epoch.epoch)
        _add_source(run, "routers/metrics.jsonl")
    if (folder / LAYERS_FILE).exists():
        run.layers = read_json(folder / LAYERS_FILE, Layers)
        _add_source(run, f"routers/{LAYERS_FILE}")
    elif run.epochs:
        run.absent.append(f"routers/{LAYERS_FILE} (the routers layer by layer)")


def _read_results(run: Run) -> None:
    """Read the results in `eval/`, or in the folder itself, where `drllm evaluate` writes them."""
    has_eval_folder = (run.folder / "eval").is_dir()
    run.is_eval_folder = not has_eval_folder and results.holds_results(run.folder)
    prefix = "" if run.is_eval_folder else "eval/"
    folder = run.folder / prefix
    paths = results.list_possible_results(folder)
    if not paths:
        run.absent.append("eval/TASK.json (accuracy and routes)")
        return
    run.evaluations = results.read_results(folder)
    run.latency = read_latency(folder)
    samples = f"{prefix}{results.SAMPLES_FILE}"
    if _has_file(run, samples, "routes and questions"):
        _add_source(run, samples)
    for path, evaluation in zip(paths, run.evaluations, strict=True):
        _add_source(run, f"{prefix}{path.name}", evaluation)
    if run.latency is not None:  # time is measured only if the user asks for it
        _add_source(run, f"{prefix}{results.LATENCY_FILE}", run.latency)


def _read_recipe(run: Run) -> None:
    recipe = run.folder / "run.yaml"
    if recipe.is_file():
        run.recipe = read_text(recipe)
    else:
        run.absent.append("run.yaml (the recipe)")


def _refuse_empty(run: Run) -> None:
    if run.has_training or run.evaluations:
        return
    # A damaged result isn't recognised as a result, so it wasn't read. Reading it now raises an
    # error that names the file.
    for path in results.list_possible_results(run.folder):
        read_json(path, Version)
    raise RecordError(
        f"{run.folder} holds no search.jsonl, supervision.jsonl, routers/ "
        f"or eval/; give a folder that 'drllm run' has written"
    )


def _refuse_other_routers(run: Run) -> None:
    """Refuse results of other routers than the folder's, such as older routers."""
    weights = run.folder / "routers" / WEIGHTS_FILE
    if not weights.is_file():
        return
    digest = sha256(weights)
    for source in run.sources:
        evaluated = source.manifest.get("routers_sha256")
        if evaluated and evaluated != digest:
            raise RecordError(
                f"{run.folder / source.name} was made with other routers than those in "
                f"{weights.parent}; evaluate again"
            )


def _find_num_layers(run: Run) -> int | None:
    """Find the number of layers, which must be the same in all files; None if no file has it."""
    numbers: list[tuple[str, int]] = []  # the name of each file, and its number of layers
    if run.search:
        numbers.append((SEARCH_FILE, run.search[0].num_layers))
    if run.supervision:
        numbers.append((SUPERVISION_FILE, len(run.supervision[0].optimal_layer_config)))
    if run.router_config:
        numbers.append((CONFIG_FILE, run.router_config["num_layers"]))
    if run.layers:
        numbers.append((LAYERS_FILE, len(run.layers.train.confusion)))
    for evaluation in run.evaluations:
        name = f"the evaluation of {evaluation.task!r}"
        numbers.append((name, evaluation.num_layers))
    _refuse_different(run, "models of different depth, by layers", numbers)
    return numbers[0][1] if numbers else None


def _find_model(run: Run) -> Mapping[str, Any]:
    """Find the base model in the first file that names one; all files must have the same model."""
    models: list[tuple[str, dict[str, Any]]] = []
    for source in run.sources:
        model = source.manifest.get("model")
        if model and isinstance(model, dict):
            models.append((source.name, model))
    fingerprints: list[tuple[str, str]] = []
    for name, model in models:
        if not model.get("fingerprint"):
            continue
        fingerprint = str(model["fingerprint"])
        # The same weights in another precision count as the same model.
        if fingerprints:
            _, first_fingerprint = fingerprints[0]
            if have_same_weights(first_fingerprint, fingerprint, name):
                fingerprint = first_fingerprint  # so that the two compare as equal below
        fingerprints.append((name, fingerprint))
    _refuse_different(run, "base models with different weights, by fingerprint", fingerprints)
    return models[0][1] if models else {}


def _refuse_different(run: Run, what: str, values: Sequence[tuple[str, Any]]) -> None:
    """Refuse files with different values.

    Args:
        run: The run.
        what: What the values belong to, for the message.
        values: The name of each file, and its value.
    """
    if len({value for _, value in values}) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in values)
        raise RecordError(
            f"{run.folder} mixes {what} ({listed}); keep the files of one run in a folder"
        )
