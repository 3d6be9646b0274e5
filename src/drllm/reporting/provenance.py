"""The part of a report about where everything comes from: model, files, hashes, commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from drllm.config import EvaluateConfig
from drllm.config.fields import flag_of
from drllm.records.results import EVALUATION_SCHEMA
from drllm.reporting.blocks import Block, Code, Section, Table, Text
from drllm.reporting.numbers import NONE
from drllm.reporting.run import Run

RUNTIME = ("dtype", "device", "attn_implementation")
"""How a base model ran, by the names of settings of `ModelConfig`."""


def section(run: Run) -> Section:
    """Return the section on a run's provenance."""
    blocks: list[Block] = []
    if run.model:
        model = ", ".join(f"{key} {_shown(value)}" for key, value in run.model.items())
        blocks.append(Text(f"Base model: {model}."))
    blocks += [Text(said) for said in _runtimes(run)]
    made = Table.of(
        "Files that this report was made from; their manifests hold every setting.",
        [(each.name, each.manifest, each.sha256) for each in run.sources],
        {
            "file": lambda s: s[0],
            "made": lambda s: _shown(s[1].get("created"))[:19].replace("T", " "),
            "drllm": lambda s: _shown(s[1].get("drllm_version")),
            "seed": lambda s: _shown((s[1].get("config") or {}).get("seed")),
            "SHA-256": lambda s: s[2],
            "made from": lambda s: ", ".join(
                f"{name} {digest}" for name, digest in (s[1].get("inputs") or {}).items()
            ),
        },
        words=("made", "SHA-256", "made from"),
    )
    blocks.append(made)
    libraries = {
        f"{name} {version}"
        for each in run.sources
        for name, version in (each.manifest.get("libraries") or {}).items()
    }
    if libraries:
        blocks.append(Text(f"Libraries: {', '.join(sorted(libraries))}."))
    made_by = (each.manifest for each in run.sources)
    wanted = (m for m in made_by if m.get("schema") == EVALUATION_SCHEMA and m.get("routers"))
    if commands := dict.fromkeys(map(command, wanted)):
        blocks.append(Code("Command that repeats the evaluation", "\n".join(commands)))
    for each in run.evaluations:
        if rows := each.not_asked:
            listed = "; ".join(f"{row} ({why})" for row, why in rows.items())
            blocks.append(Text(f"Rows of {each.task} that weren't asked: {listed}."))
    if run.recipe is not None:
        blocks.append(Code("Recipe (run.yaml)", run.recipe))
    return Section("Provenance", blocks, folded=True)


def _runtimes(run: Run) -> list[str]:
    """Say how the base model ran, files that agree in one line."""
    files: dict[str, list[str]] = {}
    for source in run.sources:
        if runtime := _runtime(source.manifest):
            threads = runtime.get("num_threads")
            values = [runtime.get(name) for name in RUNTIME]
            values += [threads and f"{threads} threads", source.manifest.get("machine")]
            said = ", ".join(str(value) for value in values if value is not None)
            files.setdefault(said, []).append(source.name)
    return [f"{', '.join(names)}: {said}." for said, names in files.items()]


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
    words = ["drllm", "evaluate"]
    for name, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += [] if value is None else [flag_of(name), text]
    return shlex.join(words)


def _shown(value: Any) -> str:
    return NONE if value is None else str(value)
