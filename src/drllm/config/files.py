"""Reads settings from YAML files: recipes, presets, and the files of `--config`.

The names of settings may have dashes, and published names are accepted. Numbers are first read as
texts and then converted to the type of the setting, since 1.10 may be the name of a branch.
"""

import dataclasses
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from drllm.config.fields import Settings, convert_text, list_kinds, to_flag
from drllm.config.removed import REMOVED_FLAGS
from drllm.errors import ConfigError, unknown_name

PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
"""Files of packaged settings by name. They have the sections of a recipe."""


class _Loader(yaml.SafeLoader):
    """Reads YAML, but refuses tags and repeated names, and keeps numbers and dates as texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as SafeLoader has them
        first: [(tag, form) for tag, form in forms if not tag.endswith((":int", ":float", "stamp"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(
                problem=f"the tag {event.tag!r} can't be read", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            is_name = isinstance(key, yaml.ScalarNode)
            if not is_name or key.value in seen:
                problem = f"{key.value!r} is given twice" if is_name else "a name must be a text"
                raise yaml.constructor.ConstructorError(
                    problem=problem, problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file of names and values; dashes in names become underscores.

    `what` describes for messages what the file should hold.
    """
    remedy = f"give a YAML file with {what}"
    if not path.is_file():
        state = "isn't a file" if path.exists() else "doesn't exist"
        raise ConfigError(f"{path} {state}; {remedy}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a UTF-8 text; {remedy}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # Only some of YAML's errors have a place. A text "\U00110000" raises ValueError.
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{path}{line}: not YAML ({problem}); {remedy}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, not names and values; {remedy}, written "
            f"'name: value'"
        )
    return with_underscores(values)


def with_preset(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a file, completed by the preset that the file names as `config`.

    A setting in the file wins over the same setting in the preset.
    """
    sections = dict(values)
    if "config" not in sections:
        return sections
    name = str(sections.pop("config"))
    if name not in PRESETS:
        raise ConfigError(f"{path}: config: " + unknown_name("preset", name, PRESETS))
    for section, preset in read_yaml(PRESETS[name], "settings").items():
        settings = sections.get(section) or {}
        if isinstance(settings, dict):  # `read_sections` refuses any other value
            settings = {**preset, **with_underscores(settings)}
        sections[section] = settings
    return sections


def read_sections(
    path: Path, values: Mapping[str, Any], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return the sections of a file.

    Raises ConfigError for an unknown section, and for a section that isn't names and values.
    """
    names = list(names)
    sections = {}
    for name, section in with_underscores(values).items():
        if name not in names:
            raise ConfigError(f"{path}: " + unknown_name("section", name, names))
        if not isinstance(section, dict | None):
            raise ConfigError(
                f"{path}: section {name!r} is {section}; give settings, written 'name: value'"
            )
        sections[name] = with_underscores(section or {})
    return sections


def with_underscores(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Replace the dashes in the names of settings with underscores."""
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def normalise_settings(group: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under our names, with a group's numbers converted from text.

    Settings of other groups are left as they are.
    """
    names = {field.metadata["alias"]: field.name for field in dataclasses.fields(group)}
    settings = {names.get(name, name): value for name, value in values.items()}
    for name, kinds in list_kinds(group).items():
        if name in settings:
            settings[name] = convert_text(settings[name], kinds)
    return settings


def drop_empty_removed(values: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """Return settings without removed settings whose value is null.

    Files of commit 3820ce17 list every setting of that commit; a setting that wasn't given is null.
    `names` are the current settings, since a setting that was removed from one section may exist in
    another section.
    """
    settings = {}
    for name, value in values.items():
        is_removed = name not in names and to_flag(name) in REMOVED_FLAGS
        if value is not None or not is_removed:
            settings[name] = value
    return settings
