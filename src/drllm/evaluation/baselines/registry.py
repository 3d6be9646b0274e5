"""Baselines by name: which ones users ask for, and what is refused of the settings that do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from drllm.config import EvaluateConfig
from drllm.config.settings import flag_of
from drllm.errors import ConfigError, unknown_name
from drllm.evaluation.baselines.base import BASELINES, QUESTIONS, Baseline

NOT_COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "LayerSkip": "arXiv 2404.16710: needs weights trained with layer dropout and a loss at "
        "every exit, so it is no method for a frozen model",
        "FlexiDepth": "arXiv 2503.23798: needs adapters trained with its routers for every layer "
        "that tokens skip, so the model under it isn't frozen",
    }
)
"""Methods that a reader will look for, and why they aren't compared."""


FILES = {"search": "search", "targets": "supervision"}
"""Material → the setting that names its file."""


def ordered() -> list[type[Baseline]]:
    """Return all baselines in the order in which they are shown."""
    return sorted(map(BASELINES.get, BASELINES), key=lambda baseline: baseline.order)


def named(names: str) -> list[str]:
    """Return the baselines of a comma list, in the order in which they are shown.

    Args:
        names: Names with dashes or underscores for spaces; or one of `quick` (those that need no
            fitting), `all`, `none`.

    Raises:
        ConfigError: A name that there isn't.

    Example:
        >>> named("last_layers,permuted-routes")
        ['permuted routes', 'last layers']
    """
    baselines = ordered()
    if names == "none":
        return []
    if names in ("all", "quick"):
        return [each.name for each in baselines if names == "all" or not _is_fitted(each)]
    wanted = [name.strip().replace("_", " ").replace("-", " ") for name in names.split(",")]
    for name in wanted:
        if name not in BASELINES:
            known = {*map(dashed, BASELINES), "quick", "all", "none"}
            raise ConfigError("--baselines: " + unknown_name("baseline", dashed(name), known))
    return [each.name for each in baselines if each.name in wanted]


def dashed(name: str) -> str:
    """Return a name as it is typed.

    Example:
        >>> dashed("last layers")
        'last-layers'
    """
    return name.replace(" ", "-")


def _is_fitted(baseline: type[Baseline]) -> bool:
    return baseline.needs is not None or baseline.fitted_on in QUESTIONS


def files_needed(baselines: str) -> list[str]:
    """Return the settings whose files some of the baselines of a comma list are fitted on.

    Example:
        >>> files_needed("last-layers,best-program")
        ['search']
    """
    wanted = [BASELINES.get(name).needs for name in named(baselines)]
    needed = {needs[0] for needs in wanted if needs is not None}
    return [setting for material, setting in FILES.items() if material in needed]


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
    if draws is not None and not any(BASELINES.get(n).is_drawn for n in named(config.baselines)):
        added = " or ".join(dashed(each.name) for each in ordered() if each.is_drawn)
        raise ConfigError(
            f"--num-random-draws {draws} has no effect on the baselines {config.baselines}; leave "
            f"it out, or add {added} to --baselines"
        )
    for setting in ("search", "supervision"):
        value = getattr(config, setting)
        if value is not None and setting not in files_needed(config.baselines):
            fitted = [dashed(each.name) for each in ordered() if setting in files_needed(each.name)]
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
