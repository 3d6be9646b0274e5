"""SmolLM2-135M says the same under every supported transformers; a misread config is silent.

The environments are those of `make test-all`, one for each file of bounds beside this one.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venvs"
NAMES = sorted(bounds.stem for bounds in HERE.glob("*.txt"))

ROPE_BASE = 100_000
OTHER_TORCH = 1e-4
"""Greatest difference of logits (standard deviation about 6) that another torch and another place
in memory may make; none was measured, all are equal to the last bit with torch 2.4 and 2.13 on an
x86 processor. A rotation whose base is read as 10,000, the default, moves them by 4.6."""

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.usefixtures("smollm2"),  # converts the model, before another environment wants it
    pytest.mark.skipif(
        Path(sys.prefix).parent == ENVIRONMENTS,
        reason="the main environment compares itself with this one",
    ),
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A function that runs an environment's Python once, by the name of its file of bounds."""
    folder, known = tmp_path_factory.mktemp("outputs"), {}

    def run(name):
        if name not in known:
            python = sys.executable if name == "here" else ENVIRONMENTS / name / "bin" / "python"
            if not Path(python).exists():
                pytest.skip(f"there is no environment {name}; make test-{name} makes it")
            file = folder / f"{name}.safetensors"
            child = subprocess.run(
                [python, HERE / "smollm2_outputs.py", file], capture_output=True, text=True
            )
            assert child.returncode == 0, child.stderr
            known[name] = load_file(file)
        return known[name]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_rotation_has_the_base_that_the_model_was_trained_with(outputs, name):
    found = outputs(name)["inverse frequencies"]
    expected = ROPE_BASE ** -(torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_greedy_answers_are_the_same(outputs, name):
    ours, theirs = outputs("here"), outputs(name)
    assert ours.keys() == theirs.keys()
    whole = [key for key in ours if not ours[key].is_floating_point()]
    assert len(whole) == 14, "six prompts and their answers, two by a path as well"
    assert {key: ours[key].tolist() for key in whole} == {
        key: theirs[key].tolist() for key in whole
    }


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same(outputs, name):
    ours, theirs = outputs("here"), outputs(name)
    for key, logits in ours.items():
        if key.endswith("/logits"):
            torch.testing.assert_close(
                theirs[key],
                logits,
                rtol=0,
                atol=OTHER_TORCH,
                msg=lambda text, key=key: f"{key}: {text}",
            )
