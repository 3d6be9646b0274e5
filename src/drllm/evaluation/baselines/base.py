"""What a baseline is, what it may be fitted on, and the registry of all of them.

Adding one is a module of this package with a class under `@register`, and a test. The modules load
torch only inside of functions, so that baselines are listed without it; what needs it as a whole
is in `fitting`.

Axes: Q questions, L layers, N calibration prompts.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar

from drllm.cost import mean_executions
from drllm.paths import Decisions, StaticPath
from drllm.records import SearchRecord, SupervisionRecord
from drllm.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routing.policies import Policy
    from drllm.models.routing.routed_model import RoutedModel
    from drllm.models.scoring.packing import Question

NOTHING = "nothing"
ROUTES = "nothing but the routed model's own routes on these questions"
CALIBRATION = "calibration prompts"
CHOICE = "questions that settings may be chosen on"
TARGETS = "the routers' own targets"
PROGRAMS = f"the search log, then {CHOICE}"
QUESTIONS = (CALIBRATION, CHOICE, PROGRAMS)
"""What is fitted on questions of the split that settings are chosen on."""

Measure: TypeAlias = Callable[[Sequence[Decisions]], list[float]]
"""Returns how good each of several candidates is; the larger the better."""


@dataclass(frozen=True)
class Material:
    """What baselines may be fitted on, never what is reported on; empty is what isn't there.

    Prompts are the token ids of each calibration prompt, `[N]`; questions are the same with their
    options, where they have any, and golds say which of these are right. The search log is that of
    the training questions, the supervision holds the routers' own targets.
    """

    routed: RoutedModel
    prompts: Sequence[Sequence[int]]
    questions: Sequence[Question] = ()
    golds: Sequence[int] = ()
    search: Sequence[SearchRecord] = ()
    supervision: Sequence[SupervisionRecord] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """How a baseline or a given path decides on a task's questions; one of the first three.

    Attributes:
        plan: `[Q, L]` decisions.
        policy: What decides on each prompt.
        path: One path for all.
        note: What a reader should know beyond the description; a part of a sentence.
    """

    plan: Tensor | None = None
    policy: Policy | None = None
    path: StaticPath | None = None
    note: str = ""


class Baseline(ABC):
    """One baseline of a routed model, fitted on one task when it is first asked for.

    Attributes:
        name: As shown.
        description: What it does: the first line of its docstring.
        source: Where it comes from.
        fitted_on: What its decisions are fitted on; never questions that are reported on.
        order: Its place in tables.
        needs: What of the material it can't do without, and how that is said.
        is_drawn: Whether it is drawn several times; the others' draws only decide which questions
            run a layer more.
        reads_question: Whether its decisions follow from the question that is asked.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    fitted_on: ClassVar[str]
    order: ClassVar[float] = float("inf")
    needs: ClassVar[tuple[str, str] | None] = None
    is_drawn: ClassVar[bool] = False
    reads_question: ClassVar[bool] = False

    def __init__(self, fitted: FittedBaselines) -> None:
        self.fitted = fitted
        self.routed = fitted.routed
        self.num_layers = fitted.routed.num_layers

    def obstacle(self, executions: float) -> str | None:
        """Say why the baseline can't be had at given mean executions; None if it can."""
        return None

    @abstractmethod
    def at(self, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return how it decides on some questions at the routed model's mean executions.

        Args:
            routes: `[Q, L]`, those that the routed model took on the questions.
            generator: Source of randomness.
        """


BASELINES: Registry[type[Baseline]] = Registry("baseline", ("drllm.evaluation.baselines.*",))

Kind = TypeVar("Kind", bound=type[Baseline])


def register(kind: Kind) -> Kind:
    """Register a baseline under its name; its docstring's first line describes it."""
    line = (inspect.getdoc(kind) or "").partition("\n")[0]
    kind.description = line[:1].lower() + line[1:].removesuffix(".")
    return BASELINES.register(kind.name)(kind)


class FittedBaselines:
    """The baselines of one routed model on one task, fitted once and asked for any executions.

    They are fitted on the named task's questions, which `prepare` gives when they are first needed.
    `remember`, given the name of a measure, candidates and the measure itself, returns what it
    gives, asking it unless that is known: by far the longest part of fitting.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[], Material],
        routed: RoutedModel,
        remember: Callable[[str, Sequence[Decisions], Measure], list[float]],
    ) -> None:
        self.name = name
        self._prepare = prepare
        self.routed = routed
        self._remember = remember
        self._baseline = functools.cache(lambda name: BASELINES.get(name)(self))

    @functools.cached_property
    def material(self) -> Material:
        """What baselines are fitted on."""
        return self._prepare()

    def obstacle(self, name: str, executions: float) -> str | None:
        """Say why a baseline can't be had at given mean executions; None if it can."""
        baseline = self._baseline(name)
        if baseline.needs and not getattr(self.material, baseline.needs[0]):
            return f"it needs {baseline.needs[1]}"
        return baseline.obstacle(executions)

    def at(self, name: str, routes: Tensor, generator: torch.Generator) -> Drawn:
        """Return how a baseline decides on some questions; see `Baseline.at`."""
        return self._baseline(name).at(routes, generator)

    def measure(self, kind: str) -> Measure:
        """Return a measure of `fitting.measures.MEASURES` that remembers what it found."""
        from drllm.evaluation.baselines.fitting.measures import MEASURES

        def measure(unknown: Sequence[Decisions]) -> list[float]:
            return MEASURES[kind](self.material)(unknown)

        return lambda candidates: self._remember(f"{self.name} by {kind}", candidates, measure)


def executions_of(routes: Tensor) -> float:
    """Return the mean executions of routes `[Q, L]`."""
    return mean_executions(routes.tolist())
