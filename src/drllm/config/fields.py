"""Settings: groups of fields with a type, bounds and a help text.

Making a group of settings checks its values.
"""

import dataclasses
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from drllm.config.removed import REMOVED_FLAGS
from drllm.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class NamesIn(Iterable[str]):
    """The names in a registry, given as `module:attribute`, in the registry's order.

    The registry is imported only when the names are read, because its module may import this one.
    """

    registry: str

    def __iter__(self) -> Iterator[str]:
        return iter(pkgutil.resolve_name(self.registry))


def setting(
    default: Any,
    *,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Iterable[str] | None = None,
    alias: str | None = None,
    no_effect_if: tuple[str, Any] | None = None,
    decisive: bool = True,
    value: str | None = None,
    basic: bool = False,
) -> Any:
    """Declare one field of a group of settings.

    Args:
        default: The default value; None is accepted only if it is the default.
        help: The help text, with the unit.
        minimum: The lowest accepted value.
        maximum: The highest accepted value.
        above: A lower bound that itself isn't accepted.
        choices: The accepted texts.
        alias: A second name, such as that of a published command.
        no_effect_if: Another field of the group and a value. If that field has this value, the
            declared field has no effect.
        decisive: Whether results depend on the field.
        value: The placeholder for a value in the help; for a setting by task, an example.
        basic: Whether `--help` shows the field; `--help-all` shows all fields.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "choices": choices,
        "alias": alias,
        "no_effect_if": no_effect_if,
        "decisive": decisive,
        "value": value,
        "basic": basic,
    }
    return dataclasses.field(default=default, metadata=metadata)


basic = partial(setting, basic=True)
"""Declares a field that `--help` shows."""
incidental = partial(setting, decisive=False)
"""Declares a field that doesn't change results, such as a folder or a limit of memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings. Making a group checks all of its values."""

    def __post_init__(self) -> None:
        kinds = list_kinds(type(self))
        for field in dataclasses.fields(self):
            field_kinds = kinds[field.name]
            name = field.name if is_by_task(field_kinds) else to_flag(field.name)
            _check(name, getattr(self, field.name), field_kinds, field.metadata)

    def check_effects(self) -> None:
        """Refuse settings that have no effect because of another setting of the group.

        Making a group doesn't check this, because a file and the command line may each give a part
        of the settings. A setting with its default value counts as absent.
        """
        for field in dataclasses.fields(self):
            condition = field.metadata["no_effect_if"]
            value = getattr(self, field.name)
            if condition is None or value == field.default:
                continue
            other_name, other_value = condition
            if getattr(self, other_name) == other_value:
                raise _no_effect(to_flag(field.name), value, to_flag(other_name), other_value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types, for manifests."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """Return the settings on which results depend."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata["decisive"]]
        return {name: getattr(self, name) for name in names}


def _no_effect(flag: str, value: Any, other: str, other_value: Any) -> ConfigError:
    """Return the error for a setting without effect."""
    setting = flag if value is True else f"{flag} {_format(value)}"
    if other_value is None or other_value is False:
        return ConfigError(
            f"{setting} has no effect without {other}; give that too, or leave it out"
        )
    return ConfigError(
        f"{setting} has no effect with {other} {_format(other_value)}; leave it out, or give "
        f"another {other}"
    )


Group = TypeVar("Group", bound=Settings)

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
# The texts that are read as numbers.
_NUMBERS = {
    int: re.compile(r"[+-]?\d{1,20}"),
    float: re.compile(r"[+-]?(\d{1,400}(\.\d*)?|\.\d+)([eE][+-]?\d{1,5})?"),
}
LARGEST_INT = 2**63 - 1


def list_kinds(group: type[Settings]) -> dict[str, tuple[type, ...]]:
    """Return the accepted types of each setting of a group, two for `int | None`."""
    hints = typing.get_type_hints(group)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}


def is_by_task(kinds: tuple[type, ...]) -> bool:
    """Tell whether a setting has a value for each task. Only YAML files can give these values."""
    return typing.get_origin(kinds[0]) is dict


def convert_text(value: Any, kinds: tuple[type, ...]) -> Any:
    """Convert a text to a number if the setting accepts one; return any other value unchanged.

    The values of a setting by task are converted one by one.
    """
    if isinstance(value, dict) and is_by_task(kinds):
        task_kinds = _kinds_by_task(kinds)
        return {task: convert_text(task_value, task_kinds) for task, task_value in value.items()}
    if not isinstance(value, str):
        return value
    for kind in kinds:
        if kind in _NUMBERS and _NUMBERS[kind].fullmatch(value):
            return kind(value)
    return value


def _kinds_by_task(kinds: tuple[type, ...]) -> tuple[type, ...]:
    """Return the accepted types of one task's value, for a setting by task."""
    hint = typing.get_args(kinds[0])[1]
    return typing.get_args(hint) or (hint,)


def to_flag(name: str) -> str:
    """Return a setting's name as a flag."""
    return "--" + name.replace("_", "-")


def _format(value: Any) -> str:
    """Write a value for a message."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() >= 100:
        return "a huge number"
    return str(value)


def _check(name: str, value: Any, kinds: tuple[type, ...], rules: Mapping[str, Any]) -> None:
    """Refuse a value of a wrong type, outside the bounds, or not among the choices."""
    if is_by_task(kinds):
        _check_by_task(name, value, kinds, rules)
        return
    is_bool = isinstance(value, bool)  # to Python, a bool is an int
    accepted = (*kinds, int) if float in kinds else kinds
    if (is_bool and bool not in kinds) or not isinstance(value, accepted):
        expected = " or ".join(_KINDS.get(kind, "nothing") for kind in kinds)
        raise ConfigError(f"{name} is {value!r}; give {expected}")
    if isinstance(value, str):
        check_text(name, value)
        if rules["choices"] and value not in rules["choices"]:
            raise ConfigError(f"{name}: " + unknown_name("value", value, rules["choices"]))
    if isinstance(value, (int, float)) and not is_bool:
        _check_bounds(name, value, rules)


def _check_by_task(
    name: str, values: Any, kinds: tuple[type, ...], rules: Mapping[str, Any]
) -> None:
    if values is None:
        return
    if not isinstance(values, dict):
        example = f"{name}: {rules['value']}"
        raise ConfigError(f"{name} is {values!r}; give values by task, as in '{example}'")
    for task, value in values.items():
        _check(f"{name} of {task}", value, _kinds_by_task(kinds), rules)


def _check_bounds(name: str, value: float, rules: Mapping[str, Any]) -> None:
    minimum = rules["minimum"]
    maximum = rules["maximum"]
    above = rules["above"]
    expected = None
    if not abs(value) <= LARGEST_INT:  # refuses NaN too
        expected = "a finite number below 2^63"
    elif minimum is not None and value < minimum:
        expected = f"a value of at least {minimum}"
    elif above is not None and value <= above:
        expected = f"a value above {above}"
    elif maximum is not None and value > maximum:
        expected = f"a value of at most {maximum}"
    if expected is not None:
        raise ConfigError(f"{name} is {_format(value)}; give {expected}")


def check_text(flag: str, text: str) -> None:
    """Refuse a text that is empty or can't name a file; the message names the flag."""
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{flag} is {text!r}; give a text, or leave it out")


def require_tasks(names: str | None, flag: str = "--tasks") -> str:
    """Return the names of the tasks; raise ConfigError if there are none."""
    if names is None:
        raise ConfigError(
            f"no task is given; name one as {flag}, for example {flag} questions.jsonl or "
            f"{flag} arc_easy ('drllm ls tasks' lists all)"
        )
    return names


def replace_settings(kind: type[Group], config: Group | None, settings: Mapping[str, Any]) -> Group:
    """Copy a group of settings, or the defaults, and change some settings in the copy.

    A setting may be given by its alias, which is its published name.
    """
    names = {field.metadata["alias"]: field.name for field in dataclasses.fields(kind)}
    values = (config or kind()).to_dict()
    for name, value in settings.items():
        values[names.get(name, name)] = value
    return from_dict(kind, values, "settings")


def make_settings(kind: type[Group], values: Mapping[str, Any]) -> Group:
    """Make a group of settings from the values that belong to it; ignore all other values."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: values[name] for name in names if name in values})


def from_dict(kind: type[Group], values: dict[str, Any], where: str) -> Group:
    """Make a group of settings from values.

    Raises ConfigError for an unknown name, with `where` in the message, and for a wrong value.
    """
    known = list_kinds(kind)
    for name in map(str, values):
        if name in known:
            continue
        if to_flag(name) in REMOVED_FLAGS:
            raise ConfigError(f"{where}: {REMOVED_FLAGS[to_flag(name)]}")
        raise ConfigError(f"{where}: " + unknown_name("setting", name, known))
    return kind(**values)
