"""Extras: packages that only some parts of drllm need."""

from importlib.util import find_spec

from drllm.errors import ConfigError

EXTRAS = {
    "eval": ("lm_eval", "datasets"),
    "heal": ("peft",),
    "report": ("matplotlib",),
    "math": ("math_verify",),
    "demo": ("gguf",),
    "ray": ("ray",),
    "trackers": ("tensorboard", "wandb"),
}
"""Extra → the packages that it brings, by the names they are imported by."""


def need(extras: str, purpose: str, *packages: str) -> None:
    """Raise a ConfigError if packages aren't installed, before anything runs.

    Args:
        extras: The extras that bring them (a comma list).
        purpose: What needs them, as the subject of a sentence ("a report").
        packages: The packages that are needed of the one extra; all of the extras' by default.
    """
    missing: dict[str, str] = {}  # package → its extra
    for extra in extras.split(","):
        for package in packages or EXTRAS[extra]:
            if not _is_installed(package):
                missing[package] = extra
    if missing:
        needed = ",".join(dict.fromkeys(missing.values()))
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not installed here; "
            f'run: pip install "drllm[{needed}]"'
        )


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # A mere folder with the package's name has no origin.
    return spec is not None and spec.origin is not None
