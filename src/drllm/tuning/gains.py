"""What paths gain over the full path on the part `select`, by which a tuning chooses among them.

The *gain* of a path is its objective minus the objective of the full path, as a mean over the
tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from drllm.paths import StaticPath
from drllm.records.static_paths import SELECT
from drllm.statistics.intervals import mean_interval, sum_interval
from drllm.tuning.score_blocks import PLAIN
from drllm.tuning.score_table import ScoreTable
from drllm.tuning.task_questions import TaskQuestions


@dataclass(frozen=True)
class Gains:
    """The gains of paths that are scored on `select`, as the full path is.

    Attributes:
        table: The scores.
        tasks: The tasks.
        full: The full path.
        max_loss: The setting `--max-loss`, in nats.
        seed: Seed of the intervals.
        repair: How the paths are repaired that are compared with the full path: `PLAIN`,
            `STAND_IN` or `REFIT`.
    """

    table: ScoreTable
    tasks: Sequence[TaskQuestions]
    full: StaticPath
    max_loss: float
    seed: int
    repair: str = PLAIN

    def with_repair(self, repair: str) -> "Gains":
        """Return the gains of paths that are repaired in another way."""
        return replace(self, repair=repair)

    def mark_repair(self, path: StaticPath) -> StaticPath:
        """Return a path as the table of scores has it; the full path is always plain."""
        if path == self.full:
            return path
        return path.with_adapter(self.repair)

    def gain(self, path: StaticPath) -> float:
        """Return the gain of a path."""
        total = 0.0
        for task in self.tasks:
            total += fmean(self._differences(task, path))
        return total / len(self.tasks)

    def gain_with_interval(self, path: StaticPath) -> tuple[float, float, float]:
        """Return the gain of a path, and the low and the high end of its 95 % interval."""
        weight = 1 / len(self.tasks)
        terms = [(weight, self._differences(task, path)) for task in self.tasks]
        return sum_interval(terms, self.seed)

    def may_extend(self, path: StaticPath) -> bool:
        """Tell whether the search may skip one more layer of a path.

        It may not if the path loses more than `max_loss` on a task, even at the high end of the
        95 % interval of its gain on the task.
        """
        for task in self.tasks:
            _, high = mean_interval(self._differences(task, path), self.seed)
            if high < -self.max_loss:
                return False
        return True

    def choose_best(self, paths: Sequence[StaticPath]) -> StaticPath:
        """Return the path with the highest gain; paths that may be extended come first."""
        return max(paths, key=lambda path: (self.may_extend(path), self.gain(path)))

    def find_dominated(self, paths: Sequence[StaticPath]) -> list[bool]:
        """Tell for each path whether a shorter path has as high a gain; never for the full path.

        The paths must be in order, from the longest to the shortest.
        """
        gains = [self.gain(path) for path in paths]
        dominated = []
        for place, path in enumerate(paths):
            shorter_is_as_good = any(gain >= gains[place] for gain in gains[place + 1 :])
            dominated.append(path != self.full and shorter_is_as_good)
        return dominated

    def _differences(self, task: TaskQuestions, path: StaticPath) -> list[float]:
        return self.table.compare(task, SELECT, self.mark_repair(path), self.full)
