"""The base class of all settings, and the functions that declare, check and convert them.

A group of settings is a dataclass, such as `TrainConfig`. Each of its fields is a setting, which
`setting`, `basic` or `incidental` declares with its default, bounds and help text. Making an object
of the class checks all values.
"""

import dataclasses
import pkgutil
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from drllm.errors import ConfigError, shorten, unknown_name


@dataclass(frozen=True)
class NamesIn(Iterable[str]):
    """The names in a registry, in the registry's order.

    The registry is imported only when the names are read, because its module may import this one.

    Attributes:
        registry: Where the registry is, as `module:attribute`.
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
    shows_alias: bool = False,
    no_effect_if: tuple[str, Any] | None = None,
    decisive: bool = True,
    placeholder: str | None = None,
    basic: bool = False,
) -> Any:
    """Declare one field of a group of settings.

    Args:
        default: The default value.
        help: The help text, with the unit.
        minimum: The lowest accepted value.
        maximum: The highest accepted value.
        above: A lower bound that itself isn't accepted.
        choices: The accepted texts; None accepts any text.
        alias: A second name, such as the flag's name in the commands of the Dr.LLM paper's code.
        shows_alias: Whether help and messages show the alias instead of the name. The name is in
            files of earlier versions, so it stays.
        no_effect_if: Another field of the group and a value. If that field has this value, the
            declared field has no effect.
        decisive: Whether results depend on the field. Finished work is reused if the decisive
            fields are the same.
        placeholder: What the help shows in place of a value, such as `FILE`; None for a placeholder
            by type.
        basic: Whether `--help` shows the field; `--help-all` shows all fields.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "choices": choices,
        "alias": alias,
        "shows_alias": shows_alias,
        "no_effect_if": no_effect_if,
        "decisive": decisive,
        "placeholder": placeholder,
        "basic": basic,
    }
    return dataclasses.field(default=default, metadata=metadata)


basic = partial(setting, basic=True)
"""Declares a field that `--help` shows."""
incidental = partial(setting, decisive=False)
"""Declares a field on which no result depends, such as a folder or a limit of memory."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A group of settings. Making a group checks all of its values."""

    def __post_init__(self) -> None:
        kinds = list_kinds(type(self))
        for field in dataclasses.fields(self):
            field_kinds = kinds[field.name]
            _check(_flag_of(field), getattr(self, field.name), field_kinds, field.metadata)

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
        """Return the settings on which results depend, by name."""
        names = [field.name for field in dataclasses.fields(self) if field.metadata["decisive"]]
        return {name: getattr(self, name) for name in names}


def _no_effect(flag: str, value: Any, other_flag: str, other_value: Any) -> ConfigError:
    """Return the error for a setting that has no effect while another setting has this value."""
    words = flag if value is True else f"{flag} {_format(value)}"
    if other_value is None or other_value is False:
        return ConfigError(
            f"{words} has no effect without {other_flag}; give that too, or leave it out"
        )
    return ConfigError(
        f"{words} has no effect with {other_flag} {_format(other_value)}; leave it out, or give "
        f"another {other_flag}"
    )


Group = TypeVar("Group", bound=Settings)

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
"""The accepted types of settings, as messages name them."""
_NUMBERS = {
    int: re.compile(r"[+-]?\d{1,20}"),
    float: re.compile(r"[+-]?(\d{1,400}(\.\d*)?|\.\d+)([eE][+-]?\d{1,5})?"),
}
"""The texts that are read as numbers. A text with more digits stays a text, and is refused."""
LARGEST_INT = 2**63 - 1  # no number of a setting may be larger


def list_kinds(group: type[Settings]) -> dict[str, tuple[type, ...]]:
    """List the accepted types of each setting by name; `int | None` gives two types."""
    hints = typing.get_type_hints(group)
    return {name: typing.get_args(hint) or (hint,) for name, hint in hints.items()}


def convert_text(value: Any, kinds: tuple[type, ...]) -> Any:
    """Convert a text to a number if the setting accepts a number.

    Any other value is returned unchanged.

    Args:
        value: The value, as it was read from a file or the command line.
        kinds: The accepted types of the setting.
    """
    if not isinstance(value, str):
        return value
    for kind in kinds:
        if kind in _NUMBERS and _NUMBERS[kind].fullmatch(value):
            return kind(value)
    return value


def to_flag(name: str) -> str:
    """Return the flag of a setting: `--num-epochs` for `num_epochs`."""
    return "--" + name.replace("_", "-")


def _flag_of(field: "dataclasses.Field[Any]") -> str:
    """Return the flag of a field as messages show it."""
    return to_flag(field.metadata["alias"] if field.metadata["shows_alias"] else field.name)


def _format(value: Any) -> str:
    """Write a value for a message."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() >= 100:
        return "a huge number"
    return shorten(str(value))


def _check(name: str, value: Any, kinds: tuple[type, ...], rules: Mapping[str, Any]) -> None:
    """Refuse a value of a wrong type, outside the bounds, or not among the choices.

    Args:
        name: The name of the setting, for messages.
        value: The value.
        kinds: The accepted types.
        rules: The metadata of the field, which `setting` made.
    """
    accepted_kinds = kinds
    if float in kinds:
        accepted_kinds = (*kinds, int)
    is_bool = isinstance(value, bool)
    is_wrong_bool = is_bool and bool not in kinds  # to Python, a bool is an int
    if is_wrong_bool or not isinstance(value, accepted_kinds):
        expected = " or ".join(_KINDS.get(kind, "nothing") for kind in kinds)
        raise ConfigError(f"{name} is {shorten(repr(value))}; give {expected}")
    if isinstance(value, str):
        check_text(name, value)
        if rules["choices"] and value not in rules["choices"]:
            raise ConfigError(f"{name}: " + unknown_name("value", value, rules["choices"]))
    if isinstance(value, (int, float)) and not is_bool:
        _check_bounds(name, value, rules)


def _check_bounds(name: str, value: float, rules: Mapping[str, Any]) -> None:
    """Refuse a number outside the bounds of its field."""
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
    """Refuse a text that is empty, or that has a zero byte and so can't name a file."""
    if not text.strip() or "\0" in text:
        raise ConfigError(f"{flag} is {shorten(repr(text))}; give a text, or leave it out")


def require_tasks(names: str | None) -> str:
    """Return the names of the tasks, separated by commas; raise ConfigError if they are None."""
    if names is None:
        raise ConfigError(
            "no task is given; give --tasks FILE.jsonl, --tasks NAME ('drllm ls tasks' lists the "
            "names), or --tasks builtin_facts for a first try"
        )
    return names


def replace_settings(kind: type[Group], config: Group | None, settings: Mapping[str, Any]) -> Group:
    """Return a copy of a group of settings in which some settings are replaced.

    Args:
        kind: The class of the group.
        config: The group to copy; None for the defaults.
        settings: The new values by name. A setting may also be named by its alias.

    Raises:
        ConfigError: A name is unknown, or a value is wrong.
    """
    names_by_alias = {field.metadata["alias"]: field.name for field in dataclasses.fields(kind)}
    values = (config or kind()).to_dict()
    for name, value in settings.items():
        values[names_by_alias.get(name, name)] = value
    return from_dict(kind, values, "settings")


def make_settings(kind: type[Group], values: Mapping[str, Any]) -> Group:
    """Make a group of settings from values by name; values of other groups are ignored."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: values[name] for name in names if name in values})


def from_dict(kind: type[Group], values: dict[str, Any], where: str) -> Group:
    """Make a group of settings from values that must all belong to it.

    Args:
        kind: The class of the group.
        values: The values by name.
        where: Where the values come from, for messages.

    Raises:
        ConfigError: A name is unknown, or a value is wrong.
    """
    known_names = list_kinds(kind)
    for name in map(str, values):
        if name in known_names:
            continue
        raise ConfigError(f"{where}: " + unknown_name("setting", name, known_names))
    return kind(**values)
