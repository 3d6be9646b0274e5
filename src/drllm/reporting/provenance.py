"""The part of a report on where everything comes from: hashes, versions, settings, command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from drllm.config import EvaluateConfig
from drllm.config.settings import flag_of
from drllm.records.results import EVALUATION_SCHEMA
from drllm.reporting.blocks import Block, Code, Listing, Section, Table, Text
from drllm.reporting.numbers import NONE
from drllm.reporting.run import Run, Source

RUNTIME = ("dtype", "device", "attn_implementation")
"""How a base model ran, by the names of settings of `ModelConfig`."""


def section(run: Run) -> Section:
    """Return the section on a run's provenance."""
    sources = run.sources
    made = [
        [
            each.name,
            _shown(each.manifest.get("created")).replace("T", " "),
            _shown(each.manifest.get("drllm_version")),
            _shown((each.manifest.get("config") or {}).get("seed")),
            each.sha256,
        ]
        for each in sources
    ]
    inputs = [
        [each.name, str(name), _shown(digest)]
        for each in sources
        for name, digest in (each.manifest.get("inputs") or {}).items()
    ]
    model = [[key, _shown(value)] for key, value in run.model.items()]
    blocks = [
        *_listed("Base model, as the files record it", ("what", "value"), model),
        *_runtimes(sources),
        *_listed(
            "Files that this report was made from",
            ("file", "made", "drllm", "seed", "SHA-256"),
            made,
        ),
        *_listed(
            "What these files were made from in turn", ("file", "made from", "SHA-256"), inputs
        ),
    ]
    libraries = {
        str(name): _shown(version)
        for each in sources
        for name, version in (each.manifest.get("libraries") or {}).items()
    }
    if libraries:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))
        blocks.append(Text(f"Libraries: {versions}."))
    commands = dict.fromkeys(
        command(each.manifest)
        for each in sources
        if each.manifest.get("schema") == EVALUATION_SCHEMA and each.manifest.get("routers")
    )
    if commands:
        blocks.append(Code("Command that repeats the evaluation", "\n".join(commands)))
    if run.recipe is not None:
        blocks.append(Code("Recipe (run.yaml)", run.recipe))
    settings: dict[str, list[str]] = {}
    for each in sources:
        if config := each.manifest.get("config"):
            text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
            settings.setdefault(text, []).append(each.name)
    blocks += [Code(f"Settings of {', '.join(names)}", text) for text, names in settings.items()]
    if run.absent:
        blocks += [Text("What is missing in this folder:"), Listing(run.absent)]
    return Section("Provenance", blocks)


def _runtimes(sources: Sequence[Source]) -> list[Block]:
    """Return how the base model ran, files that agree in one row."""
    files: dict[tuple[str, ...], list[str]] = {}
    for source in sources:
        if runtime := _runtime(source.manifest):
            values = [runtime.get(name) for name in (*RUNTIME, "num_threads")]
            cells = tuple(map(_shown, [*values, source.manifest.get("machine")]))
            files.setdefault(cells, []).append(source.name)
    return _listed(
        "How the base model ran; threads and the machine stand with measured times",
        ("files", "dtype", "device", "attention code", "threads", "machine"),
        [[", ".join(names), *cells] for cells, names in files.items()],
        texts=(0, 1, 2, 3, 5),
    )


def _runtime(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a file says of how the model ran; a search has it in its plan."""
    runtime = manifest.get("runtime") or (manifest.get("plan") or {}).get("runtime")
    return runtime if isinstance(runtime, dict) else {}


def _listed(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    texts: Sequence[int] = range(5),
) -> list[Block]:
    """Return a table of words, none without rows."""
    return [Table(caption=caption, header=header, rows=rows, texts=texts)] if rows else []


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
