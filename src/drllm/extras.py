"""Extras: the packages that single parts of drllm need, installed only with those parts."""

from __future__ import annotations

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
    """Refuse, before anything runs, what needs packages that aren't installed.

    Args:
        extras: Which extras bring them, keys of `EXTRAS` with commas between.
        purpose: What needs them, as the subject of a sentence: "a report".
        packages: Those of the one extra that are needed; all unless given.

    Raises:
        ConfigError: Naming the missing packages, with the command that installs them.

    Example:
        >>> need("report", "a report")  # with matplotlib installed
    """
    missing = [
        (extra, package)
        for extra in extras.split(",")
        for package in packages or EXTRAS[extra]
        if not _is_installed(package)
    ]
    if missing:
        verb = "isn't" if len(missing) == 1 else "aren't"
        raise ConfigError(
            f"{purpose} needs {', '.join(package for _, package in missing)}, which {verb} "
            f'installed; run: pip install "drllm[{",".join(dict(missing))}]"'
        )


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # a mere folder of that name has none
