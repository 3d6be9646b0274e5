"""The targets that a search leaves beside its records: `supervision.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.config import SuperviseConfig
from drllm.records.codec import sha256
from drllm.records.manifest import read_manifest, to_lines
from drllm.records.places import only_writer
from drllm.records.search import SearchRecords
from drllm.records.supervision import SUPERVISION_FILE
from drllm.supervision.select import Supervision, pick_targets, write_supervision


@dataclass(frozen=True, kw_only=True)
class SearchTargets:
    """What became of the targets of a search.

    Attributes:
        file: The file of targets beside `search.jsonl`.
        supervision: The targets that were written; None if nothing was written.
        reason: Why nothing was written, in words; empty if targets were written.
        is_up_to_date: Whether nothing was written because the file was made from this search.
    """

    file: Path
    supervision: Supervision | None = None
    reason: str = ""
    is_up_to_date: bool = False


def supervise_search(
    records: SearchRecords, config: SuperviseConfig | None = None
) -> SearchTargets:
    """Pick the targets of a search, and write them beside its file.

    A file of the user's own stays as it is, and so do targets that are up to date. No file is
    written if no question has a target.

    Args:
        records: The records of a search that was written.
        config: The rule and the quotas; None for the default rule.
    """
    assert records.file is not None
    config = config or SuperviseConfig()
    file = records.file.with_name(SUPERVISION_FILE)
    with only_writer(file.parent, "search", "--output-dir"):
        supervision = pick_targets(records, config)
        if file.is_file():
            manifest = read_manifest(file, "supervision")
            if manifest is None and not _has_lines(file, supervision):
                reason = f"{file} has no manifest, so drllm didn't write it; it stays as it is"
                return SearchTargets(file=file, reason=reason)
            if manifest is not None and _is_up_to_date(manifest, records.file, config):
                reason = f"{file} was made from this search already"
                return SearchTargets(file=file, reason=reason, is_up_to_date=True)
        if not supervision:
            reason = (
                f"no question has a target path, so {file.name} was not written; search more "
                f"questions or simulations, or try 'drllm supervise' with another --target"
            )
            return SearchTargets(file=file, reason=reason)
        write_supervision(supervision, [records], file, config)
    return SearchTargets(file=file, supervision=supervision)


def _has_lines(file: Path, supervision: Supervision) -> bool:
    """Tell whether a file has exactly these targets.

    An earlier search that was killed before it wrote the manifest left such a file.
    """
    return file.read_bytes() == to_lines(supervision).encode()


def _is_up_to_date(manifest: Mapping[str, Any], search_file: Path, config: SuperviseConfig) -> bool:
    """Tell whether targets were made from the search beside them, by the rule of this search.

    Targets that `drllm supervise` made by another rule stay if this search names no rule.
    """
    if sha256(search_file) not in manifest.get("inputs", {}).values():
        return False
    settings = config.to_dict()
    is_same_rule = settings == manifest.get("config")
    names_no_rule = settings == SuperviseConfig().to_dict()
    return is_same_rule or names_no_rule
