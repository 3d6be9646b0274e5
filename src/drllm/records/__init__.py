"""Typed records and their files: search, supervision, results, manifests; JSON; resume.

`docs/formats.md` describes the same files for readers without Python. Loads no torch.
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
from drllm.records.lock import only_writer
from drllm.records.manifest import (
    manifest_path,
    new_manifest,
    read_manifest,
    read_records,
    refuse_artefact,
    to_lines,
    write_records,
)
from drllm.records.resume import Chunks, differences, refuse_other_run
from drllm.records.search import (
    FailedQuestion,
    Question,
    Retest,
    SearchRecord,
    TriedPath,
    read_search,
)
from drllm.records.splits import question_key, split_of
from drllm.records.supervision import (
    RejectedQuestion,
    SupervisionRecord,
    WeightedPath,
    join_supervision,
    read_supervision,
    rejected_path,
)

__all__ = [
    "SCHEMA_VERSION",
    "Chunks",
    "FailedQuestion",
    "Question",
    "RejectedQuestion",
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
    "read_json",
    "read_json_lines",
    "read_manifest",
    "read_records",
    "read_search",
    "read_supervision",
    "read_text",
    "refuse_artefact",
    "refuse_odd_file",
    "refuse_other_run",
    "rejected_path",
    "sha256",
    "split_of",
    "to_lines",
    "write_atomically",
    "write_json",
    "write_records",
]
