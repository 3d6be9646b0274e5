"""Strategies: which paths of a question are tried, and when its search is over.

A strategy is one class in one module of this package, under `@STRATEGIES.register("name")`. It
knows no model: the caller asks for paths and tells their rewards. Loads no torch.
"""

from abc import ABC, abstractmethod
from random import Random
from typing import ClassVar, NamedTuple

from drllm.config import SearchConfig
from drllm.cost import max_executions
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.registry import Registry


class Tried(NamedTuple):
    """How one path fared."""

    simulation: int  # 0 for the full path, else the simulation that tried it, from 1
    reward: float  # in [0, 1]; 1 is a right answer
    score: float | None = None  # in nats, more is better; None where none was given


class PathSearch(ABC):
    """A search over the paths of one question, by ask and tell.

    The caller asks for paths with `ask`, finds out what they are worth, and tells it with `tell`,
    until nothing is returned although nothing is in flight (asked for and not told yet). So many
    searches can advance in step and have their paths evaluated in one batch. The full path comes
    first, alone, and isn't counted as a simulation. Subclasses choose paths in `_select`; `rng` is
    the only source of randomness.

    Attributes:
        tried: Every path whose reward is known, in that order, the full path first.
        own_settings: Settings of `SearchConfig` that no other strategy reads.
    """

    own_settings: ClassVar[tuple[str, ...]] = ()

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

    def ask(self, maximum: int = 1) -> list[Decisions]:
        """Return up to so many new paths whose rewards are wanted.

        There are none when the search is over, or when nothing can be chosen before the reward of a
        path in flight is known.
        """
        if self._over:
            return []
        if not self.tried:
            if self._in_flight:
                return []
            self._in_flight[self._full] = 0
            return [self._full]
        asked: list[Decisions] = []
        while len(asked) < maximum and self._num_begun < self.config.num_simulations:
            decisions = self._select()
            if decisions is None:
                break
            self._in_flight[decisions] = self._num_begun + 1
            asked.append(decisions)
        self._over = not self._in_flight
        return asked

    def tell(self, decisions: Decisions, reward: float, score: float | None = None) -> None:
        """Record the reward, in [0, 1], of a path in flight; after the end of a search too.

        The score tells paths of equal reward apart (see `graded`). It helps to choose edits, and is
        never a part of the reward.
        """
        if not 0 <= reward <= 1:
            raise ValueError(f"reward {reward} is not in [0, 1]")
        simulation = self._in_flight.pop(decisions)
        if simulation:
            self.num_simulations_done += 1
        self.tried[decisions] = Tried(simulation, reward, score)
        self._backup(decisions, reward)
        self._over = self._over or self._stops_at(decisions, reward)

    @property
    def _num_begun(self) -> int:
        """Simulations finished or in flight."""
        return self.num_simulations_done + len(self._in_flight)

    def _stops_at(self, decisions: Decisions, reward: float) -> bool:
        """Say whether the stop rule ends the search with this path; `released` at two saved."""
        rule = self.config.stop_rule
        if rule == "exhaust" or decisions == self._full or reward < 1:
            return False
        improving = self.tried[self._full].reward < 1
        saved = self.num_layers - num_executions(decisions)
        return improving or saved >= (2 if rule == "released" else 1)

    @abstractmethod
    def _select(self) -> Decisions | None:
        """Return a path neither tried nor in flight; None if none is left, or it depends on one."""

    def _backup(self, decisions: Decisions, reward: float) -> None:  # noqa: B027
        """Use the reward of the full path, or of one that `_select` returned."""


def graded(margin: float | None, kl: float | None) -> float | None:
    """Return a path's score: its margin, or where that isn't known its KL, negated.

    Scores of one question are of one kind: a reward either has margins at once or for no path.
    """
    if margin is not None:
        return margin
    return None if kl is None else -kl


STRATEGIES: Registry[type[PathSearch]] = Registry("strategy", [f"{__name__}.*"])


def new_search(num_layers: int, config: SearchConfig, rng: Random) -> PathSearch:
    """Start the search that `config.strategy` names on one question, with its own randomness."""
    return STRATEGIES.get(config.strategy)(num_layers, config, rng)
