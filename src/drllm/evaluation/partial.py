"""What an evaluation has done so far, so that one that was interrupted goes on.

Owns the folder `partial/`. Of a system that is under way it holds a file for each block of
questions, of one that is done a single file; beside them the plan, and digests of the questions,
say which evaluation they belong to. Each file is there whole or not at all. Leaves what is run to
the stage, and which questions make up a block to `blocks`.

    plan.json
    questions-NAME.txt
    SYSTEM.json                   done
    SYSTEM/NUMBER-DECISIONS.json  a block
    MEASURE.json                  what baselines were chosen by

A block's file is named by a hash of its decisions too: were they others after an interruption
(what is trained is trained again then), the block would be asked again. A measure's is named by a
hash of the candidates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from drllm.errors import RecordError
from drllm.evaluation.blocks import Answered, Block, Keep
from drllm.evaluation.systems import System
from drllm.paths import Path as LayerPath
from drllm.records import write_atomically

PLAN_FILE = "plan.json"

Result = TypeVar("Result")


class Run(Protocol):
    """Does a system; a protocol, so that `keep` comes by its name."""

    def __call__(self, *, keep: Keep) -> System:
        """Run the system, its blocks by way of `keep`."""


class Partial:
    """What is done of one evaluation: systems, and blocks of those under way.

    Args:
        folder: Made when the first block is done.
        plan: What the evaluation is; plain JSON types.

    Raises:
        RecordError: The folder belongs to another evaluation.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        # Written before the first block and not sooner: a start that came to nothing, by a setting
        # that is mended then, must not stand in the way of the next one.
        self._belongs: dict[Path, str] = {}
        text = json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False)
        self._check(folder / PLAN_FILE, text, "other settings, routers or files")

    def check_questions(self, name: str, digest: str) -> None:
        """Refuse to go on where what is asked has changed.

        Args:
            name: Of the questions, unlike all others of the evaluation.
            digest: Of all that is asked.

        Raises:
            RecordError: Others were asked by this name before.
        """
        self._check(self._path(f"questions {name}", ".txt"), digest, f"other questions of {name}")

    def once(
        self,
        name: str,
        run: Run,
        on_progress: Callable[[float], object] = lambda _: None,
    ) -> System:
        """Return what a system did: read it if it is done, else run it and keep it.

        Args:
            name: Of the system on a task, unlike all others of the evaluation.
            run: Does it, block by block; those that are done already aren't asked again.
            on_progress: Called with the share of the blocks that are done.

        Raises:
            RecordError: A file that isn't what was written.
        """
        blocks = self._path(name, "")

        def keep(block: Block, decided: Any, ask: Callable[[], Answered]) -> Answered:
            def read(values: Any) -> Answered:
                answered = Answered.read(values)
                answered.check(len(block.places))
                return answered

            file = blocks / f"{block.number:05d}-{_hash(json.dumps(decided))}.json"
            answered = self._kept(file, read, lambda: dataclasses.asdict(ask()))
            on_progress((block.number + 1) / block.num_blocks)
            return answered

        system = self._kept(
            self._path(name, ".json"), _system, lambda: dataclasses.asdict(run(keep=keep))
        )
        if blocks.is_dir():
            shutil.rmtree(blocks)  # all that is in them stands in the system's file
        return system

    def values(
        self,
        name: str,
        candidates: Sequence[LayerPath],
        measure: Callable[[Sequence[LayerPath]], list[float]],
    ) -> list[float]:
        """Return what a measure gives for candidates: read it if it is known, else ask and keep it.

        Args:
            name: Of the measure, unlike all others of the evaluation.
            candidates: Decisions or paths.
            measure: Gives a value for each of them.

        Raises:
            RecordError: A file that isn't what was written.
        """

        def read(values: Any) -> list[float]:
            if len(values) != len(candidates):
                raise ValueError(f"{len(values)} values of {len(candidates)} candidates")
            return [float(value) for value in values]

        file = self._path(name, ".json", json.dumps(candidates))
        return self._kept(file, read, lambda: measure(candidates))

    def remove(self) -> None:
        """Delete the folder: what it held stands in the results now."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _kept(self, file: Path, read: Callable[[Any], Result], make: Callable[[], Any]) -> Result:
        """Return what a file holds; one that isn't there is made first.

        What was just made is read from its text as well, so that it can't differ from what a later
        start will find.
        """
        if not file.is_file():
            text = json.dumps(make()) + "\n"
            for beside, content in self._belongs.items():
                if not beside.is_file():
                    write_atomically(beside, content)
            write_atomically(file, text)
        try:
            return read(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RecordError(
                f"{file} is broken ({error}); delete it, and what it held is done again"
            ) from error

    def _path(self, name: str, ending: str, content: str = "") -> Path:
        words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return self.folder / f"{words}-{_hash(name + content)}{ending}"

    def _check(self, file: Path, text: str, otherwise: str) -> None:
        text += "\n"
        if file.is_file() and file.read_bytes() != text.encode():
            raise RecordError(
                f"{self.folder} holds what another evaluation has done so far ({otherwise}); give "
                f"the same ones to go on, another --output-dir, or delete {self.folder}"
            )
        self._belongs[file] = text


def _system(values: Any) -> System:
    system = System(**values)
    system.routes = [[tuple(row) for row in draw] for draw in system.routes]
    return system


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
