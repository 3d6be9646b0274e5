"""The progress of a search, as its users see it: questions done, paths a second, right paths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from drllm.search.batch import BatchRecords
from drllm.search.questions import Batch
from drllm.supervision.rules import is_improving, survived
from drllm.work.listener import OnProgress
from drllm.work.run import Block

MAX_FAILED_AT_START = 16
"""The search ends if this many questions fail before any question succeeds."""


@dataclass
class SearchProgress:
    """Counts the searched questions and paths, and reports progress.

    Progress is measured in characters of prompts, not in questions. Long questions come last and
    take longer, so by questions the time left would be estimated too short.
    """

    num_questions: int  # of all batches
    num_characters: float  # of all batches
    on_progress: OnProgress
    num_done: int = 0  # finished questions, including questions of an interrupted search
    num_characters_done: float = 0  # characters of the finished questions
    num_failed: int = 0  # finished questions that failed
    num_valid: int = 0  # finished questions with a right path that survived the re-test
    num_improving: int = 0  # of these, the questions whose full path is wrong
    num_new_paths: int = 0  # paths tried since the search was started or resumed
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, blocks: Sequence[Block[Batch]], on_progress: OnProgress) -> SearchProgress:
        """Return the progress of a search before its first batch."""
        num_questions = sum(len(block.data.questions) for block in blocks)
        num_characters = sum(block.size for block in blocks)
        return cls(num_questions, num_characters, on_progress)

    def add(self, block: Block[Batch], result: BatchRecords, *, is_new: bool) -> None:
        """Count a finished batch, and report it; `is_new` says that it was searched now."""
        self.num_done += len(block.data.questions)
        self.num_characters_done += block.size
        self.num_failed += len(result.failed)
        for record in result.records:
            survivors = [path for path in record.paths if survived(path)]
            if survivors:
                self.num_valid += 1
            if any(is_improving(path, record) for path in survivors):
                self.num_improving += 1
        if is_new:
            self.num_new_paths += result.num_new
        self._report(block.data.task)

    def report_step(self, block: Block[Batch], share: float, num_paths: int, step: str) -> None:
        """Report a step within an unfinished batch.

        Args:
            block: The batch, which `add` hasn't counted yet.
            share: The share of the batch's work that is done.
            num_paths: How many of its paths were tried since the search was started or resumed.
            step: The finished step in words.
        """
        self._report(block.data.task, share * block.size, num_paths, step)

    def _report(
        self, task: str, num_characters: float = 0.0, num_paths: int = 0, step: str = ""
    ) -> None:
        """Report progress, with the characters and paths of an unfinished batch that are done."""
        note = f"{self.num_done} of {self.num_questions} questions, {task}"
        if step:
            note = f"{step}, {note}"
        num_new_paths = self.num_new_paths + num_paths
        if num_new_paths > 0:
            seconds = max(time.monotonic() - self.started, 1e-9)
            note += f", {num_new_paths / seconds:.1f} paths a second"
        if self.num_done > 0:
            note += f", right path for {100 * (self.num_valid / self.num_done):.0f} % of questions"
            note += f", {100 * (self.num_improving / self.num_done):.0f} % corrected"
        # The bar counts questions, so the share of the characters is scaled to questions.
        share_done = (self.num_characters_done + num_characters) / self.num_characters
        self.on_progress(self.num_questions * share_done, self.num_questions, note)

    @property
    def has_only_failed(self) -> bool:
        """Whether all questions so far failed, and they are enough to end the search."""
        if self.num_failed < self.num_done:
            return False
        return self.num_failed >= min(MAX_FAILED_AT_START, self.num_questions)
