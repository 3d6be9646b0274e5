import math

import pytest
import torch

from drllm.errors import ConfigError
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack, Spans
from drllm.models.routing.policies import (
    FixedPolicy,
    FullPolicy,
    Policy,
    PromptView,
    RecordingPolicy,
    RouterPolicy,
    apply_depth_bias,
    apply_router_penalty,
)

D = 32
L = 6


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def view(rows, tokens=7, seed=0):
    hidden = torch.randn(rows, tokens, D, generator=rng(seed))
    return PromptView(hidden, torch.ones(rows, tokens, dtype=torch.bool))


def new_routers(seed=0, spread=3.0):
    """Routers whose logits differ enough from layer to layer for every decision to be taken."""
    stack = RouterStack(RouterConfig(num_layers=L, hidden_size=D), rng(seed))
    stack.decision_bias.data.normal_(std=spread, generator=rng(seed + 1))
    return stack


def random_logits(rows=500, size=5.0, seed=0):
    return size * torch.randn(rows, 3, generator=rng(seed))


@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        (FullPolicy(), False),
        (FixedPolicy([1, 0], 2), False),
        (RecordingPolicy(FullPolicy(), 4), True),  # the record depends on the prompt
        (RouterPolicy(new_routers()), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_policy_says_whether_it_reads_the_prompt(policy, reads):
    assert reads == policy.reads_prompt


def test_a_policy_of_ones_own_counts_as_reading_unless_it_says_otherwise():
    class Own(Policy):
        def decide(self, layer, prompts):
            return torch.ones(prompts.num_rows, dtype=torch.long)

    assert Own().reads_prompt
    assert Own().decide(0, view(2)).tolist() == [1, 1]


def test_a_policy_that_cannot_decide_cannot_be_made():
    class Misspelt(Policy):
        def decides(self, layer, prompts):
            return torch.ones(prompts.num_rows, dtype=torch.long)

    with pytest.raises(TypeError, match="decide"):
        Misspelt()


def test_the_labels_are_followed_and_the_routers_inputs_recorded():
    views = [view(2, seed=layer) for layer in range(3)]
    policy = RecordingPolicy(FixedPolicy([[1, 0, 2], [2, 1, 0]], 3), num_windows=4)
    for _ in range(2):  # a second pass starts anew
        labels = [list(policy.decide(layer, prompts)) for layer, prompts in enumerate(views)]
    assert labels == [[1, 2], [0, 1], [2, 0]]
    expected = [Spans(each.readable, 4).means(each.hidden).means for each in views]
    assert torch.equal(torch.stack(expected, dim=1), policy.means)
    assert policy.filled.tolist() == [4, 4]


def test_without_a_knob_the_largest_logit_decides():
    routers, prompts = new_routers(), view(40)
    windows = prompts.windows(8)
    columns = [RouterPolicy(routers).decide(layer, prompts).tolist() for layer in range(L)]
    for layer, decisions in enumerate(columns):
        assert routers.layer_logits(layer, windows).argmax(dim=1).tolist() == decisions
    assert {decision for column in columns for decision in column} == {0, 1, 2}


def test_autocast_does_not_change_a_decision():
    prompts, policy = view(400), RouterPolicy(new_routers(spread=0.1))
    expected = policy.decide(2, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(expected, policy.decide(2, prompts))


@pytest.mark.parametrize("bias", [-2.5, -0.1, 0.0, 0.7, 40.0])
def test_a_bias_charges_each_execution_once(bias):
    logits = random_logits()
    expected = [[row[d] - bias * d for d in range(3)] for row in logits.tolist()]
    torch.testing.assert_close(torch.tensor(expected), apply_depth_bias(logits, bias))


def published_blend(row, p):
    """The published rule on one row of logits, written out."""
    weights = [math.exp(value - max(row)) for value in row]
    routers = [weight / sum(weights) for weight in weights]
    skip, execute, repeat = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    if p <= -0.5:
        start, end, share = skip, routers, 2 * (p + 1)
    elif p <= 0.5:
        start, end, share = routers, execute, p + 0.5
    else:
        start, end, share = execute, repeat, 2 * (p - 0.5)
    return [(1 - share) * a + share * b for a, b in zip(start, end, strict=True)]


@pytest.mark.parametrize("p", [-1, -0.9, -0.6, -0.5, -0.2, 0.0, 0.3, 0.5, 0.6, 0.9, 1])
def test_a_penalty_blends_as_published(p):
    logits = random_logits(50)
    expected = torch.tensor([published_blend(row, p) for row in logits.tolist()])
    torch.testing.assert_close(expected, apply_router_penalty(logits, p), atol=1e-6, rtol=1e-5)


WRONG = [{"depth_bias": 0.5, "router_penalty": -0.5}, {"depth_bias": math.nan}]


@pytest.mark.parametrize("knobs", [*WRONG, {"router_penalty": -2}])
def test_two_knobs_and_a_knob_out_of_range_are_refused(knobs):
    with pytest.raises(ConfigError, match=r"^--(depth-bias|router-penalty) (and|is) "):
        RouterPolicy(new_routers(), **knobs)
