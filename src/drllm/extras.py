"""Extras: the packages that single parts of drllm need, installed only with those parts."""

from importlib.util import find_spec

from drllm.errors import ConfigError

EXTRAS = {
    "eval": ("lm_eval", "datasets"),
    "report": ("matplotlib",),
    "math": ("math_verify",),
    "demo": ("gguf",),
    "ray": ("ray",),
    "trackers": ("tensorboard", "wandb"),
}
"""Extra → the packages that it brings, by the names they are imported by."""


def need(extras: str, purpose: str, *packages: str) -> None:
    """Refuse, before anything runs, what needs packages that aren't installed, by ConfigError.

    The purpose is the subject of a sentence ("a report"). All packages of the extras (a comma list)
    are needed, unless those of the one extra are given.
    """
    wanted = {each: extra for extra in extras.split(",") for each in packages or EXTRAS[extra]}
    # A mere folder that is called like a package has no origin.
    missing = [each for each in wanted if not getattr(find_spec(each), "origin", None)]
    if missing:
        extras = ",".join(dict.fromkeys(wanted[each] for each in missing))
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not installed here; "
            f'run: pip install "drllm[{extras}]"'
        )
