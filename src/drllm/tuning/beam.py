"""Beam search over edits of a path, with successive halving over questions. Loads no torch.

Paths are grouped in levels by how many layers they save. The candidates of a level leave out one
layer more than the best paths of the level before. Most candidates are dropped after few questions.

Source: ours, of greedy removal (SLEB, arXiv 2402.09025; TALE, arXiv 2510.22767) and successive
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
"""Returns the objective of paths on the first so many questions, `[N]`; the larger the better."""
SHARE_SKIPPED = 1 / 6  # of the layers, unless another number is given


@dataclass(frozen=True, slots=True)
class Level:
    """The best paths that save so many layers, the best first."""

    saved: int
    paths: tuple[StaticPath, ...]


@dataclass(frozen=True, slots=True)
class Beam:
    """A beam search: of how many layers, how wide, how far, and on how many questions."""

    num_layers: int
    width: int
    max_saved: int
    num_questions: int

    def levels(self, measure: Measure, grows: Callable[[StaticPath], bool]) -> Iterator[Level]:
        """Yield the levels from the least saved to the most.

        A path is only edited further while `grows` says so, asked once its level was yielded.
        """
        parents = [StaticPath(range(self.num_layers))]
        for saved in range(1, self.max_saved + 1):
            candidates = dict.fromkeys(child for parent in parents for child in skips(parent))
            if not candidates:
                return
            best = self._best(list(candidates), measure)
            yield Level(saved, tuple(best))
            parents = [path for path in best if grows(path)]

    def saved(self, path: StaticPath) -> int:
        """Return how many layers a path saves."""
        return self.num_layers - len(path.layers)

    @property
    def rungs(self) -> Sequence[tuple[int, int]]:
        """How many questions each rung of a level asks, and how many paths it keeps."""
        return rungs(self.num_questions, self.width)

    def _best(self, candidates: list[StaticPath], measure: Measure) -> list[StaticPath]:
        """Return the best candidates; most are dropped after few questions."""
        left = candidates
        for num_questions, num_kept in self.rungs:
            values = measure(left, num_questions)
            order = sorted(range(len(left)), key=lambda place: -values[place])
            left = [left[place] for place in order[:num_kept]]
        return left


def beam_of(config: TuneConfig, divided: Sequence[TaskSplits], num_layers: int) -> Beam:
    """Return the search that settings ask for on tasks; a ConfigError where none is possible."""
    most = config.max_skipped or max(1, int(SHARE_SKIPPED * num_layers))
    if most >= num_layers:
        raise ConfigError(
            f"--max-skipped {most:g} leaves nothing of {num_layers} layers; give at most "
            f"{num_layers - 1}"
        )
    if most < 1:
        raise ConfigError(f"--max-skipped {most:g} is less than one layer; give 1 or more")
    num_questions = max(len(parts.examples[FIT]) for parts in divided)
    return Beam(num_layers, config.beam, int(most), num_questions)


def skips(path: StaticPath) -> Iterator[StaticPath]:
    """Yield the paths that leave out one layer more; at least one layer is left."""
    if len(path.layers) == 1:
        return
    for place in range(len(path.layers)):
        yield StaticPath([*path.layers[:place], *path.layers[place + 1 :]])


def rungs(num: int, beam: int) -> Sequence[tuple[int, int]]:
    """Return how many questions each rung of successive halving asks, and how many paths it keeps.

    An eighth of the questions for all candidates, a third for those that are left, then all.

    Example:
        >>> rungs(300, 3)
        [(38, 12), (100, 6), (300, 3)]
        >>> rungs(24, 3)
        [(24, 3)]
    """
    fewest = min(num, 24)
    kept_by_size: dict[int, int] = {}
    kept_by_size[max(fewest, -(-num // 8))] = 4 * beam
    kept_by_size[max(fewest, -(-num // 3))] = 2 * beam
    kept_by_size[num] = beam  # rungs of as many questions are one, which keeps what the last keeps
    return list(kept_by_size.items())


def num_pairs(num_paths: int, rungs: Sequence[tuple[int, int]]) -> int:
    """Return how many questions times paths a level scores, given its rungs.

    Example:
        >>> num_pairs(28, [(38, 12), (100, 6), (300, 3)])  # 28 * 38 + 12 * 62 + 6 * 200
        3008
    """
    pairs = 0
    num_asked = 0
    for num_questions, num_kept in rungs:
        pairs += num_paths * (num_questions - num_asked)
        num_paths = min(num_paths, num_kept)
        num_asked = num_questions
    return pairs
