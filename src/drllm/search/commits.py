"""The blocks that are committed: a folder beside `search.jsonl` that a search goes on from.

Owns the files of the folder, one per block and the plan; each is written at once and read back
with suspicion: one that doesn't hold exactly its block's questions is set aside, and the block is
searched again. Leaves what makes two searches the same to `plan`. Loads no torch.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.errors import RecordError
from drllm.records import (
    FailedQuestion,
    SearchRecord,
    decode,
    encode,
    read_json_lines,
    write_atomically,
)
from drllm.search.plan import compare
from drllm.search.questions import Block

BLOCKS_FOLDER = "search.blocks"
PLAN_FILE = "plan.json"
BROKEN = ".broken"
"""Ending of the name of a block file that was set aside."""

logger = logging.getLogger(__name__)


class Commits:
    """The committed blocks of one search.

    Args:
        folder: The folder that gets `search.jsonl`.
        plan: Of the search that wants to go on.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        self.folder = folder / BLOCKS_FOLDER
        self.plan = plan
        self.plan_file = self.folder / PLAN_FILE

    def open(self, output: Path, blocks: Sequence[Block]) -> None:
        """Prepare the folder, or accept the one that is there.

        Args:
            output: Where the whole search will be written. A file there without a manifest is
                ours only if every block is committed: then a kill came between file and manifest.
            blocks: All blocks of the search.

        Raises:
            ConfigError: The blocks were made from something else.
            RecordError: The output holds a file that isn't ours.
        """
        is_begun = self.plan_file.exists()
        if output.exists() and not (
            is_begun and all(self._file(block).exists() for block in blocks)
        ):
            raise RecordError(
                f"{output} exists without its manifest, so it can't be continued; "
                f"choose another --output-dir"
            )
        if is_begun:
            compare(self.folder, read_plan(self.plan_file), self.plan)
        else:
            write_atomically(self.plan_file, json.dumps(self.plan, indent=2) + "\n")

    def commit(self, block: Block, lines: str) -> None:
        """Keep a block's lines; either all of them are there afterwards or none.

        Raises:
            RecordError: A folder that can't be written, or a full disk.
        """
        write_atomically(self._file(block), lines)

    def find(self, block: Block) -> tuple[list[SearchRecord], list[FailedQuestion]] | None:
        """Return a block's records and the questions that were set aside; None where it isn't done.

        A file that can't be trusted is set aside with a warning: the block isn't done.
        """
        file = self._file(block)
        if not file.exists():
            return None
        try:
            return self.read(block)
        except RecordError as error:
            aside = file.with_name(file.name + BROKEN)
            file.replace(aside)
            logger.warning(
                "%s; it is set aside as %s, and its questions are searched again", error, aside.name
            )
            return None

    def read(self, block: Block) -> tuple[list[SearchRecord], list[FailedQuestion]]:
        """Return a committed block's records and the questions that were set aside.

        Raises:
            RecordError: A file that can't be read, or holds other questions than its block's.
        """
        file = self._file(block)
        rows = read_json_lines(file, dict[str, Any])
        read = [_question(row, f"{file}, line {line}") for line, row in rows]
        records = [one for one in read if isinstance(one, SearchRecord)]
        failed = [one for one in read if isinstance(one, FailedQuestion)]
        if sorted(one.id for one in read) != sorted(example.id for example in block.examples):
            raise RecordError(f"{file} doesn't hold exactly the questions of its block")
        return records, failed

    def remove(self) -> None:
        """Delete the blocks of a search that is complete; those of another plan stay.

        The plan goes last, so that blocks that a kill leaves behind can still be told whose they
        are.
        """
        is_begun = self.plan_file.exists()
        if not self.folder.is_dir() or (is_begun and read_plan(self.plan_file) != self.plan):
            return
        files = [file for file in self.folder.iterdir() if file != self.plan_file]
        if is_begun or not files:
            for file in files:
                file.unlink()
            shutil.rmtree(self.folder)

    def _file(self, block: Block) -> Path:
        return self.folder / f"{block.number:05d}.jsonl"


def read_plan(file: Path) -> dict[str, Any]:
    """Return the plan that stands beside committed blocks.

    Raises:
        RecordError: It can't be read.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RecordError(
            f"{file} is broken; delete the folder {file.parent}, and the search begins anew"
        ) from error


def _question(row: Mapping[str, Any], where: str) -> SearchRecord | FailedQuestion:
    line = encode(row)
    if "error" in row:
        return decode(line, FailedQuestion, where)
    return decode(line, SearchRecord, where)
