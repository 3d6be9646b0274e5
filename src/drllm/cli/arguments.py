"""Reads a command line with argparse: finds its flags, and the text of each value.

argparse only splits the words. The settings convert and check the values, so a mistake gets the
same message in a file and on the command line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from drllm.cli.verbs import CONFIG, HELP, Flag, Verb, list_flags
from drllm.config.removed import REMOVED_FLAGS
from drllm.errors import ConfigError, nearest_name

FILE_FLAGS = ("--search", "--supervision", "--dataset", "--tasks", "--path")
"""Flags that take a file. If a file name stands without a flag, the message suggests the first of
these flags that the verb has."""
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".csv")
_LOOKS_LIKE_FLAG = re.compile(r"-{1,2}[A-Za-z][^\s=]*(=.*)?", re.DOTALL)


def read_arguments(verb: Verb, words: Sequence[str]) -> dict[str, Any]:
    """Return the values in a command line by the names of their flags.

    A value is a text, a list of texts, or a boolean for a switch. Everything after `--` is a
    positional argument. Raises ConfigError for an unknown flag, a missing value, or a word that
    belongs to no flag.
    """
    end = words.index("--") if "--" in words else len(words)
    written = [_with_dashes(word) for word in words[:end]]
    parser, flags = _make_parser(verb)
    try:
        namespace, others = parser.parse_known_args(written)
    except argparse.ArgumentError as error:
        _refuse(error, flags, written)
    for word in others:
        if _LOOKS_LIKE_FLAG.fullmatch(word):
            raise _unknown_flag(verb, word.partition("=")[0])
    free = [*others, *words[end + 1 :]]
    positional, unused = _positional_values(verb, free)
    if unused:
        _refuse_word(verb, unused[0], flags, written)
    return {**vars(namespace), **positional}


def _with_dashes(word: str) -> str:
    """Replace the underscores in a flag's name with dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _make_parser(verb: Verb) -> tuple[argparse.ArgumentParser, dict[str, Flag]]:
    """Build argparse's parser for a verb, and a dictionary of the verb's flags by every name."""
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    # Only words like `-a` are flags; any other word that begins with a dash is a value.
    parser._negative_number_matcher = re.compile("-[^A-Za-z-]")
    flags: dict[str, Flag] = {}
    known = [*list_flags(verb), CONFIG] if verb.settings else [*verb.flags]
    for flag in known:
        if flag.positional or flag.is_only_in_files:
            continue
        action: dict[str, Any] = {"dest": flag.name}
        if flag.switch:
            action["action"] = "store_true"
        elif flag.kind is bool:
            action["action"] = argparse.BooleanOptionalAction
        elif flag.many:
            action.update(action="extend", nargs="+")
        elif flag is CONFIG:
            action["action"] = "append"
        added = parser.add_argument(*flag.names, **action)
        flags.update(dict.fromkeys(added.option_strings, flag))
    return parser, flags


def _positional_values(verb: Verb, words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of positional arguments by name, and the words that are left over."""
    values: dict[str, Any] = {}
    for flag in verb.flags:
        if not flag.positional or not words:
            continue
        if flag.many:
            values[flag.name] = words
            words = []
        else:
            values[flag.name] = words[0]
            words = words[1:]
    return values, words


def _refuse(
    error: argparse.ArgumentError, flags: dict[str, Flag], words: Sequence[str]
) -> NoReturn:
    """Raise a ConfigError for a flag without a value, or for a switch with a value."""
    names = (error.argument_name or "").split("/")
    flag_word = next(word for word in words if word.partition("=")[0] in names)
    name, _, value = flag_word.partition("=")
    flag = flags[name]
    if flag.is_on_or_off:
        raise _superfluous_value(flag, name, value)
    raise ConfigError(f"{name} has no value; give {flag.expected}")


def _refuse_word(verb: Verb, word: str, flags: dict[str, Flag], words: Sequence[str]) -> NoReturn:
    """Raise a ConfigError for a word that is neither a flag nor the value of a flag."""
    if word in words:
        before = words[words.index(word) - 1]
        flag = flags.get(before)
        if flag is not None and flag.is_on_or_off:
            raise _superfluous_value(flag, before, word)
    advice = f"put texts with spaces in quotes, or see 'drllm {verb.name} --help'"
    names = [name for name in FILE_FLAGS if name in flags]
    if names and (word.endswith(FILE_ENDINGS) or Path(word).exists()):
        advice = f"did you mean {names[0]} {word}?"
    raise ConfigError(f"{verb.name} has no use for {word!r}; {advice}")


def _superfluous_value(flag: Flag, name: str, value: str) -> ConfigError:
    """Return the error for a switch that is followed by a value."""
    if flag.switch:
        advice = "leave that out"
    else:
        turns = "off" if name in flag.names else "on"
        advice = f"{_opposite(name)} turns it {turns}"
    return ConfigError(f"{name} takes no value, but {value!r} follows it; {advice}")


def _opposite(name: str) -> str:
    """Return the opposite of a switch: `--no-x` for `--x`, and `--x` for `--no-x`."""
    if name.startswith("--no-"):
        return name.replace("--no-", "--", 1)
    return name.replace("--", "--no-", 1)


def _unknown_flag(verb: Verb, name: str) -> ConfigError:
    """Return the error for an unknown flag."""
    flags = {flag.names[0]: flag for flag in list_flags(verb) if not flag.positional}
    if name in flags:
        return ConfigError(
            f"{name} isn't a flag; write it into a YAML file, such as '{flags[name].name}: "
            f"{flags[name].value}', and give that as --config FILE"
        )
    if name in REMOVED_FLAGS:
        return ConfigError(REMOVED_FLAGS[name])
    known = [name for flag in flags.values() for name in flag.names]
    known += HELP
    if verb.settings:
        known.append("--config")
    return ConfigError(f"{nearest_name('flag', name, known)} {see_all_flags(verb)}")


def see_all_flags(verb: Verb) -> str:
    """Return a hint for messages: the command that lists all flags of a verb."""
    return f"('drllm {verb.name} --help-all' lists all)"
