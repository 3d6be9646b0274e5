"""Strategies: choose which path of a question is tried next, and when its search ends.

A strategy is a class with `@STRATEGIES.register("name")`, in a module of its own in this package. A
strategy never sees a model: its caller asks for paths, runs them, and tells their rewards. This
package doesn't import torch.
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
    score: float | None = None  # ranks paths of equal reward, see `path_score`; None if unknown


class PathSearch(ABC):
    """A search over the paths of one question.

    The caller gets paths from `ask`, evaluates them, and passes their rewards to `tell`. In between
    a path is in flight. The caller can so search many questions at a time, and evaluate all their
    paths in one batch. The search is over when `ask` returns nothing while no path is in flight.

    The full path comes first, alone. Every other path counts as a simulation. Subclasses choose the
    other paths in `_select`, and draw random numbers only from `_rng`.

    Attributes:
        trials: The trial of every path whose reward is known, in the order of `tell`.
        limit: Maximum executions of a path.
        own_settings: Names of the settings of `SearchConfig` that only this strategy reads.
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
        # If no path is in flight now, no reward can come that would lead to more paths.
        self._is_over = not self._in_flight
        return paths

    def tell(self, decisions: Decisions, reward: float, score: float | None = None) -> None:
        """Record the reward of a path in flight, even if the search is over.

        Args:
            decisions: The path.
            reward: Its reward, in [0, 1].
            score: Ranks paths of equal reward; see `path_score`. A score helps a strategy to choose
                edits, and is never part of the reward.
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
        """Return the full path; nothing if it is in flight already."""
        if self._in_flight:
            return []
        self._in_flight[self._full] = 0
        return [self._full]

    @property
    def _num_begun(self) -> int:
        """Number of simulations that are finished or in flight."""
        return self.num_simulations_done + len(self._in_flight)

    def _stops_at(self, decisions: Decisions, reward: float) -> bool:
        """Tell whether the stop rule ends the search after this path.

        The rule `exhaust` never does. The others end the search at a right path, other than the
        full path, in two cases. Either the full path was wrong, or the path saves enough executions
        of layers: at least 1 under the rule `paper`, and at least 2 under `released`.
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
        """Return a path that wasn't tried before and isn't in flight.

        Returns None if no path is left, or if the choice needs the reward of a path in flight.
        """

    def _backup(self, decisions: Decisions, reward: float) -> None:  # noqa: B027
        """Learn from the reward of the full path or of a path that `_select` returned.

        Does nothing here; a strategy that uses rewards overrides it.
        """


def path_score(margin: float | None, kl: float | None) -> float | None:
    """Return a path's score in nats: its margin, or minus its KL if there is no margin.

    Larger scores are better. Scores of one question can be compared: either all its paths have a
    margin, or none has. The score is None without a margin and a KL.
    """
    if margin is not None:
        return margin
    if kl is not None:
        return -kl
    return None


STRATEGIES: Registry[type[PathSearch]] = Registry("strategy", [f"{__name__}.*"])
"""Strategies by name; `drllm ls strategies` prints the first line of each docstring."""


def new_search(num_layers: int, config: SearchConfig, rng: Random) -> PathSearch:
    """Start the search of one question with the strategy that `config.strategy` names."""
    strategy = STRATEGIES.get(config.strategy)
    return strategy(num_layers, config, rng)
