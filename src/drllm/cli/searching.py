"""`drllm search`: the work of the verb, and the search as a stage of a recipe.

Owns who searches (this process or Ray), what is said on the way, and what a dry run prints.
Leaves the search itself to `search` and the targets to `supervision`, which meet only here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from drllm.cli import checks
from drllm.cli.show_search import show_search
from drllm.cli.show_supervision import say_written
from drllm.cli.stages import attached, loaded
from drllm.cli.terminal import Progress, Terminal, duration, new_table
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import ModelConfig, SearchConfig, SuperviseConfig
from drllm.records import (
    SearchRecord,
    clear_half_written,
    manifest_path,
    only_writer,
    read_manifest,
    read_search,
    rejected_path,
    sha256,
    to_lines,
)
from drllm.records.places import check_folder
from drllm.supervision import targets
from drllm.supervision import write as write_supervision
from drllm.tasks.base import Task

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel
    from drllm.search.executors import Executor
    from drllm.search.run import OnBegin, OnProgress, Status

PROMPT_SHOWN = 600
"""Characters of a prompt that are shown; of a longer one, half of them from either end."""


@verb(
    "search",
    help="try layer paths for each question: search.jsonl, then supervision.jsonl",
    example="drllm search --dataset builtin_facts --limit 64 --output-dir data/",
    settings=(ModelConfig, SearchConfig),
    flags=(
        Flag(
            "dry_run",
            "measure a few paths and say what the search will take; writes nothing",
            switch=True,
        ),
    ),
    resumes=True,
)
def search(request: Request, terminal: Terminal) -> None:
    """Search the tasks' questions, then choose target paths by the default rules."""
    config, model = request.of(SearchConfig), request.of(ModelConfig)
    folder = Path(config.output_dir).expanduser()
    config = dataclasses.replace(config, output_dir=str(folder))
    tasks = checks.tasks_to_search(config)
    check_folder(folder, "--output-dir")
    if request.values["dry_run"]:
        _say_forecast(tasks, config, model, terminal)
        return
    was_complete = manifest_path(folder / "search.jsonl").is_file()
    output = run_search_stage(tasks, config, model, terminal)
    if was_complete:
        terminal.say(f"{output} is complete already; nothing was searched anew")
    terminal.say(f"search         {output}")
    records = read_search(output)
    show_search(records, terminal, edits=False)
    _say_failed(output, terminal)
    supervision = folder / "supervision.jsonl"
    with only_writer(folder, "search", "--output-dir"):
        clear_half_written(supervision, manifest_path(supervision), rejected_path(supervision))
        _supervise_by_default(output, records, supervision, terminal)


def run_search_stage(
    tasks: Sequence[Task],
    config: SearchConfig,
    model: ModelConfig,
    terminal: Terminal,
    base: BaseModel | None = None,
) -> Path:
    """Search, or go on with a search, and return `search.jsonl`.

    Args:
        tasks: Where the questions come from.
        config: Settings of the search.
        model: Which base model, and how it is loaded.
        terminal: Where progress is shown.
        base: That model, where it is loaded already.
    """
    with _executor(config, model, terminal, base) as executor:
        from drllm.search.run import run_search

        with terminal.progress("searching", "questions") as progress:
            return run_search(executor, tasks, config, _told(progress), _said_prompts(terminal))


@contextmanager
def _executor(
    config: SearchConfig, model: ModelConfig, terminal: Terminal, base: BaseModel | None
) -> Iterator[Executor]:
    if config.executor == "ray":
        with terminal.busy("starting Ray"):
            from drllm.search.ray import RayExecutor

            workers = RayExecutor(model, num_workers=config.num_workers, address=config.ray_address)
        with workers:
            yield workers
    elif base is None:
        with loaded(model, terminal) as base, _executor(config, model, terminal, base) as local:
            yield local
    else:
        from drllm.search.executors import LocalExecutor

        with attached(base) as routed:
            yield LocalExecutor(routed, base.identity, base.runtime)


def _told(progress: Progress) -> OnProgress:
    """Return what turns the status of a search into a line of progress."""
    started = time.monotonic()

    def tell(status: Status) -> None:
        elapsed = max(time.monotonic() - started, 1e-9)
        note = status.task
        if status.fresh_paths:
            note += f", {status.fresh_paths / elapsed:.1f} paths a second"
        if found := status.found.questions:
            valid, improving = status.found.valid / found, status.found.improving / found
            note += f", {100 * valid:.0f} % valid, {100 * improving:.0f} % improving"
        progress(status.done, status.total, note)

    return tell


def _said_prompts(terminal: Terminal) -> OnBegin:
    """Return what shows a prompt of each task: a wrong template is seen before hours are spent."""

    def say(prompts: Mapping[str, str]) -> None:
        for name, text in prompts.items():
            terminal.note(f"a prompt of {name}, as the model reads it:")
            for line in shortened(text, PROMPT_SHOWN).split("\n"):
                terminal.note(f"  | {line}")

    return say


def shortened(text: str, most: int) -> str:
    """Return a text with its middle left out where it is longer than `most` characters.

    Example:
        >>> shortened("0123456789", 4)
        '01[... 6 characters left out ...]89'
    """
    if len(text) <= most:
        return text
    start, end = text[: most - most // 2], text[-(most // 2) :]
    return f"{start}[... {len(text) - most} characters left out ...]{end}"


def _say_failed(output: Path, terminal: Terminal) -> None:
    manifest = read_manifest(output, "search") or {}
    if failed := manifest.get("num_failed"):
        file = output.with_name("search.failed.jsonl")
        terminal.say(f"failed         {failed} more questions, set aside in {file}")


def _say_forecast(
    tasks: Sequence[Task], config: SearchConfig, model: ModelConfig, terminal: Terminal
) -> None:
    """Print what a search would take; nothing is written."""
    with loaded(model, terminal) as base, attached(base) as routed:
        from drllm.search.forecast import forecast
        from drllm.search.questions import blocks_of

        with terminal.busy("measuring"):
            parts = forecast(routed, blocks_of(tasks, config), config)
    table = new_table("task", "questions", "paths", "executions", "hours", "MB", numbers_from=1)
    for part in parts:
        table.add_row(
            part.task,
            str(part.questions),
            str(part.paths),
            f"{part.executions:.2e}",
            f"{part.seconds / 3600:.3g}",
            f"{part.size_bytes / 1e6:.3g}",
        )
    terminal.show(table)
    seconds, size = sum(p.seconds for p in parts), sum(p.size_bytes for p in parts)
    workers = config.num_workers or 1
    shared = f", {duration(seconds / workers)} on {workers} like it" if workers > 1 else ""
    runtime = base.runtime
    terminal.say(f"time           {duration(seconds)} on one {runtime['device']}{shared}")
    terminal.say(f"disk           {size / 1e6:.3g} MB, twice that while the files are joined")
    for part in parts:
        terminal.say(
            f"measured on    {part.sample_paths} paths of {part.sample_questions} questions of "
            f"{part.task}: {base.name}, {runtime['dtype']} on {runtime['device']}"
        )
    terminal.say(f"a prompt of {parts[0].task}, as the model reads it:\n{parts[0].prompt}")
    terminal.say("nothing was written; leave --dry-run out to search")


def _supervise_by_default(
    search_file: Path, records: Sequence[SearchRecord], output: Path, terminal: Terminal
) -> None:
    found = targets(records, SuperviseConfig()).records
    if output.is_file():
        manifest = read_manifest(output, "supervision")
        # A kill between the file and its manifest leaves exactly what would be written now.
        if manifest is None and output.read_bytes() != to_lines(found).encode():
            terminal.note(f"drllm: {output} has no manifest, so it isn't ours; it stays as it is")
            return
        if manifest is not None and sha256(search_file) in manifest.get("inputs", {}).values():
            terminal.say(f"{output} is made from this search already; it stays as it is")
            return
    if not found:
        terminal.note(
            f"drllm: no question has a target path, so {output.name} was not written; search more "
            f"questions or simulations, or try 'drllm supervise' with another --target"
        )
        return
    summary = write_supervision([search_file], output, SuperviseConfig())
    say_written(output, summary, terminal)
