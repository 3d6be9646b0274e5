"""Settings in YAML files: a recipe's sections, and what a verb reads with `--config`.

Owns reading names and values, and what their YAML may differ in from the fields of `config`:
dashes in names, published names, and numbers where a setting is a text. Leaves which values fit to
the settings themselves, and precedence to `parser`. Loads no torch.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from drllm.cli.verbs import Flag, Verb
from drllm.config.settings import Settings
from drllm.errors import ConfigError, unknown_name


class WrittenInt(int):
    """A whole number of a YAML file, with the text that stands there."""

    text: str


class WrittenFloat(float):
    """Another number of a YAML file, with the text that stands there."""

    text: str


class _Loader(yaml.SafeLoader):
    """YAML's plain values, numbers with their texts."""

    def written_int(self, node: yaml.ScalarNode) -> WrittenInt:
        number = WrittenInt(self.construct_yaml_int(node))
        number.text = str(node.value)
        return number

    def written_float(self, node: yaml.ScalarNode) -> WrittenFloat:
        number = WrittenFloat(self.construct_yaml_float(node))
        number.text = str(node.value)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.written_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.written_float)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds names and values.

    Args:
        path: The file.
        what: What it is, for messages ("settings", "a recipe").

    Returns:
        Its contents, the names with underscores; numbers know how they are written.

    Raises:
        ConfigError: No such file, not a text, not YAML, or something else than names and values.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "doesn't exist"
        raise ConfigError(f"{path} {state}; give a YAML file with {what}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a UTF-8 text; give a YAML file with {what}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it can't be read"
        raise ConfigError(
            f"{path}{line}: not YAML ({problem}); give a YAML file with {what}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, not names and values; "
            f"give a YAML file with {what}, written 'name: value'"
        )
    return with_underscores(values)


def with_underscores(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Write the names of settings as the dataclasses have them."""
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def canonical(group: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings under our names, a number as text where the setting is one.

    The text is the file's: 1.10 may be the name of a branch.

    Args:
        group: Where the settings are declared.
        values: From `read_yaml`; what is no setting of the group is left as it is.
    """
    hints = typing.get_type_hints(group)
    found = {}
    ours = {declared.metadata["alias"]: declared.name for declared in dataclasses.fields(group)}
    for name, value in values.items():
        known = ours.get(name, name)
        if known in hints:
            kinds = typing.get_args(hints[known]) or (hints[known],)
            value = _as_text(value) if str in kinds else _plain(value)
        found[known] = value
    return found


def _as_text(value: Any) -> Any:
    return value.text if isinstance(value, (WrittenInt, WrittenFloat)) else value


def _plain(value: Any) -> Any:
    """Return a number that is one and nothing else, as whoever writes it expects."""
    if isinstance(value, WrittenInt):
        return int(value)
    return float(value) if isinstance(value, WrittenFloat) else value


def read_settings(path: Path, verb: Verb) -> dict[str, Any]:
    """Read and check a `--config` file for a verb.

    Raises:
        ConfigError: As `read_yaml`; an unknown setting, or a value that doesn't fit.
    """
    values = read_yaml(path, "settings")
    for group in verb.groups:
        values = canonical(group, values)
    known = [flag.name for flag in verb.flags if not flag.positional]
    known += [declared.name for group in verb.groups for declared in dataclasses.fields(group)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: " + unknown_name("setting", key, known))
    for flag in verb.flags:
        if flag.name in values:
            values[flag.name] = _flag_value(path, flag, values[flag.name])
    for group in verb.groups:
        names = {declared.name for declared in dataclasses.fields(group)}
        try:
            group(**{key: value for key, value in values.items() if key in names})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return values


def _flag_value(path: Path, flag: Flag, value: Any) -> Any:
    """Return what a file says for a verb's own flag."""
    if flag.switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {flag.shown} is {value!r}; give true or false")
        return value
    value = _as_text(value)
    if flag.many and isinstance(value, str):
        value = [value]
    texts = value if flag.many and isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        wanted = "one text or a list of texts" if flag.many else "a text"
        raise ConfigError(f"{path}: {flag.shown} is {value!r}; give {wanted}")
    return value
