"""The table of verbs, and the way from the words of a command line to checked settings.

Each verb is a function, registered once with its settings and its own flags; the parser, the help
and the messages are made from this table. A flag wins over the file given as `--config`, and that
over the default. A mistake becomes one line that names the flag, the value and what was expected.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drllm.cli.removed import REMOVED_FLAGS, REMOVED_VERBS
from drllm.config.fields import Settings, check_text, flag_of, from_text, is_by_task, kinds_of
from drllm.config.files import PRESETS, canonical, read_yaml, sections_of, with_preset
from drllm.errors import ConfigError, nearest_name, unknown_name

if TYPE_CHECKING:
    from drllm.cli.terminal import Terminal

Kind = TypeVar("Kind", bound=Settings)

_WANTED = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
HELP = ("-h", "--help", "--help-all")
_FLAG = re.compile(r"-{1,2}[A-Za-z][^\s=]*(=.*)?", re.DOTALL)


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

    @property
    def in_files(self) -> bool:
        """Whether it is a setting by task, which only YAML files have."""
        return is_by_task((self.kind,))

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
        return [Path(value).expanduser() for value in self.values[name] or ()]


@dataclass(frozen=True, slots=True)
class Verb:
    """One command; `run` does the work."""

    name: str
    help: str
    example: str
    run: Callable[[Request, Terminal], None]
    settings: tuple[type[Settings], ...] = ()  # groups that become flags
    flags: tuple[Flag, ...] = ()
    model_from: str = ""  # what names the base model where --model isn't given
    resumes: bool = False  # the same command resumes after an interruption
    shares: bool = False  # several processes divide the work


CONFIG = Flag(
    "config", f"settings in YAML, or one of {', '.join(PRESETS)}; flags win, then later files"
)


class _Verbs(UserDict[str, Any]):
    """Verbs by name, first the names of modules: each is imported when its verb is asked for."""

    def __getitem__(self, name: str) -> Verb:
        if isinstance(module := self.data[name], str):
            importlib.import_module(f"drllm.cli.{module}")
        found: Verb = self.data[name]
        return found


_OF_STAGES = "search supervise train tune heal evaluate report export"
VERBS = _Verbs(
    {"run": "running", "generate": "generation"}
    | dict.fromkeys(_OF_STAGES.split(), "stages")
    | {"show": "show", "ls": "listing"}
)

IN_ORDER = {
    "all stages in a row": "run",
    "the stages, each of which reads what one before it wrote": "search supervise train tune "
    "heal generate evaluate lm-eval report export",
    "what there is": "show ls",
}
"""Titles and verbs as `drllm --help` has them: in the order in which data goes through them."""
WIDEST = 26  # columns for a flag; the text of a longer one begins on the next line
FOREIGN = {"lm-eval": "lm-evaluation-harness' own command line, with --model drllm"}
"""Verbs whose arguments another program parses, with their help."""


def verb(name: str, **described: Any) -> Callable[[Any], Any]:
    """Register a function as a verb, described as `Verb` says; its docstring is the help."""

    def register(function: Any) -> Any:
        text = function.__doc__.split("\n")[0].rstrip(".")
        VERBS[name] = Verb(name, text[0].lower() + text[1:], run=function, **described)
        return function

    return register


def parse(words: Sequence[str]) -> Request:
    """Turn a verb and its flags into checked settings; what doesn't fit is a ConfigError."""
    verb = verb_of(words[0])
    given = _said(verb, words[1:])
    values: dict[str, Any] = {}
    for file in given.pop("config", []):
        check_text("--config", file)
        values |= _read_settings(PRESETS.get(file) or Path(file).expanduser(), verb)
    values |= given
    own: dict[str, Any] = {}
    flags = {flag.name: flag for flag in flags_of(verb)}
    for flag in flags.values():
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
            values[flag.name] = from_text(said, (flag.kind,))
            if not isinstance(values[flag.name], flag.kind):
                raise ConfigError(f"{name} is {said[:80]!r}; give {flag.wanted}")
    if columns := own.get("columns"):
        from drllm.tasks.files import with_columns  # which few commands need

        name = next(name for name in ("dataset", "tasks") if name in flags)
        values[name] = with_columns(values.get(name) or flags[name].default or "", columns)
    groups = tuple(_made(group, values) for group in verb.settings)
    return Request(verb.name, groups, own, "model" in values)


def _made(group: type[Settings], values: Mapping[str, Any]) -> Settings:
    names = [declared.name for declared in dataclasses.fields(group)]
    return group(**{name: values[name] for name in names if name in values})


def verb_of(name: str) -> Verb:
    """Return the verb of a name; ConfigError for one that there isn't."""
    if name in REMOVED_VERBS:
        raise ConfigError(REMOVED_VERBS[name])
    if name not in VERBS:
        kind = "flag" if name.startswith("-") else "verb"
        known = [*VERBS, *FOREIGN]
        raise ConfigError(unknown_name(kind, name, known) + "; 'drllm --help' explains them")
    return VERBS[name]


def flags_of(verb: Verb) -> Iterator[Flag]:
    """Return a verb's flags, its own first; settings that only YAML files have are among them."""
    yield from verb.flags
    for group in verb.settings:
        kinds, helps = kinds_of(group), group.helps()
        for each in dataclasses.fields(group):
            rules, kind = each.metadata, kinds[each.name][0]
            choices = tuple(rules["choices"] or ())
            value = {int: "N", float: "X"}.get(kind, "DIR" if "_dir" in each.name else "NAME")
            yield Flag(
                each.name,
                helps[each.name],
                each.default,
                value=rules["value"] or "|".join(choices) or value,
                basic=rules["basic"],
                group=group,
                kind=kind,
                choices=choices,
                alias=rules["alias"],
            )


def _said(verb: Verb, words: Sequence[str]) -> dict[str, Any]:
    """Return what a command line says of each flag: its texts, or whether a switch is on."""
    flags: dict[str, Flag] = {}
    for known in (*flags_of(verb), *([CONFIG] if verb.settings else [])):
        for name in () if known.in_files or known.positional else known.names:
            flags |= dict.fromkeys((name, _opposite(name))[: 1 + (known.kind is bool)], known)
    end = words.index("--") if "--" in words else len(words)
    said: dict[str, Any] = {}
    free: list[tuple[str, str]] = []  # words that belong to no flag, and the switch before
    switch, todo = "", list(reversed(words[:end]))
    while todo:
        word = todo.pop()
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        flag = flags.get(name)
        if not _FLAG.fullmatch(word):
            free.append((word, switch))
        elif flag is None:
            raise _unknown(verb, name)
        elif flag.switch or flag.kind is bool:
            if equals:
                raise _one_too_many(flag, name, value)
            said[flag.name] = name in flag.names
        else:
            texts = [value] if equals else []
            while todo and not todo[-1].startswith("--") and not equals:
                texts.append(todo.pop())
                if not flag.many:
                    break
            if not texts:
                raise ConfigError(f"{name} has no value; give {flag.wanted}")
            adds_up = flag.many or flag is CONFIG
            said[flag.name] = [*said.get(flag.name, []), *texts] if adds_up else texts[0]
        switch = name if flag is not None and isinstance(said.get(flag.name), bool) else ""
    free += [(word, "") for word in words[end + 1 :]]
    for place in (flag for flag in verb.flags if flag.positional and free):
        said[place.name] = [word for word, _ in free] if place.many else free[0][0]
        free = [] if place.many else free[1:]
    for word, switch in free:
        if switch:
            raise _one_too_many(flags[switch], switch, word)
        raise ConfigError(
            f"{verb.name} has no use for {word!r}; put texts with spaces in quotes, or see "
            f"'drllm {verb.name} --help'"
        )
    return said


def _section(group: type[Settings]) -> str:
    """Return what a group of settings is called in recipes and presets."""
    return group.__name__.removesuffix("Config").lower()


def _read_settings(path: Path, verb: Verb) -> dict[str, Any]:
    values = read_yaml(path, f"settings, or one of {', '.join(PRESETS)}")
    known = {_section(group) for each in VERBS.values() for group in each.settings}
    if any(isinstance(values.get(name), dict) for name in known):
        sections = sections_of(path, with_preset(path, values), known)
        own = [sections[name] for name in map(_section, verb.settings) if name in sections]
        if not own:
            raise ConfigError(
                f"{path} has no effect on {verb.name}: it has settings of {', '.join(sections)} "
                f"alone; leave --config out"
            )
        values = {name: value for section in own for name, value in section.items()}
    for group in verb.settings:
        values = canonical(group, values)
    names = [flag.name for flag in flags_of(verb) if not flag.positional]
    for key in values:
        if key not in names and flag_of(key) in REMOVED_FLAGS:
            raise ConfigError(f"{path}: {REMOVED_FLAGS[flag_of(key)]}")
        if key not in names:
            raise ConfigError(f"{path}: {nearest_name('setting', key, names)} {_see(verb)}")
    try:
        for flag in verb.flags:
            if flag.name in values:
                values[flag.name] = _flag_value(flag, values[flag.name])
        for group in verb.settings:
            _made(group, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def _flag_value(flag: Flag, value: Any) -> Any:
    if flag.switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{flag.names[0]} is {value!r}; give true or false")
        return value
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts) or (len(texts) != 1 and not flag.many):
        wanted = "one text or a list of texts" if flag.many else "a text"
        raise ConfigError(f"{flag.names[0]} is {value!r}; give {wanted}")
    for text in texts:
        check_text(flag.names[0], text)
    return texts if flag.many else texts[0]


def _unknown(verb: Verb, name: str) -> ConfigError:
    flags = {flag.names[0]: flag for flag in flags_of(verb) if not flag.positional}
    if name in flags:
        return ConfigError(
            f"{name} is no flag; write it into a YAML file, such as '{flags[name].name}: "
            f"{flags[name].value}', and give that as --config FILE"
        )
    if name in REMOVED_FLAGS:
        return ConfigError(REMOVED_FLAGS[name])
    known = [*flags, *HELP, *(["--config"] if verb.settings else [])]
    return ConfigError(f"{nearest_name('flag', name, known)} {_see(verb)}")


def _see(verb: Verb) -> str:
    return f"('drllm {verb.name} --help-all' lists all)"


def _opposite(name: str) -> str:
    """Return the flag that turns a switch off, or on again."""
    return name.replace("--no-", "--", 1) if "--no-" in name else name.replace("--", "--no-", 1)


def _one_too_many(flag: Flag, name: str, value: str) -> ConfigError:
    turned = "off" if name in flag.names else "on"
    undo = "leave that out" if flag.switch else f"{_opposite(name)} turns it {turned}"
    return ConfigError(f"{name} takes no value, but {value!r} follows it; {undo}")


def say_overview(terminal: Terminal) -> None:
    """Print the text of `drllm --help`."""
    texts = {name: verb.help for name, verb in VERBS.items()} | FOREIGN
    terminal.say("usage: drllm VERB [flags]\n")
    terminal.say(
        "Layer routing for frozen Hugging Face language models: skip, execute or repeat each "
        "layer, once per prompt.\n"
    )
    for title, names in IN_ORDER.items():
        terminal.say(f"{title}:")
        for name in names.split():
            terminal.beside(f"  {name}", texts[name], max(map(len, texts)) + 3)
        terminal.say()
    terminal.beside("drllm VERB --help", "says more of one; drllm --version says the version", 17)
    terminal.beside("first try:", VERBS["run"].example, 17)


def say_help(verb: Verb, terminal: Terminal, *, everything: bool = False) -> None:
    """Print what a verb does and its basic flags; all of them with `everything`."""
    flags = list(flags_of(verb))
    positional = [f"[{flag.names[0]}]" for flag in flags if flag.positional]
    terminal.say(f"usage: {' '.join(['drllm', verb.name, '[flags]', *positional])}\n")
    terminal.say(f"{verb.help[0].upper()}{verb.help[1:]}.\nfor example: {verb.example}\n")
    chosen = [flag for flag in flags if everything or flag.basic]
    group = None
    for flag in chosen:
        if everything and flag.group is not group and (group := flag.group):
            text = (group.__doc__ or "").partition("\n")[0].rstrip(".")
            terminal.say(f"\n{text[0].lower()}{text[1:]}:")
        terminal.beside(f"  {_name(flag, everything)}", _text(flag, verb), WIDEST)
    terminal.say()
    if verb.settings:
        terminal.beside(f"  {_name(CONFIG, everything)}", CONFIG.help, WIDEST)
    if more := len(flags) - len(chosen):
        terminal.beside("  --help-all", f"{more} more flags and settings too", WIDEST)


def _name(flag: Flag, everything: bool) -> str:
    if flag.in_files:
        return f"{flag.name}: {flag.value}"
    names = flag.names if everything else flag.names[:1]
    many = " ..." * flag.many
    if flag.kind is bool and flag.default is not False:
        names = [name.replace("--", "--[no-]", 1) for name in names]
    has_value = not (flag.positional or flag.switch or flag.kind is bool)
    return ", ".join(names) + f" {flag.value}" * has_value + many


def _text(flag: Flag, verb: Verb) -> str:
    if flag.in_files:
        return f"{flag.help} (in the file of --config)"
    if flag.name == "model" and verb.model_from:
        return f"{flag.help}; without it the one that {verb.model_from}"
    if flag.default is None or flag.default is False:
        return flag.help
    shown = f"{flag.default:g}" if isinstance(flag.default, float) else str(flag.default)
    said = f"{flag.help} (" if not flag.help.endswith(")") else f"{flag.help[:-1]}; "
    return f"{said}default: {'on' if flag.default is True else shown})"
