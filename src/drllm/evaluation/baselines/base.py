"""Define a baseline, what it may be fitted on, and the registry of all of them.

Adding one is a module of this package with a class under `@register`, and a test. The modules load
torch only inside functions, so that baselines are listed without it.

Axes: Q questions, L layers, N calibration prompts.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar

from drllm.config import EvaluateConfig
from drllm.config.fields import flag_of
from drllm.cost import mean_executions
from drllm.errors import ConfigError, unknown_name
from drllm.paths import Decisions, StaticPath, to_path
from drllm.records.supervision import SupervisionRecord
from drllm.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routing.policies import Policy
    from drllm.models.routing.routed_model import RoutedModel
    from drllm.models.scoring.packing import Request
    from drllm.tuning.path_scorer import Item

NOTHING = "nothing"
ROUTES = "nothing but the routed model's own routes on these questions"
CALIBRATION = "calibration prompts"
CHOICE = "questions that settings may be chosen on"
TARGETS = "the routers' own targets"
QUESTIONS = (CALIBRATION, CHOICE)
"""Both are questions of the split that settings are chosen on."""
STATE_CACHE_GB = 1.0

Measure: TypeAlias = Callable[[Sequence[Decisions]], list[float]]
"""Returns how good each of several candidates is; the larger the better."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What baselines may be fitted on, never what is reported on; what isn't there is empty.

    Attributes:
        routed: The routed model.
        prompts: The token ids of each calibration prompt of the task, `[N]`.
        questions: The same prompts with their options, where they have any.
        golds: The right option of each question.
        supervision: The routers' own targets.
        name: The task's name.
        remember: Gets the name of a measure, candidates, and the measure; returns its values. It
            calls the measure only for what it doesn't know: that takes the longest of all fitting.
    """

    routed: RoutedModel
    prompts: Sequence[Sequence[int]] = ()
    questions: Sequence[Request] = ()
    golds: Sequence[int] = ()
    supervision: Sequence[SupervisionRecord] = ()
    name: str = ""
    remember: Callable[[str, Sequence[Decisions], Measure], list[float]] = (
        lambda _, candidates, measure: measure(candidates)
    )

    def measure(self, kind: str) -> Measure:
        """Return a measure of candidates, in nats, that remembers its values.

        `loss` is the mean log-probability of a token of the calibration prompts, but their first
        ones; `answers` that of the gold options, of the options and not of the text. ModelError
        where that of the full path isn't finite; other decisions are the worst then.

        Source: SLEB (arXiv 2402.09025) chooses by perplexity; TALE (arXiv 2510.22767), by
            log-probability (D-18).
        """
        values_of = self._mean_answer_logprobs if kind == "answers" else self._mean_token_logprobs
        return lambda candidates: self.remember(f"{self.name} by {kind}", candidates, values_of)

    def _mean_token_logprobs(self, candidates: Sequence[Decisions]) -> list[float]:
        from drllm.models.scoring.packing import Request
        from drllm.tuning.objectives import LOSS
        from drllm.tuning.path_scorer import Item

        texts = [Request(ids[:1], [ids[1:]]) for ids in self.prompts if len(ids) > 1]
        num_tokens = [len(text.continuations[0]) for text in texts]
        return self._mean_scores(candidates, [Item(text) for text in texts], LOSS, num_tokens)

    def _mean_answer_logprobs(self, candidates: Sequence[Decisions]) -> list[float]:
        from drllm.tuning.objectives import GOLD
        from drllm.tuning.path_scorer import Item

        questions = zip(self.questions, self.golds, strict=True)
        items = [Item(request, gold) for request, gold in questions]
        return self._mean_scores(candidates, items, GOLD, [1] * len(items))

    def _mean_scores(
        self,
        candidates: Sequence[Decisions],
        items: Sequence[Item],
        objective: str,
        weights: Sequence[int],
    ) -> list[float]:
        """Return the weighted mean over the items of each candidate's score."""
        import numpy as np

        from drllm.tuning.path_scorer import PathScorer

        scorer = PathScorer(self.routed, items, objective, STATE_CACHE_GB)
        paths = [StaticPath(to_path(decisions)) for decisions in candidates]
        scores = scorer.score(paths).objective  # [N][Q]
        means: list[float] = np.average(scores, axis=1, weights=weights).tolist()
        return means


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """How a system decides on a task's questions.

    Attributes:
        decides: Decisions of each question `[Q, L]`, a policy, or a path for all.
        note: What a reader should know beyond the description; a part of a sentence.
    """

    decides: Tensor | Policy | StaticPath
    note: str = ""


class Baseline(ABC):
    """One baseline of a routed model, fitted on one task on first use.

    Attributes:
        description: What it does: the first line of its docstring.
        fitted_on: What its decisions are fitted on; never questions that are reported on.
        order: Its place in tables.
        needs: A field of the material that must not be empty, and what messages call it.
        is_drawn: Whether it is drawn several times; the others' draws only decide which questions
            run a layer more.
        reads_question: Whether its decisions depend on the question.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    fitted_on: ClassVar[str]
    order: ClassVar[float] = float("inf")
    needs: ClassVar[tuple[str, str] | None] = None
    is_drawn: ClassVar[bool] = False
    reads_question: ClassVar[bool] = False

    def __init__(self, routed: RoutedModel, read: Callable[[], Material]) -> None:
        self.routed = routed
        self.num_layers = routed.num_layers
        self._read = read

    @functools.cached_property
    def material(self) -> Material:
        """What it is fitted on, read on first use."""
        return self._read()

    def obstacle(self, executions: float) -> str | None:
        """Say why the baseline can't run at these mean executions; None if it can."""
        if self.needs is None:
            return None
        field, name = self.needs
        return None if getattr(self.material, field) else f"it needs {name}"

    @abstractmethod
    def at(self, routes: Tensor, generator: torch.Generator) -> BaselineRun:
        """Return how it decides at the routed model's mean executions.

        Args:
            routes: The decisions that the routed model took on the questions, `[Q, L]`.
            generator: What is drawn is drawn from it.
        """


BASELINES: Registry[type[Baseline]] = Registry("baseline", ("drllm.evaluation.baselines.*",))

Kind = TypeVar("Kind", bound=type[Baseline])


def register(kind: Kind) -> Kind:
    """Register a baseline under its name; its docstring's first line describes it."""
    line = (inspect.getdoc(kind) or "").partition("\n")[0]
    kind.description = line[:1].lower() + line[1:].removesuffix(".")
    return BASELINES.register(kind.name)(kind)


def executions_of(routes: Tensor) -> float:
    """Return the mean executions of routes `[Q, L]`."""
    return mean_executions(routes.tolist())


def ordered() -> list[type[Baseline]]:
    """Return all baselines in the order of tables."""
    return sorted(map(BASELINES.get, BASELINES), key=lambda baseline: baseline.order)


def named(names: str) -> list[str]:
    """Return the baselines of a comma list, in the order of tables.

    Names have dashes or underscores for spaces; an unknown one is a ConfigError. `quick` stands for
    those that need no fitting; `all` and `none` are lists too.
    """
    baselines = ordered()
    if names == "none":
        return []
    if names == "all":
        return [baseline.name for baseline in baselines]
    if names == "quick":
        return [baseline.name for baseline in baselines if not _needs_fitting(baseline)]
    listed = [name.strip().replace("_", " ").replace("-", " ") for name in names.split(",")]
    for name in listed:
        if name not in BASELINES:
            choices = {*map(dashed, BASELINES), "quick", "all", "none"}
            raise ConfigError("--baselines: " + unknown_name("baseline", dashed(name), choices))
    return [baseline.name for baseline in baselines if baseline.name in listed]


def _needs_fitting(baseline: type[Baseline]) -> bool:
    return baseline.needs is not None or baseline.fitted_on in QUESTIONS


def dashed(name: str) -> str:
    """Return a name as it is typed: `last-layers`."""
    return name.replace(" ", "-")


def needs_targets(baselines: str) -> bool:
    """Tell whether some of the baselines of a comma list need the routers' targets."""
    needs = [BASELINES.get(name).needs for name in named(baselines)]
    return any(need is not None and need[0] == "supervision" for need in needs)


def check(config: EvaluateConfig) -> None:
    """Refuse settings that make no sense together, before anything is loaded or written.

    ConfigError for an unknown baseline, depths that are none, or a setting, file or draws that
    nothing has a use for.
    """
    names = named(config.baselines)
    depths(config.curve)
    config.check_effects()
    drawn = [baseline.name for baseline in ordered() if baseline.is_drawn]
    trained = [baseline.name for baseline in ordered() if needs_targets(baseline.name)]
    for setting, users in (("num_random_draws", drawn), ("supervision", trained)):
        value = getattr(config, setting)
        if value is not None and not set(users) & set(names):
            raise ConfigError(
                f"{flag_of(setting)} {value} has no effect on the baselines {config.baselines}; "
                f"leave it out, or add {' or '.join(map(dashed, users))} to --baselines"
            )


def depths(curve: str | None) -> list[float]:
    """Read the shares of the executions that a curve is to save, `0.1,0.2`; return them in order.

    ConfigError for what is no share below 1 and above 0, or one given twice.
    """
    if curve is None:
        return []
    shares: list[float] = []
    for word in curve.split(","):
        try:
            share = float(word)
        except ValueError:
            share = -1.0
        if not 0 < share < 1 or share in shares:
            raise ConfigError(
                f"--curve is {curve!r}; give the shares of the executions to save, each above 0 "
                f"and below 1 and named once, for example 0.1,0.2,0.3"
            )
        shares.append(share)
    return sorted(shares)
