"""Reads the settings of a verb from a YAML file or a preset (`--config`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.cli.arguments import see_all_flags
from drllm.cli.verbs import VERBS, Flag, Verb, list_flags
from drllm.config.fields import Settings, check_text, make_settings, to_flag
from drllm.config.files import (
    PRESETS,
    drop_empty_removed,
    normalise_settings,
    read_sections,
    read_yaml,
    with_preset,
)
from drllm.config.removed import REMOVED_FLAGS
from drllm.errors import ConfigError, nearest_name


def read_settings(name: str, verb: Verb) -> dict[str, Any]:
    """Read the settings of a verb from a YAML file, or from a preset by name.

    The file holds either settings or sections, as a recipe does. Of the sections, only those of the
    verb are read. Raises ConfigError for an unknown setting, a wrong value, or a file without
    settings of the verb.
    """
    check_text("--config", name)
    path = PRESETS.get(name) or Path(name).expanduser()
    values = _read_values(path, verb)
    for group in verb.settings:
        values = normalise_settings(group, values)
    names = {flag.alias: flag.name for flag in verb.flags if flag.alias is not None}
    values = {names.get(name, name): value for name, value in values.items()}
    setting_names = [flag.name for flag in list_flags(verb) if not flag.positional]
    values = drop_empty_removed(values, setting_names)
    _refuse_unknown(path, values, setting_names, verb)
    try:
        for flag in verb.flags:
            if flag.name in values:
                values[flag.name] = check_value(flag, values[flag.name])
        for group in verb.settings:
            make_settings(group, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def check_value(flag: Flag, value: Any) -> Any:
    """Check the value of a verb's own flag: a text, a list of texts, or a boolean for a switch."""
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
    known: set[str] = set()
    for other_verb in VERBS.values():
        known.update(_section_name(group) for group in other_verb.settings)
    if not any(isinstance(values.get(name), dict) for name in known):
        return values
    sections = read_sections(path, with_preset(path, values), known)
    names = [_section_name(group) for group in verb.settings]
    chosen = [sections[name] for name in names if name in sections]
    if not chosen:
        raise ConfigError(
            f"{path} has no effect on {verb.name}: it has settings of {', '.join(sections)} "
            f"alone; leave --config out"
        )
    merged: dict[str, Any] = {}
    for section in chosen:
        merged.update(section)
    return merged


def _section_name(group: type[Settings]) -> str:
    """Return the name of a group of settings in recipes and presets."""
    return group.__name__.removesuffix("Config").lower()


def _refuse_unknown(
    path: Path, values: Mapping[str, Any], names: Sequence[str], verb: Verb
) -> None:
    for key in values:
        if key in names:
            continue
        if to_flag(key) in REMOVED_FLAGS:
            raise ConfigError(f"{path}: {REMOVED_FLAGS[to_flag(key)]}")
        raise ConfigError(f"{path}: {nearest_name('setting', key, names)} {see_all_flags(verb)}")
