"""The section of a report on where its numbers come from: model, files, libraries and commands."""

from collections.abc import Mapping
from typing import Any

from drllm.records.manifest import RUNTIME
from drllm.records.results import EVALUATION_SCHEMA
from drllm.reporting.commands import evaluate_command, find_runtime
from drllm.reporting.document import Section
from drllm.reporting.markdown import Markdown, write_code, write_paragraph, write_table
from drllm.reporting.numbers import NONE
from drllm.reporting.run import ReportSource, Run

HEADER = "file|made|drllm|seed|ran on|SHA-256|made from"


def provenance_section(run: Run) -> Section:
    """Build the section on the files behind a report, and on how to repeat the evaluation."""
    blocks: list[Markdown] = []
    if run.model:
        identity = [f"{key} {value}" for key, value in run.model.items() if value is not None]
        blocks.append(write_paragraph(f"Base model: {', '.join(identity)}."))
    blocks.append(_source_table(run))
    libraries = _list_libraries(run)
    if libraries:
        blocks.append(write_paragraph(f"Libraries: {', '.join(libraries)}."))
    commands = _list_commands(run)
    if commands:
        blocks.append(write_code("Command that repeats the evaluation", "\n".join(commands)))
    for evaluation in run.evaluations:
        if evaluation.not_asked:
            rows = [f"{row} ({reason})" for row, reason in evaluation.not_asked.items()]
            sentence = f"Rows of {evaluation.task} that weren't asked: {'; '.join(rows)}."
            blocks.append(write_paragraph(sentence))
    if run.recipe:
        blocks.append(write_code("Recipe (run.yaml)", run.recipe))
    return Section("Provenance", blocks, folded=True)


def _source_table(run: Run) -> Markdown:
    caption = "Files that this report was made from; their manifests hold every setting."
    rows = [_source_row(source) for source in run.sources]
    return write_table(caption, HEADER, rows, word_columns="made|ran on|SHA-256|made from")


def _source_row(source: ReportSource) -> list[str]:
    manifest = source.manifest
    config = manifest.get("config") or {}
    created = (manifest.get("created") or NONE)[:19].replace("T", " ")
    inputs = [f"{name} {digest}" for name, digest in (manifest.get("inputs") or {}).items()]
    return [
        source.name,
        created,
        manifest.get("drllm_version") or NONE,
        str(config.get("seed", NONE)),
        _describe_runtime(manifest) or NONE,
        source.sha256,
        ", ".join(inputs) or NONE,
    ]


def _describe_runtime(manifest: Mapping[str, Any]) -> str:
    """Return how and where the model ran; empty if the manifest doesn't say it."""
    runtime = find_runtime(manifest)
    values = [runtime.get(name) for name in RUNTIME]
    if runtime.get("num_threads"):
        values.append(f"threads {runtime['num_threads']}")
    values.append(manifest.get("machine"))
    return ", ".join(value for value in values if value)


def _list_libraries(run: Run) -> list[str]:
    """List the libraries and versions that the files were made with, without duplicates."""
    versions: set[str] = set()
    for source in run.sources:
        libraries = source.manifest.get("libraries") or {}
        versions.update(f"{name} {version}" for name, version in libraries.items())
    return sorted(versions, key=str.casefold)


def _list_commands(run: Run) -> list[str]:
    """Write the commands that repeat the evaluations, without duplicates."""
    commands: list[str] = []
    for source in run.sources:
        if source.manifest.get("schema") == EVALUATION_SCHEMA:
            command = evaluate_command(source.manifest)
            if command not in commands:
                commands.append(command)
    return commands
