"""The extras of the package: which optional packages they install, and whether these are there."""

from importlib.util import find_spec

from drllm.errors import ConfigError

EXTRAS = {
    "eval": ("lm_eval", "datasets", "pyarrow"),
    "heal": ("peft",),
    "report": ("matplotlib", "markdown_it"),
    "math": ("math_verify",),
    "demo": ("gguf",),
    "ray": ("ray",),
    "trackers": ("tensorboard", "wandb"),
}
"""Extra → names under which its packages are imported."""


def need(extras: str, purpose: str, *packages: str) -> None:
    """Raise a ConfigError if packages aren't installed, before anything runs.

    Args:
        extras: A comma list of the extras that the packages belong to.
        purpose: What needs the packages, as the subject of a sentence ("a report").
        packages: The packages that are needed; by default all packages of the extras.
    """
    missing: dict[str, str] = {}  # package → its extra
    for extra in extras.split(","):
        for package in packages or EXTRAS[extra]:
            if not _is_installed(package):
                missing[package] = extra
    if missing:
        missing_extras = ",".join(dict.fromkeys(missing.values()))  # each extra once
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not installed here; "
            f'run: pip install "drllm[{missing_extras}]"'
        )


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # A folder with the package's name but without code has no origin.
    return spec is not None and spec.origin is not None
