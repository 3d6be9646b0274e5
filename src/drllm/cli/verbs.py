"""The table of verbs: the settings and flags of each, and the function that runs it.

A verb is a function, registered with its settings and flags. The parser, the help and the messages
use this table.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drllm.cli.removed import REMOVED_VERBS
from drllm.config.fields import Settings, is_by_task, list_kinds, to_flag
from drllm.config.files import PRESETS
from drllm.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from drllm.cli.command_line import CommandLine
    from drllm.cli.terminal import Terminal

HELP = ("-h", "--help", "--help-all")  # flags that print the help of a verb
SEE_VERBS = "'drllm --help' explains the verbs"
EXPECTED = {int: "a whole number", float: "a finite number", str: "a value", bool: "true or false"}
PLACEHOLDERS = {int: "N", float: "X"}
"""Placeholders for values in the help, by type. A setting may have a placeholder of its own."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of a verb: a file, folder or switch of the verb itself, or one of its settings.

    Attributes:
        name: The name with underscores; a positional argument has a name too.
        help: The help text.
        default: The value without the flag.
        required: Whether the verb needs the flag.
        many: Whether the flag takes several values.
        positional: Whether the value is written without the flag's name.
        switch: Whether the flag takes no value; without the flag the value is False.
        value: The placeholder for the value in the help.
        basic: Whether `--help` shows the flag; `--help-all` shows all flags.
        alias: A second name, kept so that published commands with old flags still run.
        group: The group of settings with this setting; None for a flag of the verb itself.
        kind: The type of a setting's value.
        choices: The values that a setting accepts.
    """

    name: str
    help: str
    default: Any = None
    required: bool = False
    many: bool = False
    positional: bool = False
    switch: bool = False
    value: str = "FILE"
    basic: bool = True
    alias: str | None = None
    group: type[Settings] | None = None
    kind: type = str
    choices: tuple[str, ...] = ()

    @property
    def is_only_in_files(self) -> bool:
        """Whether only a YAML file can give the setting, because it maps tasks to values."""
        return is_by_task((self.kind,))

    @property
    def is_on_or_off(self) -> bool:
        """Whether the flag takes no value."""
        return self.switch or self.kind is bool

    @property
    def names(self) -> list[str]:
        """The names as a user writes them; the first name is the main one."""
        if self.positional:
            return [self.name.upper()]
        names = [to_flag(self.name)]
        if self.alias is not None:
            names.append(to_flag(self.alias))
        return names

    @property
    def expected(self) -> str:
        """The expected value, for messages."""
        if self.choices:
            expected = f"one of {', '.join(self.choices)}"
        elif self.group is not None:
            expected = EXPECTED[self.kind]
        else:
            expected = "a value"
        return f"{expected} ({self.help})"


@dataclass(frozen=True, slots=True)
class Verb:
    """One command of `drllm`.

    Attributes:
        name: The name of the verb.
        help: One line that says what the verb does.
        example: A command line that works.
        run: The function that runs the verb.
        settings: Groups of settings; each setting becomes a flag.
        flags: Further flags.
        model_from: Where the base model comes from without `--model`.
        resumes: Whether the same command resumes interrupted work.
        shares: Whether several processes can divide the work.
    """

    name: str
    help: str
    example: str
    run: Callable[[CommandLine, Terminal], int | None]
    settings: tuple[type[Settings], ...] = ()
    flags: tuple[Flag, ...] = ()
    model_from: str = ""
    resumes: bool = False
    shares: bool = False


CONFIG = Flag(
    "config", f"YAML file with settings, or a preset ({', '.join(PRESETS)}); flags override it"
)


class _Verbs(UserDict[str, Any]):
    """Verbs by name; the first use of a verb imports its module.

    At first an entry is the name of the module that registers the verb. The import replaces the
    entry with the `Verb` (see `verb`).
    """

    def __getitem__(self, name: str) -> Verb:
        entry = self.data[name]
        if isinstance(entry, str):
            importlib.import_module(f"drllm.cli.{entry}")
        verb: Verb = self.data[name]
        return verb


VERBS = _Verbs(
    {
        "run": "running",
        "generate": "generation",
        "search": "stages",
        "supervise": "stages",
        "train": "stages",
        "tune": "stages",
        "heal": "stages",
        "evaluate": "stages",
        "report": "stages",
        "export": "stages",
        "show": "show",
        "ls": "listing",
    }
)

FOREIGN = {"lm-eval": "lm-evaluation-harness' own command line, with --model drllm"}
"""Verbs whose arguments another program parses, and their help."""

SECTIONS = {
    "everything in one command": ("run",),
    "the stages, in order; each reads files of an earlier one": (
        "search",
        "supervise",
        "train",
        "tune",
        "heal",
        "generate",
        "evaluate",
        "lm-eval",
        "report",
        "export",
    ),
    "results and names": ("show", "ls"),
}
"""The titles and verbs of `drllm --help`, in the order of the data flow."""


def verb(name: str, **attributes: Any) -> Callable[[Any], Any]:
    """Register a function as a verb; the first line of its docstring is the help.

    `attributes` are attributes of `Verb`.
    """

    def register(function: Any) -> Any:
        line = function.__doc__.split("\n")[0].rstrip(".")
        text = line[0].lower() + line[1:]
        VERBS[name] = Verb(name, text, run=function, **attributes)
        return function

    return register


def find_verb(name: str) -> Verb:
    """Look up a verb; raise ConfigError for an unknown or a removed verb."""
    if name in REMOVED_VERBS:
        raise ConfigError(REMOVED_VERBS[name])
    if name.startswith("-"):
        raise ConfigError(f"no verb stands before {name}; write drllm VERB {name} …: {SEE_VERBS}")
    if name not in VERBS:
        raise ConfigError(f"{unknown_name('verb', name, [*VERBS, *FOREIGN])}; {SEE_VERBS}")
    return VERBS[name]


def list_flags(verb: Verb) -> Iterator[Flag]:
    """Yield a verb's own flags, then all settings, including those only for YAML files."""
    yield from verb.flags
    for group in verb.settings:
        for field in dataclasses.fields(group):
            yield _make_setting_flag(group, field)


def _make_setting_flag(group: type[Settings], field: dataclasses.Field[Any]) -> Flag:
    rules = field.metadata
    kind = list_kinds(group)[field.name][0]
    choices = tuple(rules["choices"] or ())
    value = rules["value"] or "|".join(choices)
    if not value:
        value = PLACEHOLDERS.get(kind, "DIR" if "_dir" in field.name else "NAME")
    return Flag(
        field.name,
        rules["help"],
        field.default,
        value=value,
        basic=rules["basic"],
        alias=rules["alias"],
        group=group,
        kind=kind,
        choices=choices,
    )
