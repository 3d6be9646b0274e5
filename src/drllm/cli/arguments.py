"""Reads a command line with argparse: finds its flags, and the text of each value.

argparse only splits the words. The settings convert and check the values, so a mistake gets the
same message in a file and on the command line.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from drllm.cli.verbs import CONFIG, HELP, VERBS, Flag, Verb, list_flags
from drllm.config.fields import to_flag
from drllm.errors import ConfigError
from drllm.tasks.examples import FILE_ENDINGS

FILE_FLAGS = ("--search", "--supervision", "--tasks", "--path", "--file")
"""Flags that take a file, in the order of preference.

If a file name stands without a flag, the message suggests the first of them that the verb has.
"""
OTHER_NAMES = {
    "--tasks": ("--data", "--file", "--input", "--prompts", "--questions", "--task"),
    "--output-dir": ("--out", "--output-file", "--output-folder", "--output-path", "--run-name"),
    "--num-epochs": ("--epochs",),
    "--learning-rate": ("--lr",),
    "--max-new-tokens": ("--max-tokens", "--max-length"),
    "--model": ("--base", "--base-model", "--model-name", "--pretrained"),
    "--path": ("--paths",),
    "--paths": ("--path",),
}
"""Our flag → flags of other programs, or of other verbs, that mean the same.

The message about one of these names suggests our flag, if the verb has it.
"""
_LOOKS_LIKE_FLAG = re.compile(r"-{1,2}[A-Za-z][^\s=]*(=.*)?", re.DOTALL)


def read_arguments(verb: Verb, words: Sequence[str]) -> dict[str, Any]:
    """Return the values in a command line by the names of their flags.

    A value is a text, a list of texts, or a boolean for a switch. Every word after `--` is a
    positional argument.

    Args:
        verb: The verb.
        words: The words after the verb.

    Raises:
        ConfigError: A flag is unknown, a value is missing, or a word belongs to no flag.
    """
    end = words.index("--") if "--" in words else len(words)
    words_before = [_with_dashes(word) for word in words[:end]]
    words_after = words[end + 1 :]
    parser, flags = _make_parser(verb)
    try:
        namespace, words_without_flag = parser.parse_known_args(words_before)
    except argparse.ArgumentError as error:
        _refuse(error, flags, words_before)
    for word in words_without_flag:
        if _LOOKS_LIKE_FLAG.fullmatch(word):
            raise _unknown_flag(verb, word.partition("=")[0])
    values, unused_words = _read_positional(
        verb, [*words_without_flag, *words_after], vars(namespace)
    )
    if unused_words:
        _refuse_second_value(verb, vars(namespace))
        _refuse_word(verb, unused_words[0], flags, words_before)
    return {**vars(namespace), **values}


def _with_dashes(word: str) -> str:
    """Replace the underscores in a flag's name with dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _make_parser(verb: Verb) -> tuple[argparse.ArgumentParser, dict[str, Flag]]:
    """Build argparse's parser for a verb.

    Returns the parser, and the verb's flags by each name that a user can write (`--no-chat` too).
    """
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
    )
    # Only words like `-a` are flags; any other word that begins with a dash is a value.
    parser._negative_number_matcher = re.compile("-[^A-Za-z-]")
    all_flags = list(list_flags(verb))
    if verb.settings:
        all_flags.append(CONFIG)
    flags: dict[str, Flag] = {}
    for flag in all_flags:
        names = flag.names
        if flag.positional:
            if not flag.title:
                continue
            names = [to_flag(flag.name)]
        options: dict[str, Any] = {"dest": flag.name}
        if flag.switch:
            options["action"] = "store_true"
        elif flag.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif flag.many:
            options["action"] = "extend"
            options["nargs"] = "+"
        elif flag is CONFIG:
            options["action"] = "append"
        argument = parser.add_argument(*names, **options)
        for name in argument.option_strings:
            flags[name] = flag
    return parser, flags


def _read_positional(
    verb: Verb, words: list[str], named_values: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values of positional arguments by name, and the words that are left over.

    Args:
        verb: The verb.
        words: The words that belong to no flag.
        named_values: The values of flags that the user wrote by name. These have no word.
    """
    values: dict[str, Any] = {}
    for flag in verb.flags:
        if not flag.positional or not words or flag.name in named_values:
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
    """Raise a ConfigError for a flag without a value, or for a switch with a value.

    Args:
        error: The error of argparse.
        flags: The verb's flags by name.
        words: The words that argparse read.
    """
    names = (error.argument_name or "").split("/")  # argparse joins the names of a flag
    flag_word = next(word for word in words if word.partition("=")[0] in names)
    name, _, value = flag_word.partition("=")
    flag = flags[name]
    if flag.is_on_or_off:
        raise _superfluous_value(flag, name, value)
    raise ConfigError(f"{name} has no value; give {flag.expected}")


def _refuse_second_value(verb: Verb, named_values: Mapping[str, Any]) -> None:
    """Refuse a positional argument that is given by its name too."""
    for flag in verb.flags:
        if flag.positional and flag.name in named_values:
            raise ConfigError(
                f"{flag.names[0]} is written twice: as {to_flag(flag.name)} "
                f"{named_values[flag.name]!r} and without the flag; give a text once"
            )


def _refuse_word(verb: Verb, word: str, flags: dict[str, Flag], words: Sequence[str]) -> NoReturn:
    """Raise a ConfigError for a word that is neither a flag nor the value of a flag.

    Args:
        verb: The verb.
        word: The word.
        flags: The verb's flags by name.
        words: The words before `--`.
    """
    if word in words:
        word_before = words[words.index(word) - 1]
        flag = flags.get(word_before)
        if flag is not None and flag.is_on_or_off:
            raise _superfluous_value(flag, word_before, word)
    advice = f"put texts with spaces in quotes, or see 'drllm {verb.name} --help'"
    file_flags = [name for name in FILE_FLAGS if name in flags]
    if file_flags and (word.endswith(FILE_ENDINGS) or Path(word).exists()):
        advice = f"did you mean {file_flags[0]} {word}?"
    raise ConfigError(f"{verb.name} has no use for {word!r}; {advice}")


def _superfluous_value(flag: Flag, name: str, value: str) -> ConfigError:
    """Return the error for a switch that is followed by a value."""
    if flag.switch:
        advice = "leave that out"
    else:
        state = "off" if name in flag.names else "on"  # `--no-x` isn't among the names
        advice = f"{_opposite(name)} turns it {state}"
    return ConfigError(f"{name} takes no value, but {value!r} follows it; {advice}")


def _opposite(name: str) -> str:
    """Return the opposite of a switch: `--no-x` for `--x`, and `--x` for `--no-x`."""
    if name.startswith("--no-"):
        return name.replace("--no-", "--", 1)
    return name.replace("--", "--no-", 1)


def _unknown_flag(verb: Verb, name: str) -> ConfigError:
    """Return the error for an unknown flag."""
    return ConfigError(f"{_suggest_flag(verb, name)} {see_all_flags(verb)}")


def _suggest_flag(verb: Verb, name: str) -> str:
    """Return the message for an unknown flag, with the nearest flag of the verb."""
    shown_names = {word: word for word in HELP}  # a name of a flag → the name that help shows
    for flag in list_flags(verb):
        if not flag.positional:
            shown_names.update(dict.fromkeys(flag.names, flag.names[0]))
    if verb.settings:
        shown_names["--config"] = "--config"
    for shown_name, other_names in OTHER_NAMES.items():
        if name in other_names and shown_name in shown_names:
            return f"unknown flag {name!r}; did you mean {shown_name!r}?"
    verbs = _list_verbs_with_flag(name)
    if verbs:
        return f"unknown flag {name!r} of {verb.name}; it is a flag of {', '.join(verbs)}"
    closest_names = difflib.get_close_matches(name, shown_names, n=1)
    if closest_names:
        return f"unknown flag {name!r}; did you mean {shown_names[closest_names[0]]!r}?"
    return f"unknown flag {name!r}"


def _list_verbs_with_flag(name: str) -> list[str]:
    """List the verbs that have a flag of this name."""
    return [verb.name for verb in VERBS.values() if _has_flag(verb, name)]


def _has_flag(verb: Verb, name: str) -> bool:
    return any(name in flag.names for flag in list_flags(verb) if not flag.positional)


def see_all_flags(verb: Verb) -> str:
    """Return a hint for messages: the command that lists all flags of a verb."""
    return f"('drllm {verb.name} --help-all' lists all)"
