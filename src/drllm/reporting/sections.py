"""A report's order: headline, test, search, training, provenance; several runs side by side.

Owns which section follows which. Leaves their contents to `evaluated` and `learned`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from drllm.reporting import evaluated, learned
from drllm.reporting.blocks import Block, Code, Document, Listing, Section, Table, Text
from drllm.reporting.numbers import NONE
from drllm.reporting.results import BASE, ROUTED
from drllm.reporting.run import Run


def document(runs: Sequence[Run]) -> Document:
    """Lay out the report of one run, or of several with a comparison in front."""
    if len(runs) == 1:
        return Document(f"Layer routing report: {runs[0].name}", _run_sections(runs[0]))
    sections = [Section("Runs compared", [_comparison(runs)])]
    for number, run in enumerate(runs, start=1):
        sections.append(Section(f"Run {number}: {run.name}", []))
        sections += [Section(part.title, part.blocks, level=3) for part in _run_sections(run)]
    return Document(f"Layer routing report: {len(runs)} runs", sections)


def _run_sections(run: Run) -> list[Section]:
    sections = [Section("Result", evaluated.headline(run))]
    tested = [evaluated.sections(run, evaluation) for evaluation in run.evaluations]
    examples = [part for parts in tested for part in parts if part.title.startswith("Example")]
    sections += [part for parts in tested for part in parts if part not in examples]
    sections += learned.sections(run)
    sections += examples
    sections.append(Section("Provenance", _provenance(run)))
    return sections


def _comparison(runs: Sequence[Run]) -> Table:
    rows = []
    for number, run in enumerate(runs, start=1):
        for evaluation in run.evaluations:
            rows += [
                [
                    f"{number}: {run.name}",
                    evaluated.model_words(run),
                    evaluation.task,
                    str(evaluation.num_questions),
                    *evaluated.system_row(system, evaluation.num_layers),
                ]
                for system in evaluation.systems
                if system.name in (BASE, ROUTED)
            ]
        if not run.evaluations:
            blank = [NONE] * (len(evaluated.SYSTEM_COLUMNS) + 2)
            rows.append([f"{number}: {run.name}", evaluated.model_words(run), *blank])
    return Table(
        caption="Base and routed model of every run. Intervals of different runs say nothing about "
        "a difference between them where the questions differ.",
        header=("run", "model", "task", "questions", *evaluated.SYSTEM_COLUMNS),
        rows=rows,
        texts=(0, 1, 2, 4),
    )


# --- provenance --------------------------------------------------------------------------------


def _provenance(run: Run) -> list[Block]:
    blocks: list[Block] = []
    if run.model:
        rows = [[key, _shown(value)] for key, value in run.model.items()]
        blocks.append(
            Table(
                caption="Base model, as the files record it",
                header=("what", "value"),
                rows=rows,
                texts=(0, 1),
            )
        )
    blocks.append(
        Table(
            caption="Files that this report was made from",
            header=("file", "made", "drllm", "seed", "SHA-256"),
            rows=[
                [
                    source.name,
                    _shown(source.manifest.get("created")).replace("T", " "),
                    _shown(source.manifest.get("drllm_version")),
                    _shown(_seed(source.manifest)),
                    source.sha256,
                ]
                for source in run.sources
            ],
            texts=(0, 1, 2, 3, 4),
        )
    )
    libraries = {
        str(name): _shown(version)
        for source in run.sources
        for name, version in (source.manifest.get("libraries") or {}).items()
    }
    if libraries:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(libraries.items()))
        blocks.append(Text(f"Libraries: {versions}."))
    if run.recipe is not None:
        blocks.append(Code("Recipe (run.yaml)", run.recipe))
    for source in run.sources:
        config = source.manifest.get("config")
        if config:
            blocks.append(Code(f"Settings of {source.name}", _settings(config)))
    if run.absent:
        blocks.append(Text("What is missing in this folder:"))
        blocks.append(Listing(run.absent))
    return blocks


def _seed(manifest: Mapping[str, Any]) -> Any:
    config = manifest.get("config")
    return config.get("seed") if isinstance(config, dict) else None


def _shown(value: Any) -> str:
    return NONE if value is None else str(value)


def _settings(config: Any) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
