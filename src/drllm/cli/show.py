"""`drllm show`: prints any file or folder that drllm wrote, results too. Loads no torch.

Claims about results are the evaluation's own findings and verdicts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from drllm.agreement import compare_by_layer, compute_metrics, display_name, judge_routers
from drllm.cli.parser import CommandLine
from drllm.cli.show_search import LINES, say_classes, show_question, show_unfinished
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, verb
from drllm.errors import RecordError
from drllm.records import results
from drllm.records.codec import read_json, read_json_lines
from drllm.records.healed import HEALED_FILE, read_healed
from drllm.records.layers import LAYERS_FILE, Layers
from drllm.records.removed import refuse_menu
from drllm.records.search import read_search
from drllm.records.static_paths import PATHS_FILE, read_paths
from drllm.reporting import tuned
from drllm.reporting.evaluated import measured_line
from drllm.reporting.numbers import against, difference, label, plain, signed
from drllm.search import CHUNKS_FOLDER
from drllm.statistics.verdicts import Differences

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
        Flag("question", "id of a searched question, to draw the paths tried on it", value="ID"),
    ),
)
def show_place(command: CommandLine, terminal: Terminal) -> None:
    """Print any file or folder that drllm wrote."""
    place, question = command.path("place"), command.values["question"]
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
    """Print any file or folder that drllm wrote; a RecordError for all else and broken files."""
    if place.name == CHUNKS_FOLDER and place.is_dir():
        show_unfinished(place, terminal)
    elif place.is_dir():
        _show_folder(place, terminal)
    elif place.suffix == ".json":
        _show_json(place, terminal)
    elif place.suffix == ".jsonl" or not place.exists():
        _show_lines(place, terminal)
    else:
        raise RecordError(f"{place} is no folder and no .json[l]; give one that drllm has written")


def _show_folder(folder: Path, terminal: Terminal) -> None:
    if (folder / "router_config.json").is_file():
        _show_routers(folder / "router_config.json", terminal)
        return
    names = ("search.jsonl", "search.failed.jsonl", "supervision.jsonl")
    more = ("routers/router_config.json", PATHS_FILE, HEALED_FILE)
    files = [folder / name for name in (*names, *more)]
    parts: list[tuple[Path, Renderer]] = [(file, show) for file in files if file.is_file()]
    if (folder / CHUNKS_FOLDER).is_dir() and not (folder / "search.jsonl").is_file():
        parts.insert(0, (folder / CHUNKS_FOLDER, show_unfinished))
    for place in (folder / "eval", folder):
        schemas = map(results.schema_of, results.results_in(place))
        parts += [(place, show_results)] * (results.EVALUATION_SCHEMA in schemas)
    if not parts:
        refuse_menu(folder)
        raise RecordError(f"{folder} holds no records or results; give a folder that a stage wrote")
    for number, (place, print_it) in enumerate(parts):
        if number:
            terminal.say()
        terminal.say(str(place.parent if place.name == "router_config.json" else place))
        print_it(place, terminal)
    if (folder / "report.html").is_file():
        terminal.say()
        terminal.fact("report", folder / "report.html")


def _show_json(path: Path, terminal: Terminal) -> None:
    refuse_menu(path)
    if path.name in _JSON:
        _JSON[path.name](path, terminal)
    elif path.name.endswith(".manifest.json"):
        _show_lines(path.with_name(path.name.replace(".manifest.json", ".jsonl")), terminal)
    else:
        show_results(path.parent, terminal, [results.read_evaluation(path).task])


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
    has = ", ".join(sorted(first)) or "nothing"
    raise RecordError(f"{path}, line 1: has {has}; expected {known}")


def _show_samples(path: Path, terminal: Terminal) -> None:
    rows = _rows(path)
    terminal.fact("samples", f"{len(rows)}; systems {', '.join(rows[0]['systems'])}")
    terminal.fact("tables", f"drllm show {path.parent}")


def _show_metrics(path: Path, terminal: Terminal) -> None:
    rows = _rows(path)
    last = max(row["epoch"] for row in rows)
    chosen = [row for row in rows if row["epoch"] == last]
    names = [name for name in chosen[0] if name not in ("epoch", "split", "learning_rate")]
    parts = {str(row["split"]): row for row in chosen}
    _show_metric_table(names, parts, f"epoch {last}", terminal)


def _show_metric_table(
    names: Iterable[str], columns: Mapping[str, Any], title: str, terminal: Terminal
) -> None:
    rows = ([name, *(plain(each.get(name), 3) for each in columns.values())] for name in names)
    terminal.table("|".join(["metric", *columns]), rows, title=title, numbers_from=1)


def _show_routers(path: Path, terminal: Terminal) -> None:
    config, folder = read_json(path, dict[str, Any]), path.parent
    training = config.get("training") or {}
    shape = f"{config.get('num_layers')} layers of width {config.get('hidden_size')}"
    terminal.fact("base model", f"{config.get('base_model') or 'not named'}, {shape}")
    windows, width = config.get("num_windows"), config.get("router_width")
    terminal.fact("routers", f"{windows} windows, inner width {width}")
    if training:
        tasks = ", ".join(f"{name} {n}" for name, n in training.get("tasks", {}).items())
        n, out, steps = map(training.get, ("num_trained", "num_held_out", "steps"))
        terminal.fact("trained on", f"{n} targets ({tasks}), {out} held out, {steps} steps")
    if counts := config.get("label_counts"):
        say_classes([sum(column) for column in zip(*counts, strict=True)], terminal)
    for name, render in (("metrics.jsonl", _show_metrics), (LAYERS_FILE, _show_agreement)):
        if (folder / name).is_file():
            render(folder / name, terminal)


def _show_agreement(path: Path, terminal: Terminal) -> None:
    """Compare the saved routers with decisions that ignore the question, on each part."""
    layers = read_json(path, Layers)
    for part, systems in layers.parts.items():
        scores = {display_name(name): compute_metrics(counts) for name, counts in systems.items()}
        title = f"after epoch {layers.epoch}, on {layers.title(part)}"
        _show_metric_table(next(iter(scores.values())), scores, title, terminal)
    terminal.say(compare_by_layer(layers.parts[layers.judged]))
    terminal.say(judge_routers(layers.parts))


def show_results(folder: Path, terminal: Terminal, tasks: Sequence[str] = ()) -> None:
    """Print the tables of an `eval` folder: of some tasks, or of all."""
    for evaluation in results.read_results(folder):
        if not tasks or evaluation.task in tasks:
            show_evaluation(evaluation, terminal)
    show_measured(folder, terminal)


def show_measured(folder: Path, terminal: Terminal) -> None:
    """Print the measured times of an `eval` folder, where it holds any."""
    if measured := results.read_latency(folder):
        terminal.say(measured_line(measured))


def show_evaluation(evaluation: results.Evaluation, terminal: Terminal) -> None:
    """Print what one task's results show, the tables, then what else is to be known."""
    terminal.say(f"{evaluation.task}, {evaluation.split}: {evaluation.num_questions} questions")
    for line in evaluation.verdict:
        terminal.say(line)
    terminal.table(
        f"system|layers\nrun|{evaluation.score}\n%|minus base's\n(95 % interval)|token\nloss"
        + ("|verdict\non routed" if evaluation.routed else "|verdict"),
        [_system(system, evaluation) for system in evaluation.systems],
        numbers_from=1,
    )
    if any(point.setting for point in evaluation.curve):
        terminal.table(
            f"depth|system|layers\nrun|{evaluation.score}\n%|minus base's\n(95 % interval)"
            "|token\nloss",
            _depths(evaluation.curve),
            title="at other depths; next-token loss minus base's",
            numbers_from=2,
        )
    for finding in evaluation.findings[len(evaluation.verdict) :]:
        terminal.say(finding)


def _system(system: results.System, of: results.Evaluation) -> list[Text]:
    found = system.against_base
    verdict = against(system) if of.routed or found is None else found.accuracy
    cells = [
        system.name + (f" ×{system.draws}" if system.draws > 1 else ""),
        plain(system.executions, 2),
        plain(100 * system.accuracy),
        difference(found.accuracy if found else None),
        plain(system.text_loss, 3),
        label(verdict),
    ]
    is_ours = of.compared is not None and system.name == of.compared.name
    return [Text(cell, style="bold" if is_ours else "") for cell in cells]


def _depths(curve: Sequence[results.Point]) -> Iterator[list[str]]:
    for setting in dict.fromkeys(point.setting for point in curve if point.setting):
        name = setting
        for point in curve:
            if point.setting == setting:
                numbers = plain(point.executions, 2), plain(100 * point.accuracy)
                change = difference(point.against_base.accuracy if point.against_base else None)
                yield [name, point.system, *numbers, change, _losses(point.against_base)[1]]
                name = ""
        yield []


def _losses(found: Differences | None) -> list[str]:
    verdicts = (found.gold_logprob, found.text_loss) if found else (None, None)
    return [signed(verdict.mean if verdict else None) for verdict in verdicts]


def show_paths(file: Path, terminal: Terminal) -> None:
    """Print the paths of a `paths.json`, task by task, and what is certified."""
    found = read_paths(file)
    for task in found.tasks:
        rows = tuned.path_rows(found, task)
        terminal.table(tuned.COLUMNS, rows, f"{task}, objective {found.objective[task]}", 1)
        sentence = tuned.compare_test_with_fit(found, task)
        if sentence:
            terminal.say(sentence)
    if found.division:
        terminal.say(found.division)
    for path in found.paths[1:]:
        terminal.fact(path.name, tuned.describe_path(found, path))
    for sentence in found.choice.sentences() if found.choice else ():
        terminal.say(sentence)
    terminal.fact("paths", file)


def show_healed(file: Path, terminal: Terminal) -> None:
    """Print a healed path: its losses by source, and how it was trained."""
    found = read_healed(file)
    terminal.table(tuned.LOSS_COLUMNS, tuned.loss_rows(found), tuned.LOSS_CAPTION, 1)
    terminal.say(tuned.describe_healing(found))
    terminal.fact(found.name, found.path.with_adapter("").edits(found.num_layers))
    terminal.fact("adapter", f"rank {found.rank}, from layer {found.first_layer} on")
    terminal.fact("healed path", file.parent)


_JSON: dict[str, Renderer] = {
    "router_config.json": _show_routers,
    "run.manifest.json": lambda path, terminal: _show_folder(path.parent, terminal),
    results.LATENCY_FILE: lambda path, terminal: show_measured(path.parent, terminal),
    LAYERS_FILE: _show_agreement,
    PATHS_FILE: show_paths,
    HEALED_FILE: show_healed,
}
"""By name, what prints a file."""

_LINES: dict[str, tuple[str, Renderer]] = {
    **LINES,
    "systems": ("samples", _show_samples),
    "epoch": ("metrics", _show_metrics),
}
