"""The way from the words of a command line to checked settings.

A flag wins over the file given as `--config`, and that over the default. A mistake becomes one line
that names the flag, the value and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from drllm.cli.arguments import read_arguments
from drllm.cli.settings_file import check_value, read_settings
from drllm.cli.verbs import Flag, Verb, find_verb, flags_of
from drllm.config.fields import Settings, from_text, make_settings
from drllm.errors import ConfigError

Group = TypeVar("Group", bound=Settings)

LONGEST_SHOWN = 80  # characters of a wrong value in a message


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line, understood and checked.

    Attributes:
        verb: The name of the verb.
        settings: One object of each of the verb's groups.
        values: The values of the verb's own flags, by name.
        names_model: Whether the user named a base model.
    """

    verb: str
    settings: tuple[Settings, ...]
    values: Mapping[str, Any]
    names_model: bool

    def of(self, kind: type[Group]) -> Group:
        """Return the settings of one group of the verb."""
        return next(group for group in self.settings if isinstance(group, kind))

    def path(self, name: str) -> Path:
        """Return the value of a flag that is there, as a path."""
        return Path(self.values[name]).expanduser()

    def optional_path(self, name: str) -> Path | None:
        """Return the value of a flag as a path; None where it isn't given."""
        return self.path(name) if self.values[name] else None

    def paths(self, name: str) -> list[Path]:
        """Return the values of a flag that takes several."""
        return [Path(value).expanduser() for value in self.values[name] or ()]


def parse(words: Sequence[str]) -> CommandLine:
    """Turn a verb and its flags into checked settings; ConfigError for what doesn't fit."""
    verb = find_verb(words[0])
    arguments = read_arguments(verb, words[1:])
    values: dict[str, Any] = {}
    for file in arguments.pop("config", []):
        values.update(read_settings(file, verb))
    values.update(arguments)
    own_values: dict[str, Any] = {}
    for flag in flags_of(verb):
        if flag.group is None:
            own_values[flag.name] = _value_of(flag, values, verb)
        elif isinstance(arguments.get(flag.name), str):
            values[flag.name] = _read_setting(flag, arguments[flag.name])
    if own_values.get("columns"):
        _name_columns(verb, values, own_values["columns"])
    groups = tuple(make_settings(group, values) for group in verb.settings)
    return CommandLine(verb.name, groups, own_values, "model" in values)


def _value_of(flag: Flag, values: Mapping[str, Any], verb: Verb) -> Any:
    """Return the value of a verb's own flag; ConfigError for a wrong or missing one."""
    if flag.name in values:
        value = check_value(flag, values[flag.name])
    elif flag.many:
        value = []
    else:
        value = False if flag.switch else flag.default
    if flag.required and not value:
        raise ConfigError(
            f"{verb.name} needs {flag.names[0]} ({flag.help}), for example: {verb.example}"
        )
    return value


def _read_setting(flag: Flag, text: str) -> Any:
    """Return the value of a setting that a text writes; ConfigError for one of another type."""
    value = from_text(text, (flag.kind,))
    if not isinstance(value, flag.kind):
        raise ConfigError(f"{flag.names[0]} is {text[:LONGEST_SHOWN]!r}; give {flag.expected}")
    return value


def _name_columns(verb: Verb, values: dict[str, Any], columns: str) -> None:
    """Write the columns that `--columns` names behind the tasks that are files or hub sets."""
    from drllm.tasks.files import with_columns  # which few commands need

    fields = [pair.partition("=")[0].strip() for pair in columns.split(",")]
    for field in fields:
        if fields.count(field) > 1:
            raise ConfigError(f"--columns {columns} names {field!r} twice; give one column for it")
    names = {flag.name for flag in flags_of(verb)}
    setting = "dataset" if "dataset" in names else "tasks"
    values[setting] = with_columns(values.get(setting) or "", columns)
