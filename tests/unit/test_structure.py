"""The shape of the house: who imports whom, and what loads torch."""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src"
MODULES = sorted(
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for file in (SOURCE / "drllm").rglob("*.py")
)
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "lm_eval", "scipy")

FRESH = """
import json, runpy, sys
sys.argv = ["drllm", *sys.argv[1:]]
status = 0
if len(sys.argv) > 1:
    try:
        runpy.run_module("drllm", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
else:
    import drllm
print()
print(json.dumps([status, sorted(set(sys.modules) & set(HEAVY))]))
"""


def in_a_fresh_interpreter(*arguments: str) -> tuple[int, list[str], str]:
    """Run drllm's command line, or only import drllm where no argument is given.

    Returns:
        Exit status, heavy libraries that were loaded, what went to stderr.
    """
    child = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY}\n{FRESH}", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert child.stdout, child.stderr
    status, loaded = json.loads(child.stdout.splitlines()[-1])
    return status, loaded, child.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"], ["search", "--help"]])
def test_importing_drllm_and_help_load_no_heavy_library(arguments):
    assert in_a_fresh_interpreter(*arguments) == (0, [], "")


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["search", "--no-such-flag", "1"]])
def test_a_wrong_flag_is_answered_in_one_line_without_a_heavy_library(
    arguments,
):
    status, loaded, said = in_a_fresh_interpreter(*arguments)
    assert (status, loaded) == (2, [])
    assert len(said.splitlines()) == 1
    assert "--no-such-flag" in said


def test_imports_point_downwards_only():
    program = Path(sys.executable).parent / "lint-imports"
    if not program.is_file():
        pytest.skip("import-linter isn't installed (make setup)")
    child = subprocess.run([program], cwd=REPOSITORY, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_a_module_has_what_it_offers_and_its_examples_hold(name):
    module = importlib.import_module(name)
    assert [
        public for public in getattr(module, "__all__", ()) if not hasattr(module, public)
    ] == []
    assert doctest.testmod(module).failed == 0
