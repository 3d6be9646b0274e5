"""The part of a report about where everything comes from, and the command that repeats it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from drllm.config import EvaluateConfig
from drllm.config.fields import flag_of
from drllm.records.results import EVALUATION_SCHEMA
from drllm.reporting.blocks import Section
from drllm.reporting.run import Run

RUNTIME = ("dtype", "device", "attn_implementation")
"""How a base model ran, by the names of settings of `ModelConfig`."""


def section(run: Run) -> Section:
    """Return the section on a run's provenance."""
    made = (each.manifest for each in run.sources)
    wanted = (m for m in made if m.get("schema") == EVALUATION_SCHEMA and m.get("routers"))
    commands = list(dict.fromkeys(map(command, wanted)))
    values = {"run": run, "runtime": _runtime, "commands": commands}
    return Section("Provenance", folded=True, template="provenance.j2", values=values)


def _runtime(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a file says of how the model ran; a search has it in its plan."""
    runtime = manifest.get("runtime") or (manifest.get("plan") or {}).get("runtime")
    return runtime if isinstance(runtime, dict) else {}


def command(manifest: Mapping[str, Any]) -> str:
    """Write the command that evaluates with a result's settings; those by default are left out.

    Example:
        >>> command({"routers": "r", "config": {"tasks": "arc_easy", "curve": "0.1", "seed": 0}})
        'drllm evaluate --routers r --tasks arc_easy --curve 0.1'
    """
    runtime, config = _runtime(manifest), manifest.get("config") or {}
    values: dict[str, Any] = {"model": (manifest.get("model") or {}).get("id") or None}
    values |= {name: runtime.get(name) for name in RUNTIME} | {"routers": manifest["routers"]}
    for declared in fields(EvaluateConfig):
        value = config.get(declared.name, declared.default)
        if value != declared.default or declared.name == "tasks":
            values[declared.name] = value
    words, in_file = ["drllm", "evaluate"], dict[str, Any]()
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(flag_of(name if value else f"no_{name}"))
        elif isinstance(value, Mapping):  # by task, which YAML files alone can say
            in_file[name] = value
        elif value is not None:
            words += [flag_of(name), str(value)]
    return shlex.join(words) + (f" --config FILE  # with {json.dumps(in_file)}" if in_file else "")
