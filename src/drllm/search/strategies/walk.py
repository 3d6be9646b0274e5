"""The search of the paper's published code: a chain of random edits that ignores all rewards."""

from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decisions
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies import STRATEGIES, PathSearch


@STRATEGIES.register("walk")
class WalkSearch(PathSearch):
    """Edits the last path at random, whatever its reward, as the paper's published code does.

    The first edit is of the full path. When no legal edit is left, the walk starts again from the
    full path. If the walk comes to a path that was tried before, this counts as a simulation. The
    path isn't evaluated again, and the walk continues from it. Unlike the published code, this walk
    makes only legal edits: each edit changes the path, no layer runs more than twice, and no path
    exceeds the budget.

    Source: the published code of Dr.LLM (commit 14e8837). In its search tree every node has one
        child, so the tree is a chain.
    """

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self._last = self._full

    def _select(self) -> Decisions | None:
        """Edit the last path until a new path comes up or all simulations are used."""
        while self._num_begun < self.config.num_simulations:
            actions = legal_actions(self._last, self.limit)
            if not actions and self._last == self._full:
                return None  # even the full path has no legal edit
            if not actions:
                self._last = self._full
                continue
            self._last = apply(self._last, self._rng.choice(actions))
            if self._last not in self.trials and self._last not in self._in_flight:
                return self._last
            self.num_simulations_done += 1  # a path that was tried before
        return None
