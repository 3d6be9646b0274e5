"""Strategies: choose which paths of a question are tried next, and when its search ends.

A strategy is a class with `@STRATEGIES.register("name")`, in a module of its own in this package. A
strategy never sees a model: it yields the paths of a round, and receives their evaluations. This
package doesn't import torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from random import Random
from typing import ClassVar, NamedTuple, TypeAlias

from drllm.config import SearchConfig
from drllm.cost import max_executions
from drllm.paths import Decisions, full_decisions, num_executions
from drllm.registry import Registry


class Evaluation(NamedTuple):
    """What a path is worth on the question, as the evaluator tells a strategy."""

    reward: float  # in [0, 1]; 1 is a right answer
    score: float | None = None  # ranks paths of equal reward, see `path_score`; None if unknown


class Trial(NamedTuple):
    """The result of one path on the question."""

    simulation: int  # number of the simulation that tried the path, from 1; 0 for the full path
    reward: float  # see `Evaluation`
    score: float | None = None  # see `Evaluation`


Rounds: TypeAlias = Generator[list[Decisions], Sequence[Evaluation], None]
"""A search under way: yields the paths of each round, and is sent their evaluations."""


class PathSearch(ABC):
    """A search over the paths of one question.

    A strategy writes the whole search in `run`: the full path comes first, alone, and then rounds
    of new paths. The caller evaluates the paths of many questions at a time:

        paths = search.start()
        while paths:
            paths = search.advance([evaluate(path) for path in paths])

    Every path but the full path counts as a simulation. Random numbers are drawn only from `rng`,
    so that a search can be repeated.

    Attributes:
        trials: The trial of every path that was evaluated, in the order of the rounds.
        in_flight: The paths that are chosen and not yet evaluated, with the numbers of their
            simulations.
        num_simulations: Number of simulations, those of paths in flight included.
        limit: Maximum executions of a path.
        is_over: Whether a path has ended the search by the stop rule.
        own_settings: Names of the settings of `SearchConfig` that only this strategy reads.
    """

    own_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_layers: int, config: SearchConfig, rng: Random) -> None:
        self.num_layers = num_layers
        self.config = config
        self.rng = rng
        self.limit = max_executions(config.budget, num_layers)
        self.full_path = full_decisions(num_layers)
        self.trials: dict[Decisions, Trial] = {}
        self.in_flight: dict[Decisions, int] = {}
        self.num_simulations = 0
        self.is_over = False

    @abstractmethod
    def run(self) -> Rounds:
        """Yield the new paths of each round, and receive their evaluations in the same order.

        The first round is the full path alone. Later rounds have at most `round_size` paths, of
        which each goes through `begin` and `record`. The search ends when `is_over` is set, or when
        nothing new is left to try.
        """

    def start(self) -> list[Decisions]:
        """Begin the search; return the paths of its first round."""
        self._rounds = self.run()
        return next(self._rounds)

    def advance(self, evaluations: Sequence[Evaluation]) -> list[Decisions]:
        """Return the paths of the next round; none if the search is over.

        Args:
            evaluations: The evaluations of this round's paths, in their order.

        Raises ValueError if a reward is not in [0, 1].
        """
        for evaluation in evaluations:
            if not 0 <= evaluation.reward <= 1:
                raise ValueError(f"reward {evaluation.reward} is not in [0, 1]")
        try:
            return self._rounds.send(evaluations)
        except StopIteration:
            return []

    @property
    def round_size(self) -> int:
        """The maximum number of paths of a round that begins now."""
        num_left = self.config.num_simulations - self.num_simulations
        return min(self.config.leaves_per_round, num_left)

    def begin(self, decisions: Decisions) -> None:
        """Count a new path as a simulation; the path is in flight until `record`."""
        self.num_simulations += 1
        self.in_flight[decisions] = self.num_simulations

    def record(self, decisions: Decisions, evaluation: Evaluation) -> None:
        """Add the trial of the full path or of a path in flight, and apply the stop rule."""
        simulation = self.in_flight.pop(decisions, 0)  # the full path is no simulation
        self.trials[decisions] = Trial(simulation, evaluation.reward, evaluation.score)
        if self._stops_at(decisions, evaluation.reward):
            self.is_over = True

    def _stops_at(self, decisions: Decisions, reward: float) -> bool:
        """Tell whether the stop rule ends the search after this path.

        The rule `exhaust` never does. The others end the search at a right path, other than the
        full path, in two cases. Either the full path was wrong, or the path saves enough executions
        of layers: at least 1 under the rule `paper`, and at least 2 under `released`.
        """
        rule = self.config.stop_rule
        if rule == "exhaust" or decisions == self.full_path or reward < 1:
            return False
        if self.trials[self.full_path].reward < 1:
            return True
        num_saved = self.num_layers - num_executions(decisions)
        min_saved = 2 if rule == "released" else 1
        return num_saved >= min_saved


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
