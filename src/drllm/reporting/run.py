"""What one run folder holds, read and checked: records, router metrics, results, manifests.

Files that don't exist are noted in `Run.absent`. A file that can't be trusted, or that belongs to
another model than the others, is an error. Axes: L layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict

from drllm.errors import RecordError
from drllm.records import results
from drllm.records.codec import read_json, read_json_lines, read_text, sha256
from drllm.records.healed import HEALED_FILE, HEALED_SCHEMA, HealedPath, read_healed
from drllm.records.identity import same_weights
from drllm.records.layers import LAYERS_FILE, Layers
from drllm.records.manifest import read_manifest
from drllm.records.search import SearchRecord, read_search
from drllm.records.static_paths import PATHS_FILE, StaticPaths, read_paths
from drllm.records.supervision import SupervisionRecord, read_supervision


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file that was read, for the provenance table."""

    name: str
    sha256: str
    manifest: Mapping[str, Any]


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `routers/metrics.jsonl`: what is shown of one split after one epoch."""

    epoch: int
    split: Literal["train", "validation"]
    macro_f1: float | None = None
    accuracy: float | None = None
    routers_loss: float | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything a run folder says; what it doesn't hold is empty or None.

    `num_layers` is L, agreed on by all files; `model` is the base model's identity, from the first
    file that says it. `layers` says how the saved routers agree with their labels. `sources` are
    the files that were read; of each that isn't there `absent` has a line.
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
    latency: results.Latency | None = None
    paths: StaticPaths | None = None
    healed: HealedPath | None = None
    recipe: str | None = None
    sources: list[Source] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def learns(self) -> bool:
        """Whether there is anything of a search or of routers."""
        return bool(self.search or self.supervision or self.router_config or self.epochs)

    @property
    def summary(self) -> Mapping[str, Any]:
        """Counts that the supervision stage left in its manifest."""
        return self.supervised("summary")

    @property
    def notes(self) -> list[str]:
        """What a reader should know before trusting the rest."""
        read = self.supervised("inputs").get("search.jsonl")
        searched = [each.sha256 for each in self.sources if each.name == "search.jsonl"]
        if read is None or searched in ([], [read]):
            return []
        return [
            "The targets in supervision.jsonl were made from another search.jsonl than the one in "
            "this folder, so what is said of the search and of the targets doesn't belong together."
        ]

    def supervised(self, key: str) -> Mapping[str, Any]:
        """Return what the supervision's manifest says of something; empty where it says nothing."""
        said = [each.manifest for each in self.sources if each.name == "supervision.jsonl"]
        return (said[0].get(key) if said else None) or {}

    def has(self, name: str, otherwise: str, said: msgspec.Struct | None = None) -> bool:
        """Say whether a file is there, and note it as a source, or as absent.

        `otherwise` is what it would show, empty where nobody misses it; `said` is the
        file as read, where it says itself what a manifest says.
        """
        path = self.folder / name
        if not path.exists():
            self.absent += [f"{name} ({otherwise})"] if otherwise else []
            return False
        manifest = asdict(said) if said is not None else {}
        if path.suffix == ".jsonl":
            manifest = read_manifest(path, path.stem) or {}
        self.sources.append(Source(name=name, sha256=sha256(path), manifest=manifest))
        return True


def read_run(folder: Path) -> Run:
    """Read a folder of `drllm run` or `drllm evaluate`; any of its parts may be missing.

    Nothing to report on, a file that can't be trusted, and files that belong to different models
    are a RecordError.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "doesn't exist"
        raise RecordError(f"{folder} {what}; give a folder that 'drllm run' has written")
    run = Run(folder=folder)
    if run.has("search.jsonl", "what the search found"):
        run.search = list(read_search(folder / "search.jsonl"))
    if run.has("supervision.jsonl", "the targets"):
        run.supervision = list(read_supervision(folder / "supervision.jsonl"))
    _read_routers(run)
    _read_results(run)
    for name in (PATHS_FILE, f"tuned/{PATHS_FILE}"):
        if run.paths is None and (folder / name).is_file():
            run.paths = read_paths(folder / name)
            run.has(name, "", run.paths)
    for name in (HEALED_FILE, f"healed/{HEALED_FILE}"):  # a path.json may be a plain path as well
        if run.healed is None and results.schema_of(folder / name) == HEALED_SCHEMA:
            run.healed = read_healed(folder / name)
            run.has(name, "", run.healed)
    recipe = folder / "run.yaml"
    if recipe.is_file():
        run.recipe = read_text(recipe)
    else:
        run.absent.append("run.yaml (the recipe)")
    if not (run.learns or run.evaluations or run.paths or run.healed):
        raise RecordError(
            f"{folder} holds no search.jsonl, supervision.jsonl, routers/, paths.json, healed path "
            f"or eval/; give a folder that 'drllm run' has written"
        )
    _check_routers(run)
    _agree(run)
    return run


def _read_routers(run: Run) -> None:
    folder = run.folder / "routers"
    if run.has("routers/router_config.json", "the routers"):
        path = folder / "router_config.json"
        run.router_config = read_json(path, dict[str, Any])
        if not isinstance(run.router_config.get("num_layers"), int):
            raise RecordError(f"{path}: 'num_layers' is missing, or no whole number")
    if run.has("routers/metrics.jsonl", "their metrics"):
        epochs = [epoch for _, epoch in read_json_lines(folder / "metrics.jsonl", Epoch)]
        run.epochs = sorted(epochs, key=lambda epoch: epoch.epoch)
    missed = "the routers layer by layer" if run.epochs else ""
    if run.has(f"routers/{LAYERS_FILE}", missed):
        run.layers = read_json(folder / LAYERS_FILE, Layers)


def _read_results(run: Run) -> None:
    """Read `eval/`, or results that lie in the folder itself, as `drllm evaluate` leaves them."""
    own = any(
        results.schema_of(path) == results.EVALUATION_SCHEMA
        for path in results.results_in(run.folder)
    )
    prefix = "" if own and not (run.folder / "eval").is_dir() else "eval/"
    folder = run.folder / prefix
    paths = results.results_in(folder)
    if not paths:
        run.absent.append("eval/TASK.json (accuracy and routes)")
        return
    run.evaluations = results.read_results(folder)
    run.latency = results.read_latency(folder)
    run.has(f"{prefix}{results.SAMPLES_FILE}", "routes and questions")
    for path, evaluation in zip(paths, run.evaluations, strict=True):
        run.has(f"{prefix}{path.name}", "", evaluation)
    run.has(f"{prefix}{results.LATENCY_FILE}", "measured time", run.latency)


def _agree(run: Run) -> None:
    """Set depth and model, on which all files must agree."""
    depths = [("search.jsonl", n) for n in dict.fromkeys(one.num_layers for one in run.search)]
    depths += [("supervision.jsonl", len(s.optimal_layer_config)) for s in run.supervision[:1]]
    if run.router_config:
        depths.append(("router_config.json", run.router_config["num_layers"]))
    depths += [(LAYERS_FILE, len(run.layers.train.confusion))] if run.layers else []
    depths += [(PATHS_FILE, run.paths.num_layers)] if run.paths else []
    depths += [(HEALED_FILE, run.healed.num_layers)] if run.healed else []
    depths += [(f"the evaluation of {each.task!r}", each.num_layers) for each in run.evaluations]
    run.num_layers = _agreed(run, "models of different depth, by layers", depths)
    said = [(each.name, each.manifest.get("model")) for each in run.sources]
    models = [(name, model) for name, model in said if model and isinstance(model, dict)]
    prints = [(name, str(m["fingerprint"])) for name, m in models if m.get("fingerprint")]
    first = prints[0][1] if prints else ""
    alike = [(name, first if same_weights(first, own, name) else own) for name, own in prints]
    _agreed(run, "base models with different weights, by fingerprint", alike)
    run.model = models[0][1] if models else {}


def _agreed(run: Run, what: str, said: Sequence[tuple[str, Any]]) -> Any:
    """Return what files say of the model, None if none does; a RecordError where they differ."""
    if len({value for _, value in said}) > 1:
        shown = ", ".join(f"{name}: {value}" for name, value in said)
        raise RecordError(
            f"{run.folder} mixes {what} ({shown}); keep the files of one run in a folder"
        )
    return said[0][1] if said else None


def _check_routers(run: Run) -> None:
    """Refuse results of other routers than those in the folder, such as before a new training."""
    weights = run.folder / "routers" / "routers.safetensors"
    if not weights.is_file():
        return
    here = sha256(weights)
    for source in run.sources:
        if (source.manifest.get("routers_sha256") or here) != here:
            raise RecordError(
                f"{run.folder / source.name} was made with other routers than those in "
                f"{weights.parent}; evaluate again"
            )
