"""The verb `drllm shrink`: a smaller checkpoint for a task, or an honest no."""

from __future__ import annotations

import shlex
from pathlib import Path

from drllm.cli.base_model import check_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig, ShrinkConfig
from drllm.model.places import read_num_layers
from drllm.records.places import check_folder, check_new_folder
from drllm.records.shortened import SHRINK_FILE, ShrinkRecord, find_work_folder, read_shrink
from drllm.tasks.parts import read_questions

NOT_SHOWN = 1  # the exit status if no candidate passed


@verb(
    "shrink",
    example="drllm shrink smollm2-135m questions.jsonl smaller/ --max-drop 3",
    settings=(ModelConfig, ShrinkConfig),
    flags=(
        Flag(
            "model",
            "base model: an alias, a hub id or a local folder",
            required=True,
            positional=True,
            title="MODEL",
        ),
        Flag(
            "tasks",
            "questions of the task that the smaller model is for: a file (.jsonl, .json, .csv, "
            ".tsv, .parquet), or the name of a task",
            required=True,
            positional=True,
            title="QUESTIONS",
        ),
        Flag(
            "output_dir",
            "folder for the smaller checkpoint; the work is kept beside it, in OUT.work",
            required=True,
            positional=True,
            title="OUT",
        ),
        COLUMNS,
        Flag(
            "force",
            "if no checkpoint is shown to lose little, write the one whose test failed",
            switch=True,
        ),
    ),
    resumes=True,
)
def shrink_verb(command: CommandLine, terminal: Terminal) -> int | None:
    """Write a smaller checkpoint for a task, and say what it gains and loses."""
    config = command.get_settings(ShrinkConfig)
    output = command.path("output_dir")
    force = bool(command.values["force"])
    config.check()
    check_model(command)
    num_layers = read_num_layers(command.get_settings(ModelConfig))
    if num_layers is not None:
        config.choose_num_skipped(num_layers)
    check_new_folder(output)
    check_folder(output, "OUT")
    check_folder(find_work_folder(output), "OUT.work")
    questions = read_questions(config)
    with terminal.busy("counting the questions"):
        from drllm.prune.power import find_power
    held_out = questions.count("held out")
    for name, number in questions.count("fit").items():
        checked = questions.count("check")[name]
        counts = f"{number:,} to learn from, {checked:,} to check on, {held_out[name]:,} held out"
        terminal.say(f"{name}: {counts}")
    powers = [] if config.has_given_size else find_power(questions, config)
    if not force and not all(power.is_enough for power in powers):
        for power in powers:
            if not power.is_enough:
                terminal.say(f"NOT SHOWN: {power.sentence}.")
        terminal.say(
            "Nothing was done. Give more questions, allow a larger loss, or give --force to go on."
        )
        return NOT_SHOWN
    for power in powers:
        terminal.note(power.sentence)
    with terminal.busy(LOADING):
        from drllm.prune.shrink import shrink

    model = command.get_settings(ModelConfig)
    record = shrink(model, questions, output, config, force=force, listener=terminal)

    show_record(record, terminal)
    if record.chosen is None:
        return NOT_SHOWN
    terminal.fact("checkpoint", f"{output}, loads with transformers alone")
    terminal.fact("numbers", output / SHRINK_FILE)
    terminal.command(shlex.join(["drllm", "generate", "--model", str(output), "What is a cloud?"]))
    return None


def show_shrink(file: Path, terminal: Terminal) -> None:
    """Print a `shrink.json`."""
    show_record(read_shrink(file), terminal)


def show_record(record: ShrinkRecord, terminal: Terminal) -> None:
    """Print the table of the models, then the verdict."""
    columns, rows = record.list_rows()
    terminal.table("|".join(columns), rows)
    for note in record.notes:
        terminal.say(note)
    terminal.say(record.verdict)
