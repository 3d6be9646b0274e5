"""Strategies: what every search over one question's paths has in common, and the table of them.

Owns the conversation with the runner (`propose`, `observe`), the count of simulations and the
stop rules. Leaves which path comes next to `mcts` (the tree), `sweep` (single edits, then the best
together) and `walk` (the chain of edits), and what a path is worth to whoever observes it. A
strategy is added here and in one file of its own. Loads no torch.

Axes: L layers.
"""

from __future__ import annotations

import importlib
import math
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
        score: Graded value in nats, more is better; None where none was given.
    """

    simulation: int
    reward: float
    score: float | None = None


class PathSearch(ABC):
    """A search over the paths of one question, as a conversation.

    The caller asks for paths with `propose`, finds out what they are worth, and says so with
    `observe`, until nothing is proposed although nothing is in flight. Many searches can so
    advance in step and have their paths evaluated in one batch. A path is in flight from the
    moment it is proposed until it is observed. The full path comes first, alone, and isn't counted
    as a simulation.

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
        self._in_flight: dict[Decisions, int] = {}  # with the number of its simulation
        self._over = False

    def propose(self, most: int = 1) -> list[Decisions]:
        """Return new paths whose rewards are wanted.

        Args:
            most: How many at most; with 1, each path is chosen knowing the rewards of all others.

        Returns:
            Distinct paths that were never proposed before. None when the search is over, or when
            nothing can be chosen before a path in flight is observed.

        Raises:
            ValueError: `most` is below 1.
        """
        if most < 1:
            raise ValueError(f"can't propose {most} paths; give at least 1")
        if self._over:
            return []
        if not self.tried:
            return [] if self._in_flight else [self._send(self._full, 0)]
        proposed: list[Decisions] = []
        while len(proposed) < most and self._num_begun < self.config.num_simulations:
            decisions = self._next()
            if decisions is None:
                break
            proposed.append(self._send(decisions, self._num_begun + 1))
        self._over = not self._in_flight
        return proposed

    def observe(self, decisions: Decisions, reward: float, score: float | None = None) -> None:
        """Take in the reward of a path in flight; after the end of a search too.

        Args:
            decisions: One of those that `propose` returned, in any order.
            reward: In [0, 1].
            score: What tells paths of equal reward apart (see `graded`). It helps to choose
                edits, and is never a part of the reward. None where there is none.

        Raises:
            ValueError: A path that isn't in flight, a reward out of range, or a score that isn't
                finite.
        """
        if decisions not in self._in_flight:
            raise ValueError(
                f"{decisions} is not in flight; propose() gave {[*self._in_flight]} to be observed"
            )
        if not 0 <= reward <= 1:
            raise ValueError(f"reward {reward} is not in [0, 1]")
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score {score} is not finite; give None where there is none")
        simulation = self._in_flight.pop(decisions)
        if simulation:
            self.num_simulations_done += 1
        self.tried[decisions] = Tried(simulation, reward, score)
        self._learn(decisions, reward)
        self._over = self._over or self._stops_at(decisions, reward)

    @property
    def _num_begun(self) -> int:
        """Simulations finished or in flight."""
        return self.num_simulations_done + len(self._in_flight)

    def _send(self, decisions: Decisions, simulation: int) -> Decisions:
        self._in_flight[decisions] = simulation
        return decisions

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
        """Return a path that is neither tried nor in flight, or None where none is left.

        None too where the next one depends on a path in flight.
        """

    @abstractmethod
    def _learn(self, decisions: Decisions, reward: float) -> None:
        """Take in the reward of the full path, or of one that `_next` returned."""


def graded(margin: float | None, kl: float | None) -> float | None:
    """Return a path's score: its margin, or where that isn't known its KL, negated.

    Scores of one question are of one kind: a reward either has margins at once or for no path.

    Example:
        >>> graded(None, 0.25)
        -0.25
    """
    if margin is not None:
        return margin
    return None if kl is None else -kl


STRATEGIES: dict[str, str] = {
    "tree": "drllm.search.mcts:TreeSearch",
    "sweep": "drllm.search.sweep:SweepSearch",
    "walk": "drllm.search.walk:WalkSearch",
}
"""Name → `module:attribute`, resolved on use."""

READ_BY_TREE = ("exploration_constant", "length_penalty", "random_child_probability")
"""Settings that no other strategy reads."""


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
        [(1, 1, 1)]
    """
    if config.strategy not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", config.strategy, STRATEGIES))
    module, attribute = STRATEGIES[config.strategy].split(":")
    kind: type[PathSearch] = getattr(importlib.import_module(module), attribute)
    return kind(num_layers, config, rng)
