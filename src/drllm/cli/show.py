"""`drllm show`: prints any file or folder that drllm wrote. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drllm.cli.parser import Flag, Request, verb
from drllm.cli.show_results import show_measured, show_results, show_sweep
from drllm.cli.show_search import (
    say_classes,
    show_failed,
    show_question,
    show_rejected,
    show_search,
    show_supervision,
    show_unfinished,
)
from drllm.cli.terminal import Terminal
from drllm.errors import RecordError
from drllm.metrics import by_layer, ratios, shown, verdict
from drllm.records import read_json, read_json_lines, read_search, refuse_odd_file
from drllm.records.layers import LAYERS_FILE, calibration_of, read_layers
from drllm.records.results import (
    EVALUATION_SCHEMA,
    LATENCY_FILE,
    read_evaluation,
    results_in,
    schema_of,
)
from drllm.reporting.numbers import plain
from drllm.reporting.sweeps import SWEEP_FILE
from drllm.search import CHUNKS_FOLDER

Renderer = Callable[[Path, Terminal], None]


@verb(
    "show",
    example="drllm show runs/demo",
    flags=(
        Flag(
            "place",
            "a records file, a result, a folder of routers or a run folder",
            required=True,
            positional=True,
        ),
        Flag("question", "id of a searched question, to draw the paths tried on it"),
    ),
)
def show_place(request: Request, terminal: Terminal) -> None:
    """Print any file or folder that drllm wrote."""
    place, question = request.path("place"), request.values["question"]
    if question is None:
        show(place, terminal)
        return
    file = place / "search.jsonl" if place.is_dir() else place
    if "paths" not in _first_row(file):
        raise RecordError(
            f"{file} is no search.jsonl, and --question {question} draws what a search tried; "
            f"give a search.jsonl or a folder that holds one"
        )
    show_question(read_search(file), question, file, terminal)


def show(place: Path, terminal: Terminal) -> None:
    """Print any file or folder that drllm wrote.

    Raises:
        RecordError: Nothing there, nothing that drllm wrote, or a file that can't be trusted.
    """
    if place.name == CHUNKS_FOLDER and place.is_dir():
        show_unfinished(place, terminal)
    elif place.is_dir():
        _show_folder(place, terminal)
    elif place.suffix == ".json":
        _show_json(place, terminal)
    elif place.suffix == ".jsonl" or not place.exists():
        _show_lines(place, terminal)
    else:
        raise RecordError(
            f"{place} is no file of records; give a .jsonl or .json file, or a folder, that drllm "
            f"has written"
        )


def _show_folder(folder: Path, terminal: Terminal) -> None:
    if (folder / "router_config.json").is_file():
        _show_routers(folder / "router_config.json", terminal)
        return
    names = ("search.jsonl", "search.failed.jsonl", "supervision.jsonl")
    files = [folder / name for name in (*names, "routers/router_config.json", SWEEP_FILE)]
    parts: list[tuple[Path, Renderer]] = [(file, show) for file in files if file.is_file()]
    if (folder / CHUNKS_FOLDER).is_dir() and not (folder / "search.jsonl").is_file():
        parts.insert(0, (folder / CHUNKS_FOLDER, show_unfinished))
    places = (folder / "eval", folder, folder / "test" / "eval")
    parts += [(place, show_results) for place in places if _has_results(place)]
    if not parts:
        raise RecordError(
            f"{folder} holds no search.jsonl, supervision.jsonl, routers or results; "
            f"give a folder that a stage of drllm has written"
        )
    for number, (place, print_it) in enumerate(parts):
        if number:
            terminal.say()
        terminal.say(str(place.parent if place.name == "router_config.json" else place))
        print_it(place, terminal)
    if (folder / "report.html").is_file():
        terminal.say()
        terminal.fact("report", folder / "report.html")


def _has_results(folder: Path) -> bool:
    return any(schema_of(path) == EVALUATION_SCHEMA for path in results_in(folder))


def _show_json(path: Path, terminal: Terminal) -> None:
    if not path.is_file():
        raise RecordError(f"{path} doesn't exist; give a file or folder that drllm has written")
    if path.name in _JSON:
        _JSON[path.name](path, terminal)
    elif path.name.endswith(".manifest.json"):
        _show_lines(path.with_name(path.name.replace(".manifest.json", ".jsonl")), terminal)
    else:
        show_results(path.parent, terminal, [read_evaluation(path).task])


def _first_row(path: Path) -> dict[str, Any]:
    return next(read_json_lines(path, dict[str, Any]))[1]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(path, dict[str, Any])]


def _show_lines(path: Path, terminal: Terminal) -> None:
    first = _first_row(path)
    for field, (_, render) in _LINES.items():
        if field in first:
            render(path, terminal)
            return
    known = ", ".join(f"{field!r} ({what})" for field, (what, _) in _LINES.items())
    raise RecordError(
        f"{path}, line 1: has {', '.join(sorted(first)) or 'nothing'}; expected {known}"
    )


def _show_samples(path: Path, terminal: Terminal) -> None:
    rows = _rows(path)
    terminal.fact("samples", f"{len(rows)}; systems {', '.join(rows[0]['systems'])}")
    terminal.fact("tables", f"drllm show {path.parent}")


def _show_metrics(path: Path, terminal: Terminal) -> None:
    rows = _rows(path)
    last = max(row["epoch"] for row in rows)
    chosen = [row for row in rows if row["epoch"] == last]
    names = [name for name in chosen[0] if name not in ("epoch", "split", "learning_rate")]
    terminal.table(
        "|".join(["metric", *(str(row["split"]) for row in chosen)]),
        ([name, *(plain(row.get(name), 3) for row in chosen)] for name in names),
        title=f"epoch {last}",
        numbers_from=1,
    )


def _show_routers(path: Path, terminal: Terminal) -> None:
    config, folder = read_json(path, dict[str, Any]), path.parent
    _check_weights(folder / "routers.safetensors")
    training = config.get("training") or {}
    shape = f"{config.get('num_layers')} layers of width {config.get('hidden_size')}"
    terminal.fact("base model", f"{config.get('base_model') or 'not named'}, {shape}")
    windows, width = config.get("num_windows"), config.get("router_width")
    terminal.fact("routers", f"{windows} windows, inner width {width}")
    if training:
        tasks = ", ".join(f"{name} {n}" for name, n in training.get("tasks", {}).items())
        terminal.fact(
            "trained on",
            f"{training.get('num_trained')} targets ({tasks}), "
            f"{training.get('num_held_out')} held out, {training.get('steps')} steps",
        )
    if (found := calibration_of(config, str(path))) is not None:
        folded = (training.get("settings") or {}).get("calibrate") is True
        terminal.fact(
            "calibration",
            f"temperature {plain(found.temperature, 2)} "
            f"({'in the weights' if folded else 'not in the weights'}), expected calibration "
            f"error {plain(found.ece_before, 4)} without and {plain(found.ece_after, 4)} with "
            f"it, on {found.num_decisions} held-out decisions",
        )
    if counts := config.get("label_counts"):
        say_classes([sum(column) for column in zip(*counts, strict=True)], terminal)
    for name, render in (("metrics.jsonl", _show_metrics), (LAYERS_FILE, _show_agreement)):
        if (folder / name).is_file():
            render(folder / name, terminal)


def _check_weights(path: Path) -> None:
    """Refuse weights that are broken, cut off or not finite."""
    if not refuse_odd_file(path, "read"):
        return
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:  # as torch takes seconds to load
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:
        raise RecordError(
            f"{path} is broken or cut off ({error}); train the routers again"
        ) from error
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise RecordError(f"{path}: {name!r} holds NaN or infinity; train the routers again")


def _show_agreement(path: Path, terminal: Terminal) -> None:
    """Compare the saved routers with decisions that ignore the question, on each part."""
    layers = read_layers(path)
    for part, systems in layers.parts.items():
        scores = [ratios(counts) for counts in systems.values()]
        terminal.table(
            "|".join(["metric", *map(shown, systems)]),
            ([name, *(plain(each[name], 3) for each in scores)] for name in scores[0]),
            title=f"after epoch {layers.epoch}, on {layers.title(part)}",
            numbers_from=1,
        )
    terminal.say(by_layer(layers.parts[layers.judged]))
    terminal.say(verdict(layers.parts))


_JSON: dict[str, Renderer] = {
    "router_config.json": _show_routers,
    "run.manifest.json": lambda path, terminal: _show_folder(path.parent, terminal),
    LATENCY_FILE: lambda path, terminal: show_measured(path.parent, terminal),
    LAYERS_FILE: _show_agreement,
    SWEEP_FILE: show_sweep,
}
"""By name, what prints a file."""

_LINES: dict[str, tuple[str, Renderer]] = {
    "paths": ("search", lambda path, terminal: show_search(read_search(path), terminal)),
    "optimal_layer_config": ("supervision", show_supervision),
    "reason": ("questions without a target", show_rejected),
    "error": ("questions that failed", show_failed),
    "systems": ("samples", _show_samples),
    "epoch": ("metrics", _show_metrics),
}
"""By a field of the first line, what a file of records holds and what prints it."""
