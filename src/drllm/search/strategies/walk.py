"""The released code's search: one chain of random edits, never steered by rewards."""

from random import Random

from drllm.config import SearchConfig
from drllm.paths import Decisions
from drllm.search.actions import apply, legal_actions
from drllm.search.strategies import STRATEGIES, PathSearch


@STRATEGIES.register("walk")
class WalkSearch(PathSearch):
    """A random walk of edits that starts from the full path.

    Each simulation edits the last path once, at random, whatever its reward. When no legal edit is
    left, the walk starts again from the full path. If the walk comes to a path that was tried
    before, the path isn't evaluated again, but it counts as a simulation, and the next edit starts
    there. Unlike the released code this walk makes only legal edits: each edit has an effect, no
    layer runs more than twice, and no path exceeds the budget.

    Source: the published code of Dr.LLM (commit 14e8837), whose tree gives every node one child.
    """

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        super().__init__(num_layers, config, rng)
        self._last = self._full

    def _select(self) -> Decisions | None:
        while self._num_begun < self.config.num_simulations:
            actions = legal_actions(self._last, self.limit)
            if not actions and self._last == self._full:
                return None
            if not actions:
                self._last = self._full
                continue
            self._last = apply(self._last, self._rng.choice(actions))
            if self._last not in self.trials and self._last not in self._in_flight:
                return self._last
            self.num_simulations_done += 1
        return None
