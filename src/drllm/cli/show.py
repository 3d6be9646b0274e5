"""`drllm show`: prints any file or folder that drllm wrote. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from drllm.cli.show_results import show_measured, show_results
from drllm.cli.show_routers import show_agreement
from drllm.cli.show_search import show_failed, show_question, show_search, show_unfinished
from drllm.cli.show_supervision import say_classes, show_rejected, show_supervision
from drllm.cli.show_sweep import show_sweep
from drllm.cli.terminal import Terminal, new_table
from drllm.cli.verbs import Flag, Request, verb
from drllm.errors import RecordError
from drllm.records import (
    FailedQuestion,
    RejectedQuestion,
    read_json,
    read_json_lines,
    read_search,
    read_supervision,
    refuse_odd_file,
)
from drllm.records.layers import LAYERS_FILE, Calibration, calibration_of
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
    help="print any file or folder that drllm wrote",
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
    """Print a file or folder that drllm wrote."""
    place, question = request.path("place"), request.values["question"]
    if question is None:
        show(place, terminal)
        return
    file = place / "search.jsonl" if place.is_dir() else place
    _, first = next(read_json_lines(file, dict[str, Any]))
    if "paths" not in first:
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
        _show_routers(folder, terminal)
        return
    parts: list[tuple[Path, Renderer]] = [
        (folder / name, _show_lines)
        for name in ("search.jsonl", "search.failed.jsonl", "supervision.jsonl")
        if (folder / name).is_file()
    ]
    if (folder / CHUNKS_FOLDER).is_dir() and not (folder / "search.jsonl").is_file():
        parts.insert(0, (folder / CHUNKS_FOLDER, show_unfinished))
    if (folder / "routers" / "router_config.json").is_file():
        parts.append((folder / "routers", _show_routers))
    if (folder / SWEEP_FILE).is_file():
        parts.append((folder / SWEEP_FILE, show_sweep))
    places = (folder / "eval", folder, folder / "test" / "eval")
    parts += [(place, show_results) for place in places if _has_results(place)]
    if not parts:
        raise RecordError(
            f"{folder} holds no search.jsonl, supervision.jsonl, routers or results; "
            f"give a folder that a stage of drllm has written"
        )
    for number, (place, print_it) in enumerate(parts):
        terminal.say(f"{chr(10) * (number > 0)}{place}")
        print_it(place, terminal)
    if (folder / "report.html").is_file():
        terminal.say()
        terminal.fact("report", str(folder / "report.html"))


def _has_results(folder: Path) -> bool:
    """Tell whether a file of the folder says that it is a result."""
    return any(schema_of(path) == EVALUATION_SCHEMA for path in results_in(folder))


# --- files, by name and by what they hold ------------------------------------------------------


def _show_json(path: Path, terminal: Terminal) -> None:
    if not path.is_file():
        raise RecordError(f"{path} doesn't exist; give a file or folder that drllm has written")
    if path.name in _JSON:
        _JSON[path.name](path, terminal)
    elif path.name.endswith(".manifest.json"):
        _show_lines(path.with_name(path.name.replace(".manifest.json", ".jsonl")), terminal)
    else:
        show_results(path.parent, terminal, [read_evaluation(path).task])


def _show_lines(path: Path, terminal: Terminal) -> None:
    _, first = next(read_json_lines(path, dict[str, Any]))
    for field, (_, render) in _LINES.items():
        if field in first:
            render(path, terminal)
            return
    known = ", ".join(f"{field!r} ({what})" for field, (what, _) in _LINES.items())
    raise RecordError(
        f"{path}, line 1: has {', '.join(sorted(first)) or 'nothing'}; expected {known}"
    )


def _show_samples(path: Path, terminal: Terminal) -> None:
    rows = [row for _, row in read_json_lines(path, dict[str, Any])]
    terminal.fact("samples", f"{len(rows)}; systems {', '.join(rows[0]['systems'])}")
    terminal.fact("tables", f"drllm show {path.parent}")


def _check_weights(path: Path) -> None:
    """Refuse weights that are broken, cut off or not finite."""
    if not refuse_odd_file(path, "read"):
        return
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


def _show_routers(folder: Path, terminal: Terminal) -> None:
    path = folder / "router_config.json"
    config = read_json(path, dict[str, Any])
    _check_weights(folder / "routers.safetensors")
    training = config.get("training") or {}
    terminal.fact(
        "base model",
        f"{config.get('base_model') or 'not named'}, "
        f"{config.get('num_layers')} layers of width {config.get('hidden_size')}",
    )
    terminal.fact(
        "routers",
        f"{config.get('num_windows')} windows, inner width {config.get('router_width')}",
    )
    if training:
        tasks = ", ".join(f"{name} {n}" for name, n in training.get("tasks", {}).items())
        terminal.fact(
            "trained on",
            f"{training.get('num_trained')} targets ({tasks}), "
            f"{training.get('num_held_out')} held out, {training.get('steps')} steps",
        )
    if (found := calibration_of(config, str(path))) is not None:
        folded = (training.get("settings") or {}).get("calibrate") is True
        terminal.fact("calibration", _calibration(found, folded))
    counts = config.get("label_counts") or []
    if counts:
        say_classes([sum(column) for column in zip(*counts, strict=True)], terminal)
    if (folder / "metrics.jsonl").is_file():
        _show_metrics(folder / "metrics.jsonl", terminal)
    if (folder / LAYERS_FILE).is_file():
        show_agreement(folder / LAYERS_FILE, terminal)


def _calibration(found: Calibration, folded: bool) -> str:
    """Say how far the probabilities can be believed, and whether that was mended."""
    return (
        f"temperature {plain(found.temperature, 2)} "
        f"({'in the weights' if folded else 'not in the weights'}), expected calibration "
        f"error {plain(found.ece_before, 4)} without and {plain(found.ece_after, 4)} with "
        f"it, on {found.num_decisions} held-out decisions"
    )


def _show_metrics(path: Path, terminal: Terminal) -> None:
    rows = [row for _, row in read_json_lines(path, dict[str, Any])]
    last = max(row["epoch"] for row in rows)
    table = new_table("metric", title=f"epoch {last}")
    chosen = [row for row in rows if row["epoch"] == last]
    for row in chosen:
        table.add_column(str(row["split"]), justify="right")
    names = [name for name in chosen[0] if name not in ("epoch", "split", "learning_rate")]
    for name in names:
        table.add_row(name, *(plain(row.get(name), 3) for row in chosen))
    terminal.show(table)


_JSON: dict[str, Renderer] = {
    "router_config.json": lambda path, terminal: _show_routers(path.parent, terminal),
    "run.manifest.json": lambda path, terminal: _show_folder(path.parent, terminal),
    LATENCY_FILE: lambda path, terminal: show_measured(path.parent, terminal),
    LAYERS_FILE: show_agreement,
    SWEEP_FILE: show_sweep,
}
"""By name, what prints a file."""

_LINES: dict[str, tuple[str, Renderer]] = {
    "paths": ("search", lambda path, terminal: show_search(read_search(path), terminal)),
    "optimal_layer_config": (
        "supervision",
        lambda path, terminal: show_supervision(path, read_supervision(path), terminal),
    ),
    "reason": (
        "questions without a target",
        lambda path, terminal: show_rejected(
            [one for _, one in read_json_lines(path, RejectedQuestion)], terminal
        ),
    ),
    "error": (
        "questions that failed",
        lambda path, terminal: show_failed(
            [one for _, one in read_json_lines(path, FailedQuestion)], terminal
        ),
    ),
    "systems": ("samples", _show_samples),
    "epoch": ("metrics", _show_metrics),
}
"""By a field of the first line, what a file of records holds and what prints it."""
