"""The sweep: every single edit, then the best ones together, level by level. Loads no torch."""

import itertools
import math
from collections.abc import Iterator
from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decisions, num_executions
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies import STRATEGIES, PathSearch, Tried


@STRATEGIES.register("sweep")
class SweepSearch(PathSearch):
    """A search in levels: paths of one edit, of two, of three, until simulations run out.

    The first level is every legal edit of the full path: single skips, then double skips, then
    repeats, each kind in an order drawn at random. Skips come first because they alone save
    executions, and single ones because they break least. A later level makes one more edit of the
    paths of the level before, the best paths and the best edits first: path i of the ranking and
    edit j of the ranking are tried in the order of i + j. Paths rank by reward, then
    by score, then the shorter one first; an edit ranks as the path that it alone makes. The ranking
    waits until no path is in flight, so a round never reaches into the next level.
    """

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self._order = self._by_level()

    def _select(self) -> Decisions | None:
        return next(self._order, None)

    def _by_level(self) -> Iterator[Decisions | None]:
        """Yield the paths in order; None for as long as a level waits for the one before."""
        # Repeats that the budget forbids at first become legal where something is skipped.
        edits = [*legal_actions(self._full, 2 * self.num_layers)]
        self._rng.shuffle(edits)
        edits.sort(key=lambda edit: (edit.decision, edit.span))  # stable: within a kind as drawn
        legal = {*legal_actions(self._full, self.limit)}
        level = [apply(self._full, edit) for edit in edits if edit in legal]
        yield from level
        while level:
            while self._in_flight:
                yield None
            level.sort(key=self._rank)
            edits.sort(key=lambda edit: self._rank(apply(self._full, edit)))
            longer: list[Decisions] = []
            places = itertools.product(range(len(level)), range(len(edits)))
            for parent, edit in ((level[i], edits[j]) for i, j in sorted(places, key=sum)):
                if edit in legal_actions(parent, self.limit):
                    decisions = apply(parent, edit)
                    if decisions not in self.tried and decisions not in self._in_flight:
                        longer.append(decisions)
                        yield decisions
            level = longer

    def _rank(self, decisions: Decisions) -> tuple[float, float, int]:
        """Return what paths are sorted by; an edit that is over the budget alone comes last."""
        _, reward, score = self.tried.get(decisions, Tried(0, 0.0))
        return -reward, math.inf if score is None else -score, num_executions(decisions)
