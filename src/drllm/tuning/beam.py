"""Beam search over paths that skip layers, with successive halving over questions.

A level holds the best paths that save the same number of layers. The candidates of a level skip one
layer more than the paths of the level before. Most candidates are dropped after few questions. This
module doesn't import torch.

Source: ours, from greedy removal (SLEB, arXiv 2402.09025; TALE, arXiv 2510.22767) and successive
halving (Jamieson and Talwalkar 2016, AISTATS).
"""

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
"""Returns the objective of N paths on the first n questions, `[N]`. Larger is better."""

SHARE_SKIPPED = 1 / 6  # by default, the largest share of the layers that is skipped


@dataclass(frozen=True, slots=True)
class Level:
    """The best paths that save `saved` layers, the best first."""

    saved: int
    paths: tuple[StaticPath, ...]


@dataclass(frozen=True, slots=True)
class Beam:
    """A beam search over paths that skip more and more layers."""

    num_layers: int
    width: int  # number of paths in a level
    max_saved: int  # number of layers that the paths of the last level save
    num_questions: int

    def levels(self, measure: Measure, grows: Callable[[StaticPath], bool]) -> Iterator[Level]:
        """Yield the levels, from the fewest layers saved to the most.

        After each level, `grows` decides which of its paths the next level builds on.
        """
        parents = [StaticPath(range(self.num_layers))]
        for saved in range(1, self.max_saved + 1):
            candidates: list[StaticPath] = []
            for parent in parents:
                candidates += skip_one_layer(parent)
            if not candidates:
                return
            unique = list(dict.fromkeys(candidates))
            best = self._find_best(unique, measure)
            yield Level(saved, tuple(best))
            parents = [path for path in best if grows(path)]

    def saved(self, path: StaticPath) -> int:
        """Return how many layers a path saves."""
        return self.num_layers - len(path.layers)

    @property
    def rungs(self) -> Sequence[tuple[int, int]]:
        """For each rung of a level, its number of questions, and how many paths it keeps."""
        return make_rungs(self.num_questions, self.width)

    def _find_best(self, candidates: list[StaticPath], measure: Measure) -> list[StaticPath]:
        """Return the best candidates, the best first. Most are dropped after few questions."""
        paths = candidates
        for num_questions, num_kept in self.rungs:
            values = measure(paths, num_questions)
            order = sorted(range(len(paths)), key=lambda place: -values[place])
            paths = [paths[place] for place in order[:num_kept]]
        return paths


def make_beam(config: TuneConfig, tasks: Sequence[TaskSplits], num_layers: int) -> Beam:
    """Make the beam search for some settings and tasks.

    Raises:
        ConfigError: `max_skipped` is below 1, or leaves no layer.
    """
    max_skipped = config.max_skipped or max(1, int(SHARE_SKIPPED * num_layers))
    if max_skipped >= num_layers:
        raise ConfigError(
            f"--max-skipped {max_skipped:g} leaves nothing of {num_layers} layers; give at most "
            f"{num_layers - 1}"
        )
    if max_skipped < 1:
        raise ConfigError(f"--max-skipped {max_skipped:g} is less than one layer; give 1 or more")
    num_questions = max(len(splits.examples[FIT]) for splits in tasks)
    return Beam(num_layers, config.beam, int(max_skipped), num_questions)


def skip_one_layer(path: StaticPath) -> Iterator[StaticPath]:
    """Yield the paths that skip one more layer; none for a path of one layer."""
    if len(path.layers) == 1:
        return
    for place in range(len(path.layers)):
        yield StaticPath(path.layers[:place] + path.layers[place + 1 :])


def make_rungs(num: int, beam: int) -> Sequence[tuple[int, int]]:
    """Return the rungs of successive halving: pairs of a number of questions and of paths kept.

    All candidates are scored on an eighth of the questions. The best of these are scored on a
    third, and the best of those on all questions.

    Example:
        >>> make_rungs(300, 3)
        [(38, 12), (100, 6), (300, 3)]
        >>> make_rungs(24, 3)
        [(24, 3)]
    """
    fewest = min(num, 24)
    kept_by_size: dict[int, int] = {}
    kept_by_size[max(fewest, -(-num // 8))] = 4 * beam
    kept_by_size[max(fewest, -(-num // 3))] = 2 * beam
    kept_by_size[num] = beam  # rungs with equally many questions become one, with fewest paths
    return list(kept_by_size.items())


def num_pairs(num_paths: int, rungs: Sequence[tuple[int, int]]) -> int:
    """Return the number of (question, path) pairs that a level scores.

    Example:
        >>> num_pairs(28, [(38, 12), (100, 6), (300, 3)])  # 28 * 38 + 12 * 62 + 6 * 200
        3008
    """
    pairs = 0
    num_scored = 0  # questions of the rung before, whose scores are reused
    for num_questions, num_kept in rungs:
        pairs += num_paths * (num_questions - num_scored)
        num_paths = min(num_paths, num_kept)
        num_scored = num_questions
    return pairs
