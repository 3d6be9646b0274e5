"""Reads the settings of a verb from a YAML file or a preset (`--config`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.cli.arguments import see_all_flags
from drllm.cli.verbs import VERBS, Flag, Verb, list_flags
from drllm.config.fields import Settings, check_text, make_settings
from drllm.config.files import (
    PRESETS,
    normalise_settings,
    read_sections,
    read_yaml,
    refuse_code,
    replace_aliases,
    with_preset,
)
from drllm.errors import ConfigError, nearest_name


def read_settings(name: str, verb: Verb) -> dict[str, Any]:
    """Read the settings of a verb from a YAML file or a preset.

    The file holds the verb's settings, or sections as a recipe does. Of the sections, only those of
    the verb are read.

    Args:
        name: The value of `--config`: a file, or the name of a preset.
        verb: The verb.

    Raises:
        ConfigError: A setting is unknown, a value is wrong, or no setting belongs to the verb.
    """
    check_text("--config", name)
    path = PRESETS.get(name) or Path(name).expanduser()
    values = _read_values(path, verb)
    known_names = [flag.name for flag in list_flags(verb) if not flag.positional]
    try:
        values = _name_settings(values, verb)
        _refuse_unknown(values, known_names, verb)
        for flag in verb.flags:
            if flag.name in values:
                values[flag.name] = check_value(flag, values[flag.name])
        for group in verb.settings:
            make_settings(group, values)  # checks the values
        refuse_code(values, "leave it out, and give the flag on the command line")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def _name_settings(values: Mapping[str, Any], verb: Verb) -> dict[str, Any]:
    """Replace aliases with names: first those of settings, then those of the verb's own flags."""
    settings = dict(values)
    for group in verb.settings:
        settings = normalise_settings(group, settings)
    names_by_alias = {flag.alias: flag.name for flag in verb.flags if flag.alias is not None}
    return replace_aliases(settings, names_by_alias)


def check_value(flag: Flag, value: Any) -> Any:
    """Check and return the value of one of a verb's own flags.

    The value is a text, a list of texts if the flag takes several, or a boolean for a switch.
    """
    name = flag.names[0]
    if flag.switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}; give true or false")
        return value
    texts = value if isinstance(value, list) else [value]
    are_texts = all(isinstance(text, str) for text in texts)
    if not are_texts or (len(texts) != 1 and not flag.many):
        expected = "one text or a list of texts" if flag.many else "a text"
        raise ConfigError(f"{name} is {value!r}; give {expected}")
    for text in texts:
        check_text(name, text)
    return texts if flag.many else texts[0]


def _read_values(path: Path, verb: Verb) -> dict[str, Any]:
    """Read the settings in a file; if the file has sections, read those of the verb."""
    values = read_yaml(path, f"settings, or one of {', '.join(PRESETS)}")
    all_names: set[str] = set()
    for any_verb in VERBS.values():
        all_names.update(_section_name(group) for group in any_verb.settings)
    has_sections = any(isinstance(values.get(name), dict) for name in all_names)
    if not has_sections:
        return values
    sections = read_sections(path, with_preset(path, values), all_names)
    names = [_section_name(group) for group in verb.settings]
    sections_of_verb = [sections[name] for name in names if name in sections]
    if not sections_of_verb:
        raise ConfigError(
            f"{path} has no effect on {verb.name}: it only has settings of {', '.join(sections)}; "
            f"leave --config out"
        )
    settings: dict[str, Any] = {}
    for section in sections_of_verb:
        settings.update(section)
    return settings


def _section_name(group: type[Settings]) -> str:
    """Return the name of a group's section in recipes and presets, such as `train`."""
    return group.__name__.removesuffix("Config").lower()


def _refuse_unknown(values: Mapping[str, Any], known_names: Sequence[str], verb: Verb) -> None:
    """Raise ConfigError for a setting that the verb doesn't have."""
    for key in values:
        if key in known_names:
            continue
        message = nearest_name("setting", key, known_names)
        raise ConfigError(f"{message} {see_all_flags(verb)}")
