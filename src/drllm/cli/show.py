"""Records as people read them: the route picture, `show`.

Owns what is printed about a file or folder of ours. Leaves results to `show_results`, the story of
a search to `show_search`, one question's paths to `show_question`, targets to `show_supervision`,
reading and checking to `records` and `reporting`. Loads no torch. Axes: L layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from drllm.cli.show_question import show_question
from drllm.cli.show_results import show_measured, show_results
from drllm.cli.show_routers import show_agreement
from drllm.cli.show_search import show_failed, show_search, show_unfinished
from drllm.cli.show_supervision import say_classes, show_rejected, show_supervision
from drllm.cli.show_sweep import show_sweep
from drllm.cli.tables import new_table
from drllm.cli.terminal import Terminal, duration
from drllm.cli.verbs import Flag, Request, verb
from drllm.errors import RecordError
from drllm.paths import Decision, sketch
from drllm.records import (
    SearchRecord,
    read_each,
    read_lines,
    read_search,
    read_supervision,
)
from drllm.reporting.agreement import LAYERS_FILE
from drllm.reporting.fields import read_object
from drllm.reporting.measured import LATENCY_FILE
from drllm.reporting.numbers import plain
from drllm.reporting.reliability import Reliability, read_reliability
from drllm.reporting.sweeps import SWEEP_FILE
from drllm.search.commits import BLOCKS_FOLDER
from drllm.search.counts import failed_question
from drllm.supervision import rejected_question

STYLES = {Decision.SKIP: "red", Decision.EXECUTE: "dim", Decision.REPEAT: "bold green"}
LAYERS_A_ROW = 60
TICK = 10


# --- a route -----------------------------------------------------------------------------------


def draw_route(decisions: Sequence[int]) -> Text:
    """Draw decisions with numbered layers; the three kinds differ in shape, not only in colour.

    Example:
        >>> print(draw_route([1, 0, 2, 1]).plain)
        layer  0
               █·2█
               █ execute  · skip  2 repeat
    """
    text = Text()
    margin = " " * 7
    for start in range(0, len(decisions), LAYERS_A_ROW):
        row = decisions[start : start + LAYERS_A_ROW]
        ticks = ""
        for layer in range(start, start + len(row)):
            if layer % TICK == 0:
                ticks = ticks.ljust(layer - start) + str(layer)
        text.append(f"layer  {ticks}\n{margin}")
        for value in row:
            text.append(sketch([value]), style=STYLES[Decision(value)])
        text.append("\n")
    kinds = (
        (Decision.EXECUTE, "execute"),
        (Decision.SKIP, "skip"),
        (Decision.REPEAT, "repeat"),
    )
    legend = Text("  ").join(
        Text.assemble((sketch([kind]), STYLES[kind]), f" {name}") for kind, name in kinds
    )
    return text.append(margin).append_text(legend)


# --- one stage in a few lines ------------------------------------------------------------------


def say_search(records: Sequence[SearchRecord], terminal: Terminal) -> None:
    """Print in a few lines what a search did; `show_search` tells the whole story."""
    n = len(records)
    tried = sum(len(record.paths) for record in records)
    terminal.say(
        f"questions      {n} ({_by_task(Counter(record.task for record in records))}), "
        f"{records[0].num_layers} layers"
    )
    terminal.say(f"paths tried    {tried}, {plain(tried / n)} a question")
    terminal.say(f"time           {duration(sum(record.seconds for record in records))} in all")


def _by_task(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


# --- show --------------------------------------------------------------------------------------


@verb(
    "show",
    help="print any file or folder of ours in readable form",
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
    """Print a file or folder of ours."""
    show(request.path("place"), terminal, request.values["question"])


def show(place: Path, terminal: Terminal, question: str | None = None) -> None:
    """Print any file or folder of ours in readable form.

    Args:
        place: The file or folder.
        terminal: Where to.
        question: Of a search, or of the one in the folder, draw this question's paths instead.

    Raises:
        RecordError: Nothing there, nothing of ours, a file that can't be trusted, or no question
            of that id.
    """
    if question is not None:
        _show_question(place, question, terminal)
    elif place.name == BLOCKS_FOLDER and place.is_dir():
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


def _show_question(place: Path, question: str, terminal: Terminal) -> None:
    file = place / "search.jsonl" if place.is_dir() else place
    _, first = next(read_lines(file))
    if "paths" not in first:
        raise RecordError(
            f"{file} is no search.jsonl, and --question {question} draws what a search tried; "
            f"give a search.jsonl or a folder that holds one"
        )
    show_question(read_search(file), question, file, terminal)


def _show_folder(folder: Path, terminal: Terminal) -> None:
    if (folder / "router_config.json").is_file():
        _show_routers(folder, terminal)
        return
    parts: list[tuple[Path, Callable[[Path, Terminal], None]]] = [
        (folder / name, _show_lines)
        for name in ("search.jsonl", "search.failed.jsonl", "supervision.jsonl")
        if (folder / name).is_file()
    ]
    if (folder / BLOCKS_FOLDER).is_dir() and not (folder / "search.jsonl").is_file():
        parts.insert(0, (folder / BLOCKS_FOLDER, show_unfinished))
    if (folder / "routers" / "router_config.json").is_file():
        parts.append((folder / "routers", _show_routers))
    if (folder / SWEEP_FILE).is_file():
        parts.append((folder / SWEEP_FILE, show_sweep))
    places = (folder / "eval", folder, folder / "test" / "eval")
    results = [place for place in places if _results(place)]
    parts += [(place, show_results) for place in results]
    if not parts:
        raise RecordError(
            f"{folder} holds no search.jsonl, supervision.jsonl, routers or results; "
            f"give a folder that a stage of drllm has written"
        )
    for number, (place, print_it) in enumerate(parts):
        terminal.say(f"{chr(10) * (number > 0)}{place}")
        print_it(place, terminal)
    if (folder / "report.html").is_file():
        terminal.say(f"\nreport         {folder / 'report.html'}")


def _results(folder: Path) -> list[Path]:
    """Return the files of a folder that say that they are results."""
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if not path.name.endswith(".manifest.json")
        and read_object(path).values.get("schema") == "drllm.evaluation"
    ]


def _show_json(path: Path, terminal: Terminal) -> None:
    if not path.is_file():
        raise RecordError(f"{path} doesn't exist; give a file or folder that drllm has written")
    if path.name == "router_config.json":
        _show_routers(path.parent, terminal)
        return
    if path.name == "run.manifest.json":
        _show_folder(path.parent, terminal)
        return
    if path.name.endswith(".manifest.json"):
        _show_lines(path.with_name(path.name.replace(".manifest.json", ".jsonl")), terminal)
        return
    if path.name == LATENCY_FILE:
        show_measured(path.parent, terminal)
        return
    if path.name == LAYERS_FILE:
        show_agreement(path, terminal)
        return
    if path.name == SWEEP_FILE:
        show_sweep(path, terminal)
        return
    schema = read_object(path).values.get("schema")
    if schema != "drllm.evaluation":
        raise RecordError(
            f"{path} says it is {schema!r}; expected 'drllm.evaluation'. Give a result of "
            f"'drllm evaluate', a records file or a folder"
        )
    show_results(path.parent, terminal, [read_object(path).text("task")])


def _show_lines(path: Path, terminal: Terminal) -> None:
    _, first = next(read_lines(path))
    if "paths" in first:
        show_search(read_search(path), terminal)
    elif "optimal_layer_config" in first:
        show_supervision(path, read_supervision(path), terminal)
    elif "reason" in first:
        show_rejected([one for _, one in read_each(path, rejected_question)], terminal)
    elif "error" in first:
        show_failed([one for _, one in read_each(path, failed_question)], terminal)
    elif "systems" in first:
        rows = sum(1 for _ in read_lines(path))
        terminal.say(f"samples        {rows}; systems {', '.join(first['systems'])}")
        terminal.say(f"tables         drllm show {path.parent}")
    elif "epoch" in first:
        _show_metrics(path, terminal)
    else:
        raise RecordError(
            f"{path}, line 1: has {', '.join(sorted(first)) or 'nothing'}; expected 'paths' "
            f"(search), 'error' (questions that failed), 'optimal_layer_config' (supervision), "
            f"'reason' (questions without a target), 'systems' (samples) or 'epoch' (metrics)"
        )


def _show_routers(folder: Path, terminal: Terminal) -> None:
    config = read_object(folder / "router_config.json")
    training = config.values.get("training") or {}
    terminal.say(
        f"base model     {config.values.get('base_model') or 'not named'}, "
        f"{config.whole('num_layers')} layers of width {config.whole('hidden_size')}"
    )
    terminal.say(
        f"routers        {config.whole('num_windows')} windows, "
        f"inner width {config.values.get('router_width')}"
    )
    if training:
        tasks = ", ".join(f"{name} {n}" for name, n in training.get("tasks", {}).items())
        terminal.say(
            f"trained on     {training.get('num_trained')} targets ({tasks}), "
            f"{training.get('num_held_out')} held out, {training.get('steps')} steps"
        )
    if (found := read_reliability(config)) is not None:
        terminal.say(f"calibration    {_calibration(found)}")
    counts = config.values.get("label_counts") or []
    if counts:
        say_classes([sum(column) for column in zip(*counts, strict=True)], terminal)
    if (folder / "metrics.jsonl").is_file():
        _show_metrics(folder / "metrics.jsonl", terminal)
    if (folder / LAYERS_FILE).is_file():
        show_agreement(folder / LAYERS_FILE, terminal)


def _calibration(found: Reliability) -> str:
    """Say how far the probabilities can be believed, and whether that was mended."""
    return (
        f"temperature {plain(found.temperature, 2)} "
        f"({'in the weights' if found.is_folded else 'not in the weights'}), expected calibration "
        f"error {plain(found.error_before, 4)} without and {plain(found.error_after, 4)} with "
        f"it, on {found.num_decisions} held-out decisions"
    )


def _show_metrics(path: Path, terminal: Terminal) -> None:
    rows = [row for _, row in read_lines(path)]
    last = max(row["epoch"] for row in rows)
    table = new_table("metric", title=f"epoch {last}")
    chosen = [row for row in rows if row["epoch"] == last]
    for row in chosen:
        table.add_column(str(row["split"]), justify="right")
    names = [name for name in chosen[0] if name not in ("epoch", "split", "learning_rate")]
    for name in names:
        table.add_row(name, *(plain(row.get(name), 3) for row in chosen))
    terminal.show(table)
