"""The base class of baselines, and their registry.

To add a baseline, write a module in this package with a class under `@register`, and a test
(docs/add-a-baseline.md). The modules import torch inside functions only, so that the command line
can list the baselines without torch.

Axes: Q questions, L layers, N calibration prompts.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from drllm.config import EvaluateConfig
from drllm.config.fields import to_flag
from drllm.cost import mean_executions
from drllm.errors import ConfigError, unknown_name
from drllm.evaluation.baselines.material import (
    Material,
    Measure,
    Remember,
    make_measure,
    measure_all,
)
from drllm.paths import StaticPath
from drllm.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routed_model import RoutedModel
    from drllm.models.routing.policies import Policy

NOTHING = "nothing"
ROUTES = "nothing but the routed model's own routes on these questions"
CALIBRATION = "calibration prompts"
CHOICE = "questions that settings may be chosen on"
TARGETS = "the routers' own targets"
"""Values of `Baseline.fitted_on`, as tables and reports print them."""
QUESTIONS = (CALIBRATION, CHOICE)
"""The values of `fitted_on` for which the evaluation reads further questions to fit on."""


class PolicyMaker(ABC):
    """Makes a policy that needs the model. Unlike the policy, it can be pickled and compared."""

    @abstractmethod
    def make_policy(self, routed: RoutedModel) -> Policy:
        """Return the policy for the model in this process."""


@dataclass(frozen=True, slots=True)
class BaselineRun:
    """How a baseline decides on a task's questions; a baseline with random draws has several runs.

    It can be pickled, since the questions may be answered in other processes.

    Attributes:
        routing: Decisions for each question `[Q, L]`, a policy, what makes a policy of the model,
            or one path for all questions.
        note: Further information for the reader of the results, as part of a sentence.
    """

    routing: Tensor | Policy | PolicyMaker | StaticPath
    note: str = ""


class Baseline(ABC):
    """A baseline of a routed model on one task; it is fitted on first use.

    Args:
        routed: The model. Its weights may be in other processes if only `find_obstacle` is called.
        material: The data to fit on.
        remember: Takes a measure's name, candidates and the measure, and returns the candidates'
            values. An evaluation keeps the values and measures new candidates only, since measuring
            is the slowest part of fitting. The default keeps nothing.

    Attributes:
        name: The name, with spaces between words.
        description: What the baseline does: the first line of the class's docstring.
        source: The publication that the baseline is from, or "ours".
        fitted_on: The data that decisions are fitted on; never the questions that are reported.
        order: A number that tables are sorted by.
        required_data: A field of `Material` that must not be empty; None if all may be empty.
        requirement: The required data in words, for messages.
        is_drawn: Whether decisions are random, so that results are averaged over several draws. In
            the other baselines, chance only decides which questions run one more layer.
        reads_question: Whether decisions depend on the question.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    fitted_on: ClassVar[str]
    order: ClassVar[float] = float("inf")
    required_data: ClassVar[str | None] = None
    requirement: ClassVar[str] = ""
    is_drawn: ClassVar[bool] = False
    reads_question: ClassVar[bool] = False

    def __init__(
        self, routed: RoutedModel, material: Material, remember: Remember = measure_all
    ) -> None:
        self.routed = routed
        self.num_layers = routed.num_layers
        self.material = material
        self._remember = remember

    @classmethod
    def needs_material(cls) -> bool:
        """Tell whether the calibration prompts and questions of the material are read."""
        if cls.required_data is not None:
            return True
        return cls.fitted_on not in (NOTHING, ROUTES, TARGETS)

    def measure(self, kind: str) -> Measure:
        """Return a function that measures candidates, and remembers their values.

        Args:
            kind: What it measures, `loss` or `answers`; see `make_measure`.
        """
        return make_measure(self.routed, self.material, kind, self._remember)

    def find_obstacle(self, executions: float) -> str | None:
        """Return the reason why the baseline can't run at these mean executions; None if it can."""
        if self.required_data is None or getattr(self.material, self.required_data):
            return None
        return f"it needs {self.requirement}"

    @abstractmethod
    def make_run(self, routes: Tensor, generator: torch.Generator) -> BaselineRun:
        """Decide on the questions so that the mean executions equal the routed model's.

        A baseline that can't reach these mean executions comes as near to them as it can.

        Args:
            routes: The routed model's decisions on the questions, `[Q, L]`.
            generator: The source of all random draws.
        """


BASELINES: Registry[type[Baseline]] = Registry("baseline", ("drllm.evaluation.baselines.*",))

BaselineClass = TypeVar("BaselineClass", bound=type[Baseline])


def register(baseline: BaselineClass) -> BaselineClass:
    """Register a class of baselines under its name, and set its description."""
    line = (inspect.getdoc(baseline) or "").partition("\n")[0]
    baseline.description = line[:1].lower() + line[1:].removesuffix(".")
    return BASELINES.register(baseline.name)(baseline)


def average_executions(routes: Tensor) -> float:
    """Return the executions of routes `[Q, L]`, as a mean over the questions."""
    return mean_executions(routes.tolist())


def list_baselines() -> list[type[Baseline]]:
    """Return all baselines in their order in tables."""
    return sorted(map(BASELINES.get, BASELINES), key=lambda baseline: baseline.order)


def select_baselines(names: str) -> list[str]:
    """Return the names of the baselines in a comma-separated list, in their order in tables.

    A name may have dashes or underscores instead of spaces. Instead of a list, `names` may be
    `all`, `none`, or `quick`, which selects the baselines that need no fitting.

    Raises:
        ConfigError: A name is unknown.
    """
    baselines = list_baselines()
    if names == "none":
        return []
    if names == "all":
        return [baseline.name for baseline in baselines]
    if names == "quick":
        return [baseline.name for baseline in baselines if not _needs_fitting(baseline)]
    selection = [name.strip().replace("_", " ").replace("-", " ") for name in names.split(",")]
    for name in selection:
        if name not in BASELINES:
            choices = {*map(format_name, BASELINES), "quick", "all", "none"}
            problem = unknown_name("baseline", format_name(name), choices)
            raise ConfigError(f"--baselines: {problem}")
    return [baseline.name for baseline in baselines if baseline.name in selection]


def _needs_fitting(baseline: type[Baseline]) -> bool:
    return baseline.required_data is not None or baseline.fitted_on in QUESTIONS


def format_name(name: str) -> str:
    """Return a name as users type it, such as `last-layers`."""
    return name.replace(" ", "-")


def needs_targets(baselines: str) -> bool:
    """Tell whether a baseline in a comma-separated list needs the routers' targets."""
    names = select_baselines(baselines)
    return any(BASELINES.get(name).required_data == "supervision" for name in names)


def check_baseline_settings(config: EvaluateConfig) -> None:
    """Refuse settings that don't fit together, before anything is loaded or written.

    Raises:
        ConfigError: A baseline is unknown, a depth isn't a share, or a setting has no effect.
    """
    select_baselines(config.baselines)
    read_curve(config.curve)
    config.check_effects()
    baselines = list_baselines()
    random = [baseline.name for baseline in baselines if baseline.is_drawn]
    _check_effect(config, "num_random_draws", random)
    trained_on_targets = [baseline.name for baseline in baselines if needs_targets(baseline.name)]
    _check_effect(config, "supervision", trained_on_targets)


def _check_effect(config: EvaluateConfig, setting: str, users: Sequence[str]) -> None:
    """Refuse a setting if none of the baselines that use it is selected."""
    value = getattr(config, setting)
    selection = select_baselines(config.baselines)
    if value is not None and not set(users) & set(selection):
        raise ConfigError(
            f"{to_flag(setting)} {value} has no effect on the baselines {config.baselines}; "
            f"leave it out, or add {' or '.join(map(format_name, users))} to --baselines"
        )


def read_curve(curve: str | None) -> list[float]:
    """Read the value of `--curve`: the shares of executions to save, such as `0.1,0.2`.

    Returns:
        The shares, the smallest first; an empty list for None.

    Raises:
        ConfigError: A share isn't between 0 and 1, or occurs twice.
    """
    if curve is None:
        return []
    shares: list[float] = []
    for word in curve.split(","):
        try:
            share = float(word)
        except ValueError:
            share = -1.0  # refused like a number out of range
        if not 0 < share < 1 or share in shares:
            raise ConfigError(
                f"--curve is {curve!r}; give the shares of the executions to save, each above 0 "
                f"and below 1 and named once, for example 0.1,0.2,0.3"
            )
        shares.append(share)
    return sorted(shares)
