"""Beam search over paths that skip layers, with successive halving over questions.

A *level* holds the best paths that save the same number of layers. The candidates of a level skip
one layer more than the paths of the level before. The best candidates are found in *rungs*: each
rung scores the remaining candidates on more questions, and keeps fewer of them. So most candidates
are dropped after few questions. This module doesn't import torch.

Source: ours, from greedy removal (SLEB, arXiv 2402.09025; TALE, arXiv 2510.22767) and successive
halving (Jamieson and Talwalkar 2016, AISTATS).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from drllm.config import TuneConfig
from drllm.errors import ConfigError
from drllm.paths import StaticPath
from drllm.records.static_paths import FIT
from drllm.statistics.intervals import Floats
from drllm.tuning.data_splits import TaskSplits

Measure: TypeAlias = Callable[[Sequence[StaticPath], int], Floats]
"""Takes N paths and a number n; returns the objective of the paths on the first n questions, `[N]`.
Larger is better."""

MAX_SHARE_SKIPPED = 1 / 6  # by default, the largest share of the layers that is skipped
MIN_QUESTIONS = 24  # the fewest questions that a rung scores paths on


@dataclass(frozen=True, slots=True)
class Level:
    """The best paths that save `saved` layers, the best first."""

    saved: int
    paths: tuple[StaticPath, ...]


@dataclass(frozen=True, slots=True)
class Beam:
    """A beam search over paths that skip more and more layers.

    Attributes:
        num_layers: L of the model.
        width: The number of paths in a level.
        max_saved: The number of layers that the paths of the last level save.
        num_questions: The number of questions that the last rung scores paths on.
        keeps_ends: Whether all paths run the first and the last layer. Paths that are repaired do:
            no layer before the first one could make up for it, and a refit makes up badly for the
            last one.
    """

    num_layers: int
    width: int
    max_saved: int
    num_questions: int
    keeps_ends: bool = False

    def levels(self, measure: Measure, may_extend: Callable[[StaticPath], bool]) -> Iterator[Level]:
        """Yield the levels, from the fewest layers saved to the most.

        Args:
            measure: Returns the objective of paths.
            may_extend: Tells whether the next level may skip one more layer of a path. It is called
                after each level for the paths of the level.
        """
        parents = [StaticPath(range(self.num_layers))]
        for saved in range(1, self.max_saved + 1):
            candidates: list[StaticPath] = []
            for parent in parents:
                candidates += skip_one_layer(parent, keeps_ends=self.keeps_ends)
            if not candidates:
                return
            unique = list(dict.fromkeys(candidates))
            best = self._find_best(unique, measure)
            yield Level(saved, tuple(best))
            parents = [path for path in best if may_extend(path)]

    def most_candidates(self, saved: int) -> int:
        """Return the maximum number of candidates of the level that saves `saved` layers."""
        num_parents = 1 if saved == 1 else self.width
        num_kept = 2 if self.keeps_ends else 0
        return num_parents * (self.num_layers - num_kept - saved + 1)

    @property
    def rungs(self) -> Sequence[tuple[int, int]]:
        """For each rung, the number of questions and the number of paths that are kept."""
        return make_rungs(self.num_questions, self.width)

    def _find_best(self, candidates: list[StaticPath], measure: Measure) -> list[StaticPath]:
        """Return the best candidates, the best first."""
        paths = candidates
        for num_questions, num_kept in self.rungs:
            values = measure(paths, num_questions)
            order = sorted(range(len(paths)), key=lambda place: -values[place])
            paths = [paths[place] for place in order[:num_kept]]
        return paths


def make_beam(
    config: TuneConfig, tasks: Sequence[TaskSplits], num_layers: int, *, keeps_ends: bool = False
) -> Beam:
    """Make the beam search for some settings and tasks.

    Args:
        config: The settings.
        tasks: The tasks with their questions.
        num_layers: L of the model.
        keeps_ends: As in `Beam`.

    Raises:
        ConfigError: `max_skipped` is below 1, or leaves too few layers; or the model has too few.
    """
    if num_layers == 1:
        raise ConfigError(
            "the model has only one layer, so there is none to skip; tune a model with more layers"
        )
    if keeps_ends and num_layers == 2:
        raise ConfigError(
            "the model has two layers, and repair keeps the first and the last layer; give "
            "--repair none, or tune a model with more layers"
        )
    max_skipped = config.max_skipped or max(1, int(MAX_SHARE_SKIPPED * num_layers))
    if max_skipped >= num_layers:
        raise ConfigError(
            f"--max-skipped {max_skipped:g} leaves no layer of {num_layers}; give at most "
            f"{num_layers - 1}"
        )
    if keeps_ends and max_skipped > num_layers - 2:
        raise ConfigError(
            f"--max-skipped {max_skipped:g} is too many of {num_layers} layers, since repair keeps "
            f"the first and the last; give at most {num_layers - 2}, or --repair none"
        )
    if max_skipped < 1:
        raise ConfigError(f"--max-skipped {max_skipped:g} is less than one layer; give 1 or more")
    num_questions = max(len(splits.examples[FIT]) for splits in tasks)
    return Beam(num_layers, config.beam, int(max_skipped), num_questions, keeps_ends)


def skip_one_layer(path: StaticPath, *, keeps_ends: bool = False) -> Iterator[StaticPath]:
    """Yield the paths that skip one more layer; none for a path of one layer.

    Args:
        path: The path.
        keeps_ends: Whether the path's first and last layer stay.
    """
    num_layers = len(path.layers)
    if num_layers == 1:
        return
    places = range(1, num_layers - 1) if keeps_ends else range(num_layers)
    for place in places:
        yield StaticPath(path.layers[:place] + path.layers[place + 1 :])


def make_rungs(num_questions: int, width: int) -> Sequence[tuple[int, int]]:
    """Return the rungs: for each rung its number of questions, and how many paths it keeps.

    The first rung scores all candidates on an eighth of the questions. The second rung scores the
    best candidates on a third, and the last rung on all questions. A rung has at least
    `MIN_QUESTIONS` questions, or all questions if there are fewer. Rungs with the same number of
    questions become one rung, which keeps the fewest paths.

    Args:
        num_questions: The number of all questions.
        width: The number of paths that the last rung keeps.

    Example:
        >>> make_rungs(300, 3)
        [(38, 12), (100, 6), (300, 3)]
        >>> make_rungs(24, 3)
        [(24, 3)]
    """
    fewest = min(num_questions, MIN_QUESTIONS)
    kept_by_questions: dict[int, int] = {}
    kept_by_questions[max(fewest, math.ceil(num_questions / 8))] = 4 * width
    kept_by_questions[max(fewest, math.ceil(num_questions / 3))] = 2 * width
    kept_by_questions[num_questions] = width
    return list(kept_by_questions.items())


def num_pairs(num_paths: int, rungs: Sequence[tuple[int, int]]) -> int:
    """Return how many pairs of a question and a path a level scores.

    Args:
        num_paths: The number of candidates of the level.
        rungs: The rungs, see `make_rungs`.

    Example:
        >>> num_pairs(28, [(38, 12), (100, 6), (300, 3)])  # 28 * 38 + 12 * 62 + 6 * 200
        3008
    """
    total = 0
    num_scored = 0  # questions of the rung before, whose scores are reused
    for num_questions, num_kept in rungs:
        total += num_paths * (num_questions - num_scored)
        num_paths = min(num_paths, num_kept)
        num_scored = num_questions
    return total
