"""The records of one search, with the base model and the file that they are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from drllm.errors import RecordError
from drllm.records.manifest import read_manifest
from drllm.records.search import FailedQuestion, SearchRecord, read_search


class SearchRecords(Sequence[SearchRecord]):
    """What `search_paths` returns and `supervise` takes: a sequence of search records.

    Args:
        records: In the order of the questions.
        model: Identity of the base model, as far as it is known.
        file: The `search.jsonl` that holds them; None where they were never written.
        failed: The questions that failed every time.
        is_new: Something was searched for them, not all read from a file.
    """

    def __init__(
        self,
        records: Sequence[SearchRecord],
        model: Mapping[str, Any] | None = None,
        *,
        file: Path | None = None,
        failed: Sequence[FailedQuestion] = (),
        is_new: bool = True,
    ) -> None:
        self._records = tuple(records)
        layers = {"num_layers": self._records[0].num_layers} if self._records else {}
        self.model: dict[str, Any] = {**layers, **(model or {})}
        self.file = file
        self.failed = tuple(failed)
        self.is_new = is_new

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
        found = cls(
            records, (read_manifest(file, "search") or {}).get("model"), file=file, is_new=is_new
        )
        if found.model["num_layers"] != layers:
            raise RecordError(
                f"{file} holds paths of {layers} layers, but its manifest names a model of "
                f"{found.model['num_layers']}; make it again"
            )
        return found

    @overload
    def __getitem__(self, place: int) -> SearchRecord: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[SearchRecord, ...]: ...
    def __getitem__(self, place: int | slice) -> SearchRecord | tuple[SearchRecord, ...]:
        """Return the record of one question, or those of several."""
        return self._records[place]

    def __len__(self) -> int:
        return len(self._records)
