"""Runs scripts under the environments of `make test-all`, one for each file of bounds here."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venvs"


@pytest.fixture(scope="session", params=sorted(file.stem for file in HERE.glob("*.txt")))
def environment(request):
    """Every environment but this one, by the name of its file of bounds."""
    return request.param


@pytest.fixture(scope="session")
def run():
    """A function that runs a script beside this file under an environment, `here` for this one."""
    if Path(sys.prefix).parent == ENVIRONMENTS:
        pytest.skip("the main environment compares itself with this one")

    def run_script(name, script, *words):
        python = sys.executable if name == "here" else ENVIRONMENTS / name / "bin" / "python"
        if not Path(python).exists():
            pytest.skip(f"there is no environment {name}; make test-{name} makes it")
        child = subprocess.run([python, HERE / script, *words], capture_output=True, text=True)
        assert child.returncode == 0, child.stderr

    return run_script
