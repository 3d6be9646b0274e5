"""The verbs `drllm search` and `drllm supervise`: try paths for questions, and choose targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drllm.cli.base_model import check_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS, print_splits
from drllm.cli.show_forecast import show_forecasts
from drllm.cli.show_search import print_targets_file, show_search
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig, SearchConfig, SuperviseConfig
from drllm.pipeline.model import open_model
from drllm.records.manifest import read_manifest
from drllm.records.places import check_file, check_folder, choose_file
from drllm.records.search import SEARCH_FILE, SearchRecords
from drllm.records.supervision import SUPERVISION_FILE
from drllm.reporting.numbers import write_count_of
from drllm.search.questions import SearchQuestion, collect_questions, select_tasks
from drllm.search.targets import SearchTargets, supervise_search
from drllm.supervision.select import check_settings, supervise_to_file


@verb(
    "search",
    example="drllm search --tasks builtin_facts --limit 64 --output-dir data/",
    settings=(ModelConfig, SearchConfig, SuperviseConfig),
    further_settings=(SuperviseConfig,),
    flags=(
        COLUMNS,
        Flag(
            "dry_run",
            "search a few questions and print the time, memory and disk for all; write nothing",
            switch=True,
        ),
    ),
    resumes=True,
)
def search(command: CommandLine, terminal: Terminal) -> None:
    """Try layer paths for each question, then choose its target path."""
    config = command.get_settings(SearchConfig)
    targets_config = command.get_settings(SuperviseConfig)
    folder = Path(config.output_dir).expanduser()

    check_model(command)
    check_folder(folder, "--output-dir")
    with terminal.busy("reading the questions"):
        tasks = select_tasks(config)
        questions = collect_questions(tasks, config)
    check_settings(targets_config, {question.task for question in questions}, config)
    print_splits(tasks, terminal)
    if command.values["dry_run"]:
        _forecast(questions, command, terminal)
        return
    with terminal.busy(LOADING):
        from drllm.search.run import search_questions

    model = command.get_settings(ModelConfig)
    records = search_questions(model, questions, config, folder, listener=terminal)
    _print_search(records, folder, terminal)
    _print_targets(supervise_search(records, targets_config), terminal)


def _print_search(records: SearchRecords, folder: Path, terminal: Terminal) -> None:
    """Print the results of a search, and how many questions failed."""
    file = folder / SEARCH_FILE
    if not records.is_new:
        terminal.say(f"{file} is complete already; nothing was searched again")
    terminal.fact("search", file)
    show_search(records, terminal)
    manifest = read_manifest(file, "search") or {}
    num_failed = manifest.get("num_failed")
    if num_failed:
        questions = write_count_of(num_failed, "more question", "more questions")
        terminal.fact("failed", f"{questions}, set aside in {folder}/search.failed.jsonl")


def _print_targets(targets: SearchTargets, terminal: Terminal) -> None:
    """Print the targets of a search, or why none were written."""
    if targets.supervision is not None:
        print_targets_file(targets.file, targets.supervision.summary, terminal)
    elif targets.is_up_to_date:
        terminal.say(targets.reason)
    else:
        terminal.note(f"drllm: {targets.reason}")


def _forecast(
    questions: Sequence[SearchQuestion], command: CommandLine, terminal: Terminal
) -> None:
    """Search a few questions, and print the time, memory and disk that all questions need."""
    config = command.get_settings(SearchConfig)
    with (
        open_model(command.get_settings(ModelConfig), terminal) as base,
        terminal.busy("measuring"),
    ):
        from drllm.models.routed_model import RoutedModel
        from drllm.search.forecast import forecast_search

        routed = RoutedModel(base.model, tokenizer=base.tokenizer, bypass=base.bypass)
        forecasts = forecast_search(routed, questions, config)
    show_forecasts(forecasts, base, config, terminal)
    terminal.say("nothing was written; to search, leave --dry-run out")


@verb(
    "supervise",
    example="drllm supervise --search data/search.jsonl --output-dir data/",
    settings=(SuperviseConfig,),
    flags=(
        Flag("search", "search.jsonl files to read", many=True, required=True),
        Flag(
            "output_dir",
            "folder for supervision.jsonl, or a file of another name",
            required=True,
            placeholder="PLACE",
            alias="output",
        ),
    ),
)
def supervise_verb(command: CommandLine, terminal: Terminal) -> None:
    """Choose one target path for each searched question."""
    config = command.get_settings(SuperviseConfig)
    output = choose_file(command.path("output_dir"), SUPERVISION_FILE)

    check_file(output, "--output-dir", "supervision")
    supervision = supervise_to_file(command.paths("search"), config, output)

    print_targets_file(output, supervision.summary, terminal)
