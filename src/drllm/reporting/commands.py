"""Writes commands that a report's reader can paste, from the settings in the files of a run."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from drllm.config import TIMING, EvaluateConfig, SearchConfig, SuperviseConfig, TrainConfig
from drllm.config.fields import Settings, to_flag
from drllm.records.manifest import RUNTIME

ALWAYS_WRITTEN = ("tasks", "dataset")
"""Settings that are written into a command even if they have their default value."""


def find_runtime(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the device, the precision and similar settings with which the model ran.

    Most manifests have them as `runtime`; the manifest of a search has them in its plan.
    """
    plan = manifest.get("plan") or {}
    runtime = manifest.get("runtime") or plan.get("runtime")
    return runtime if isinstance(runtime, dict) else {}


def evaluate_command(manifest: Mapping[str, Any], **changes: Any) -> str:
    """Write the command that evaluates with the settings of a result.

    Args:
        manifest: The result, as plain values.
        changes: Values to use instead, for settings of `EvaluateConfig` or flags (`output_dir`).
    """
    values = _model_values(manifest)
    routers = manifest.get("routers")
    if routers is not None:
        values["routers"] = [routers, *(manifest.get("other_seeds") or {})]
    config = dict(manifest.get("config") or {})
    if config.get("latency") is False:
        for name in TIMING:  # older files have values for all of them
            config.pop(name, None)
    values |= _list_changed_settings(EvaluateConfig, config)
    return write_command("evaluate", values | changes)


def search_command(manifest: Mapping[str, Any], **changes: Any) -> str:
    """Write the command that searches with the settings in a search's manifest."""
    settings = _list_changed_settings(SearchConfig, manifest.get("config") or {})
    values = _model_values(manifest)
    values["tasks"] = settings.pop("dataset")
    return write_command("search", values | settings | changes)


def supervise_command(manifest: Mapping[str, Any], **changes: Any) -> str:
    """Write the command that makes targets with the settings in the manifest of targets."""
    settings = _list_changed_settings(SuperviseConfig, manifest.get("config") or {})
    return write_command("supervise", settings | changes)


def train_command(router_config: Mapping[str, Any], **changes: Any) -> str:
    """Write the command that trains with the settings in the config of routers."""
    values = {
        "model": router_config.get("base_model") or None,
        "revision": router_config.get("base_revision"),
    }
    training = router_config.get("training")
    settings = training.get("settings") if isinstance(training, dict) else None
    if not isinstance(settings, dict):
        settings = {}  # not recorded
    settings = _list_changed_settings(TrainConfig, settings)
    return write_command("train", values | settings | changes)


def _model_values(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the model in a manifest, of its bypass, and of how it ran."""
    runtime = find_runtime(manifest)
    values = name_model(manifest.get("model") or {})
    for name in RUNTIME:
        values[name] = runtime.get(name)
    values["bypass"] = manifest.get("bypass")
    return values


def name_model(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that name a model: the model itself, and the commit of a hub model."""
    return {"model": identity.get("id") or None, "revision": identity.get("revision")}


def _list_changed_settings(group: type[Settings], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a command must name, since they differ from their default.

    Args:
        group: The class of the settings.
        config: The settings that were used. Settings that only earlier versions had are left out.
    """
    values: dict[str, Any] = {}
    for setting in fields(group):
        value = config.get(setting.name, setting.default)
        if value != setting.default or setting.name in ALWAYS_WRITTEN:
            values[setting.name] = value
    return {name: value for name, value in values.items() if _has_effect(group, name, values)}


def _has_effect(group: type[Settings], name: str, values: Mapping[str, Any]) -> bool:
    """Tell whether a setting has an effect, given the other settings.

    A verb refuses a setting without effect, so a command mustn't have it. A setting may name
    another setting and the value at which it has no effect.
    """
    settings = {setting.name: setting for setting in fields(group)}
    condition = settings[name].metadata["no_effect_if"]
    if condition is None:
        return True
    other_name, value_without_effect = condition
    other_value = values.get(other_name, settings[other_name].default)
    return bool(other_value != value_without_effect)


def write_command(verb: str, values: Mapping[str, Any]) -> str:
    """Write the command line of a verb.

    Args:
        verb: The verb, such as "evaluate".
        values: Flag or setting → value. Flags with the value None are left out. A list has the
            values of a flag that takes several.
    """
    words = ["drllm", verb]
    for name, value in values.items():
        if isinstance(value, bool):
            switch = name if value else f"no_{name}"
            words.append(to_flag(switch))
        elif isinstance(value, list):
            words += [to_flag(name), *map(str, value)]
        elif value is not None:
            words += [to_flag(name), str(value)]
    return shlex.join(words)
