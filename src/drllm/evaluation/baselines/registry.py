"""The baselines that a comparison can have, those that it can't, and what users may ask for.

Owns their names, what each one is and is fitted on, where it comes from, and the checks of the
settings that name them. Leaves the baselines themselves to `baselines`. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from drllm.config import EvaluateConfig
from drllm.config.settings import flag_of
from drllm.errors import ConfigError, unknown_name

NOTHING = "nothing"
ROUTES = "nothing but the routed model's own routes on these questions"
CALIBRATION = "calibration prompts"
CHOICE = "questions that settings may be chosen on"
TARGETS = "the routers' own targets"
SEARCH_LOG = "the search log"
PROGRAMS = f"{SEARCH_LOG}, then {CHOICE}"
QUESTIONS = (CALIBRATION, CHOICE, PROGRAMS)
"""What is fitted on questions of the split that settings are chosen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One baseline of a routed model.

    Attributes:
        name: As shown.
        description: What it does, in a line.
        source: Where it comes from.
        fitted_on: What its decisions were fitted on; never on questions that are reported on.
        reads_question: Whether its decisions follow from the question that is asked.
        has_own_depth: Whether it runs at executions of its own, whatever the routed model's are.
    """

    name: str
    description: str
    source: str
    fitted_on: str
    reads_question: bool = False
    has_own_depth: bool = False


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        baseline.name: baseline
        for baseline in (
            Baseline(
                name="permuted routes",
                description="each question runs the route of another question",
                source="ours",
                fitted_on=ROUTES,
            ),
            Baseline(
                name="random decisions",
                description="each question's skips and repeats at random layers",
                source="ours",
                fitted_on=ROUTES,
            ),
            Baseline(
                name="label frequency",
                description="each layer's decision drawn as often as it was the target in "
                "training, tilted to the executions wanted",
                source="ours",
                fitted_on=TARGETS,
            ),
            Baseline(
                name="last layers",
                description="the deepest layers but the last one are given up",
                source="Gromov et al., arXiv 2403.17887",
                fitted_on=NOTHING,
            ),
            Baseline(
                name="evenly spaced",
                description="layers at even distances are given up, the first and the last kept",
                source="Unified Layer Skipping, arXiv 2404.06954",
                fitted_on=NOTHING,
            ),
            Baseline(
                name="block influence",
                description="the layers that turn the hidden state least are given up",
                source="ShortGPT, arXiv 2403.03853",
                fitted_on=CALIBRATION,
            ),
            Baseline(
                name="greedy by loss",
                description="layers are given up one by one, each time the one whose absence "
                "raises the next-token loss least",
                source="SLEB, arXiv 2402.09025",
                fitted_on=CALIBRATION,
            ),
            Baseline(
                name="greedy by answers",
                description="layers are given up one by one, each time the one whose absence "
                "lowers the gold answers' log-probability least",
                source="TALE, arXiv 2510.22767, by log-probability instead of accuracy",
                fitted_on=CHOICE,
            ),
            Baseline(
                name="best program",
                description="the one program of the search log that serves the most questions, "
                "mixed with the full path",
                source="Re-PoLar, arXiv 2609.31360; the mixture is ours",
                fitted_on=PROGRAMS,
            ),
            Baseline(
                name="confidence exit",
                description="all further layers are skipped once the model is confident of the "
                "next token behind the prompt",
                source="CALM, arXiv 2207.07061, once per prompt",
                fitted_on=CALIBRATION,
                reads_question=True,
            ),
            Baseline(
                name="block repeat",
                description="one block of neighbouring layers runs twice; at its own executions",
                source="RYS; depth up-scaling, arXiv 2312.15166",
                fitted_on=CHOICE,
                has_own_depth=True,
            ),
            Baseline(
                name="sequence router",
                description="one linear router decides for all layers, from the mean of the "
                "prompt's embeddings",
                source="MindSkip in Router-Tuning, arXiv 2410.13184, on our targets",
                fitted_on=TARGETS,
                reads_question=True,
            ),
            Baseline(
                name="program predictor",
                description="a program of segments is predicted up front, from the mean of the "
                "prompt's embeddings",
                source="PoLar, arXiv 2606.06574, simplified: no encoder of its own",
                fitted_on=SEARCH_LOG,
                reads_question=True,
            ),
        )
    }
)
"""Every baseline by its name, in the order in which they are shown."""

NOT_COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "LayerSkip": "arXiv 2404.16710: needs weights trained with layer dropout and a loss at "
        "every exit, so it is no method for a frozen model",
        "FlexiDepth": "arXiv 2503.23798: needs adapters trained with its routers for every layer "
        "that tokens skip, so the model under it isn't frozen",
    }
)
"""Methods that a reader will look for, and why they aren't compared."""

QUICK = (
    "permuted routes",
    "random decisions",
    "label frequency",
    "last layers",
    "evenly spaced",
)
"""Baselines that need no fitting."""

PERMUTED = "permuted routes"
DRAWN = (PERMUTED, "random decisions", "label frequency")
"""Baselines that are drawn several times; the others' draws only say who gives up one more."""

NEEDS: dict[str, tuple[str, str]] = {
    "greedy by answers": ("questions", "a task with options"),
    "block repeat": ("questions", "a task with options"),
    "best program": ("search", "the search log; give it as --search"),
    "program predictor": ("search", "the search log; give it as --search"),
    "sequence router": ("targets", "the routers' targets; give them as --supervision"),
}
"""Baseline → what of the material it can't do without, and how that is said."""


def named(names: str) -> list[str]:
    """Return the baselines of a comma list, in the order in which they are shown.

    Args:
        names: Names as in `BASELINES`, with dashes or underscores for spaces; or one of `quick`
            (those that need no fitting), `all`, `none`.

    Raises:
        ConfigError: A name that there isn't.

    Example:
        >>> named("last_layers,permuted-routes")
        ['permuted routes', 'last layers']
    """
    if names == "all":
        return list(BASELINES)
    if names == "none":
        return []
    if names == "quick":
        return list(QUICK)
    wanted = [name.strip().replace("_", " ").replace("-", " ") for name in names.split(",")]
    known = {name.replace(" ", "-") for name in BASELINES} | {"quick", "all", "none"}
    for name in wanted:
        if name not in BASELINES:
            raise ConfigError(
                "--baselines: " + unknown_name("baseline", name.replace(" ", "-"), known)
            )
    return [name for name in BASELINES if name in wanted]


def files_needed(baselines: str) -> list[str]:
    """Return the settings whose files some of the baselines of a comma list are fitted on.

    Example:
        >>> files_needed("last-layers,best-program")
        ['search']
    """
    files = {"search": "search", "targets": "supervision"}
    needed = {NEEDS[name][0] for name in named(baselines) if name in NEEDS}
    return [setting for material, setting in files.items() if material in needed]


def check(config: EvaluateConfig) -> None:
    """Refuse settings that make no sense together, before anything is loaded or written.

    Raises:
        ConfigError: An unknown baseline, depths that are none, a choice without depths, its limits
            without a choice, or a file or draws that no baseline has a use for.
    """
    named(config.baselines)
    depths(config.curve)
    _check_choice(config)
    draws = config.num_random_draws
    if draws is not None and not any(name in DRAWN for name in named(config.baselines)):
        added = " or ".join(name.replace(" ", "-") for name in DRAWN)
        raise ConfigError(
            f"--num-random-draws {draws} has no effect on the baselines {config.baselines}; leave "
            f"it out, or add {added} to --baselines"
        )
    for setting in ("search", "supervision"):
        value = getattr(config, setting)
        if value is not None and setting not in files_needed(config.baselines):
            fitted = [name.replace(" ", "-") for name in BASELINES if setting in files_needed(name)]
            raise ConfigError(
                f"--{setting} {value} has no effect on the baselines {config.baselines}; leave it "
                f"out, or add {' or '.join(fitted)} to --baselines"
            )


def _check_choice(config: EvaluateConfig) -> None:
    """Refuse a certified choice without depths to choose from, and its limits without it."""
    if config.epsilon is not None and config.curve is None:
        raise ConfigError(
            f"--epsilon {config.epsilon:g} has no effect without depths to choose from; give "
            f"them as --curve, for example 0.1,0.2,0.3"
        )
    for setting in ("max_loss_increase", "worked_answers"):
        value = getattr(config, setting)
        if value is not None and config.epsilon is None:
            raise ConfigError(
                f"{flag_of(setting)} {value} has no effect without a certified choice; give "
                f"--epsilon too, for example 2, or leave it out"
            )


def depths(curve: str | None) -> list[float]:
    """Return the shares of the executions that a curve is to save.

    Raises:
        ConfigError: What is no share below 1 and above 0, or one given twice.

    Example:
        >>> depths("0.1,0.2")
        [0.1, 0.2]
    """
    shares: list[float] = []
    for word in [] if curve is None else curve.split(","):
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
