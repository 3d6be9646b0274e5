"""The verb `drllm show`: finds out what a file or folder holds, and prints it.

This module doesn't import torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drllm.cli.command_line import CommandLine
from drllm.cli.running import show_demo
from drllm.cli.shortening import show_gaps
from drllm.cli.show_question import show_question
from drllm.cli.show_results import show_latency, show_results
from drllm.cli.show_routers import show_agreement, show_metrics, show_routers
from drllm.cli.show_search import SEARCH_RENDERERS, show_unfinished
from drllm.cli.shrinking import show_shrink
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, verb
from drllm.errors import RecordError
from drllm.models.routers.places import CONFIG_FILE
from drllm.records import results
from drllm.records.codec import read_json_lines
from drllm.records.gaps import PATHS_FILE
from drllm.records.layers import LAYERS_FILE
from drllm.records.search import SEARCH_FILE, read_search
from drllm.records.shortened import DEMO_FILE, SHRINK_FILE
from drllm.records.supervision import SUPERVISION_FILE
from drllm.search import CHUNKS_FOLDER

Renderer = Callable[[Path, Terminal], None]
"""A function that prints a file or folder."""

RUN_PARTS = (
    SEARCH_FILE,
    "search.failed.jsonl",
    SUPERVISION_FILE,
    f"routers/{CONFIG_FILE}",
    PATHS_FILE,
    DEMO_FILE,
)
"""The files of a run folder in the order of printing; the results of `evaluate` come last."""


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
        Flag(
            "question",
            "id of a searched question: draw the paths that were tried on it",
            placeholder="ID",
        ),
    ),
)
def show_place(command: CommandLine, terminal: Terminal) -> None:
    """Print any file or folder that drllm wrote."""
    place = command.path("place")
    question = command.values["question"]
    if question is None:
        show(place, terminal)
        return
    file = place / "search.jsonl" if place.is_dir() else place
    if "paths" not in _read_first_row(file):
        raise RecordError(
            f"{file} is no search.jsonl, but --question {question} draws the paths of a search; "
            f"give a search.jsonl or a folder that holds one"
        )
    show_question(read_search(file), question, file, terminal)


def show(place: Path, terminal: Terminal) -> None:
    """Print any file or folder that drllm wrote.

    Raises RecordError for any other file or folder, and for a broken file.
    """
    if place.name == CHUNKS_FOLDER and place.is_dir():
        show_unfinished(place, terminal)
    elif place.is_dir():
        _show_folder(place, terminal)
    elif place.suffix == ".json":
        _show_json(place, terminal)
    elif place.suffix == ".jsonl" or not place.exists():  # reading what is missing is an error
        _show_lines(place, terminal)
    else:
        raise RecordError(
            f"{place} is neither a folder nor a .json or .jsonl file; give one that drllm has "
            f"written"
        )


def _show_folder(folder: Path, terminal: Terminal) -> None:
    """Print every part of a folder, each under its path."""
    if (folder / SHRINK_FILE).is_file():
        show_shrink(folder / SHRINK_FILE, terminal)
        return
    if (folder / CONFIG_FILE).is_file():
        show_routers(folder / CONFIG_FILE, terminal)
        return
    parts = _find_parts(folder)
    if not parts:
        raise RecordError(f"{folder} holds no records or results; give a folder that a stage wrote")
    for number, (place, render) in enumerate(parts):
        if number > 0:
            terminal.say()
        title = place.parent if place.name == CONFIG_FILE else place
        terminal.say(str(title))
        render(place, terminal)
    if (folder / "report.html").is_file():
        terminal.say()
        terminal.fact("report", folder / "report.html")


def _find_parts(folder: Path) -> list[tuple[Path, Renderer]]:
    """Find the parts of a folder, and the function that prints each part."""
    parts: list[tuple[Path, Renderer]] = []
    unfinished = folder / CHUNKS_FOLDER
    if unfinished.is_dir() and not (folder / SEARCH_FILE).is_file():
        parts.append((unfinished, show_unfinished))
    files = [folder / name for name in RUN_PARTS]
    parts += [(file, show) for file in files if file.is_file()]
    # Any file that may be a result counts, a damaged one too: reading it raises an error that
    # names the file.
    if results.list_possible_results(folder / "eval"):
        parts.append((folder / "eval", show_results))
    if results.holds_results(folder):
        parts.append((folder, show_results))
    return parts


def _show_json(path: Path, terminal: Terminal) -> None:
    """Print a JSON file; the name of the file says what it holds."""
    if path.name in JSON_RENDERERS:
        JSON_RENDERERS[path.name](path, terminal)
    elif path.name.endswith(".manifest.json"):
        lines_file = path.with_name(path.name.replace(".manifest.json", ".jsonl"))
        _show_lines(lines_file, terminal)
    else:
        task = results.read_evaluation(path).task
        show_results(path.parent, terminal, [task])


def _show_lines(path: Path, terminal: Terminal) -> None:
    """Print a file of JSON lines; a field of its first line says what it holds."""
    first_row = _read_first_row(path)
    for field, (_, render) in LINES_RENDERERS.items():
        if field in first_row:
            render(path, terminal)
            return
    expected = [f"{field!r} ({content})" for field, (content, _) in LINES_RENDERERS.items()]
    fields = ", ".join(sorted(first_row)) or "nothing"
    raise RecordError(f"{path}, line 1: has {fields}; expected {', '.join(expected)}")


def _read_first_row(path: Path) -> dict[str, Any]:
    """Read the first line of a file of JSON lines; raise RecordError if it can't be read."""
    _, row = next(read_json_lines(path, dict[str, Any]))
    return row


def _show_samples(path: Path, terminal: Terminal) -> None:
    """Print what a `samples.jsonl` holds, and the command that prints its tables."""
    samples = [sample for _, sample in read_json_lines(path, results.Sample)]
    terminal.fact("samples", f"{len(samples)}; systems {', '.join(samples[0].systems)}")
    terminal.fact("tables", f"drllm show {path.parent}")


def _show_run(manifest: Path, terminal: Terminal) -> None:
    _show_folder(manifest.parent, terminal)


def _show_latency_file(path: Path, terminal: Terminal) -> None:
    show_latency(path.parent, terminal)


JSON_RENDERERS: dict[str, Renderer] = {
    CONFIG_FILE: show_routers,
    "run.manifest.json": _show_run,
    results.LATENCY_FILE: _show_latency_file,
    LAYERS_FILE: show_agreement,
    PATHS_FILE: show_gaps,
    SHRINK_FILE: show_shrink,
    DEMO_FILE: show_demo,
}
"""The function that prints a JSON file, by the name of the file."""

LINES_RENDERERS: dict[str, tuple[str, Renderer]] = {
    **SEARCH_RENDERERS,
    "systems": ("samples", _show_samples),
    "epoch": ("metrics", show_metrics),
}
"""What a file of JSON lines holds, and the function that prints it, by a field of its first line.

If the line has several of the fields, the one that comes first in this table decides.
"""
