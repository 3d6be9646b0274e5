"""Baselines by name: which ones users ask for, and what is refused of the settings that do."""

from drllm.config import EvaluateConfig
from drllm.config.fields import flag_of
from drllm.errors import ConfigError, unknown_name
from drllm.evaluation.baselines.base import BASELINES, QUESTIONS, Baseline

NOT_COMPARED = {
    "LayerSkip": "arXiv 2404.16710: needs weights trained with layer dropout and a loss at "
    "every exit, so it is no method for a frozen model",
    "FlexiDepth": "arXiv 2503.23798: needs adapters trained with its routers for every layer "
    "that tokens skip, so the model under it isn't frozen",
}
"""Methods that a reader will look for, and why they aren't compared."""

FILES = ("search", "supervision")
"""Settings that name files which baselines are fitted on; `Material` has their content."""


def ordered() -> list[type[Baseline]]:
    """Return all baselines in the order in which they are shown."""
    return sorted(map(BASELINES.get, BASELINES), key=lambda baseline: baseline.order)


def named(names: str) -> list[str]:
    """Return the baselines of a comma list, in the order in which they are shown.

    Names have dashes or underscores for spaces; ConfigError for one that there isn't. `quick` are
    those that need no fitting; `all` and `none` are lists too.
    """
    baselines = ordered()
    if names in ("all", "none"):
        return [each.name for each in baselines if names == "all"]
    if names == "quick":
        fitted = [each for each in baselines if each.needs or each.fitted_on in QUESTIONS]
        return [each.name for each in baselines if each not in fitted]
    wanted = [name.strip().replace("_", " ").replace("-", " ") for name in names.split(",")]
    for name in wanted:
        if name not in BASELINES:
            known = {*map(dashed, BASELINES), "quick", "all", "none"}
            raise ConfigError("--baselines: " + unknown_name("baseline", dashed(name), known))
    return [each.name for each in baselines if each.name in wanted]


def dashed(name: str) -> str:
    """Return a name as it is typed: `last-layers`."""
    return name.replace(" ", "-")


def files_needed(baselines: str) -> list[str]:
    """Return the settings whose files some of the baselines of a comma list are fitted on."""
    wanted = [BASELINES.get(name).needs for name in named(baselines)]
    return [file for file in FILES if any(needs and needs[0] == file for needs in wanted)]


def check(config: EvaluateConfig) -> None:
    """Refuse settings that make no sense together, before anything is loaded or written.

    ConfigError for an unknown baseline, depths that are none, a choice of nothing, its limits
    without a choice, or a file or draws that no baseline has a use for.
    """
    every, asked = ordered(), [BASELINES.get(name) for name in named(config.baselines)]
    depths(config.curve)
    config.check_effects()
    if config.epsilon is not None and config.curve is None and config.paths is None:
        raise ConfigError(
            f"--epsilon {config.epsilon:g} has no effect without --curve or --paths; give one of "
            f"them, or leave it out"
        )
    using = {file: [b for b in every if b.needs and b.needs[0] == file] for file in FILES}
    using = {"num_random_draws": [each for each in every if each.is_drawn], **using}
    for setting, users in using.items():
        value = getattr(config, setting)
        if value is not None and not set(users) & set(asked):
            raise ConfigError(
                f"{flag_of(setting)} {value} has no effect on the baselines {config.baselines}; "
                f"leave it out, or add {' or '.join(dashed(each.name) for each in users)} to "
                f"--baselines"
            )


def depths(curve: str | None) -> list[float]:
    """Return the shares of the executions that a curve is to save, `0.1,0.2`, in order.

    ConfigError for what is no share below 1 and above 0, or one given twice.
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
