"""What one run folder holds, read and checked: records, metrics, evaluations and their manifests.

Owns reading and refusing. Files that don't exist are noted in `Run.absent`; a file that exists
and can't be trusted, or that belongs to another model than its neighbours, is an error. Leaves
the formats of `search.jsonl` and `supervision.jsonl` to `records`, evaluations to `results` and
`measured`, and all arithmetic to `summary`. Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.records import (
    SearchRecord,
    SupervisionRecord,
    read_json_lines,
    read_manifest,
    read_search,
    read_supervision,
    sha256,
)
from drllm.reporting.agreement import LAYERS_FILE, Agreement, read_agreement
from drllm.reporting.fields import Fields, read_object, read_text
from drllm.reporting.measured import LATENCY_FILE, Measured, read_measured
from drllm.reporting.reliability import Reliability, read_reliability
from drllm.reporting.results import Evaluation, read_evaluations, results_folder
from drllm.reporting.samples import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One line of `routers/metrics.jsonl`: the metrics of one split after one epoch."""

    epoch: int
    split: str
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a run folder says.

    Attributes:
        name: Name of the folder.
        num_layers: L, agreed on by all files; None where no file says it.
        model: Identity of the base model, from the first file that says it.
        search: The search records.
        supervision: The targets.
        summary: Counts that the supervision stage left in its manifest.
        router_config: Contents of `router_config.json`.
        epochs: Router metrics, in order of epoch.
        agreement: How the saved routers agree with their labels; None where it wasn't kept.
        reliability: How far their probabilities can be believed; None where nothing was held out.
        evaluations: By task, in order of name.
        measured: Times of base and routed; None where none were measured.
        recipe: Text of `run.yaml`.
        sources: The files that were read.
        absent: One line for each file that isn't there.
        notes: What a reader should know before trusting the rest.
    """

    name: str
    num_layers: int | None
    model: Mapping[str, Any]
    search: tuple[SearchRecord, ...]
    supervision: tuple[SupervisionRecord, ...]
    summary: Mapping[str, Any]
    router_config: Mapping[str, Any]
    epochs: tuple[Epoch, ...]
    agreement: Agreement | None
    reliability: Reliability | None
    evaluations: tuple[Evaluation, ...]
    measured: Measured | None
    recipe: str | None
    sources: tuple[Source, ...]
    absent: tuple[str, ...]
    notes: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Args:
        folder: As `drllm run` or `drllm evaluate` leaves it; any of its parts may be missing.

    Returns:
        What is there, checked.

    Raises:
        RecordError: Nothing to report on, a file that can't be trusted, or files that belong to
            different models.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "doesn't exist"
        raise RecordError(f"{folder} {what}; give a folder that 'drllm run' has written")
    sources: list[Source] = []
    absent: list[str] = []
    search = _records(folder / "search.jsonl", "search", sources, absent)
    supervision = _records(folder / "supervision.jsonl", "supervision", sources, absent)
    of_routers = folder / "routers" / "router_config.json"
    router_config = _router_config(of_routers, sources, absent)
    epochs = _epochs(folder / "routers" / "metrics.jsonl", sources, absent)
    agreement = _agreement(folder / "routers" / LAYERS_FILE, bool(epochs), sources, absent)
    results, prefix = results_folder(folder)
    evaluations = read_evaluations(results, sources, absent, prefix)
    measured = read_measured(results, sources, prefix) if evaluations else None
    if evaluations and measured is None:
        absent.append(f"{prefix}{LATENCY_FILE} is absent: no latency or throughput can be shown.")
    recipe = folder / "run.yaml"
    if not recipe.is_file():
        absent.append("run.yaml is absent: the recipe isn't shown.")
    if not (search or supervision or router_config or epochs or evaluations):
        raise RecordError(
            f"{folder} holds no search.jsonl, supervision.jsonl, routers/ or eval/; "
            f"give a folder that 'drllm run' has written"
        )
    _check_routers(folder, sources)
    summary: Mapping[str, Any] = {}
    for source in sources:
        if source.name == "supervision.jsonl":
            summary = source.manifest.get("summary") or {}
    return Run(
        name=folder.resolve().name,
        num_layers=_agreed_layers(
            folder, search, supervision, router_config, agreement, evaluations
        ),
        model=_agreed_model(folder, sources),
        search=tuple(search),
        supervision=tuple(supervision),
        summary=summary,
        router_config=router_config,
        epochs=tuple(epochs),
        agreement=agreement,
        reliability=read_reliability(Fields(router_config, str(of_routers))),
        evaluations=tuple(evaluations),
        measured=measured,
        recipe=read_text(recipe) if recipe.is_file() else None,
        sources=tuple(sources),
        absent=tuple(absent),
        notes=tuple(_notes(sources)),
    )


def _records(path: Path, kind: str, sources: list[Source], absent: list[str]) -> list[Any]:
    if not path.exists():
        shown = "the search's yield" if kind == "search" else "targets and label counts"
        absent.append(f"{path.name} is absent: {shown} can't be shown.")
        return []
    records: list[Any] = list(read_search(path) if kind == "search" else read_supervision(path))
    manifest = read_manifest(path, kind) or {}
    sources.append(Source(name=path.name, sha256=sha256(path), manifest=manifest))
    return records


def _router_config(path: Path, sources: list[Source], absent: list[str]) -> dict[str, Any]:
    if not path.exists():
        absent.append("routers/router_config.json is absent: the routers aren't described.")
        return {}
    fields = read_object(path)
    fields.whole("num_layers")
    fields.whole("num_windows")
    sources.append(Source(name=f"routers/{path.name}", sha256=sha256(path), manifest={}))
    return fields.values


def _epochs(path: Path, sources: list[Source], absent: list[str]) -> list[Epoch]:
    if not path.exists():
        absent.append("routers/metrics.jsonl is absent: router metrics can't be shown.")
        return []
    epochs = []
    for line, row in read_json_lines(path, dict[str, Any]):
        fields = Fields(row, f"{path}, line {line}")
        number, split = fields.whole("epoch"), fields.text("split")
        if split not in ("train", "validation"):
            raise RecordError(
                f"{fields.where}: 'split' is {split!r}; expected 'train' or 'validation'"
            )
        names = [name for name in row if name not in ("epoch", "split")]
        values = {name: fields.optional_number(name) for name in names}
        epochs.append(Epoch(epoch=number, split=split, values=values))
    sources.append(Source(name=f"routers/{path.name}", sha256=sha256(path), manifest={}))
    return sorted(epochs, key=lambda epoch: epoch.epoch)


def _agreement(
    path: Path, trained: bool, sources: list[Source], absent: list[str]
) -> Agreement | None:
    if not path.exists():
        if trained:
            absent.append(
                f"routers/{path.name} is absent: the routers aren't shown layer by layer."
            )
        return None
    sources.append(Source(name=f"routers/{path.name}", sha256=sha256(path), manifest={}))
    return read_agreement(path)


# --- do the files belong together? -------------------------------------------------------------


def _agreed_layers(
    folder: Path,
    search: Sequence[SearchRecord],
    supervision: Sequence[SupervisionRecord],
    router_config: Mapping[str, Any],
    agreement: Agreement | None,
    evaluations: Sequence[Evaluation],
) -> int | None:
    said: dict[str, int] = {}
    for record in search:
        said.setdefault("search.jsonl", record.num_layers)
        if record.num_layers != said["search.jsonl"]:
            raise RecordError(
                f"{folder / 'search.jsonl'} holds questions of models with "
                f"{said['search.jsonl']} and {record.num_layers} layers; a report is about one"
            )
    if supervision:
        said["supervision.jsonl"] = len(supervision[0].optimal_layer_config)
    if router_config:
        said["router_config.json"] = int(router_config["num_layers"])
    if agreement is not None:
        said[LAYERS_FILE] = agreement.num_layers
    for evaluation in evaluations:
        said[f"the evaluation of {evaluation.task!r}"] = evaluation.num_layers
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{name}: {layers}" for name, layers in said.items())
        raise RecordError(
            f"{folder} mixes models of different depth ({shown} layers); "
            f"keep the files of one run in a folder"
        )
    return next(iter(said.values()), None)


def _agreed_model(folder: Path, sources: Sequence[Source]) -> Mapping[str, Any]:
    model: Mapping[str, Any] = {}
    fingerprints: dict[str, str] = {}
    for source in sources:
        identity = source.manifest.get("model")
        if not isinstance(identity, dict):
            continue
        model = model or identity
        if identity.get("fingerprint"):
            fingerprints.setdefault(str(identity["fingerprint"]), source.name)
    if len(fingerprints) > 1:
        shown = ", ".join(f"{name}: {value}" for value, name in fingerprints.items())
        raise RecordError(
            f"{folder} mixes base models with different weights (fingerprints in {shown}); "
            f"keep the files of one run in a folder"
        )
    return model


def _check_routers(folder: Path, sources: Sequence[Source]) -> None:
    """Refuse results of other routers than those in the folder, such as before a new training."""
    weights = folder / "routers" / "routers.safetensors"
    if not weights.is_file():
        return
    here = sha256(weights)
    for source in sources:
        used = source.manifest.get("routers_sha256")
        if used is not None and used != here:
            raise RecordError(
                f"{folder / source.name} was made with other routers than those in "
                f"{weights.parent}; evaluate again"
            )


def _notes(sources: Sequence[Source]) -> list[str]:
    """Say where the targets come from another search than the one in the folder."""
    by_name = {source.name: source for source in sources}
    search, supervision = by_name.get("search.jsonl"), by_name.get("supervision.jsonl")
    if search is None or supervision is None:
        return []
    read = (supervision.manifest.get("inputs") or {}).get("search.jsonl")
    if read in (None, search.sha256):
        return []
    return [
        "The targets in supervision.jsonl were made from another search.jsonl than the one in this "
        "folder, so what is said of the search and of the targets doesn't belong together."
    ]
