"""`drllm search`: the verb, and what a dry run prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from drllm.cli.show_search import show_search
from drllm.cli.show_supervision import say_written
from drllm.cli.stages import attached, loaded
from drllm.cli.terminal import Terminal, duration, new_table
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import ModelConfig, SearchConfig, SuperviseConfig
from drllm.records import (
    clear_half_written,
    manifest_path,
    only_writer,
    read_manifest,
    rejected_path,
    sha256,
    to_lines,
)
from drllm.records.places import check_folder
from drllm.records.searched import SearchRecords
from drllm.search.questions import SearchQuestion, questions_of
from drllm.supervision import targets
from drllm.supervision.select import write


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
    questions = questions_of(None, config)
    check_folder(folder, "--output-dir")
    if request.values["dry_run"]:
        _say_forecast(questions, config, model, terminal)
        return
    from drllm.search.run import search_paths

    found = search_paths(model, questions, config, folder, listener=terminal)
    assert found.file is not None
    if not found.is_new:
        terminal.say(f"{found.file} is complete already; nothing was searched again")
    terminal.say(f"search         {found.file}")
    show_search(found, terminal, edits=False)
    _say_failed(found.file, terminal)
    supervision = folder / "supervision.jsonl"
    with only_writer(folder, "search", "--output-dir"):
        clear_half_written(supervision, manifest_path(supervision), rejected_path(supervision))
        _supervise_by_default(found, supervision, terminal)


def _say_failed(output: Path, terminal: Terminal) -> None:
    manifest = read_manifest(output, "search") or {}
    if failed := manifest.get("num_failed"):
        file = output.with_name("search.failed.jsonl")
        terminal.say(f"failed         {failed} more questions, set aside in {file}")


def _say_forecast(
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    model: ModelConfig,
    terminal: Terminal,
) -> None:
    """Print what a search would take; nothing is written."""
    with loaded(model, terminal) as base, attached(base) as routed:
        from drllm.search.run import forecast

        with terminal.busy("measuring"):
            parts = forecast(routed, questions, config)
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


def _supervise_by_default(searched: SearchRecords, output: Path, terminal: Terminal) -> None:
    found = targets(searched, SuperviseConfig())
    if output.is_file() and searched.file is not None:
        manifest = read_manifest(output, "supervision")
        # A kill between the file and its manifest leaves exactly what would be written now.
        if manifest is None and output.read_bytes() != to_lines(found).encode():
            terminal.note(f"drllm: {output} has no manifest, so it isn't ours; it stays as it is")
            return
        if manifest is not None and sha256(searched.file) in manifest.get("inputs", {}).values():
            terminal.say(f"{output} is made from this search already; it stays as it is")
            return
    if not found:
        terminal.note(
            f"drllm: no question has a target path, so {output.name} was not written; search more "
            f"questions or simulations, or try 'drllm supervise' with another --target"
        )
        return
    write(found, [searched], output, SuperviseConfig())
    say_written(output, found.summary, terminal)
