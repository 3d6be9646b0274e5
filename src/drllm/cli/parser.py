"""From the words of a command line to checked settings: verbs, flags, messages.

Owns how the settings of `config` become flags, the order of precedence (flag,
then the file given as `--config`, then default), and one-line wording for whatever the parser
refuses. Leaves reading files to `settings_files` and what a verb does to `stages`, `run_folder`
and `show`. Loads no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ActionYesNo, ArgumentParser

from drllm.cli.settings_files import read_settings
from drllm.cli.verbs import FOREIGN, VERBS, Flag, Verb
from drllm.config import ModelConfig
from drllm.config.settings import Settings
from drllm.errors import ConfigError, unknown_name

SettingsType = TypeVar("SettingsType", bound=Settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line, understood and checked.

    Attributes:
        verb: Name of the verb.
        settings: One object of each of the verb's groups.
        values: What its own flags say, by name.
        model_given: The user named a base model.
    """

    verb: str
    settings: tuple[Settings, ...]
    values: Mapping[str, Any]
    model_given: bool = False

    def of(self, kind: type[SettingsType]) -> SettingsType:
        """Return the settings of one group of the verb."""
        return next(group for group in self.settings if isinstance(group, kind))

    def text(self, name: str) -> str:
        """Return the value of a flag that is there."""
        return str(self.values[name])

    def path(self, name: str) -> Path:
        """Return the value of a flag that is there, as a path."""
        return Path(self.text(name)).expanduser()

    def paths(self, name: str) -> list[Path]:
        """Return the values of a flag that takes several."""
        return [Path(value).expanduser() for value in self.values[name]]


def parse(words: Sequence[str]) -> Request:
    """Turn a verb and its flags into checked settings.

    Args:
        words: The command line without the program's name; at least the verb.

    Returns:
        The request.

    Raises:
        ConfigError: An unknown verb, flag or setting, a value that doesn't fit, something missing.
        SystemExit: After `--help` has been printed.
    """
    name, *rest = words
    if name not in VERBS:
        kind = "flag" if name.startswith("-") else "verb"
        known = {**VERBS, **FOREIGN}
        raise ConfigError(unknown_name(kind, name, known) + "; 'drllm --help' explains them")
    verb = VERBS[name]
    parser = new_parser(name)
    arguments, files = _take_config_files(_with_dashes(rest))
    defaults: dict[str, Any] = {}
    for file in files:
        defaults.update(read_settings(file, verb))
    parser.set_defaults(defaults)
    try:
        parsed = vars(parser.parse_args(arguments))
    except argparse.ArgumentError as error:
        raise _explain(error, name, arguments) from error
    return _request(name, verb, parsed)


def _request(name: str, verb: Verb, parsed: Mapping[str, Any]) -> Request:
    for flag in verb.flags:
        if flag.required and not parsed[flag.name]:
            raise ConfigError(
                f"{name} needs {flag.shown} ({flag.help}), for example: {verb.example}"
            )
    values = dict(parsed)
    model_given = values.get("model") is not None
    if not model_given:
        values.pop("model", None)
    settings = []
    for group in verb.groups:
        names = [declared.name for declared in dataclasses.fields(group)]
        settings.append(group(**{key: values[key] for key in names if key in values}))
    return Request(
        verb=name,
        settings=tuple(settings),
        values={flag.name: parsed[flag.name] for flag in verb.flags},
        model_given=model_given,
    )


# --- flags -------------------------------------------------------------------------------------


def new_parser(name: str) -> ArgumentParser:
    """Return the parser of one verb, every flag with its type, default and accepted values."""
    verb = VERBS[name]
    parser = ArgumentParser(
        prog=f"drllm {name}",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        epilog=f"example: {verb.example}",
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    for flag in verb.flags:
        _add_flag(parser, flag)
    for group in verb.groups:
        _add_settings(parser, group, verb)
    if verb.groups:
        # Read before everything else, see _take_config_files; here for the help text.
        parser.add_argument(
            "--config", type=str | None, metavar="FILE", help="settings in YAML; flags win over it"
        )
    return parser


def _add_flag(parser: ArgumentParser, flag: Flag) -> None:
    options: dict[str, Any] = {"help": _escaped(flag.help), "metavar": flag.name.upper()}
    if flag.positional:
        # Optional to argparse, so that what is missing is said in our words.
        parser.add_argument(flag.name, nargs="*" if flag.many else "?", type=str, **options)
    elif flag.switch:
        parser.add_argument(flag.shown, action="store_true", help=options["help"])
    elif flag.many:
        parser.add_argument(flag.shown, nargs="+", type=str, default=[], **options)
    else:
        parser.add_argument(flag.shown, type=str | None, default=flag.default, **options)


def _add_settings(parser: ArgumentParser, group: type[Settings], verb: Verb) -> None:
    section = parser.add_argument_group(group.__name__.removesuffix("Config").lower())
    hints = typing.get_type_hints(group)
    for declared in dataclasses.fields(group):
        rules = declared.metadata
        names = ["--" + declared.name.replace("_", "-")]
        if rules["alias"]:
            names.append("--" + rules["alias"].replace("_", "-"))
        text, hint, default = rules["help"], hints[declared.name], declared.default
        if rules["choices"]:
            text += f"; one of {', '.join(rules['choices'])}"
        if group is ModelConfig and declared.name == "model" and verb.model_from_routers:
            text += "; without it the one that the routers name"
            hint, default = str | None, None
        if hint is bool:
            section.add_argument(
                *names,
                action=ActionYesNo(yes_prefix="", no_prefix="no-"),
                default=default,
                help=_escaped(text),
            )
        else:
            section.add_argument(
                *names, type=hint, default=default, metavar=_metavar(hint), help=_escaped(text)
            )


def _metavar(hint: Any) -> str:
    kinds = typing.get_args(hint) or (hint,)
    return {int: "N", float: "X"}.get(kinds[0], "TEXT")


def _escaped(text: str) -> str:
    return text.replace("%", "%%")  # argparse formats help texts


def _with_dashes(words: Sequence[str]) -> list[str]:
    """Write flag names with dashes, since underscores are accepted too; values stay as they are."""
    written: list[str] = []
    for place, word in enumerate(words):
        if word == "--":
            return [*written, *words[place:]]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        written.append(word)
    return written


def _take_config_files(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Take `--config FILE` out of the line: wherever it stands, flags win over the file."""
    left: list[str] = []
    files: list[Path] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*left, word, *rest], files
        if word == "--config" and rest and not rest[0].startswith("--"):
            files.append(Path(rest.pop(0)).expanduser())
        elif word.startswith("--config="):
            files.append(Path(word.removeprefix("--config=")).expanduser())
        else:
            left.append(word)
    return left, files


# --- what the parser refuses -------------------------------------------------------------------

_WANTED = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def _explain(error: argparse.ArgumentError, name: str, words: Sequence[str]) -> ConfigError:
    """Say in one line what argparse or jsonargparse says in several."""
    text = str(error)
    verb = VERBS[name]
    if match := re.search(r"unrecognized arguments: (.*)", text, re.DOTALL):
        unknown = match[1].split()[0]
        flags = _flag_names(verb)
        if unknown.startswith("-"):
            wrong = unknown.partition("=")[0]
            return ConfigError(unknown_name("flag", wrong, flags) + f" ('drllm {name} --help')")
        before = {word: flag for flag, word in itertools.pairwise(words)}.get(unknown, "")
        return _one_too_many(verb, before, unknown) or ConfigError(
            f"{name} has no use for {unknown!r}; put texts with spaces in quotes, or see "
            f"'drllm {name} --help'"
        )
    match = re.search(r"argument (--[\w-]+).*ignored explicit argument '(.*)'", text)
    if match and (refused := _one_too_many(verb, match[1], match[2])):
        return refused
    if match := re.search(r"argument (--[\w-]+).*expected (?:one|at least one) argument", text):
        return ConfigError(f"{match[1]} has no value; {_expectation(verb, match[1])}")
    if match := re.search(r'Parser key "(\w+)"', text):
        flag = "--" + match[1].replace("_", "-")
        return ConfigError(f"{flag} is {_value_of(flag, words)!r}; {_expectation(verb, flag)}")
    return ConfigError(" ".join(text.split()) + f"; see 'drllm {name} --help'")


def _one_too_many(verb: Verb, flag: str, value: str) -> ConfigError | None:
    """Return what is wrong with a value behind a switch; None where the flag is no switch."""
    said = f"takes no value, but {value!r} follows it"
    if any(own.switch and own.shown == flag for own in verb.flags):
        return ConfigError(f"{flag} {said}; leave that out")
    for group in verb.groups:
        for name, hint in typing.get_type_hints(group).items():
            on, off = (f"--{prefix}{name.replace('_', '-')}" for prefix in ("", "no-"))
            if hint is bool and flag in (on, off):
                other = f"{off} turns it off" if flag == on else f"{on} turns it on"
                return ConfigError(f"{flag} {said}; {other}")
    return None


def _flag_names(verb: Verb) -> list[str]:
    own = [flag.shown for flag in verb.flags if not flag.positional]
    fields = [declared for group in verb.groups for declared in dataclasses.fields(group)]
    config = ["--config"] if verb.groups else []
    return [*own, *("--" + field.name.replace("_", "-") for field in fields), *config, "--help"]


def _expectation(verb: Verb, flag: str) -> str:
    for own in verb.flags:
        if own.shown == flag:
            return f"give one ({own.help})"
    for group in verb.groups:
        hints = typing.get_type_hints(group)
        for declared in dataclasses.fields(group):
            alias = declared.metadata["alias"] or ""
            if flag.removeprefix("--").replace("-", "_") in (declared.name, alias):
                kinds = typing.get_args(hints[declared.name]) or (hints[declared.name],)
                choices = declared.metadata["choices"]
                wanted = f"one of {', '.join(choices)}" if choices else _WANTED[kinds[0]]
                return f"give {wanted} ({declared.metadata['help']})"
    return "give the name of a YAML file"


def _value_of(flag: str, words: Sequence[str]) -> str:
    """Return the last value that the line gives a flag."""
    found = ""
    for place, word in enumerate(words):
        if word == flag and place + 1 < len(words):
            found = words[place + 1]
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found
