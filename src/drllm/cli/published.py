"""Where the published training finds what the published search has left: it names no file.

`--with-squad` and `--with-commonsense` add targets (docs/differences.md, D-31).
"""

from pathlib import Path

from drllm.cli.parser import CommandLine
from drllm.config import ModelConfig
from drllm.config.fields import flag_of
from drllm.errors import ConfigError
from drllm.records.supervision import join_supervision, read_supervision

FOLDERS = (Path("data/mcts_paths"), Path("data"))
"""`--output_dir` of the published search command, and the published (and our) default of it."""

ADDED = {"with_squad": "squad_v2", "with_commonsense": "commonsense_qa"}
"""Switch of the published training → the task whose targets it adds."""


def supervision_files(command: CommandLine) -> list[Path]:
    """Return the files that a training reads; those of `--with-…` are added to the others."""
    files = command.paths("supervision") or [_left_by_the_search(command)]
    added = [(flag_of(switch), task) for switch, task in ADDED.items() if command.values[switch]]
    return files + [_added(flag, task, files, command) for flag, task in added]


def _left_by_the_search(command: CommandLine) -> Path:
    places = [folder / "supervision.jsonl" for folder in FOLDERS]
    found = [file for file in places if file.is_file()]
    if not found:
        remedy = f"search first: {_search_command(command, 'arc,dart', FOLDERS[0])}"
        for file in reversed(places):
            if (searched := file.with_name("search.jsonl")).is_file():  # no targets by default
                remedy = f"make one: drllm supervise --search {searched} --output {file}"
        neither = " nor ".join(map(str, places))
        raise ConfigError(
            f"train needs --supervision FILE, since there is neither {neither}; {remedy}"
        )
    if len(found) > 1:
        raise ConfigError(
            f"both {' and '.join(map(str, found))} are there; give the one to learn from as "
            f"--supervision, or both"
        )
    return found[0]


def _added(flag: str, task: str, before: list[Path], command: CommandLine) -> Path:
    """Return the file of a task that is to be added to others."""
    if any(record.task == task for record in join_supervision(before)):
        raise ConfigError(
            f"{flag} has no effect: {', '.join(map(str, before))} already holds targets of "
            f"{task}; leave it out"
        )
    file = FOLDERS[1] / task / "supervision.jsonl"
    if not file.is_file():
        raise ConfigError(
            f"{flag} needs targets of {task} in {file}, which isn't there; make them: "
            f"{_search_command(command, task, file.parent)}"
        )
    if others := {record.task for record in read_supervision(file)} - {task}:
        raise ConfigError(
            f"{flag} adds targets of {task}, but {file} holds {', '.join(sorted(others))} too; "
            f"give the file as --supervision instead"
        )
    return file


def _search_command(command: CommandLine, dataset: str, folder: Path) -> str:
    return (
        f"drllm search --model {command.of(ModelConfig).model} --dataset {dataset} "
        f"--output_dir {folder} --num_simulations 50 --budget 2"
    )
