"""The table of verbs, with the settings and flags of each verb and the function that runs it.

A verb is a command of `drllm`, such as `search`. The decorator `verb` registers a function as a
verb. The parser, the help and the messages use this table.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drllm.config.fields import Settings, list_kinds, to_flag
from drllm.config.files import PRESETS
from drllm.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from drllm.cli.command_line import CommandLine
    from drllm.cli.terminal import Terminal

HELP = ("-h", "--help", "--help-all")  # flags that print the help of a verb
SEE_VERBS = "'drllm --help' explains the verbs"
EXPECTED = {int: "a whole number", float: "a finite number", str: "a value", bool: "true or false"}
"""What messages call the values of a setting that the command line can give, by type."""
PLACEHOLDERS = {int: "N", float: "X"}
"""What the help shows in place of a value, by type. A setting may have another placeholder."""


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
        title: What the help calls a positional argument, such as QUESTIONS. The value may then be
            given by the flag's name too. If empty, the help shows the name in capitals.
        switch: Whether the flag takes no value; without the flag the value is False.
        placeholder: What the help shows in place of the value.
        basic: Whether `--help` shows the flag; `--help-all` shows all flags.
        alias: A second name, such as the flag's name in the commands of the Dr.LLM paper's code.
        shows_alias: Whether help and messages show the alias instead of the name.
        group: The group of settings with this setting; None for a flag of the verb itself.
        kind: The type of a setting's value.
        choices: The values that a setting accepts; empty for any value.
    """

    name: str
    help: str
    default: Any = None
    required: bool = False
    many: bool = False
    positional: bool = False
    title: str = ""
    switch: bool = False
    placeholder: str = "FILE"
    basic: bool = True
    alias: str | None = None
    shows_alias: bool = False
    group: type[Settings] | None = None
    kind: type = str
    choices: tuple[str, ...] = ()

    @property
    def is_on_or_off(self) -> bool:
        """Whether the flag takes no value on the command line."""
        return self.switch or self.kind is bool

    @property
    def names(self) -> list[str]:
        """The name and the alias as a user writes them; help and messages show the first."""
        if self.positional:
            return [self.title or self.name.upper()]
        names = [to_flag(self.name)]
        if self.alias is not None:
            names.append(to_flag(self.alias))
        if self.shows_alias:
            names.reverse()
        return names

    @property
    def expected(self) -> str:
        """The values that the flag accepts, for messages."""
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
        run: The function that runs the verb. It returns the exit status; None means 0.
        settings: Groups of settings; each setting becomes a flag.
        flags: The verb's own flags, which aren't settings.
        model_from: A phrase for the help: which base model is used without `--model`, such as "the
            model that the routers name". It is empty for the default model.
        resumes: Whether the same command resumes interrupted work.
        further_settings: The groups of settings that only `--help-all` shows.
    """

    name: str
    help: str
    example: str
    run: Callable[[CommandLine, Terminal], int | None]
    settings: tuple[type[Settings], ...] = ()
    flags: tuple[Flag, ...] = ()
    model_from: str = ""
    resumes: bool = False
    further_settings: tuple[type[Settings], ...] = ()


CONFIG = Flag(
    "config", f"YAML file with settings, or a preset ({', '.join(PRESETS)}); flags override it"
)
"""The flag of every verb that has settings."""


class _Verbs(UserDict[str, Any]):
    """Verbs by name; the first look-up of a verb imports its module.

    Before the import, the entry is the name of the module. The import replaces the entry with the
    `Verb`, since the module registers its verbs with `verb`.
    """

    def __getitem__(self, name: str) -> Verb:
        entry = self.data[name]
        if isinstance(entry, str):
            importlib.import_module(f"drllm.cli.{entry}")
        verb: Verb = self.data[name]  # the import has replaced the entry
        return verb


VERBS = _Verbs(
    {
        "run": "running",
        "shrink": "shrinking",
        "generate": "generation",
        "search": "searching",
        "supervise": "searching",
        "train": "training",
        "bypass": "bypassing",
        "gaps": "shortening",
        "learn": "shortening",
        "export": "shortening",
        "evaluate": "evaluation",
        "report": "evaluation",
        "bundle": "bundling",
        "show": "show",
        "ls": "listing",
    }
)
"""All verbs by name. Each value here is the name of a module in `drllm.cli`. Reading an entry, also
through `values()`, imports the module and returns its `Verb`."""

FOREIGN = {"lm-eval": "lm-evaluation-harness' own command line, with --model drllm"}
"""Verbs whose arguments another program reads, with their help."""

SECTIONS = {
    "everything in one command": ("run", "shrink"),
    "a smaller model, step by step": ("gaps", "learn", "export"),
    "routing, in order; each reads files of an earlier one": (
        "search",
        "supervise",
        "train",
        "bypass",
        "generate",
        "evaluate",
        "lm-eval",
        "report",
        "bundle",
    ),
    "results and names": ("show", "ls"),
}
"""The titles and verbs of `drllm --help`, in the order of the data flow."""


def verb(name: str, **attributes: Any) -> Callable[[Any], Any]:
    """Register a function as a verb; the first line of its docstring is the help.

    Args:
        name: The name of the verb.
        attributes: The other attributes of `Verb`.
    """

    def register(function: Any) -> Any:
        summary = function.__doc__.split("\n")[0].rstrip(".")
        help_text = summary[0].lower() + summary[1:]
        VERBS[name] = Verb(name, help_text, run=function, **attributes)
        return function

    return register


def find_verb(name: str) -> Verb:
    """Look up a verb; raise ConfigError for an unknown verb."""
    if name.startswith("-"):
        raise ConfigError(f"no verb stands before {name}; write 'drllm VERB {name}'; {SEE_VERBS}")
    if name not in VERBS:
        raise ConfigError(f"{unknown_name('verb', name, [*VERBS, *FOREIGN])}; {SEE_VERBS}")
    return VERBS[name]


def list_flags(verb: Verb) -> Iterator[Flag]:
    """Yield a verb's own flags, then a flag for each setting.

    If a positional argument gives a setting, such as the model, it stands for the setting.

    Settings that several stages share, which their groups inherit, come after the group's own.
    """
    yield from verb.flags
    positional = {flag.name for flag in verb.flags if flag.positional}
    for group in verb.settings:
        fields = [field for field in dataclasses.fields(group) if field.name not in positional]
        for field in sorted(fields, key=lambda field: field.name not in vars(group)):
            yield _make_setting_flag(group, field)


def _make_setting_flag(group: type[Settings], field: dataclasses.Field[Any]) -> Flag:
    """Return the flag of a setting, made from the declaration of the setting's field."""
    rules = field.metadata
    kind = list_kinds(group)[field.name][0]
    choices = tuple(rules["choices"] or ())
    if rules["placeholder"] is not None:
        placeholder = rules["placeholder"]
    elif choices:
        placeholder = "|".join(choices)
    elif "_dir" in field.name:
        placeholder = "DIR"
    else:
        placeholder = PLACEHOLDERS.get(kind, "NAME")
    return Flag(
        field.name,
        rules["help"],
        field.default,
        placeholder=placeholder,
        basic=rules["basic"],
        alias=rules["alias"],
        shows_alias=rules["shows_alias"],
        group=group,
        kind=kind,
        choices=choices,
    )
