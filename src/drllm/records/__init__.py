"""The files between the stages: what a line holds, how it is written, read back and trusted.

Owns `search.jsonl`, `supervision.jsonl`, the manifest beside each, atomic writing, the lock that
keeps a second writer out of a folder, and the assignment of questions to splits. Leaves what the
numbers mean to the stages. `docs/formats.md` describes the same formats for readers without
Python. Loads no torch.
"""

from drllm.records.files import (
    clear_half_written,
    join_supervision,
    read_each,
    read_lines,
    read_search,
    read_supervision,
    to_lines,
    write_atomically,
    write_records,
)
from drllm.records.lines import (
    Retest,
    SearchRecord,
    SupervisionRecord,
    TriedPath,
    WeightedPath,
    search_record,
    supervision_record,
    to_json,
)
from drllm.records.lock import only_writer
from drllm.records.manifests import (
    SCHEMA_VERSION,
    manifest_path,
    new_manifest,
    read_manifest,
    sha256,
)
from drllm.records.splits import question_key, split_of

__all__ = [
    "SCHEMA_VERSION",
    "Retest",
    "SearchRecord",
    "SupervisionRecord",
    "TriedPath",
    "WeightedPath",
    "clear_half_written",
    "join_supervision",
    "manifest_path",
    "new_manifest",
    "only_writer",
    "question_key",
    "read_each",
    "read_lines",
    "read_manifest",
    "read_search",
    "read_supervision",
    "search_record",
    "sha256",
    "split_of",
    "supervision_record",
    "to_json",
    "to_lines",
    "write_atomically",
    "write_records",
]
