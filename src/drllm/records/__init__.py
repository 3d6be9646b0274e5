"""The files between the stages: what a line holds, how it is written, read back and trusted.

Owns `search.jsonl`, `supervision.jsonl`, the manifest beside each, atomic writing, the lock that
keeps a second writer out of a folder, and the assignment of questions to splits. Leaves what the
numbers mean to the stages. `docs/formats.md` describes the same formats for readers without
Python. Loads no torch.
"""

from drllm.records.codec import (
    SCHEMA_VERSION,
    clear_half_written,
    decode,
    encode,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    refuse_odd_file,
    sha256,
    write_atomically,
    write_json,
)
from drllm.records.files import (
    join_supervision,
    read_each,
    read_lines,
    read_search,
    read_supervision,
    to_lines,
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
from drllm.records.manifests import manifest_path, new_manifest, read_manifest
from drllm.records.resume import Chunks, differences, refuse_other_run
from drllm.records.splits import question_key, split_of

__all__ = [
    "SCHEMA_VERSION",
    "Chunks",
    "Retest",
    "SearchRecord",
    "SupervisionRecord",
    "TriedPath",
    "WeightedPath",
    "clear_half_written",
    "decode",
    "differences",
    "encode",
    "join_supervision",
    "manifest_path",
    "new_manifest",
    "only_writer",
    "question_key",
    "read_bytes",
    "read_each",
    "read_json",
    "read_json_lines",
    "read_lines",
    "read_manifest",
    "read_search",
    "read_supervision",
    "read_text",
    "refuse_odd_file",
    "refuse_other_run",
    "search_record",
    "sha256",
    "split_of",
    "supervision_record",
    "to_json",
    "to_lines",
    "write_atomically",
    "write_json",
    "write_records",
]
