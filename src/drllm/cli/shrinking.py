"""The verb `drllm shrink`: a smaller checkpoint, and what it loses."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from drllm.cli.base_model import check_model
from drllm.cli.command_line import CommandLine
from drllm.cli.questions import COLUMNS
from drllm.cli.show_shrink import show_models
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.config import ModelConfig, ShrinkConfig
from drllm.errors import NotShownError
from drllm.model.places import read_num_layers
from drllm.pipeline.shrink_power import Power, find_power
from drllm.pipeline.shrink_questions import ShrinkQuestions, read_questions
from drllm.records.places import check_folder, check_new_folder
from drllm.records.shrink import SHRINK_FILE, find_work_folder
from drllm.work.listener import write_minutes

NOT_SHOWN = 1  # the exit status if no candidate is shown to lose less than the limits


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
            "if no checkpoint is shown to lose little, write the one whose test failed last",
            switch=True,
        ),
    ),
    resumes=True,
)
def shrink_verb(command: CommandLine, terminal: Terminal) -> int | None:
    """Write a smaller checkpoint that is shown to lose little on a task."""
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
    with terminal.busy("reading the questions"):
        questions = read_questions(config, config.tasks)
    powers = _find_powers(questions, config)
    if not (force or all(power.is_enough for power in powers)):
        terminal.say(_describe_division(questions))
        _refuse(powers, terminal)
        return NOT_SHOWN
    terminal.say(f"{_describe_division(questions)} · {_describe_plan(questions, config)}")
    for power in powers:
        terminal.note(power.sentence)
    with terminal.busy(LOADING):
        from drllm.pipeline.shrink import shrink_questions

    model = command.get_settings(ModelConfig)
    try:
        record = shrink_questions(model, questions, config, output, force=force, listener=terminal)
    except NotShownError as error:
        terminal.say(f"NOT SHOWN: {error}.")
        return NOT_SHOWN

    show_models(record, terminal)
    if record.written is None:
        return NOT_SHOWN
    _print_next_steps(output, terminal)
    return None


def _describe_division(questions: ShrinkQuestions) -> str:
    """Say how the questions are divided."""
    to_find = questions.count_to_find()
    repeats = {splits.task.name: splits.task.describe_repeats() for splits in questions.tasks}
    parts = []
    for name, num_held_out in questions.count_held_out().items():
        part = f"{name}: {to_find[name]:,} to find and heal paths, {num_held_out:,} held out"
        if repeats.get(name):
            part += f"; {repeats[name]}"
        parts.append(part)
    return " · ".join(parts)


def _describe_plan(questions: ShrinkQuestions, config: ShrinkConfig) -> str:
    """Say what may be lost, and how long it takes."""
    if config.layers is not None:
        goal = f"{config.layers} layers stay, however much is lost"
    elif config.save is not None:
        goal = f"{config.save} of the layers go, however much is lost"
    elif questions.graded_tasks:
        goal = (
            f"at most {config.max_drop:g} points of accuracy and {config.max_loss_increase:g} nats "
            f"a token may be lost"
        )
    else:
        goal = (
            f"the loss may rise by at most {config.max_loss_increase:g} nats a token, and no "
            f"answers are graded"
        )
    minutes = write_minutes(config.minutes)
    if config.has_given_size:
        times = f"finding the path takes as long as its bar says, healing it at most {minutes} min"
    else:
        times = f"about {minutes} min to find and heal paths"
    return (
        f"{goal} · {times}; how long measuring takes is shown once it has begun; Ctrl-C keeps all "
        f"work"
    )


def _find_powers(questions: ShrinkQuestions, config: ShrinkConfig) -> list[Power]:
    """Return what the held-out questions can show; empty if nothing has to be shown."""
    if config.has_given_size:
        return []
    return find_power(questions, config)


def _refuse(powers: Sequence[Power], terminal: Terminal) -> None:
    """Print which questions can't show what is asked for, and what to do."""
    for power in powers:
        if not power.is_enough:
            terminal.say(f"NOT SHOWN: {power.sentence}.")
    terminal.say(
        "Nothing was done. Give more questions, allow a larger loss, or give --force to go on."
    )


def _print_next_steps(output: Path, terminal: Terminal) -> None:
    """Print where the checkpoint is, and commands that can be pasted."""
    terminal.fact("checkpoint", f"{output}, loads with transformers alone")
    terminal.fact("numbers", output / SHRINK_FILE)
    folder = str(output)
    terminal.command(shlex.join(["drllm", "show", folder]))
    terminal.command(shlex.join(["drllm", "generate", "--model", folder, "What is a cloud?"]))
