"""The table of verbs, and the way from the words of a command line to checked settings.

Each verb is a function, registered once with its settings and its own flags; the parser, the help
and the messages are made from this table. A flag wins over the file given as `--config`, and that
over the default. A mistake becomes one line that names the flag, the value and what was expected.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drllm.config.fields import Settings, check_text, flag_of, is_by_task, kinds_of
from drllm.config.files import PRESETS, as_text, canonical, read_yaml, with_preset, with_underscores
from drllm.errors import ConfigError, nearest_name, unknown_name

if TYPE_CHECKING:
    from drllm.cli.terminal import Terminal

Kind = TypeVar("Kind", bound=Settings)

_WANTED = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
_WRITTEN = {
    int: re.compile(r"[+-]?\d{1,20}"),
    str: re.compile(".*", re.DOTALL),
    float: re.compile(r"[+-]?(\d{1,400}(\.\d*)?|\.\d+)([eE][+-]?\d{1,5})?"),
}
HELP = ("-h", "--help", "--help-all")
_RENAMED = {"--damage": "--kl", "--no-damage": "--no-kl", "--opponents": "--baselines"}


# --- the table of verbs ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flag:
    """What a verb reads or writes, or one of its settings."""

    name: str  # with underscores, of a positional argument too
    help: str
    default: Any = None
    required: bool = False
    many: bool = False  # one value or more
    positional: bool = False
    switch: bool = False  # no value; False where it isn't given
    value: str = "FILE"  # how a value is written, for `--help`
    basic: bool = True  # shown by `--help`; the others by `--help-all` only
    group: type[Settings] | None = None  # whose setting it is; the fields below are for settings
    kind: type = str
    choices: tuple[str, ...] = ()
    alias: str | None = None
    in_files: bool = False  # a setting by task, which only YAML files have

    @property
    def names(self) -> list[str]:
        """The names as a user writes them; the first is the one to show."""
        if self.positional:
            return [self.name.upper()]
        return [flag_of(name) for name in (self.name, self.alias) if name]

    @property
    def wanted(self) -> str:
        """What to give as its value."""
        what = _WANTED[self.kind] if self.group else "one"
        return (f"one of {', '.join(self.choices)}" if self.choices else what) + f" ({self.help})"


@dataclass(frozen=True, slots=True)
class Request:
    """A command line, understood and checked."""

    verb: str
    settings: tuple[Settings, ...]  # one object of each of the verb's groups
    values: Mapping[str, Any]  # of the verb's own flags, by name
    model_given: bool  # the user named a base model

    def of(self, kind: type[Kind]) -> Kind:
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
        return [Path(value).expanduser() for value in self.values[name]]


@dataclass(frozen=True, slots=True)
class Verb:
    """One command; `run` does the work."""

    name: str
    help: str
    example: str
    run: Callable[[Request, Terminal], None]
    settings: tuple[type[Settings], ...] = ()  # groups that become flags
    flags: tuple[Flag, ...] = ()
    model_from_routers: bool = False  # without --model, the routers name the base model
    resumes: bool = False  # the same command resumes after an interruption


VERBS: dict[str, Verb] = {}
"""Filled when the modules that `drllm.cli` names are imported, in the order of `--help`."""

FOREIGN = {"lm-eval": "lm-evaluation-harness' own command line, with --model drllm"}
"""Verbs whose arguments another program parses, with their help."""


def verb(name: str, **described: Any) -> Callable[[Any], Any]:
    """Register a function as a verb, described as `Verb` says; its docstring is the help."""

    def register(function: Any) -> Any:
        text = function.__doc__.split("\n")[0].rstrip(".")
        VERBS[name] = Verb(name, text[0].lower() + text[1:], run=function, **described)
        return function

    return register


# --- a command line ----------------------------------------------------------------------------


def parse(words: Sequence[str]) -> Request:
    """Turn a verb and its flags into checked settings.

    Args:
        words: The command line without the program's name; at least the verb.

    Raises:
        ConfigError: An unknown verb, flag or setting, a value that doesn't fit, something missing.
    """
    name, *rest = words
    verb = verb_of(name)
    rest = _with_dashes(rest)
    switches = _check_values(verb, rest)
    try:
        parsed, unknown = _parser(verb).parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{' '.join(str(error).split())}; see 'drllm {name} --help'") from error
    if unknown:
        raise _unknown(verb, unknown[0], rest, switches)
    given = {key: value for key, value in vars(parsed).items() if value not in (None, [])}
    values: dict[str, Any] = {}
    for file in given.pop("config", []):
        check_text("--config", file)
        values |= _read_settings(PRESETS.get(file) or Path(file).expanduser(), verb)
    values |= given
    own: dict[str, Any] = {}
    for flag in flags_of(verb):
        said, name = given.get(flag.name), flag.names[0]
        if flag.group is None:
            missing: Any = [] if flag.many else False if flag.switch else flag.default
            own[flag.name] = values.get(flag.name, missing)
            if said is not None:
                _flag_value(flag, said)
            if flag.required and not own[flag.name]:
                needs = f"{verb.name} needs {name} ({flag.help})"
                raise ConfigError(f"{needs}, for example: {verb.example}")
        elif isinstance(said, str):
            if not _WRITTEN[flag.kind].fullmatch(said):
                raise ConfigError(f"{name} is {said[:80]!r}; give {flag.wanted}")
            values[flag.name] = flag.kind(said)
    groups = tuple(_made(group, values) for group in verb.settings)
    return Request(verb.name, groups, own, "model" in values)


def _made(group: type[Settings], values: Mapping[str, Any]) -> Settings:
    names = [declared.name for declared in dataclasses.fields(group)]
    return group(**{name: values[name] for name in names if name in values})


def verb_of(name: str) -> Verb:
    """Return the verb of a name; ConfigError for one that there isn't."""
    if name not in VERBS:
        kind = "flag" if name.startswith("-") else "verb"
        known = {**VERBS, **FOREIGN}
        raise ConfigError(unknown_name(kind, name, known) + "; 'drllm --help' explains them")
    return VERBS[name]


def flags_of(verb: Verb) -> Iterator[Flag]:
    """Return a verb's flags, its own first; settings that only YAML files have are among them."""
    yield from verb.flags
    for group in verb.settings:
        kinds = kinds_of(group)
        for each in dataclasses.fields(group):
            rules, in_files = each.metadata, is_by_task(kinds[each.name])
            kind, choices = kinds[each.name][0], tuple(rules["choices"] or ())
            value = {int: "N", float: "X"}.get(kind, "NAME")
            yield Flag(
                each.name,
                rules["help"],
                each.default,
                value=rules["value"] or (value if in_files else "|".join(choices) or value),
                basic=rules["basic"],
                group=group,
                kind=kind,
                choices=choices,
                alias=rules["alias"],
                in_files=in_files,
            )


def _given_as_flags(verb: Verb) -> list[Flag]:
    return [flag for flag in flags_of(verb) if not flag.in_files]


def _parser(verb: Verb) -> argparse.ArgumentParser:
    """Return a verb's parser: every value is read as text, and left out where it is missing."""
    parser = argparse.ArgumentParser(
        prog=f"drllm {verb.name}",
        add_help=False,
        exit_on_error=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in _given_as_flags(verb):
        options: dict[str, Any] = {}
        if flag.switch:
            options["action"] = "store_true"
        elif flag.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif flag.positional:
            # Optional to argparse, so that we word what is missing.
            options["nargs"] = "*" if flag.many else "?"
        elif flag.many:
            options["nargs"] = "+"
        parser.add_argument(*map(str.lower, flag.names), **options)
    if verb.settings:
        parser.add_argument("--config", action="append")
    return parser


def _with_dashes(words: Sequence[str]) -> list[str]:
    """Write flag names with dashes, since underscores are accepted too; values stay as they are."""
    end = words.index("--") if "--" in words else len(words)
    dashed = (re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), w) for w in words[:end])
    return [*dashed, *words[end:]]


def _section(group: type[Settings]) -> str:
    """Return what a group of settings is called in recipes and presets."""
    return group.__name__.removesuffix("Config").lower()


def _read_settings(path: Path, verb: Verb) -> dict[str, Any]:
    values = read_yaml(path, f"settings, or one of {', '.join(PRESETS)}")
    sections = {_section(group) for each in VERBS.values() for group in each.settings}
    if any(isinstance(values.get(name), dict) for name in sections):
        values = _of_verb(path, with_preset(path, values), verb, sections)
    for group in verb.settings:
        values = canonical(group, values)
    known = [flag.name for flag in flags_of(verb) if not flag.positional]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: {nearest_name('setting', key, known)} {_see(verb)}")
    try:
        for flag in verb.flags:
            if flag.name in values:
                values[flag.name] = _flag_value(flag, values[flag.name])
        for group in verb.settings:
            _made(group, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def _of_verb(
    path: Path, sections: Mapping[str, Any], verb: Verb, known: Iterable[str]
) -> dict[str, Any]:
    """Return the settings of a verb from a preset or a recipe, which has a section a group."""
    for name, section in sections.items():
        if name not in known:
            raise ConfigError(f"{path}: " + unknown_name("section", name, sorted(known)))
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {name} is {section!r}; give settings, 'name: value'")
    own = [sections[name] for name in map(_section, verb.settings) if name in sections]
    if not own:
        raise ConfigError(
            f"{path} has no effect on {verb.name}: it has settings of {', '.join(sections)} alone; "
            f"leave --config out"
        )
    return {name: value for section in own for name, value in with_underscores(section).items()}


def _flag_value(flag: Flag, value: Any) -> Any:
    """Return what is said for a verb's own flag, checked."""
    if flag.switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{flag.names[0]} is {value!r}; give true or false")
        return value
    texts = [as_text(each) for each in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) for text in texts) or (len(texts) != 1 and not flag.many):
        wanted = "one text or a list of texts" if flag.many else "a text"
        raise ConfigError(f"{flag.names[0]} is {value!r}; give {wanted}")
    for text in texts:
        check_text(flag.names[0], text)
    return texts if flag.many else texts[0]


# --- what is refused ---------------------------------------------------------------------------


def _check_values(verb: Verb, words: Sequence[str]) -> dict[str, str]:
    """Refuse `--switch=value`, and a flag without its value; return what undoes each switch."""
    valued: dict[str, str] = {}
    switches: dict[str, str] = {}
    for flag in _given_as_flags(verb):
        for name in () if flag.positional else flag.names:
            if flag.switch:
                switches[name] = "leave that out"
            elif flag.kind is bool:
                off = name.replace("--", "--no-", 1)
                switches |= {name: f"{off} turns it off", off: f"{name} turns it on"}
            else:
                valued[name] = flag.wanted
    if verb.settings:
        valued["--config"] = "the name of a YAML file"
    for word, after in itertools.zip_longest(words, words[1:]):
        name, equals, value = word.partition("=")
        if word == "--":
            break
        if equals and name in switches:
            raise _one_too_many(name, value, switches)
        if name in valued and not equals and (after is None or after.startswith("--")):
            raise ConfigError(f"{name} has no value; give {valued[name]}")
    return switches


def _unknown(
    verb: Verb, word: str, words: Sequence[str], switches: Mapping[str, str]
) -> ConfigError:
    """Return what is wrong with a word that the parser can't place."""
    name = word.partition("=")[0]
    if word.startswith("-"):
        flags = {flag.names[0]: flag for flag in flags_of(verb) if not flag.positional}
        if name in flags:
            return ConfigError(
                f"{name} is no flag; write it into a YAML file, such as '{flags[name].name}: "
                f"{flags[name].value}', and give that as --config FILE"
            )
        if _RENAMED.get(name, "").replace("--no-", "--") in flags:
            return ConfigError(f"unknown flag {name!r}, which is called {_RENAMED[name]} now")
        known = [*flags, *HELP, *(["--config"] if verb.settings else [])]
        return ConfigError(f"{nearest_name('flag', name, known)} {_see(verb)}")
    before = {after: word for word, after in itertools.pairwise(words)}.get(word, "")
    if before in switches:
        return _one_too_many(before, word, switches)
    return ConfigError(
        f"{verb.name} has no use for {word!r}; put texts with spaces in quotes, or see "
        f"'drllm {verb.name} --help'"
    )


def _see(verb: Verb) -> str:
    return f"('drllm {verb.name} --help-all' lists all)"


def _one_too_many(flag: str, value: str, switches: Mapping[str, str]) -> ConfigError:
    return ConfigError(f"{flag} takes no value, but {value!r} follows it; {switches[flag]}")
