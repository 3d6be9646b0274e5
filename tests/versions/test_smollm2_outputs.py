"""SmolLM2-135M says the same under every supported transformers; a misread config is silent."""

import functools

import pytest
import torch
from safetensors.torch import load_file

ROPE_BASE = 100_000
OTHER_TORCH = 1e-4
"""Greatest difference of logits (standard deviation about 6) that another torch and another place
in memory may make; none was measured, all are equal to the last bit with torch 2.4 and 2.13 on an
x86 processor. A rotation whose base is read as 10,000, the default, moves them by 4.6."""

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.usefixtures("smollm2"),  # converts the model, before another environment wants it
]


@pytest.fixture(scope="module")
def outputs(run, tmp_path_factory):
    """A function of an environment: what the model answers there."""
    folder = tmp_path_factory.mktemp("outputs")

    @functools.cache
    def outputs_of(name):
        run(name, "smollm2_outputs.py", folder / f"{name}.safetensors")
        return load_file(folder / f"{name}.safetensors")

    return outputs_of


def test_the_rotation_has_the_base_that_the_model_was_trained_with(outputs, environment):
    found = outputs(environment)["inverse frequencies"]
    expected = ROPE_BASE ** -(torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_tokens_and_greedy_answers_are_the_same(outputs, environment):
    ours, theirs = outputs("here"), outputs(environment)
    assert ours.keys() == theirs.keys()
    whole = [key for key in ours if not ours[key].is_floating_point()]
    assert len(whole) == 14, "six prompts and their answers, two by a path as well"
    assert {key: ours[key].tolist() for key in whole} == {
        key: theirs[key].tolist() for key in whole
    }


def test_logits_are_the_same(outputs, environment):
    ours, theirs = outputs("here"), outputs(environment)
    for key in (key for key in ours if key.endswith("/logits")):
        torch.testing.assert_close(
            theirs[key],
            ours[key],
            rtol=0,
            atol=OTHER_TORCH,
            msg=lambda text, key=key: f"{key}: {text}",
        )
