"""The records of one search, with the base model and the file that they are from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.records.manifest import read_manifest
from drllm.records.search import FailedQuestion, SearchRecord, read_search


class SearchRecords(tuple[SearchRecord, ...]):
    """What `search_paths` returns and `supervise` takes: one record per question, in order.

    Attributes:
        model: Identity of the base model, as far as it is known.
        file: The `search.jsonl` that holds them; None where they were never written.
        failed: The questions that failed every time.
        is_new: Something was searched for them, not all read from a file.
    """

    model: dict[str, Any]
    file: Path | None = None
    failed: tuple[FailedQuestion, ...] = ()
    is_new: bool = True

    @classmethod
    def of(
        cls,
        records: Iterable[SearchRecord],
        model: Mapping[str, Any] | None = None,
        *,
        file: Path | None = None,
        failed: Sequence[FailedQuestion] = (),
        is_new: bool = True,
    ) -> SearchRecords:
        """Return records with what they are from; see the attributes."""
        found = cls(records)
        found.model = {**({"num_layers": found[0].num_layers} if found else {}), **(model or {})}
        found.file, found.failed, found.is_new = file, tuple(failed), is_new
        return found

    @classmethod
    def read(cls, file: Path, *, is_new: bool = False) -> SearchRecords:
        """Read a `search.jsonl`.

        Raises:
            RecordError: What `read_search` refuses; paths of different numbers of layers, or of
                another one than the manifest names.
        """
        records = read_search(file)
        layers = records[0].num_layers
        for line, record in enumerate(records, start=1):
            if record.num_layers != layers:
                raise RecordError(
                    f"{file}, line {line}: the question was searched on {record.num_layers} "
                    f"layers, that of line 1 on {layers}; a file holds the paths of one model"
                )
        found = cls.of(
            records, (read_manifest(file, "search") or {}).get("model"), file=file, is_new=is_new
        )
        if found.model["num_layers"] != layers:
            raise RecordError(
                f"{file} holds paths of {layers} layers, but its manifest names a model of "
                f"{found.model['num_layers']}; make it again"
            )
        return found
