"""Reads what `drllm generate` needs before the model is loaded, and checks its flags.

These are the prompts, the routers or the static path, and how prompts are rendered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm.cli.base_model import check_layers, choose_model, read_routers
from drllm.cli.command_line import CommandLine
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import VERBS
from drllm.config import DepthConfig, GenerateConfig
from drllm.config.fields import to_flag
from drllm.errors import ConfigError, TaskError
from drllm.models.routers.places import check_place
from drllm.records.places import check_file, choose_file
from drllm.records.static_paths import NamedPath, read_path
from drllm.tasks.row_files import describe_place, read_rows
from drllm.tasks.rows import read_messages, read_text

if TYPE_CHECKING:
    from drllm.model.prompts import PromptForm
    from drllm.models.routers.stack import RouterStack

ANSWERS_FILE = "answers.jsonl"
PROMPT_KEYS = ("prompt", "question", "messages")
"""The keys under which a row of a file may have its prompt; a row has exactly one of them."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of a file of prompts.

    Attributes:
        line: The number of the line, from 1.
        id: The row's own id, or `line-N`.
        prompt: A text, or the messages of a conversation.
    """

    line: int
    id: str | int
    prompt: str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a command reads before the model is loaded.

    Attributes:
        prompt: The prompt to answer; None for a file of prompts or a chat.
        file: The file of prompts; None without `--file`.
        rows: The rows of the file.
        routers: The routers of `--routers`; None without the flag.
        path: The static path of `--path`; None without the flag.
        calibration: The prompts of `--calibration`, each with whether it is already rendered.
        form: How prompts are rendered.
    """

    prompt: str | None
    file: Path | None
    rows: Sequence[PromptRow]
    routers: RouterStack | None
    path: NamedPath | None
    calibration: Sequence[tuple[str, bool]]
    form: PromptForm


def check_flags(command: CommandLine, config: GenerateConfig, depth: DepthConfig) -> None:
    """Refuse flags that exclude each other, and flags without effect."""
    prompt = command.values["prompt"]
    file = command.values["file"]
    output = command.values["output_dir"]
    routers = command.values["routers"]
    path = command.values["path"]
    if routers and path:
        raise ConfigError(
            f"--routers {routers} and --path {path} would both choose the layers; leave one out"
        )
    if prompt and not _is_unicode(prompt):
        raise ConfigError(f"PROMPT {prompt!r} is not a UTF-8 text")
    if prompt and file:
        raise ConfigError(f"PROMPT {prompt!r} and --file {file} are both given; give one of them")
    if output and not file:
        raise ConfigError(f"--output-dir {output} has no effect without --file; leave it out")
    if config.batch_size and not file:
        raise ConfigError(
            f"--batch-size {config.batch_size} has no effect without --file; leave it out"
        )
    setting = depth.find_setting()
    if setting is not None and not routers:
        raise ConfigError(f"{to_flag(setting)} has no effect without routers; leave it out")


def find_output(command: CommandLine) -> Path | None:
    """Return the file for the answers to a file of prompts; None to print them."""
    place = command.optional_path("output_dir")
    return None if place is None else choose_file(place, ANSWERS_FILE)


def check_output(output: Path | None, command: CommandLine) -> None:
    """Refuse a file for answers that can't be written, or that is the file of prompts."""
    if output is None:
        return
    check_file(output, "--output-dir")
    file = command.path("file")
    # If there is no such file, the error comes when it is read.
    if output.exists() and file.exists() and output.samefile(file):
        raise ConfigError(
            f"--output-dir {command.values['output_dir']} is the file of prompts itself; give "
            f"another name"
        )


def read_inputs(
    command: CommandLine, config: GenerateConfig, depth: DepthConfig, terminal: Terminal
) -> Inputs:
    """Read and check the prompts, the routers and the path of a command."""
    file = command.optional_path("file")
    prompt = None
    rows: list[PromptRow] = []
    if file is not None:
        rows = read_prompts(file)
    elif not _is_chat(command, terminal):
        prompt = command.values["prompt"] or _read_standard_input()
    with terminal.busy("reading the routers"):
        calibration = _read_calibration(depth)
        routers = _read_routers(command)
    path = _read_path(command)
    form = _choose_form(config, routers)
    _check_conversations(file, rows, form, config)
    return Inputs(prompt, file, rows, routers, path, calibration, form)


def _is_unicode(text: str) -> bool:
    """Tell whether a word of the command line was written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_chat(command: CommandLine, terminal: Terminal) -> bool:
    """Tell whether to chat: there is no prompt, and both input and output are a terminal."""
    if command.values["prompt"] or command.values["file"]:
        return False
    return sys.stdin is not None and sys.stdin.isatty() and terminal.out.is_terminal


def _read_standard_input() -> str:
    """Read the prompt from standard input; raise ConfigError if there is none."""
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    text = ""
    if is_piped:
        try:
            text = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise ConfigError("the prompt on standard input is not a UTF-8 text") from error
    if not text:
        raise ConfigError(
            f"generate needs PROMPT (what to answer), here or on standard input, or --file "
            f"(prompts to answer, .jsonl), for example: {VERBS['generate'].example}"
        )
    return text


def _read_calibration(depth: DepthConfig) -> list[tuple[str, bool]]:
    """Read the prompts of `--calibration`, each with whether it is already rendered."""
    if depth.calibration is None:
        return []
    from drllm.models.routing.depth_control import read_calibration

    return read_calibration(Path(depth.calibration).expanduser())


def _read_routers(command: CommandLine) -> RouterStack | None:
    """Read the routers of `--routers`; return None without the flag."""
    place = command.optional_path("routers")
    if place is None:
        return None
    check_place(place)
    _, routers = read_routers(place)
    return routers


def _read_path(command: CommandLine) -> NamedPath | None:
    """Read and check the static path of `--path`; return None without the flag."""
    place = command.optional_path("path")
    if place is None:
        return None
    path = read_path(str(place))
    check_layers(choose_model(command), [path])
    return path


def _choose_form(config: GenerateConfig, routers: RouterStack | None) -> PromptForm:
    """Choose how to render prompts.

    It is what `--chat` or `--no-chat` says; without these flags, the form that the routers were
    trained on. If the routers don't record it, or without routers, prompts get the chat template.
    """
    from drllm.model.prompts import PromptForm

    if config.chat is not None:
        return PromptForm(chat=config.chat)
    if routers is None or routers.config.prompt_form is None:
        return PromptForm(chat=True)
    return routers.config.prompt_form


def _check_conversations(
    file: Path | None, rows: Sequence[PromptRow], form: PromptForm, config: GenerateConfig
) -> None:
    """Refuse conversations if the chat template isn't used."""
    if form.chat:
        return
    for row in rows:
        if isinstance(row.prompt, str):
            continue
        reason = "--no-chat is given"
        if config.chat is None:
            reason = "the routers were trained without it"
        raise TaskError(
            f"{file}, line {row.line}: 'messages' need the chat template, and {reason}; give "
            f"--chat, or 'prompt' instead"
        )


def read_prompts(path: Path) -> list[PromptRow]:
    """Read a file of prompts.

    The file holds JSON lines with `prompt`, `question` or `messages`, and may be gzipped. Raises
    TaskError for a row that can't be answered, and for an id that occurs twice.
    """
    rows: list[PromptRow] = []
    line_numbers: dict[str, int] = {}  # by id
    for line, values in read_rows(path):
        try:
            row = _read_prompt_row(values, line)
        except TaskError as error:
            raise TaskError(f"{describe_place(path, line)}: {error}") from error
        row_id = str(row.id)
        if row_id in line_numbers:
            raise TaskError(
                f"{describe_place(path, line)}: line {line_numbers[row_id]} has the id {row.id!r} "
                f"too; ids must differ"
            )
        line_numbers[row_id] = line
        rows.append(row)
    return rows


def _read_prompt_row(values: dict[str, Any], line: int) -> PromptRow:
    """Read one row of a file of prompts; raise TaskError for a row that can't be answered."""
    keys = [key for key in PROMPT_KEYS if key in values]
    if not keys:
        raise TaskError(f"the row holds none of {', '.join(PROMPT_KEYS)}; give one of them")
    if len(keys) > 1:
        raise TaskError(f"the row holds both {keys[0]!r} and {keys[1]!r}; give one of them")
    key = keys[0]
    row_id = values.get("id", f"line-{line}")
    if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
        raise TaskError(f"'id' is {row_id!r}; expected text or a whole number")
    if key == "messages":
        read_messages(values)
        return PromptRow(line, row_id, values["messages"])
    return PromptRow(line, row_id, read_text(values, key))
