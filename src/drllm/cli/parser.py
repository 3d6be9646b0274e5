"""From the words of a command line to checked settings.

A flag wins over the file given as `--config`, and that over the default. What is wrong with a
line is said in one line that names the flag, the value and what was expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.cli.verbs import FOREIGN, VERBS, Flag, Request, Verb
from drllm.config import ModelConfig
from drllm.config.files import as_text, canonical, read_yaml
from drllm.config.settings import Settings, check_text, flag_of, kinds_of
from drllm.errors import ConfigError, unknown_name

_WANTED = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
_NUMBER = {
    int: re.compile(r"[+-]?\d{1,20}"),
    float: re.compile(r"[+-]?(\d{1,400}(\.\d*)?|\.\d+)([eE][+-]?\d{1,5})?"),
}


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
    rest = _with_dashes(rest)
    _check_switches(verb, rest)
    try:
        parsed, unknown = new_parser(verb).parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{' '.join(str(error).split())}; see 'drllm {name} --help'") from error
    if unknown:
        raise _unknown(verb, unknown[0], rest)
    given = {key: value for key, value in vars(parsed).items() if value not in (None, [])}
    values: dict[str, Any] = {}
    for file in given.pop("config", []):
        check_text("--config", file)
        values.update(_read_settings(Path(file).expanduser(), verb))
    for flag in verb.flags:
        for text in _texts(given.get(flag.name)):
            check_text(flag.shown, text)
    for group in verb.settings:
        kinds = kinds_of(group)
        for declared in dataclasses.fields(group):
            if isinstance(said := given.get(declared.name), str):
                given[declared.name] = _value(declared, kinds[declared.name], said)
    return _request(verb, values | given)


def _texts(value: Any) -> list[str]:
    return [
        each
        for each in (value if isinstance(value, list) else [value])
        if each is not None and not isinstance(each, bool)
    ]


def _request(verb: Verb, values: Mapping[str, Any]) -> Request:
    own: dict[str, Any] = {}
    for flag in verb.flags:
        missing: Any = [] if flag.many else False if flag.switch else flag.default
        own[flag.name] = values.get(flag.name, missing)
        if flag.required and not own[flag.name]:
            raise ConfigError(
                f"{verb.name} needs {flag.shown} ({flag.help}), for example: {verb.example}"
            )
    settings = []
    for group in verb.settings:
        names = [declared.name for declared in dataclasses.fields(group)]
        settings.append(group(**{key: values[key] for key in names if key in values}))
    return Request(
        verb=verb.name, settings=tuple(settings), values=own, model_given="model" in values
    )


# --- flags -------------------------------------------------------------------------------------


def new_parser(verb: Verb) -> argparse.ArgumentParser:
    """Return the parser of one verb: every value is read as text, and None where it is missing."""
    places = [f"[{flag.shown}]" for flag in verb.flags if flag.positional]
    parser = argparse.ArgumentParser(
        prog=f"drllm {verb.name}",
        usage=" ".join(["%(prog)s", "[flags]", *places]),
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        epilog=f"example: {verb.example}",
        exit_on_error=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in verb.flags:
        text = flag.help + (f" (default: {flag.default})" if flag.default else "")
        options: dict[str, Any] = {"help": _escaped(text), "metavar": flag.name.upper()}
        if flag.positional:
            # Optional to argparse, so that what is missing is said in our words.
            parser.add_argument(flag.name, nargs="*" if flag.many else "?", **options)
        elif flag.switch:
            parser.add_argument(flag.shown, action="store_true", help=options["help"])
        else:
            parser.add_argument(
                flag.shown, nargs="+" if flag.many else None, dest=flag.name, **options
            )
    for group in verb.settings:
        _add_settings(parser, group, verb)
    if verb.settings:
        parser.add_argument(
            "--config", action="append", metavar="FILE", help="settings in YAML; flags win over it"
        )
    return parser


def _add_settings(parser: argparse.ArgumentParser, group: type[Settings], verb: Verb) -> None:
    section = parser.add_argument_group(group.__name__.removesuffix("Config").lower())
    kinds = kinds_of(group)
    for declared in dataclasses.fields(group):
        rules, kind = declared.metadata, kinds[declared.name][0]
        names = [flag_of(name) for name in (declared.name, rules["alias"]) if name]
        text = rules["help"]
        if rules["choices"]:
            text += f"; one of {', '.join(rules['choices'])}"
        if group is ModelConfig and declared.name == "model" and verb.model_from_routers:
            text += "; without it the one that the routers name"
        elif declared.default is not None:
            default = str(declared.default).lower() if kind is bool else declared.default
            text += f" (default: {default})"
        options: dict[str, Any] = {"dest": declared.name, "help": _escaped(text)}
        if kind is bool:
            section.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        else:
            metavar = {int: "N", float: "X"}.get(kind, "TEXT")
            section.add_argument(*names, metavar=metavar, **options)


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


def _value(declared: dataclasses.Field[Any], kinds: Sequence[type], text: str) -> Any:
    """Return the value of a setting that the line gives as text."""
    kind = kinds[0]
    if kind is str:
        return text
    if _NUMBER[kind].fullmatch(text):
        return kind(text)
    raise ConfigError(
        f"{flag_of(declared.name)} is {text[:80]!r}; give {_WANTED[kind]} "
        f"({declared.metadata['help']})"
    )


# --- files -------------------------------------------------------------------------------------


def _read_settings(path: Path, verb: Verb) -> dict[str, Any]:
    """Read and check a `--config` file for a verb.

    Raises:
        ConfigError: As `read_yaml`; an unknown setting, or a value that doesn't fit.
    """
    values = read_yaml(path, "settings")
    for group in verb.settings:
        values = canonical(group, values)
    known = [flag.name for flag in verb.flags if not flag.positional]
    known += [declared.name for group in verb.settings for declared in dataclasses.fields(group)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: " + unknown_name("setting", key, known))
    try:
        for flag in verb.flags:
            if flag.name in values:
                values[flag.name] = _flag_value(flag, values[flag.name])
        for group in verb.settings:
            names = {declared.name for declared in dataclasses.fields(group)}
            group(**{key: value for key, value in values.items() if key in names})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def _flag_value(flag: Flag, value: Any) -> Any:
    """Return what a file says for a verb's own flag."""
    if flag.switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{flag.shown} is {value!r}; give true or false")
        return value
    texts = [as_text(each) for each in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) for text in texts) or (len(texts) != 1 and not flag.many):
        wanted = "one text or a list of texts" if flag.many else "a text"
        raise ConfigError(f"{flag.shown} is {value!r}; give {wanted}")
    for text in texts:
        check_text(flag.shown, text)
    return texts if flag.many else texts[0]


# --- what is refused ---------------------------------------------------------------------------


def _check_switches(verb: Verb, words: Sequence[str]) -> None:
    """Refuse `--switch=value`, and a flag without its value."""
    switches = _switches(verb)
    valued = {flag.shown: f"one ({flag.help})" for flag in verb.flags if not flag.switch}
    for group in verb.settings:
        for declared in dataclasses.fields(group):
            rules, kind = declared.metadata, kinds_of(group)[declared.name][0]
            choices = rules["choices"]
            wanted = f"one of {', '.join(choices)}" if choices else _WANTED[kind]
            for name in (declared.name, rules["alias"]):
                if name and flag_of(name) not in switches:
                    valued[flag_of(name)] = f"{wanted} ({rules['help']})"
    if verb.settings:
        valued["--config"] = "the name of a YAML file"
    for word, after in itertools.zip_longest(words, words[1:]):
        if word == "--":
            return
        name, equals, value = word.partition("=")
        if equals and name in switches:
            raise _one_too_many(name, value, switches)
        if name in valued and not equals and (after is None or after.startswith("--")):
            raise ConfigError(f"{name} has no value; give {valued[name]}")


def _unknown(verb: Verb, word: str, words: Sequence[str]) -> ConfigError:
    """Return what is wrong with a word that the parser can't place."""
    if word.startswith("-"):
        flags = [flag.shown for flag in verb.flags if not flag.positional]
        flags += [flag_of(d.name) for group in verb.settings for d in dataclasses.fields(group)]
        flags += ["--config", "--help"] if verb.settings else ["--help"]
        said = unknown_name("flag", word.partition("=")[0], flags)
        return ConfigError(f"{said} ('drllm {verb.name} --help')")
    switches = _switches(verb)
    before = {after: word for word, after in itertools.pairwise(words)}.get(word, "")
    if before in switches:
        return _one_too_many(before, word, switches)
    return ConfigError(
        f"{verb.name} has no use for {word!r}; put texts with spaces in quotes, or see "
        f"'drllm {verb.name} --help'"
    )


def _switches(verb: Verb) -> dict[str, str]:
    """Return every flag that takes no value, with the flag that undoes it or nothing."""
    found = {flag.shown: "" for flag in verb.flags if flag.switch}
    for group in verb.settings:
        for declared in dataclasses.fields(group):
            if kinds_of(group)[declared.name][0] is bool:
                for name in filter(None, (declared.name, declared.metadata["alias"])):
                    on, off = flag_of(name), flag_of(f"no_{name}")
                    found[on], found[off] = f"{off} turns it off", f"{on} turns it on"
    return found


def _one_too_many(flag: str, value: str, switches: Mapping[str, str]) -> ConfigError:
    return ConfigError(
        f"{flag} takes no value, but {value!r} follows it; {switches[flag] or 'leave that out'}"
    )
