"""The extras of the package: which optional packages they install, and whether these are there."""

import re
from collections.abc import Iterable
from importlib.metadata import requires
from importlib.util import find_spec

from drllm.errors import ConfigError

EXTRAS = {
    "eval": ("lm_eval", "datasets", "pyarrow"),
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
            if not is_installed(package):
                missing[package] = extra
    if missing:
        missing_extras = dict.fromkeys(missing.values())  # each extra once
        raise ConfigError(
            f"{purpose} needs {', '.join(missing)}, not installed here; "
            f"run: {make_install_command(missing_extras)}"
        )


def make_install_command(extras: Iterable[str]) -> str:
    """Return the command that installs the packages of extras.

    It names the packages themselves, so it is right for a clone and for a wheel too: pip may not
    find drllm on its index.
    """
    packages: list[str] = []
    for extra in extras:
        packages += _list_packages(extra)
    return " ".join(["pip install", *(f'"{package}"' for package in packages)])


def _list_packages(extra: str) -> list[str]:
    """List the packages of an extra with their versions, as the installed drllm declares them."""
    packages = []
    for line in requires("drllm") or ():
        package, _, condition = line.partition(";")
        if re.search(f"""extra == ['"]{extra}['"]""", condition):
            packages.append(package.strip())
    return packages


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    spec = find_spec(package)
    # A folder with the package's name but without code has no origin.
    return spec is not None and spec.origin is not None
