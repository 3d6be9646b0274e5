import pytest
import torch

from drllm.evaluation.baselines.early_exit import ExitPolicy, find_threshold, measure_confidences
from drllm.models.routing.depth_control import route_prompts
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.logit_lens import LogitLens
from drllm.models.scoring.score import Request
from slow_way import confidences_alone

L = 4
TELLING = 0.13
"""A threshold at which the prompts of these tests stop behind different layers."""
CONFIDENCE_TOLERANCE = 1e-5
"""Of a probability in float32, alone or in a padded batch; 1e-6 was seen."""


def stops(probabilities, threshold):
    for num_layers, probability in enumerate(probabilities, start=1):
        if probability > threshold:
            return num_layers
    return L


@pytest.fixture(scope="module")
def prompts(some_prompts):
    return some_prompts(20)


@pytest.fixture(scope="module")
def lens(routed):
    return LogitLens(routed)


@pytest.fixture(scope="module")
def measured(routed, lens, prompts):
    return measure_confidences(routed, lens, prompts)


@pytest.fixture(scope="module")
def slow(model, prompts):
    return [confidences_alone(model, prompt, L) for prompt in prompts]


def test_confidences_equal_those_of_models_cut_off_behind_each_layer(measured, slow):
    torch.testing.assert_close(measured, torch.tensor(slow), atol=CONFIDENCE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("threshold", [0.0, 0.1, TELLING, 0.2, 1.0])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_the_policy_stops_where_a_loop_by_hand_stops(
    routed, lens, slow, prompts, threshold, batch_size
):
    wanted = [stops(probabilities, threshold) for probabilities in slow]
    assert threshold != TELLING or len(set(wanted)) > 2
    routes = route_prompts(routed, ExitPolicy(lens, threshold), prompts, batch_size=batch_size)
    assert routes.tolist() == [[1] * num + [0] * (L - num) for num in wanted]


@pytest.mark.parametrize("executions", [1.0, 1.5, 2.3, 3.1, 4.0])
def test_the_threshold_gives_the_wanted_executions_when_the_policy_runs(
    routed, lens, measured, prompts, executions
):
    found = find_threshold(measured, executions)
    # A threshold lets one prompt more run, by up to L - 1 layers.
    assert found.executions == pytest.approx(executions, abs=(L - 1) / 2 / len(measured))
    routes = route_prompts(routed, ExitPolicy(lens, found.value), prompts)
    assert float(routes.sum(dim=1).double().mean()) == found.executions


def test_a_scored_continuation_is_not_read(routed, lens, prompts):
    """There the prompt's last real token isn't the row's last one."""
    prompts = prompts[:6]
    questions = [Request(prompt, [[10, 11, 12], [13], [14, 15]]) for prompt in prompts]
    policy = ExitPolicy(lens, TELLING)
    _, routes = ChoiceBatch(routed, questions, 1.0).routed_scores(policy)
    assert torch.equal(routes, route_prompts(routed, policy, prompts))
    assert len(set(map(tuple, routes.tolist()))) > 1


def test_generated_tokens_run_what_the_prompt_ran(routed, lens, prompts):
    prompt = torch.tensor([prompts[3]])
    with routed.using(ExitPolicy(lens, TELLING)):
        routed.generate(prompt, max_new_tokens=5, do_sample=False)
    expected = route_prompts(routed, ExitPolicy(lens, TELLING), prompt.tolist())
    assert torch.equal(routed.last_route, expected)
