"""Parses a command line into checked settings (`parse`).

A flag wins over the file given as `--config`, and the file wins over the default. The message about
a mistake is one line that names the flag, its value, and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drllm.cli.arguments import read_arguments
from drllm.cli.command_line import CommandLine
from drllm.cli.settings_file import check_value, read_settings
from drllm.cli.verbs import Flag, Verb, find_verb, list_flags
from drllm.config.fields import convert_text, make_settings
from drllm.errors import ConfigError

MAX_SHOWN = 80  # characters of a wrong value that a message shows


def parse(words: Sequence[str]) -> CommandLine:
    """Parse a verb and its flags; raise ConfigError for a mistake of the user."""
    verb = find_verb(words[0])
    arguments = read_arguments(verb, words[1:])
    values: dict[str, Any] = {}  # of settings and of the verb's own flags, by name
    for file in arguments.pop("config", []):
        values.update(read_settings(file, verb))
    values.update(arguments)
    flag_values: dict[str, Any] = {}  # of the verb's own flags
    for flag in list_flags(verb):
        if flag.group is None:
            flag_values[flag.name] = _read_flag(flag, values, verb)
        elif isinstance(arguments.get(flag.name), str):
            values[flag.name] = _read_setting(flag, arguments[flag.name])
    columns = flag_values.get("columns")
    if columns:
        _add_columns(verb, values, columns)
    settings = tuple(make_settings(group, values) for group in verb.settings)
    return CommandLine(verb.name, settings, flag_values, names_model="model" in values)


def _read_flag(flag: Flag, values: Mapping[str, Any], verb: Verb) -> Any:
    """Return the value of one of the verb's own flags, or the default of the flag.

    Raises ConfigError if a required flag is missing.
    """
    value: Any = flag.default
    if flag.name in values:
        value = check_value(flag, values[flag.name])
    elif flag.many:
        value = []
    elif flag.switch:
        value = False
    if flag.required and not value:
        raise ConfigError(
            f"{verb.name} needs {flag.names[0]} ({flag.help}), for example: {verb.example}"
        )
    return value


def _read_setting(flag: Flag, text: str) -> Any:
    """Convert the text of a setting to its type; raise ConfigError if the text has another type."""
    value = convert_text(text, (flag.kind,))
    if not isinstance(value, flag.kind):
        raise ConfigError(f"{flag.names[0]} is {text[:MAX_SHOWN]!r}; give {flag.expected}")
    return value


def _add_columns(verb: Verb, values: dict[str, Any], columns: str) -> None:
    """Append the columns of `--columns` to the tasks that are files or hub data sets.

    Args:
        verb: The verb.
        values: The values of settings by name; the value of the tasks is replaced.
        columns: The value of `--columns`, `FIELD=COLUMN` pairs separated by commas.
    """
    from drllm.tasks.files import with_columns  # imported here, since few commands need it

    fields = [pair.partition("=")[0].strip() for pair in columns.split(",")]
    for field in fields:
        if fields.count(field) > 1:
            raise ConfigError(f"--columns {columns} names {field!r} twice; give it one column")
    names = {flag.name for flag in list_flags(verb)}
    tasks_setting = "dataset" if "dataset" in names else "tasks"
    values[tasks_setting] = with_columns(values.get(tasks_setting) or "", columns)
