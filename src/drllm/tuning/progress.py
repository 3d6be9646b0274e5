"""How far a tuning is, in pairs of a path and a question."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from drllm.records.static_paths import FIT, SELECT, TEST
from drllm.tuning.beam import Beam, num_pairs
from drllm.tuning.task_questions import TEXTS_OF, TaskQuestions
from drllm.work.first_block import FirstBlock
from drllm.work.listener import OnProgress


@dataclass
class TuningProgress:
    """Counts the pairs that are scored, and about how many there are in all.

    A level that would probably end after `max_seconds` isn't counted.

    Attributes:
        on_progress: Called with both numbers and a note.
        first_block: Estimates the time of the tuning.
        max_seconds: The tuning begins no level that would end later; None for no limit.
        num_done: The pairs that are scored.
        seconds: The time of all scores so far, including kept scores.
        level_ends: For each level left, about how many pairs are scored at its end.
    """

    on_progress: OnProgress
    first_block: FirstBlock
    max_seconds: float | None = None
    num_done: float = 0.0
    seconds: float = 0.0
    level_ends: Sequence[float] = (0.0,)

    def expect(self, level_pairs: Sequence[float], note: str = "") -> None:
        """Set about how many pairs each level left scores; report the progress if there is a note.

        Args:
            level_pairs: The pairs of each level left, the next level first.
            note: What was done.
        """
        ends = list(accumulate(level_pairs, initial=self.num_done))
        self.level_ends = ends[1:] or ends
        if note:
            self.on_progress(self.num_done, self._estimate_total(), note)

    def add(self, num_pairs: float, seconds: float, note: str) -> None:
        """Count pairs that were scored.

        Args:
            num_pairs: The number of the pairs.
            seconds: The time of all scores so far, including kept scores.
            note: What was done.
        """
        self.num_done += num_pairs
        self.seconds = seconds
        self.on_progress(self.num_done, self._estimate_total(), note)
        total = max(self.level_ends[-1], self.num_done)
        self.first_block.finish(self.num_done / total, seconds)

    def finish(self) -> None:
        """Report that all is done."""
        total = max(self.level_ends[-1], self.num_done)
        self.on_progress(total, total, "")

    def _estimate_total(self) -> float:
        """Return about how many pairs are scored in the end.

        The time that they would take isn't beyond `max_seconds`, unless that time is over and the
        last level still runs.
        """
        total = self.level_ends[-1]
        if self.max_seconds is not None and self.seconds >= self.max_seconds:
            total = self.level_ends[0]
        elif self.max_seconds is not None and self.seconds > 0:
            num_in_time = self.num_done * self.max_seconds / self.seconds
            ends_in_time = [end for end in self.level_ends if end <= num_in_time]
            total = max(ends_in_time, default=num_in_time)
        return max(total, self.num_done)


def estimate_pairs(
    beam: Beam, tasks: Sequence[TaskQuestions], num_saved: int = 0, *, is_repaired: bool = False
) -> list[float]:
    """Return about how many pairs each level left scores; rarely more.

    Args:
        beam: The search.
        tasks: The tasks.
        is_repaired: Whether the best paths are scored with their refits too.
        num_saved: How many layers the last finished level saves; 0 before the first level.
    """
    level_pairs = [
        estimate_level_pairs(beam, tasks, saved, is_repaired=is_repaired)
        for saved in range(num_saved + 1, beam.max_saved + 1)
    ]
    if num_saved == 0:  # the first level scores the full path too
        num_fit = sum(len(task.items[FIT]) for task in tasks)
        num_select = sum(len(task.items[SELECT]) for task in tasks)
        level_pairs[0] += num_fit + num_select + _count_report_pairs(tasks)
    return level_pairs


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
