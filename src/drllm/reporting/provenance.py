"""The part of a report on where everything comes from: hashes, versions, settings, command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from drllm.config import EvaluateConfig
from drllm.config.settings import flag_of
from drllm.reporting.blocks import Block, Code, Listing, Section, Table, Text
from drllm.reporting.numbers import NONE
from drllm.reporting.run import Run

RUNTIME = ("dtype", "device", "attn_implementation")
"""How a base model ran, by the names of settings of `ModelConfig`."""


def section(run: Run) -> Section:
    """Return the section on a run's provenance."""
    model = [[key, _shown(value)] for key, value in run.model.items()]
    blocks = [
        *_listed("Base model, as the files record it", ("what", "value"), model),
        *_runtimes(run),
        *_files(run),
    ]
    libraries = {
        str(name): _shown(version)
        for source in run.sources
        for name, version in (source.manifest.get("libraries") or {}).items()
    }
    if libraries:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))
        blocks.append(Text(f"Libraries: {versions}."))
    blocks += _commands(run)
    if run.recipe is not None:
        blocks.append(Code("Recipe (run.yaml)", run.recipe))
    blocks += _all_settings(run)
    if run.absent:
        blocks.append(Text("What is missing in this folder:"))
        blocks.append(Listing(run.absent))
    return Section("Provenance", blocks)


def _runtimes(run: Run) -> list[Block]:
    """Return how the base model ran, files that agree in one row."""
    files: dict[tuple[str, ...], list[str]] = {}
    for source in run.sources:
        runtime = _runtime(source.manifest)
        if runtime:
            names = (*RUNTIME, "num_threads")
            cells = tuple(_shown(runtime.get(name)) for name in names)
            files.setdefault((*cells, _shown(source.manifest.get("machine"))), []).append(
                source.name
            )
    header = ("files", "dtype", "device", "attention code", "threads", "machine")
    return _listed(
        "How the base model ran; threads and the machine stand with measured times",
        header,
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
    texts: Sequence[int] | None = None,
) -> list[Block]:
    """Return a table of words, none without rows."""
    places = range(len(header)) if texts is None else texts
    return [Table(caption=caption, header=header, rows=rows, texts=tuple(places))] if rows else []


def _files(run: Run) -> list[Block]:
    made = [
        [
            source.name,
            _shown(source.manifest.get("created")).replace("T", " "),
            _shown(source.manifest.get("drllm_version")),
            _shown((source.manifest.get("config") or {}).get("seed")),
            source.sha256,
        ]
        for source in run.sources
    ]
    inputs = [
        [source.name, str(name), _shown(digest)]
        for source in run.sources
        for name, digest in (source.manifest.get("inputs") or {}).items()
    ]
    header = ("file", "made", "drllm", "seed", "SHA-256")
    return [
        *_listed("Files that this report was made from", header, made),
        *_listed(
            "What these files were made from in turn", ("file", "made from", "SHA-256"), inputs
        ),
    ]


def _all_settings(run: Run) -> list[Block]:
    """Return the settings of every file, equal ones once."""
    files: dict[str, list[str]] = {}
    for source in run.sources:
        config = source.manifest.get("config")
        if config:
            text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
            files.setdefault(text, []).append(source.name)
    return [Code(f"Settings of {', '.join(names)}", text) for text, names in files.items()]


def _commands(run: Run) -> list[Block]:
    """Return the commands that evaluate the same once more, each once."""
    commands = dict.fromkeys(
        command(source.manifest)
        for source in run.sources
        if source.manifest.get("schema") == "drllm.evaluation" and source.manifest.get("routers")
    )
    if not commands:
        return []
    return [Code("Command that repeats the evaluation", "\n".join(commands))]


def command(manifest: Mapping[str, Any]) -> str:
    """Write the command that evaluates with a result's settings; those by default are left out.

    Example:
        >>> command({"routers": "r", "config": {"tasks": "arc_easy", "curve": "0.1", "seed": 0}})
        'drllm evaluate --routers r --tasks arc_easy --curve 0.1'
    """
    words = ["drllm", "evaluate"]
    model = (manifest.get("model") or {}).get("id")
    if model:
        words += ["--model", str(model)]
    for name in RUNTIME:
        value = _runtime(manifest).get(name)
        words += [] if value is None else [flag_of(name), str(value)]
    words += ["--routers", str(manifest["routers"])]
    config = manifest.get("config") or {}
    for declared in fields(EvaluateConfig):
        value = config.get(declared.name, declared.default)
        if value != declared.default or declared.name == "tasks":
            words += [flag_of(declared.name), _word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    return NONE if value is None else str(value)
