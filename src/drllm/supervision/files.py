"""Whole files: search files of one base model in, `supervision.jsonl` with its manifest out.

Owns which files may be joined, what the manifest tells, and in which order files are written.
Leaves what becomes a target to `selection`, and reading
and writing lines to `records`. Loads no torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.config import SuperviseConfig
from drllm.errors import RecordError
from drllm.records import (
    RejectedQuestion,
    SearchRecord,
    new_manifest,
    question_key,
    read_manifest,
    read_search,
    rejected_path,
    to_lines,
    write_atomically,
    write_records,
)
from drllm.supervision.quotas import read_quotas
from drllm.supervision.rules import NO_KL, OVER_QUOTA, REASONS, SAVES_TOO_LITTLE, TWICE
from drllm.supervision.select import Supervision, targets

_SAME_MODEL = ("fingerprint", "num_layers", "hidden_size", "class")


def write(search_files: Sequence[Path], output: Path, config: SuperviseConfig) -> dict[str, Any]:
    """Read search files, pick the targets and write them with their manifest.

    The questions without a target are written beside them, each with its reason; where all have
    one, there is no such file afterwards.

    Args:
        search_files: `search.jsonl` files of one base model (the shards of a search, say), read
            in this order; a question that stands in several of them counts once.
        output: The `supervision.jsonl` to write; replaced if it is there, and so is
            `supervision.rejected.jsonl`, or what it is called after the output.
        config: The rule, and the quotas if there are any.

    Returns:
        The summary, which the manifest holds too.

    Raises:
        ConfigError: Settings that can't be followed.
        RecordError: No file; one named twice; a file that can't be trusted; files of different
            base models or numbers of layers; two questions under one id; a file to write that is
            one of the inputs; no target at all. Nothing is written then.
    """
    _check_names(search_files, output)
    read_quotas(config.quotas)  # what can't be read is refused before large files are
    sources = [_read_source(file) for file in search_files]
    for first, other in itertools.combinations(sources, 2):
        _check_same_model(first, other)
    _check_ids(sources)
    records = [record for source in sources for record in source.records]
    supervision = targets(records, config)
    if not supervision.records:
        raise RecordError(_without_targets(supervision.summary))
    manifest = new_manifest(
        "supervision",
        model=max((source.model for source in sources), key=len),  # the one that tells most
        config=config.to_dict(),
        inputs=search_files,
        extra={"summary": supervision.summary, "rewards": list(supervision.rewards)},
    )
    manifest["files"] = dict(
        zip(manifest["inputs"], _counts_by_file(sources, supervision), strict=True)
    )
    # First, so that targets with a manifest never lie beside the rejects of others.
    rejected = to_lines(_rejected(records, supervision.reasons))
    if rejected:
        write_atomically(rejected_path(output), rejected)
    elif rejected_path(output).is_file():
        rejected_path(output).unlink()
    write_records(output, supervision.records, manifest)
    return supervision.summary


def _check_names(search_files: Sequence[Path], output: Path) -> None:
    if not search_files:
        raise RecordError("no search file is given; name at least one search.jsonl")
    named: set[Path] = set()
    for file in search_files:
        if file.resolve() in named:
            raise RecordError(f"{file} is given twice; name each search file once")
        named.add(file.resolve())
    for file in (output, rejected_path(output)):
        if file.resolve() in named:
            raise RecordError(f"{file} is both read and written; choose another output file")


def _without_targets(summary: Mapping[str, Any]) -> str:
    """Word the message for questions of which none has a target."""
    rejected = {reason: n for reason, n in summary["rejected"].items() if n}
    remedy = "search more questions or simulations, or choose another --target"
    if SAVES_TOO_LITTLE in rejected:
        remedy = "search more simulations, or give a smaller --min-saving"
    if NO_KL in rejected:
        remedy = "search anew with --kl, or choose another --target"
    if OVER_QUOTA in rejected:  # a quota alone leaves targets, a share leaves the improving ones
        remedy = (
            "no target improves on the full path, so leave --quota-improving out, or search more "
            "simulations"
        )
    reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    return (
        f"none of the {summary['questions']} searched questions has a target ({reasons}); {remedy}"
    )


def _rejected(
    records: Sequence[SearchRecord], reasons: Sequence[str | None]
) -> Iterator[RejectedQuestion]:
    """Yield the records without a target, in order.

    Args:
        records: What was searched.
        reasons: One for each: why it has no target, None where it has one.
    """
    for record, reason in zip(records, reasons, strict=True):
        if reason is not None:
            yield RejectedQuestion(
                id=record.id, task=record.task, question=record.question, reason=reason
            )


def _counts_by_file(
    sources: Sequence[_Source], supervision: Supervision
) -> Iterator[dict[str, Any]]:
    """Yield what became of each file's questions, in the order of the files."""
    reasons = iter(supervision.reasons)
    for source in sources:
        found = Counter(itertools.islice(reasons, len(source.records)))
        yield {
            "questions": len(source.records) - found[TWICE],
            "copies": found[TWICE],
            "targets": found[None],
            "rejected": {reason: found[reason] for reason in REASONS},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A search file: its questions and the base model they were searched with."""

    file: Path
    records: list[SearchRecord]
    model: dict[str, Any]


def _read_source(file: Path) -> _Source:
    records = read_search(file)
    layers = records[0].num_layers
    for line, record in enumerate(records, start=1):
        if record.num_layers != layers:
            raise RecordError(
                f"{file}, line {line}: the question was searched on {record.num_layers} layers, "
                f"that of line 1 on {layers}; a file holds the paths of one model"
            )
    manifest = read_manifest(file, "search") or {"model": {}}
    model = {"num_layers": layers, **manifest["model"]}
    if model["num_layers"] != layers:
        raise RecordError(
            f"{file} holds paths of {layers} layers, but its manifest names a model of "
            f"{model['num_layers']}; make it again"
        )
    return _Source(file=file, records=records, model=model)


def _check_same_model(first: _Source, other: _Source) -> None:
    """Refuse files of two base models; another id for the same weights is fine."""
    known = [name for name in _SAME_MODEL if name in first.model and name in other.model]
    if "fingerprint" not in known:
        known += [
            name for name in ("id", "revision") if name in first.model and name in other.model
        ]
    for name in known:
        if first.model[name] != other.model[name]:
            raise RecordError(
                f"{first.file} and {other.file} are of different base models "
                f"({name} {first.model[name]!r} and {other.model[name]!r}); "
                f"make one supervision file for each"
            )


def _check_ids(sources: Sequence[_Source]) -> None:
    """Refuse two questions under one id, which readers of the targets could not tell apart."""
    seen: dict[tuple[str, str], tuple[str, Path]] = {}
    for source in sources:
        for record in source.records:
            key = question_key(record.question)
            text, file = seen.setdefault((record.task, record.id), (key, source.file))
            if text != key:
                raise RecordError(
                    f"{file} and {source.file} have different questions with id {record.id!r} of "
                    f"task {record.task!r}; rename the task of one of them"
                )
