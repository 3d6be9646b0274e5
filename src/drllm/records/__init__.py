"""Typed records and their files: search, supervision, results, manifests; JSON; resume.

`docs/formats.md` describes the same files for readers without Python. Loads no torch.
"""

from drllm.records.codec import SCHEMA_VERSION as SCHEMA_VERSION
from drllm.records.codec import clear_half_written as clear_half_written
from drllm.records.codec import decode as decode
from drllm.records.codec import encode as encode
from drllm.records.codec import read_json as read_json
from drllm.records.codec import read_json_lines as read_json_lines
from drllm.records.codec import read_text as read_text
from drllm.records.codec import refuse_odd_file as refuse_odd_file
from drllm.records.codec import sha256 as sha256
from drllm.records.codec import write_atomically as write_atomically
from drllm.records.codec import write_json as write_json
from drllm.records.manifest import manifest_path as manifest_path
from drllm.records.manifest import new_manifest as new_manifest
from drllm.records.manifest import read_manifest as read_manifest
from drllm.records.manifest import to_lines as to_lines
from drllm.records.manifest import write_records as write_records
from drllm.records.places import only_writer as only_writer
from drllm.records.resume import Chunks as Chunks
from drllm.records.resume import differences as differences
from drllm.records.resume import refuse_other_run as refuse_other_run
from drllm.records.search import FailedQuestion as FailedQuestion
from drllm.records.search import Retest as Retest
from drllm.records.search import SearchRecord as SearchRecord
from drllm.records.search import TriedPath as TriedPath
from drllm.records.search import read_search as read_search
from drllm.records.splits import question_key as question_key
from drllm.records.splits import split_of as split_of
from drllm.records.supervision import RejectedQuestion as RejectedQuestion
from drllm.records.supervision import SupervisionRecord as SupervisionRecord
from drllm.records.supervision import join_supervision as join_supervision
from drllm.records.supervision import read_supervision as read_supervision
from drllm.records.supervision import rejected_path as rejected_path
