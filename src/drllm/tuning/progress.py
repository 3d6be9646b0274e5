"""How far a tuning is, in pairs of a path and a question."""

from collections.abc import Sequence
from dataclasses import dataclass

from drllm.records.static_paths import FIT, SELECT, TEST
from drllm.tuning.beam import Beam, num_pairs
from drllm.tuning.task_questions import TEXTS_OF, TaskQuestions
from drllm.work.first_block import FirstBlock
from drllm.work.listener import OnProgress


@dataclass
class TuningProgress:
    """Counts the pairs that are scored, and about how many there are in all.

    Attributes:
        on_progress: Called with both numbers and a note.
        first_block: Estimates the time of the tuning.
        num_done: The pairs that are scored.
        total: About how many pairs there are in all.
    """

    on_progress: OnProgress
    first_block: FirstBlock
    num_done: float = 0.0
    total: float = 0.0

    def expect(self, num_left: float, note: str = "") -> None:
        """Set about how many pairs are left, and report the progress if there is a note."""
        self.total = self.num_done + num_left
        if note:
            self.on_progress(self.num_done, self.total, note)

    def add(self, num_pairs: float, seconds: float, note: str) -> None:
        """Count pairs that were scored.

        Args:
            num_pairs: The number of the pairs.
            seconds: The time of all scores so far, including kept scores.
            note: What was done.
        """
        self.num_done += num_pairs
        self.total = max(self.total, self.num_done)
        self.on_progress(self.num_done, self.total, note)
        self.first_block.finish(self.num_done / self.total, seconds)

    def finish(self) -> None:
        """Report that all is done."""
        self.on_progress(self.total, self.total, "")


def estimate_pairs(
    beam: Beam, tasks: Sequence[TaskQuestions], num_saved: int = 0, *, is_repaired: bool = False
) -> float:
    """Return about how many pairs a tuning still scores; rarely more.

    Args:
        beam: The search.
        tasks: The tasks.
        is_repaired: Whether the best paths are scored with their refits too.
        num_saved: How many layers the last finished level saves; 0 before the first level.
    """
    total = 0.0
    for saved in range(num_saved + 1, beam.max_saved + 1):
        total += estimate_level_pairs(beam, tasks, saved, is_repaired=is_repaired)
    if num_saved == 0:  # of the full path
        num_fit = sum(len(task.items[FIT]) for task in tasks)
        num_select = sum(len(task.items[SELECT]) for task in tasks)
        total += num_fit + num_select + _count_report_pairs(tasks)
    return total


def estimate_level_pairs(
    beam: Beam, tasks: Sequence[TaskQuestions], saved: int, *, is_repaired: bool = False
) -> float:
    """Return about how many pairs the level that saves `saved` layers scores; rarely more."""
    num_fit = sum(len(task.items[FIT]) for task in tasks)
    num_select = sum(len(task.items[SELECT]) for task in tasks)
    num_report = _count_report_pairs(tasks)
    all_tasks = num_fit / beam.num_questions  # a beam counts the questions of the largest task
    total = all_tasks * num_pairs(beam.most_candidates(saved), beam.rungs)
    total += beam.width * num_select + num_report
    if is_repaired:
        # The search scores paths with the stand-in. So the best one is scored plain on the parts
        # of the search too, and on all parts with its refit.
        total += 2 * (num_fit + num_select) + num_report
    return total


def _count_report_pairs(tasks: Sequence[TaskQuestions]) -> int:
    """Count the pairs that the report needs for one path beyond those of the search."""
    total = 0
    for task in tasks:
        total += len(task.items[TEST])
        for part in (SELECT, TEST):
            total += len(task.items[TEXTS_OF + part])
            total += len(task.prompts.get(part, []))
    return total
