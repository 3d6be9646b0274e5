"""Finds the files of targets for `drllm train`, also where the command names no files.

The training command that the Dr.LLM paper's code documents names no files. Its flags `--with-squad`
and `--with-commonsense` add the targets of a task (docs/differences.md, D-31).
"""

import shlex
from pathlib import Path

from drllm.cli.command_line import CommandLine
from drllm.config import ModelConfig
from drllm.config.fields import to_flag
from drllm.errors import ConfigError
from drllm.records.search import SEARCH_FILE
from drllm.records.supervision import SUPERVISION_FILE, join_supervision, read_supervision

SEARCH_FOLDERS = (Path("data/mcts_paths"), Path("data"))
"""Where the published search command writes: its `--output_dir`, and the default of that flag."""

SWITCHES = {"with_squad": "squad_v2", "with_commonsense": "commonsense_qa"}
"""The switches of the published training command, and the task whose targets each switch adds."""


def find_supervision_files(command: CommandLine) -> list[Path]:
    """Return the files of targets that a training reads, including the files of the switches."""
    files = command.paths("supervision") or [_find_default_file(command)]
    switch_files = []
    for switch, task in SWITCHES.items():
        if command.values[switch]:
            switch_files.append(_find_switch_file(to_flag(switch), task, files, command))
    return files + switch_files


def _find_default_file(command: CommandLine) -> Path:
    """Return the file of targets from the published search; raise ConfigError if there is none."""
    places = [folder / SUPERVISION_FILE for folder in SEARCH_FOLDERS]
    files = [file for file in places if file.is_file()]
    if len(files) > 1:
        raise ConfigError(
            f"both {' and '.join(map(str, files))} exist; give the file to train on as "
            f"--supervision, or both files"
        )
    if files:
        return files[0]
    remedy = f"search first: {_search_command(command, 'arc,dart', SEARCH_FOLDERS[0])}"
    for file in reversed(places):  # the remedy for the first place wins
        search = file.with_name(SEARCH_FILE)
        if search.is_file():  # the search is there, but its default rule chose no targets
            remedy = f"make one: drllm supervise --search {search} --output-dir {file}"
    place_names = " nor ".join(map(str, places))
    raise ConfigError(
        f"train needs --supervision FILE, since there is neither {place_names}; {remedy}"
    )


def _find_switch_file(flag: str, task: str, files: list[Path], command: CommandLine) -> Path:
    """Return the file of targets that a switch adds; raise ConfigError if it can't be added.

    Args:
        flag: The flag of the switch.
        task: The task whose targets the switch adds.
        files: The files that are read without the switch.
        command: The command line, for messages.
    """
    if any(record.task == task for record in join_supervision(files)):
        raise ConfigError(
            f"{flag} has no effect: {', '.join(map(str, files))} already holds targets of "
            f"{task}; leave it out"
        )
    file = SEARCH_FOLDERS[1] / task / SUPERVISION_FILE
    if not file.is_file():
        raise ConfigError(
            f"{flag} needs targets of {task} in {file}, which doesn't exist; make them: "
            f"{_search_command(command, task, file.parent)}"
        )
    other_tasks = {record.task for record in read_supervision(file)} - {task}
    if other_tasks:
        raise ConfigError(
            f"{flag} adds targets of {task}, but {file} holds {', '.join(sorted(other_tasks))} "
            f"too; give the file as --supervision instead"
        )
    return file


def _search_command(command: CommandLine, dataset: str, folder: Path) -> str:
    """Return the command that searches a data set as the published command does."""
    model = shlex.quote(command.get_settings(ModelConfig).model)
    place = shlex.quote(str(folder))
    return (
        f"drllm search --model {model} --tasks {dataset} --output-dir {place} "
        f"--num-simulations 50 --budget 2"
    )
