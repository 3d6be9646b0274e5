import itertools
import math
import random
import re

import pytest
import torch

from drllm.config import DepthConfig
from drllm.config.fields import to_flag
from drllm.cost import mean_executions
from drllm.errors import ConfigError, RecordError, RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing import depth_control
from drllm.models.routing.depth_control import (
    encode_calibration,
    find_depth_bias,
    make_policy,
    read_calibration,
    route_prompts,
)
from drllm.models.routing.policies import FixedPolicy, FullPolicy, Policy, RouterPolicy

L = 6
NUM_PROMPTS = 40


def new_routers(seed=0):
    """Routers of an untrained kind whose decisions differ by layer and by prompt."""
    generator = torch.Generator().manual_seed(seed)
    stack = RouterStack(RouterConfig(num_layers=L, hidden_size=32), generator)
    stack.decision_bias.data.normal_(std=0.5, generator=generator)
    return stack


def some_prompts(number=NUM_PROMPTS, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 101) for _ in range(rng.randint(1, 30))] for _ in range(number)]


@pytest.fixture(scope="module")
def routed(tiny_llama):
    return RoutedModel(tiny_llama(), new_routers())


def mean(routed, bias, prompts):
    routes = route_prompts(routed, RouterPolicy(routed.routers, depth_bias=bias), prompts)
    return mean_executions(routes.tolist())


@pytest.fixture
def with_learned_positions(tiny_model):
    """A model whose positions padding must not move."""
    return RoutedModel(tiny_model("gpt2"), new_routers())


@pytest.mark.parametrize(
    ("kind", "bias"),
    [("routed", -1.0), ("routed", 0.0), ("routed", 0.6), ("with_learned_positions", 0.0)],
)
def test_prompts_of_all_lengths_take_the_same_routes_together_as_one_by_one(request, kind, bias):
    routed = request.getfixturevalue(kind)
    prompts, policy = some_prompts(), RouterPolicy(routed.routers, depth_bias=bias)
    alone = [route_prompts(routed, policy, [prompt])[0].tolist() for prompt in prompts]
    for batch_size in (7, 100):
        assert alone == route_prompts(routed, policy, prompts, batch_size=batch_size).tolist()
    assert len(set(map(tuple, alone))) > 3


def test_a_route_is_the_one_that_generating_takes(routed):
    prompts = some_prompts(3)
    expected = []
    for prompt in prompts:
        routed.generate(torch.tensor([prompt]), max_new_tokens=1, do_sample=False)
        expected += routed.last_route.tolist()
    assert expected == route_prompts(routed, routed.policy, prompts).tolist()


class FailsLate(Policy):
    def decide(self, layer, prompts):
        if prompts.hidden.shape[1] > 20:
            raise RuntimeError("too long for me")
        return torch.ones(prompts.num_rows, dtype=torch.long)


def test_probing_leaves_the_last_route_and_the_policy_as_they_were(tiny_llama):
    routed = RoutedModel(tiny_llama(), policy=FixedPolicy([1, 0, 2, 1, 1, 1], L))
    policy = routed.policy
    route_prompts(routed, FullPolicy(), some_prompts(3))
    with pytest.raises(RoutingError, match="no prompt has passed"):
        _ = routed.last_route
    routed.model(torch.tensor([[5, 6, 7]]))
    assert route_prompts(routed, FullPolicy(), some_prompts(3)).tolist() == [[1] * L] * 3
    with pytest.raises(RuntimeError, match="too long for me"):
        route_prompts(routed, FailsLate(), some_prompts(), batch_size=4)
    assert routed.last_route.tolist() == [[1, 0, 2, 1, 1, 1]]
    assert routed.policy is policy


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there are no prompts"),
        ([[5, 6], []], "prompt 2 has no tokens"),
        ([[5] * 513], "prompt 1 has 513 tokens, the model's context holds 512"),
    ],
)
def test_prompts_that_cannot_be_routed_are_refused(routed, prompts, message):
    with pytest.raises(ConfigError, match=message):
        route_prompts(routed, FullPolicy(), prompts)


@pytest.mark.parametrize("target", [2.5, 5.0, 9.0])
def test_the_bias_gives_the_executions_wanted_whatever_the_batches(routed, target):
    prompts = some_prompts()
    calibration = find_depth_bias(routed, prompts, target, tolerance=0.15)
    assert calibration.executions == pytest.approx(target, abs=0.15)
    assert calibration.executions == mean(routed, calibration.depth_bias, prompts)
    assert calibration.num_prompts == NUM_PROMPTS
    assert calibration == find_depth_bias(routed, prompts, target, tolerance=0.15, batch_size=3)


@pytest.mark.parametrize(("target", "route"), [(1, [0, 0, 0, 0, 0, 1]), (2 * L, [2] * L)])
def test_the_least_and_the_most_executions_can_be_had(routed, target, route):
    prompts = some_prompts(5)
    calibration = find_depth_bias(routed, prompts, target)
    policy = RouterPolicy(routed.routers, depth_bias=calibration.depth_bias)
    assert calibration.executions == target
    assert route_prompts(routed, policy, prompts, batch_size=1).tolist() == [route] * 5


def test_only_prompts_are_run_once_for_each_probe(routed):
    prompts, passes = some_prompts(), []
    handle = routed.model.register_forward_hook(lambda _m, _a, _o: passes.append(1))
    try:
        calibration = find_depth_bias(routed, prompts, 5.0, batch_size=16, tolerance=0.15)
    finally:
        handle.remove()
    assert len(passes) == 3 * calibration.num_probes


def test_a_single_prompt_cannot_run_half_an_execution(routed):
    prompts = some_prompts(1, seed=4)
    with pytest.raises(ConfigError, match=r"no depth bias gives 5\.5 executions") as caught:
        find_depth_bias(routed, prompts, 5.5)
    named = re.findall(r"([\d.]+) \(--depth-bias (-?[\d.e-]+)\)", str(caught.value))
    assert len(named) == 2
    below, above = sorted((float(value), float(bias)) for value, bias in named)
    assert below[0] < 5.5 < above[0]
    for value, bias in (below, above):  # what is named was measured, and holds as it is written
        assert value == mean(routed, bias, prompts)
        assert bias == round(bias, 6)


@pytest.mark.parametrize("target", [0.99, 0, -3, 12.01, math.nan, math.inf])
def test_executions_that_no_model_of_this_depth_runs_are_refused(routed, target):
    with pytest.raises(ConfigError, match="a model of 6 layers runs 1 to 12 executions"):
        find_depth_bias(routed, some_prompts(2), target)


def test_a_model_without_routers_has_no_bias(tiny_llama):
    with pytest.raises(ConfigError, match="has no effect on a model without routers"):
        find_depth_bias(RoutedModel(tiny_llama()), some_prompts(2), 5)


@pytest.fixture
def routing_by(monkeypatch, routed):
    """Let routes be a function of the bias and the prompt, and find a bias for it."""

    def find(executions, target, number=1, **options):
        def routes(_routed, policy, prompts, *, batch_size):
            rows = [executions(policy.depth_bias, place) for place in range(len(prompts))]
            plans = [[min(2, max(0, row - 2 * layer)) for layer in range(L)] for row in rows]
            return torch.tensor(plans)

        monkeypatch.setattr(depth_control, "route_prompts", routes)
        return find_depth_bias(routed, [[5]] * number, target, **options)

    return find


@pytest.mark.parametrize("seed", range(30))
def test_what_a_monotone_function_reaches_is_found_and_what_it_jumps_over_is_refused(
    routing_by, seed
):
    rng = random.Random(seed)
    number = rng.randint(1, 6)
    scale = 10.0 ** rng.randint(-1, 3)
    # Each prompt runs one execution less behind each of its 11 thresholds.
    thresholds = [sorted(rng.uniform(-scale, scale) for _ in range(11)) for _ in range(number)]

    def executions(bias, place):
        return 12 - sum(bias > threshold for threshold in thresholds[place])

    edges = sorted(itertools.chain([-2 * scale, 2 * scale], *thresholds))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    reached = [sum(executions(b, place) for place in range(number)) / number for b in middles]
    for target in (1.0, rng.uniform(1, 12), rng.choice(reached), rng.choice(reached), 12.0):
        if min(abs(value - target) for value in reached) <= depth_control.TOLERANCE:
            assert routing_by(executions, target, number).executions == pytest.approx(
                target, abs=depth_control.TOLERANCE
            )
        else:
            with pytest.raises(ConfigError) as caught:
                routing_by(executions, target, number)
            below = max(value for value in reached if value < target)
            above = min(value for value in reached if value > target)
            assert f"the nearest are {below:.2f} (" in str(caught.value)
            assert f" and {above:.2f} (" in str(caught.value)


def test_the_search_is_short_and_ends_where_no_bias_is_needed_or_no_bias_moves_the_routers(
    routing_by,
):
    def executions(bias, place):
        return max(1, min(12, round(6 - 2 * bias + place / 100)))

    assert routing_by(executions, 4.3, 100).num_probes < 15
    calibration = routing_by(lambda bias, place: 7, 7)
    assert (calibration.depth_bias, calibration.num_probes) == (0.0, 1)
    with pytest.raises(ConfigError, match=r"the nearest are 7.00 \(--depth-bias 0.0\); choose"):
        routing_by(lambda bias, place: 7, 5)


@pytest.mark.parametrize(("start", "end"), [(0.8, 0.9), (0.82, 0.86)])
def test_a_target_is_found_behind_a_jump_of_a_function_that_is_not_monotone(routing_by, start, end):
    def executions(bias, _place):
        # Bisection ends in the jump from 8 to 4; 6 executions are run from start to end alone.
        steps = [(0.4, 8), (0.55, 4), (start, 8), (end, 6), (math.inf, 3)]
        return next(value for edge, value in steps if bias <= edge)

    calibration = routing_by(executions, 6)
    assert start < calibration.depth_bias <= end
    assert calibration.executions == 6


def test_each_knob_becomes_a_policy_and_without_one_the_policy_in_force_stays(routed, tiny_llama):
    for model in (routed, RoutedModel(tiny_llama())):
        assert make_policy(model, DepthConfig()) == (model.policy, None)
    for knob in ({"depth_bias": 0.7}, {"router_penalty": -0.6}):
        policy, calibration = make_policy(routed, DepthConfig(**knob))
        assert {name: getattr(policy, name) for name in knob} == knob
        assert calibration is None
    policy, calibration = make_policy(routed, DepthConfig(static_routing=True))
    assert (type(policy), calibration) == (FullPolicy, None)


def test_a_target_becomes_the_bias_that_was_found(routed):
    prompts = some_prompts()
    target = mean(routed, 0.4, prompts)
    config = DepthConfig(target_executions=target, calibration="prompts.jsonl")
    policy, calibration = make_policy(routed, config, prompts)
    assert policy.routers is routed.routers
    assert calibration.depth_bias == policy.depth_bias != 0
    assert calibration == find_depth_bias(routed, prompts, target)


@pytest.mark.parametrize(
    "config",
    [
        DepthConfig(depth_bias=0.1),
        DepthConfig(router_penalty=-0.5),
        DepthConfig(static_routing=True),
        DepthConfig(target_executions=5, calibration="prompts.jsonl"),
    ],
)
def test_a_knob_without_routers_is_refused(tiny_llama, config):
    flag = to_flag(config.find_setting())
    with pytest.raises(ConfigError, match=f"{flag} has no effect"):
        make_policy(RoutedModel(tiny_llama()), config, some_prompts(2))


def test_prompts_are_read_and_those_of_our_files_are_rendered_already(write_rows):
    ours = {"optimal_layer_config": [1], "answer": "a"}
    rows = [
        ({"prompt": "one"}, "one", False),
        ({"question": "two"}, "two", False),
        ({"question": "x", "prompt": "y"}, "y", False),
        ({"question": "q", "prompt": "user: q\n", **ours}, "user: q\n", True),
        ({"question": "q", **ours}, "q", True),
        ({"question": "q", "prompt": "Question: q", "paths": []}, "Question: q", True),
    ]
    path = write_rows("prompts", [row for row, *_ in rows])
    assert read_calibration(path) == [(text, rendered) for _, text, rendered in rows]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 2: 'question' is None; expected a text, as 'prompt' or 'question'"),
        ({"prompt": " "}, "line 2: 'prompt' is ' '; expected a text"),
        ({"prompt": 5, "question": "q"}, "line 2: 'prompt' is 5; expected a text"),
        (["x"], "line 2: expected"),
    ],
)
def test_a_line_without_a_prompt_is_refused_by_its_number(write_rows, row, message):
    path = write_rows("prompts", [{"prompt": "fine"}, row])
    with pytest.raises(RecordError, match=re.escape(f"{path}, {message}")):
        read_calibration(path)


def test_only_what_is_not_rendered_yet_goes_through_the_chat_template(tiny_tokenizer):
    texts = [("hi", False), ("hi", True)]
    plain, template = tiny_tokenizer.encode("hi"), tiny_tokenizer.encode("user: hi\nassistant: ")
    assert [template, plain] == encode_calibration(texts, tiny_tokenizer, chat=True)
    assert [plain, plain] == encode_calibration(texts, tiny_tokenizer, chat=False)
