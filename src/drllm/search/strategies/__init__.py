"""Strategies: choose the path of a question to try next, and decide when the search ends.

A strategy is a class with `@STRATEGIES.register("name")`, in a module of its own in this package. A
strategy never sees a model: the caller asks for paths and tells their rewards. This package doesn't
import torch.
"""

from abc import ABC, abstractmethod
from random import Random
from typing import ClassVar, NamedTuple

from drllm.config import SearchConfig
from drllm.cost import max_executions
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.registry import Registry


class Trial(NamedTuple):
    """The result of one path on the question."""

    simulation: int  # number of the simulation that tried the path, from 1; 0 for the full path
    reward: float  # in [0, 1]; 1 is a right answer
    score: float | None = None  # in nats, more is better; None if the caller has none


class PathSearch(ABC):
    """A search over the paths of one question, by ask and tell.

    The caller gets paths from `ask`, evaluates them, and passes their rewards to `tell`. A path is
    in flight from `ask` to `tell`. The search is over when `ask` returns nothing while no path is
    in flight. In this way many searches can advance in step, and one batch evaluates all their
    paths. The full path comes first, alone, and doesn't count as a simulation. Subclasses choose
    paths in `_select`; `_rng` is the only source of randomness.

    Attributes:
        trials: The trial of every path whose reward is known, in the order of `tell`.
        limit: Maximum executions of a path.
        own_settings: Settings of `SearchConfig` that no other strategy reads.
    """

    own_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        self.num_layers = num_layers
        self.config = config
        self.limit = max_executions(config.budget, num_layers)
        self.trials: dict[Decisions, Trial] = {}
        self.num_simulations_done = 0
        self._rng = rng
        self._full = full_decisions(num_layers)
        self._in_flight: dict[Decisions, int] = {}  # path → number of its simulation
        self._is_over = False

    def ask(self, maximum: int = 1) -> list[Decisions]:
        """Return up to `maximum` new paths to evaluate.

        The list is empty when the search is over, and when the next choice needs the reward of a
        path in flight.
        """
        if self._is_over:
            return []
        if not self.trials:
            return self._ask_full_path()
        paths: list[Decisions] = []
        while len(paths) < maximum and self._num_begun < self.config.num_simulations:
            decisions = self._select()
            if decisions is None:
                break
            self._in_flight[decisions] = self._num_begun + 1
            paths.append(decisions)
        self._is_over = not self._in_flight
        return paths

    def tell(self, decisions: Decisions, reward: float, score: float | None = None) -> None:
        """Record the reward, in [0, 1], of a path in flight, even if the search is over.

        The score ranks paths of equal reward (see `path_score`). It helps to choose edits, and is
        never part of the reward.
        """
        if not 0 <= reward <= 1:
            raise ValueError(f"reward {reward} is not in [0, 1]")
        simulation = self._in_flight.pop(decisions)
        if simulation > 0:
            self.num_simulations_done += 1
        self.trials[decisions] = Trial(simulation, reward, score)
        self._backup(decisions, reward)
        if self._stops_at(decisions, reward):
            self._is_over = True

    def _ask_full_path(self) -> list[Decisions]:
        if self._in_flight:
            return []
        self._in_flight[self._full] = 0
        return [self._full]

    @property
    def _num_begun(self) -> int:
        """Number of simulations that are finished or in flight."""
        return self.num_simulations_done + len(self._in_flight)

    def _stops_at(self, decisions: Decisions, reward: float) -> bool:
        """Tell whether the stop rule ends the search with this path.

        A right path other than the full path ends the search in two cases: the full path was wrong,
        or the path saves enough executions. Enough is 1 under the rule `paper` and 2 under
        `released`.
        """
        rule = self.config.stop_rule
        if rule == "exhaust" or decisions == self._full or reward < 1:
            return False
        if self.trials[self._full].reward < 1:
            return True
        num_saved = self.num_layers - num_executions(decisions)
        min_saved = 2 if rule == "released" else 1
        return num_saved >= min_saved

    @abstractmethod
    def _select(self) -> Decisions | None:
        """Return a path that is neither tried nor in flight.

        Returns None if no path is left, or if the choice needs the reward of a path in flight.
        """

    def _backup(self, decisions: Decisions, reward: float) -> None:  # noqa: B027
        """Learn from the reward of a path: the full path, or a path that `_select` returned."""


def path_score(margin: float | None, kl: float | None) -> float | None:
    """Return a path's score: its margin, or minus its KL if there is no margin.

    All scores of one question are of the same kind: a reward gives a margin to every path or to no
    path.
    """
    if margin is not None:
        return margin
    if kl is not None:
        return -kl
    return None


STRATEGIES: Registry[type[PathSearch]] = Registry("strategy", [f"{__name__}.*"])


def new_search(num_layers: int, config: SearchConfig, rng: Random) -> PathSearch:
    """Start the search of one question with the strategy that `config.strategy` names."""
    strategy = STRATEGIES.get(config.strategy)
    return strategy(num_layers, config, rng)
