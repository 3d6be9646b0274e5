"""What a setting is: a field with a type, bounds and help text, checked when its group is made."""

import dataclasses
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from drllm.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class NamesIn(Iterable[str]):
    """The names in a registry `module:attribute`, of a module above this one, in their order."""

    registry: str

    def __iter__(self) -> Iterator[str]:
        return iter(pkgutil.resolve_name(self.registry))


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Iterable[str] | None = None,
    alias: str | None = None,
    idle: tuple[str, Any] | None = None,
    decisive: bool = True,
    value: str | None = None,
    basic: bool = False,
) -> Any:
    """Declare one field: its default and what it accepts; what it is, the class's docstring says.

    `above` is a bound that itself isn't accepted; None is accepted beside the choices where it is
    the default; `alias` is a flag under which published commands know the setting; `idle` is
    another field of the group, and the value of it that leaves this one without effect; results
    depend on what is `decisive`; `value` is how a value is written, of a setting by task an
    example; `--help` shows what is `basic`, `--help-all` the rest.
    """
    rules = {name: value for name, value in locals().items() if name != "default"}
    return field(default=default, metadata=rules)


basic = partial(setting, basic=True)  # declares a field that `--help` shows
incidental = partial(setting, decisive=False)
"""Declares a field that results don't depend on: places, memory, who does the work."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings that checks its values when it is made."""

    def __post_init__(self) -> None:
        kinds = kinds_of(type(self))
        for declared in dataclasses.fields(self):
            value, own = getattr(self, declared.name), kinds[declared.name]
            shown = declared.name if is_by_task(own) else flag_of(declared.name)
            _check(shown, value, own, declared.metadata)

    def check_effects(self) -> None:
        """Refuse settings that others of the group leave without effect.

        Not checked when the settings are made, since a file and the command line may each give a
        part of them. A setting that has its default isn't taken for given.
        """
        for declared in dataclasses.fields(self):
            value, idle = getattr(self, declared.name), declared.metadata["idle"]
            if idle and value != declared.default and getattr(self, idle[0]) == idle[1]:
                given, other = "" if value is True else f" {_shown(value)}", flag_of(idle[0])
                why = f"with {other} {_shown(idle[1])}; leave it out, or give another {other}"
                if idle[1] is None:
                    why = f"without {other}; give that too, or leave it out"
                raise ConfigError(f"{flag_of(declared.name)}{given} has no effect {why}")

    @classmethod
    def helps(cls) -> dict[str, str]:
        """Return the text of each setting for `--help`, from the attributes in the docstring."""
        listed = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")[2]
        texts = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
        return {name: " ".join(text.split()) for name, text in texts}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types, for manifests."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """Return the settings that must be equal for two results to be the same one."""
        fields = [each.name for each in dataclasses.fields(self) if each.metadata["decisive"]]
        return {name: getattr(self, name) for name in fields}


Group = TypeVar("Group", bound=Settings)

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_WRITTEN = {
    int: re.compile(r"[+-]?\d{1,20}"),
    float: re.compile(r"[+-]?(\d{1,400}(\.\d*)?|\.\d+)([eE][+-]?\d{1,5})?"),
}
LARGEST_INT = 2**63 - 1


def kinds_of(group: type[Settings]) -> dict[str, tuple[type, ...]]:
    """Return the types that each setting of a group takes; `int | None` is two."""
    hints = typing.get_type_hints(group)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}


def is_by_task(kinds: tuple[type, ...]) -> bool:
    """Tell whether a setting has a value for each task: only YAML files say such, no flag."""
    return typing.get_origin(kinds[0]) is dict


def from_text(value: Any, kinds: tuple[type, ...]) -> Any:
    """Return the number that a text writes, by task too, where one is taken; else the value."""
    if isinstance(value, dict) and is_by_task(kinds):
        of_one = _of_one(kinds)
        return {task: from_text(one, of_one) for task, one in value.items()}
    for kind in kinds:
        if isinstance(value, str) and kind in _WRITTEN and _WRITTEN[kind].fullmatch(value):
            return kind(value)
    return value


def _of_one(kinds: tuple[type, ...]) -> tuple[type, ...]:
    """Return the types that one task's value of a setting by task may have."""
    hint = typing.get_args(kinds[0])[1]
    return typing.get_args(hint) or (hint,)


def flag_of(name: str) -> str:
    """Return a setting's name as a flag."""
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if not isinstance(value, int) or value.bit_length() < 100 else "a huge number"


def _check(flag: str, value: Any, kinds: tuple[type, ...], rules: Mapping[str, Any]) -> None:
    if is_by_task(kinds):
        if value is not None and not isinstance(value, dict):
            example = f"{flag}: {rules['value']}"
            raise ConfigError(f"{flag} is {value!r}; give values by task, as in '{example}'")
        for task, one in (value or {}).items():
            _check(f"{flag} of {task}", one, _of_one(kinds), rules)
        return
    accepted = (*kinds, int) if float in kinds else kinds
    is_bool = isinstance(value, bool)  # which to Python is an int
    if (is_bool and bool not in kinds) or not isinstance(value, accepted):
        wanted = " or ".join(_KINDS.get(kind, "nothing") for kind in kinds)
        raise ConfigError(f"{flag} is {value!r}; give {wanted}")
    if isinstance(value, str):
        check_text(flag, value)
        if rules["choices"] and value not in rules["choices"]:
            raise ConfigError(f"{flag}: " + unknown_name("value", value, rules["choices"]))
    if is_bool or not isinstance(value, (int, float)):
        return
    minimum, maximum, above = rules["minimum"], rules["maximum"], rules["above"]
    for wanted, holds in (
        ("a finite number below 2^63", abs(value) <= LARGEST_INT),
        (f"a value of at least {minimum}", minimum is None or value >= minimum),
        (f"a value above {above}", above is None or value > above),
        (f"a value of at most {maximum}", maximum is None or value <= maximum),
    ):
        if not holds:
            raise ConfigError(f"{flag} is {_shown(value)}; give {wanted}")


def check_text(flag: str, text: str) -> None:
    """Refuse a text that is empty or that no file could be named by, naming the flag."""
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{flag} is {text!r}; give a text, or leave it out")


def required_tasks(names: str | None, flag: str = "--tasks") -> str:
    """Return the names of the tasks that a stage asks; ConfigError where none is named."""
    if names is None:
        raise ConfigError(
            f"no task is given; name one as {flag}, for example {flag} questions.jsonl or "
            f"{flag} arc_easy ('drllm ls tasks' lists all)"
        )
    return names


def changed(kind: type[Group], config: Group | None, settings: Mapping[str, Any]) -> Group:
    """Return a group of settings, by default that of all defaults, with some changed by name.

    A setting may be given under its published name, its alias.
    """
    names = {field.metadata["alias"]: field.name for field in dataclasses.fields(kind)}
    values = (config or kind()).to_dict()
    for name, value in settings.items():
        values[names.get(name, name)] = value
    return from_dict(kind, values, "settings")


def make_settings(kind: type[Group], values: Mapping[str, Any]) -> Group:
    """Make a group of settings of those values that belong to it."""
    names = [declared.name for declared in dataclasses.fields(kind)]
    return kind(**{name: values[name] for name in names if name in values})


def from_dict(kind: type[Group], values: dict[str, Any], where: str) -> Group:
    """Make a settings group of a mapping that is part of `where`; ConfigError if it doesn't fit."""
    known = kinds_of(kind)
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: " + unknown_name("setting", str(name), known))
    return kind(**values)
