"""Beam search over edits of a path, with successive halving over questions. Loads no torch.

Paths are grouped in levels by what they save, in whole multiples of the smallest part that can be
left out. Levels are filled from the least saved to the most: the candidates of a level are the
edits of the best paths of all levels before it. Most candidates are dropped after few questions.

Source: ours, of greedy removal (SLEB, arXiv 2402.09025; TALE, arXiv 2510.22767) and successive
halving (Jamieson and Talwalkar 2016, AISTATS).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from drllm.config import TuneConfig
from drllm.cost import Shares, path_executions
from drllm.errors import ConfigError
from drllm.paths import ALL, ATTENTION, MLP, StaticPath, Step, layer_of, step_of
from drllm.records.static_paths import FIT
from drllm.statistics.intervals import Floats
from drllm.tuning.parts import TaskParts, rungs

Measure: TypeAlias = Callable[[Sequence[StaticPath], int], Floats]
"""Returns the objective of paths on the first so many questions, `[N]`; the larger the better."""
LAYERS, SUBLAYERS, REPEATS = "layers", "sublayers", "repeats"
"""What a search may do: skip layers; skip their attention or MLP too; start from a repeat too."""
SCALES = (0.25, 0.5, 1.0)
"""Weights of a second pass's update. Published work on looping frozen models finds gains only below
1 (arXiv 2605.23872)."""
LONGEST_BLOCK = 7  # layers of a block that is repeated, at most
SHARE_SKIPPED = 1 / 6  # of the layers, unless another number is given
ROUNDING = 1e-6  # of a level that shares of layers add up to


@dataclass(frozen=True, slots=True)
class Level:
    """The best paths that save about as much, the best first."""

    saved: float  # the least that one of them saves, in layer equivalents
    paths: tuple[StaticPath, ...]


@dataclass(frozen=True, slots=True)
class Beam:
    """How a search goes: which edits, how wide, how far, and on how many questions.

    `shares` are what the parts of each layer cost.
    """

    kind: str
    width: int
    max_saved: float
    num_questions: int
    shares: Shares

    def levels(self, measure: Measure, grows: Callable[[StaticPath], bool]) -> Iterator[Level]:
        """Yield the levels from the least saved to the most.

        A path is only edited further while `grows` says so, asked once its level was yielded.
        """
        L = len(self.shares)
        full = StaticPath(range(L))
        by_level: dict[int, dict[StaticPath, None]] = {}
        self._put(by_level, [full])
        if self.kind == REPEATS:
            self._put(by_level, self._best(list(repeats(L)), measure))
        seen = {path for paths in by_level.values() for path in paths}
        while by_level:
            number = min(by_level)
            others = by_level.pop(number)
            if number > self.num_levels:
                return
            roots = [full] if full in others else []
            candidates = [path for path in others if path != full]
            best = self._best(candidates, measure) if candidates else []
            if best:
                saved = min(self.saved(path) for path in best)
                yield Level(saved, tuple(best))
            for path in [*roots, *best]:
                if path == full or grows(path):
                    new = [each for each in skips(path, self.kind) if each not in seen]
                    seen.update(new)
                    self._put(by_level, new)

    def saved(self, path: StaticPath) -> float:
        """Return what a path saves, in layer equivalents; negative where it runs more."""
        return len(self.shares) - path_executions(path, self.shares)

    @property
    def rungs(self) -> Sequence[tuple[int, int]]:
        """How many questions each rung of a level asks, and how many paths it keeps."""
        return rungs(self.num_questions, self.width)

    @property
    def unit(self) -> float:
        """What a level saves more than the one before, in layer equivalents."""
        return min(min(pair) for pair in self.shares) if self.kind == SUBLAYERS else 1.0

    @property
    def num_levels(self) -> int:
        """How many levels save something; the last saves at most `max_saved`."""
        return math.floor(self.max_saved / self.unit + ROUNDING)

    def _put(self, by_level: dict[int, dict[StaticPath, None]], paths: list[StaticPath]) -> None:
        for path in paths:
            by_level.setdefault(round(self.saved(path) / self.unit), {})[path] = None

    def _best(self, candidates: list[StaticPath], measure: Measure) -> list[StaticPath]:
        """Return the best candidates, those of few questions first dropped on few."""
        left = candidates
        for num_questions, kept in self.rungs:
            values = measure(left, num_questions)
            order = sorted(range(len(left)), key=lambda place: -values[place])
            left = [left[place] for place in order[:kept]]
        return left


def beam_of(config: TuneConfig, divided: Sequence[TaskParts], shares: Shares) -> Beam:
    """Return the search that settings ask for on tasks; a ConfigError where none is possible."""
    L = len(shares)
    most = config.max_skipped or max(1, int(SHARE_SKIPPED * L))
    if most >= L:
        raise ConfigError(
            f"--max-skipped {most:g} leaves nothing of {L} layers; give at most {L - 1}"
        )
    num = max(len(each.examples[FIT]) for each in divided)
    beam = Beam(config.edits, config.beam, most, num, shares)
    if not beam.num_levels:
        raise ConfigError(
            f"--max-skipped {most:g} is too little: one edit leaves out at least {beam.unit:.3g} "
            f"of a layer; give that or more"
        )
    return beam


def skips(path: StaticPath, kind: str) -> Iterator[StaticPath]:
    """Yield the paths that leave out one thing more, each once; at least one step is left.

    A layer that runs more than once is left as it is: it was repeated for a reason.
    """
    layers = [layer_of(item) for item in path.steps]
    for place, item in enumerate(path.steps):
        step = step_of(item)
        if layers.count(step.layer) > 1:
            continue
        before, after = path.steps[:place], path.steps[place + 1 :]
        if before or after:
            yield StaticPath([*before, *after])
        if kind == SUBLAYERS and step.run == ALL:
            for run in (ATTENTION, MLP):
                yield StaticPath([*before, Step(step.layer, run), *after])


def repeats(num_layers: int) -> Iterator[StaticPath]:
    """Yield the full path with one block run a second time, damped or not."""
    full = tuple(range(num_layers))
    for size in range(1, min(LONGEST_BLOCK, num_layers) + 1):
        for start in range(num_layers - size + 1):
            end = start + size
            for scale in SCALES:
                again = [Step(layer, ALL, scale) for layer in full[start:end]]
                yield StaticPath([*full[:end], *again, *full[end:]])
