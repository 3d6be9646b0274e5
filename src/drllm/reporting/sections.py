"""A report's order, several runs compared, and where everything comes from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from msgspec.structs import replace

from drllm.config import EvaluateConfig
from drllm.config.fields import flag_of
from drllm.records.results import BASE, EVALUATION_SCHEMA, ROUTED
from drllm.reporting import cost, evaluated, learned, questions
from drllm.reporting.blocks import Block, Code, Document, Listing, Section, Table, Text, row_of
from drllm.reporting.numbers import NONE, percent, plain
from drllm.reporting.run import Run, Source
from drllm.statistics.non_inferiority import Choice

RUNTIME = ("dtype", "device", "attn_implementation")
"""How a base model ran, by the names of settings of `ModelConfig`."""


def document(runs: Sequence[Run]) -> Document:
    """Lay out the report of one run, or of several with a comparison in front."""
    if len(runs) == 1:
        return Document(f"Layer routing report: {runs[0].name}", _run_sections(runs[0]))
    sections = [Section("Runs compared", _comparison(runs))]
    for number, run in enumerate(runs, start=1):
        sections += [Section(f"Run {number}: {run.name}", []), *_lower(_run_sections(run))]
    return Document(f"Layer routing report: {len(runs)} runs", sections)


def _run_sections(run: Run) -> list[Section]:
    sections = [Section("Result", evaluated.result(run))]
    examples: list[Section] = []
    several = len(run.evaluations) > 1
    for evaluation in run.evaluations:
        examples = questions.examples(evaluation)
        tested = [
            evaluated.systems(evaluation),
            *evaluated.depths(evaluation),
            *questions.sections(run, evaluation),
        ]
        if several:
            sections.append(Section(evaluation.task, evaluated.of_task(run, evaluation)))
            tested, examples = _lower([*tested, *examples]), []
        sections += tested
    sections += questions.routes_by_task(run.evaluations)
    if run.evaluations:
        sections += cost.sections(run.evaluations, run.latency)
    return [*sections, *learned.sections(run), *examples, provenance(run)]


def _lower(sections: Sequence[Section]) -> list[Section]:
    return [replace(section, level=section.level + 1) for section in sections]


def _comparison(runs: Sequence[Run]) -> list[Block]:
    named = [(f"{number}: {run.name}", run) for number, run in enumerate(runs, start=1)]
    tested = [(name, evaluation) for name, run in named for evaluation in run.evaluations]
    columns, rows = evaluated.SYSTEM_COLUMNS, []
    for name, run in named:
        cells = [
            [each.task, str(each.num_questions), *row_of(columns, system, each.num_layers)]
            for each in run.evaluations
            for system in each.systems
            if system.name in (BASE, ROUTED)
        ]
        unknown = [[NONE] * (len(columns) + 2)]
        rows += [[name, evaluated.model_words(run), *row] for row in cells or unknown]
    systems = Table(
        caption="Base and routed model of every run. Intervals of different runs say nothing about "
        "a difference between them where the questions differ.",
        header=("run", "model", "task", "questions", *columns),
        rows=rows,
        texts=(0, 1, 2, 4),
    )
    curves = Table(
        caption="The routed model of every run at other depths",
        header=("run", "task", *[*evaluated.CURVE_COLUMNS][1:]),
        rows=[
            [name, each.task, *row_of(evaluated.CURVE_COLUMNS, point, each.num_layers)[1:]]
            for name, each in tested
            for point in each.curve
            if point.system == ROUTED
        ],
        texts=(0, 1, 2),
    )
    limits = ("less than, points", "and less than, nats a token", "worked answers of")
    choices = Table(
        caption="The certified choice of every run",
        header=("run", "task", *limits, "confidence", "certified"),
        rows=[[name, each.task, *_choice(each.choice)] for name, each in tested],
        texts=(0, 1, 4, 6),
    )
    blocks: list[Block] = [systems]
    blocks += [curves] if any(each.curve for _, each in tested) else []
    blocks += [choices] if any(each.choice for _, each in tested) else []
    return blocks


def _choice(choice: Choice | None) -> list[str]:
    if choice is None:
        return [*[NONE] * 4, "not asked for"]
    kept = choice.certified
    return [
        f"{choice.limits.epsilon:g}",
        f"{choice.limits.max_loss_increase:g}",
        choice.worked_answers or "not looked at",
        percent(choice.limits.confidence, 0),
        f"{kept.name}, {plain(kept.executions, 2)} executions a forward" if kept else "none",
    ]


def provenance(run: Run) -> Section:
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
