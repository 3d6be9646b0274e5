"""Strategies: what every search over one question's paths has in common, and the table of them.

Owns the conversation with the runner (`propose`, `observe`), the count of simulations and the
stop rules. Leaves which path comes next to `mcts` (the tree) and `walk` (the chain of edits), and
what a path is worth to whoever observes it. A strategy is added here and in one file of its own.
Loads no torch.

Axes: L layers.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from random import Random
from typing import NamedTuple

from drllm.config import SearchConfig
from drllm.cost import max_executions
from drllm.errors import ConfigError, unknown_name
from drllm.paths import Decisions, full_decisions, num_executions

RELEASED_MIN_SAVED = 2
"""Layers that a correct path must save to end a search under the rule `released`."""


class Tried(NamedTuple):
    """How one path fared.

    Attributes:
        simulation: 0 for the full path, else the simulation that tried it, from 1.
        reward: In [0, 1]; 1 is a right answer.
    """

    simulation: int
    reward: float


class PathSearch(ABC):
    """A search over the paths of one question, as a conversation.

    The caller asks for the next path with `propose`, finds out what it is worth, and says so with
    `observe`, until `propose` gives None. Many searches can so advance in step and have their
    paths evaluated in one batch. The full path comes first and isn't counted as a simulation.

    Args:
        num_layers: L of the model.
        config: Simulations, budget, stop rule and the numbers of the selection rule.
        rng: The only source of randomness.

    Attributes:
        tried: Every path that was observed, in that order, the full path first.
        num_simulations_done: Simulations finished so far.
    """

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        self.num_layers = num_layers
        self.config = config
        self.limit = max_executions(config.budget, num_layers)
        self.tried: dict[Decisions, Tried] = {}
        self.num_simulations_done = 0
        self._rng = rng
        self._full = full_decisions(num_layers)
        self._pending: Decisions | None = None
        self._over = False

    def propose(self) -> Decisions | None:
        """Return the next path whose reward is wanted, or None when the search is over.

        Until that path is observed, the same one is proposed again.
        """
        if self._pending is None and not self._over:
            if not self.tried:
                self._pending = self._full
            elif self.num_simulations_done < self.config.num_simulations:
                self._pending = self._next()
            self._over = self._pending is None
        return self._pending

    def observe(self, decisions: Decisions, reward: float) -> None:
        """Take in the reward of the path proposed last.

        Args:
            decisions: What `propose` returned.
            reward: In [0, 1].

        Raises:
            ValueError: Another path than the one proposed, or a reward out of range.
        """
        if decisions != self._pending:
            raise ValueError(f"{decisions} was not proposed; propose() gave {self._pending}")
        if not 0 <= reward <= 1:
            raise ValueError(f"reward {reward} is not in [0, 1]")
        if self.tried:
            self.num_simulations_done += 1
        self.tried[decisions] = Tried(self.num_simulations_done, reward)
        self._pending = None
        self._learn(reward)
        self._over = self._stops_at(decisions, reward)

    def _stops_at(self, decisions: Decisions, reward: float) -> bool:
        """Say whether the stop rule ends the search with this path."""
        rule = self.config.stop_rule
        if rule == "exhaust" or decisions == self._full or reward < 1:
            return False
        improving = self.tried[self._full].reward < 1
        saved = self.num_layers - num_executions(decisions)
        return improving or saved >= (RELEASED_MIN_SAVED if rule == "released" else 1)

    @abstractmethod
    def _next(self) -> Decisions | None:
        """Return a path that wasn't tried yet, or None where none is left."""

    @abstractmethod
    def _learn(self, reward: float) -> None:
        """Take in the reward of the full path, or of the path that `_next` returned last."""


STRATEGIES: dict[str, str] = {
    "tree": "drllm.search.mcts:TreeSearch",
    "walk": "drllm.search.walk:WalkSearch",
}
"""Name → `module:attribute`, resolved on use."""


def new_search(num_layers: int, config: SearchConfig, rng: Random) -> PathSearch:
    """Start the search that `config.strategy` names on one question.

    Args:
        num_layers: L of the model.
        config: Settings of the search.
        rng: The question's own source of randomness.

    Raises:
        ConfigError: No such strategy.

    Example:
        >>> search = new_search(3, SearchConfig(), Random(0))
        >>> search.propose()
        (1, 1, 1)
    """
    if config.strategy not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", config.strategy, STRATEGIES))
    module, attribute = STRATEGIES[config.strategy].split(":")
    kind: type[PathSearch] = getattr(importlib.import_module(module), attribute)
    return kind(num_layers, config, rng)
