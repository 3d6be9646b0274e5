"""Reads settings from YAML files: recipes, presets, and the files of `--config`.

In a file, the name of a setting may have dashes or be an alias. Numbers are first read as texts and
then converted to the type of the setting, since 1.10 may also be the name of a branch.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from drllm.config.constants import PYTHON_FUNCTION
from drllm.config.fields import Settings, convert_text, list_kinds
from drllm.errors import ConfigError, shorten, unknown_name

PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
"""The files of packaged settings by name. They have the sections of a recipe."""


def _resolvers_without_numbers() -> dict[str, list[tuple[str, Any]]]:
    """Return PyYAML's rules for texts without quotes, except those for numbers and dates.

    PyYAML stores the rules by the first character of the text. A rule is a tag, such as
    `tag:yaml.org,2002:bool`, and the pattern of the texts that get this tag.
    """
    resolvers: dict[str, list[tuple[str, Any]]] = {}
    for first_character, rules in yaml.SafeLoader.yaml_implicit_resolvers.items():
        resolvers[first_character] = []
        for tag, pattern in rules:
            if not tag.endswith((":int", ":float", ":timestamp")):
                resolvers[first_character].append((tag, pattern))
    return resolvers


class _Loader(yaml.SafeLoader):
    """Reads YAML, but refuses tags, aliases and repeated names; numbers and dates stay texts.

    With aliases, a file of a few lines can stand for gigabytes.
    """

    yaml_implicit_resolvers = _resolvers_without_numbers()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse a tag such as `!!python/name` or an alias; compose other nodes as YAML does."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if self.check_event(yaml.AliasEvent):
            problem = f"the alias '*{event.anchor}' can't be read, write the value itself"
        elif getattr(event, "tag", None) is not None:
            problem = f"the tag {event.tag!r} can't be read"
        if problem is not None:
            raise yaml.composer.ComposerError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a name that isn't a text or is given twice; build any other mapping."""
        names = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a name must be a text"
            elif key.value in names:
                problem = f"{key.value!r} is given twice"
            if problem is not None:
                raise yaml.constructor.ConstructorError(
                    problem=problem, problem_mark=key.start_mark
                )
            names.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file of names and values; dashes in names become underscores.

    Args:
        path: The file.
        what: What the file should hold, for messages ("a recipe").

    Raises:
        ConfigError: The file can't be read, or doesn't hold names and values.
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
        place = str(path)
        mark = getattr(error, "problem_mark", None)
        if mark:
            place += f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{place}: not YAML ({shorten(problem, 200)}); {remedy}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {type(values).__name__}, not names and values; {remedy}, written "
            f"'name: value'"
        )
    return with_underscores(path, values)


def with_preset(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the preset that a file names as `config` to the file's sections, and return the sections.

    A setting in the file wins over the same setting in the preset. A file may name no preset.

    Args:
        path: The file, for messages.
        values: What the file holds: its sections, and maybe `config`.
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
            settings = {**preset, **with_underscores(path, settings)}
        sections[section] = settings
    return sections


def refuse_code(settings: Mapping[str, Any], remedy: str, section: str = "") -> None:
    """Refuse the settings of a file that let code run: a model's, a task file's, or a reward's.

    A settings file may come from somebody else, and is data. Such a setting is for the command
    line.

    Args:
        settings: The settings by name.
        remedy: What to do instead, for the message.
        section: The section of a recipe that has the settings.

    Raises:
        ConfigError: There is such a setting.
    """
    place = f"{section}: " if section else ""
    for name in ("trust_remote_code", "trust_task_code"):
        if settings.get(name):
            raise ConfigError(f"{place}'{name}' in a file would let foreign code run; {remedy}")
    if PYTHON_FUNCTION in str(settings.get("reward")):
        raise ConfigError(
            f"{place}'reward' in a file names a Python file, which would run; {remedy}"
        )


def read_sections(
    path: Path, values: Mapping[str, Any], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Check the sections of a file, and return their settings by section.

    Args:
        path: The file, for messages.
        values: What the file holds.
        names: The names of all sections.

    Raises:
        ConfigError: A section is unknown, or isn't names and values.
    """
    known_names = list(names)
    sections = {}
    for name, section in with_underscores(path, values).items():
        if name not in known_names:
            raise ConfigError(f"{path}: " + unknown_name("section", name, known_names))
        if not isinstance(section, dict | None):
            raise ConfigError(
                f"{path}: section {name!r} is {shorten(str(section))}; give settings, written "
                f"'name: value'"
            )
        sections[name] = with_underscores(path, section or {})
    return sections


def with_underscores(path: Path, values: Mapping[Any, Any]) -> dict[str, Any]:
    """Replace the dashes in the names of settings with underscores.

    Args:
        path: The file, for messages.
        values: The settings by name.

    Raises:
        ConfigError: A setting is given with dashes and with underscores.
    """
    settings = {}
    for name, value in values.items():
        new_name = str(name).replace("-", "_")
        if new_name in settings:
            raise ConfigError(f"{path}: {new_name!r} is given twice; give it once")
        settings[new_name] = value
    return settings


def replace_aliases(values: Mapping[str, Any], names_by_alias: Mapping[Any, str]) -> dict[str, Any]:
    """Replace aliases with the names of settings.

    Args:
        values: The settings by name or alias.
        names_by_alias: Alias → name.

    Raises:
        ConfigError: A setting is given by its name and by its alias.
    """
    settings = {}
    for name, value in values.items():
        new_name = names_by_alias.get(name, name)
        if new_name in settings:
            raise ConfigError(
                f"{new_name!r} is given twice, by its name and by its alias; give it once"
            )
        settings[new_name] = value
    return settings


def normalise_settings(group: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace aliases with the names of a group's settings, and convert its numbers from text.

    Returns a copy. Settings of other groups stay as they are. Raises ConfigError if a setting is
    given by its name and by its alias.
    """
    names_by_alias = {field.metadata["alias"]: field.name for field in dataclasses.fields(group)}
    settings = replace_aliases(values, names_by_alias)
    for name, kinds in list_kinds(group).items():
        if name in settings:
            settings[name] = convert_text(settings[name], kinds)
    return settings
