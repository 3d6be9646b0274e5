"""Depth control: find the depth bias for a number of executions, and make policies from settings.

The bias is found on a calibration set of prompts, whose routes are measured under several biases.

Axes: N prompts, L layers.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drllm.config import DepthConfig
from drllm.config.fields import to_flag
from drllm.cost import mean_executions
from drllm.errors import ConfigError, RecordError
from drllm.model.batching import group_by_length
from drllm.model.prompts import context_length, encode, pad_left, render
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.core import Routing
from drllm.models.routing.policies import FullPolicy, Policy, PromptView, RouterPolicy
from drllm.records.codec import read_json_lines

TOLERANCE = 0.25
"""How far the mean executions of the calibration set may be from the target. Often no bias comes
nearer: when a layer is skipped, later routers read other states, and a single prompt may lose
twenty executions at once."""
DECIMALS = 6  # decimals of a bias, few enough to copy it from a message
RESOLUTION = 1e-5  # bisection ends if two biases are nearer than this
WIDEST = 2.0**19
"""The largest bias to try. If all logits are smaller, every router skips or repeats under it."""
GRID_SIZE = 16  # number of intervals in which bisection starts again if it ended at a jump


class Calibration(NamedTuple):
    """A depth bias, and what it does on the calibration set.

    Attributes:
        depth_bias: The bias, for `RouterPolicy` or `--depth-bias`.
        executions: Measured mean executions of the prompts under this bias.
        num_prompts: N.
        num_probes: How many biases were measured, each on all prompts.
    """

    depth_bias: float
    executions: float
    num_prompts: int
    num_probes: int


@torch.no_grad()
def route_prompts(
    routed: Routing, policy: Policy, prompts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> Tensor:
    """Return the route of each prompt under a policy; nothing is generated.

    Prompts of similar length share a left-padded batch, so the policy can't be a plan with a row
    for each prompt. `routed.last_route` and the model's policy stay as they were.

    Returns:
        `[N, L]` on the CPU, in the order of the prompts.
    """
    _check_prompts(routed, prompts)
    routes = torch.empty(len(prompts), routed.num_layers, dtype=torch.long)
    earlier_route = routed.driver.last_route
    try:
        for rows in group_by_length([len(tokens) for tokens in prompts], batch_size):
            run_prompts(routed, policy, [prompts[row] for row in rows])
            routes[rows] = routed.last_route
    finally:
        routed.driver.set_last_route(earlier_route)
    return routes


def _check_prompts(routed: Routing, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse an empty list, a prompt without tokens, and a prompt longer than the context."""
    if not prompts:
        raise ConfigError("there are no prompts to route; give at least one")
    context = context_length(routed.model)
    for number, tokens in enumerate(prompts, start=1):
        if not tokens:
            raise ConfigError(f"prompt {number} has no tokens; leave it out")
        if context is not None and len(tokens) > context:
            raise ConfigError(
                f"prompt {number} has {len(tokens)} tokens, the model's context holds {context}; "
                f"shorten it or leave it out"
            )


class _Recorder(Policy):
    """Records what a function reads from the inputs of some layers; see `record_at_layers`.

    All layers before the last layer that is read get the same decision. From that layer on, every
    layer is skipped, since nobody needs its output.
    """

    def __init__(
        self, read: Callable[[PromptView], Tensor], layers: Collection[int], decision: int
    ) -> None:
        self.read = read
        self.layers = layers
        self.decision = decision
        self.readings: list[Tensor] = []  # batch by batch, layer by layer

    def decide(self, layer: int, prompts: PromptView) -> list[int]:
        if layer in self.layers:
            self.readings.append(self.read(prompts).cpu())
        decision = 0
        if layer < max(self.layers):
            decision = self.decision
        return [decision] * prompts.num_rows


def record_at_layers(
    routed: Routing,
    prompts: Sequence[Sequence[int]],
    read: Callable[[PromptView], Tensor],
    layers: Collection[int],
    *,
    decision: int,
) -> Tensor:
    """Run the prompts, and return what a function reads from the inputs of some layers.

    Args:
        routed: The model.
        prompts: Token ids of each prompt.
        read: Returns a tensor with a row for each prompt of a batch.
        layers: The layers whose inputs are read.
        decision: The decision at every layer before the last layer that is read.

    Returns:
        `[N, layers, …]` on the CPU, in the order of the prompts.
    """
    # `route_prompts` runs the longest prompts first. In this order, its batches are consecutive.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    recorder = _Recorder(read, layers, decision)
    route_prompts(routed, recorder, [prompts[row] for row in order])
    batch_readings = []
    for start in range(0, len(recorder.readings), len(layers)):
        readings = recorder.readings[start : start + len(layers)]
        batch_readings.append(torch.stack(readings, dim=1))
    places = torch.tensor(order).argsort()  # of each prompt in the order that was run
    return torch.cat(batch_readings)[places]


def run_prompts(routed: Routing, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
    """Run the model once over a left-padded batch of prompts under a policy."""
    ids, mask = pad_left(prompts, routed.model.device)
    with routed.using(policy):
        routed.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )


class _Probes:
    """Measures the mean executions of prompts under depth biases, once for each bias."""

    def __init__(
        self,
        routed: Routing,
        routers: RouterStack,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
    ) -> None:
        self.routed = routed
        self.routers = routers
        self.prompts = prompts
        self.batch_size = batch_size
        self.executions: dict[float, float] = {}  # measured, by bias

    def measure(self, bias: float) -> float:
        """Return the mean executions under a bias."""
        if bias not in self.executions:
            policy = RouterPolicy(self.routers, depth_bias=bias)
            routes = route_prompts(self.routed, policy, self.prompts, batch_size=self.batch_size)
            self.executions[bias] = mean_executions(routes.tolist())
        return self.executions[bias]

    def describe_nearest(self, target: float) -> str:
        """Name the nearest measured values below and above a target, with their biases."""

        def distance(bias: float) -> tuple[float, float]:
            return abs(self.executions[bias] - target), abs(bias)

        below = [bias for bias, value in self.executions.items() if value < target]
        above = [bias for bias, value in self.executions.items() if value > target]
        nearest = [min(biases, key=distance) for biases in (below, above) if biases]
        return " and ".join(
            f"{self.executions[bias]:.2f} (--depth-bias {bias})" for bias in nearest
        )


def find_depth_bias(
    routed: Routing,
    prompts: Sequence[Sequence[int]],
    target_executions: float,
    *,
    routers: RouterStack | None = None,
    batch_size: int = 16,
    tolerance: float = TOLERANCE,
) -> Calibration:
    """Find the depth bias under which prompts have a target number of executions on average.

    Each bias is measured by routing all prompts, since a decision changes what later routers read.
    The mean is a step function of the bias. It may jump over values, and it may rise as well as
    fall. Bisection usually finds the target all the same. If bisection ends at a jump, the search
    starts again in each of 16 equal intervals.

    Args:
        routed: A model with routers.
        prompts: The calibration set, token ids of each prompt.
        target_executions: Mean executions, from 1 to 2L.
        routers: The routers to find a bias for; None takes the model's routers.
        batch_size: Prompts in a forward pass.
        tolerance: How far the mean may be from the target.

    Returns:
        The first bias within the tolerance, with its measured executions.

    Raises:
        ConfigError: There are no routers or no usable prompts, a model of L layers can't run the
            target, or the mean jumps over the target. In the last case the message names the
            nearest values.

    Source: ours (D-20).
    """
    if routers is None:
        routers = routed.routers
    if routers is None:
        raise ConfigError(
            "--target-executions has no effect on a model without routers; give routers, or pin a "
            "plan with routed.fixed(...)"
        )
    maximum = 2 * routed.num_layers
    if not 1 <= target_executions <= maximum:
        raise ConfigError(
            f"--target-executions is {target_executions:g}, but a model of {routed.num_layers} "
            f"layers runs 1 to {maximum} executions; give a number from 1 to {maximum}"
        )
    probes = _Probes(routed, routers, prompts, batch_size)
    for bias in _propose_biases(probes.measure, target_executions):
        executions = probes.measure(bias)
        if abs(executions - target_executions) <= tolerance:
            return Calibration(bias, executions, len(prompts), len(probes.executions))
    raise ConfigError(
        f"no depth bias gives {target_executions:g} executions on these {len(prompts)} prompts, "
        f"whose mean jumps over it: the nearest are {probes.describe_nearest(target_executions)}; "
        f"choose one of these, or calibrate on more prompts"
    )


def _propose_biases(measure: Callable[[float], float], target: float) -> Iterator[float]:
    """Yield biases to measure, from the measurements so far; see `find_depth_bias`."""
    yield 0.0
    direction = 1.0 if measure(0.0) > target else -1.0
    near = 0.0
    far = direction
    yield far
    # Double the bias until the mean is on the other side of the target.
    while (measure(far) - target) * direction > 0 and abs(far) < WIDEST:
        near = far
        far = 2 * far
        yield far
    yield from _bisect(measure, target, near, far)
    # Bisection ended at a jump.
    grid = [round(far * step / GRID_SIZE, DECIMALS) for step in range(GRID_SIZE + 1)]
    yield from grid
    for start, end in itertools.pairwise(grid):
        yield from _bisect(measure, target, start, end)


def _bisect(
    measure: Callable[[float], float], target: float, start: float, end: float
) -> Iterator[float]:
    """Bisect between two biases, if their means lie on different sides of the target."""
    is_above = measure(start) > target
    if is_above == (measure(end) > target):
        return
    while abs(end - start) > RESOLUTION:
        middle = round((start + end) / 2, DECIMALS)
        yield middle
        if (measure(middle) > target) == is_above:
            start = middle
        else:
            end = middle


def make_policy(
    routed: Routing, config: DepthConfig, prompts: Sequence[Sequence[int]] = ()
) -> tuple[Policy, Calibration | None]:
    """Return the policy for depth settings, and the calibration if there is a target.

    Without a depth setting, the policy is the model's current policy. `prompts` are the calibration
    set, which only `target_executions` needs.
    """
    setting = config.find_setting()
    routers = routed.routers
    if setting is None:
        return routed.policy, None
    if routers is None:
        raise ConfigError(
            f"{to_flag(setting)} has no effect without routers; give --routers, or leave it out"
        )
    if setting == "static_routing":  # every layer is executed, whatever the routers say
        return FullPolicy(), None
    if config.target_executions is not None:
        calibration = find_depth_bias(routed, prompts, config.target_executions)
        return RouterPolicy(routers, depth_bias=calibration.depth_bias), calibration
    policy = RouterPolicy(
        routers, depth_bias=config.depth_bias, router_penalty=config.router_penalty
    )
    return policy, None


def read_calibration(path: Path) -> list[tuple[str, bool]]:
    """Read the prompts of a calibration file.

    Each line is an object with `prompt` or `question`. Lines of `supervision.jsonl` and
    `search.jsonl` are recognised by their other fields. Prompts of these two files are rendered
    already, with the chat template if there is one.

    Returns:
        Each prompt, and whether it is rendered already.
    """
    prompts = []
    for line, row in read_json_lines(path, dict[str, Any]):
        name = "prompt" if "prompt" in row else "question"
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise RecordError(
                f"{path}, line {line}: {name!r} is {text!r}; expected a text, as 'prompt' or "
                f"'question'"
            )
        is_rendered = "optimal_layer_config" in row or "paths" in row
        prompts.append((text, is_rendered))
    return prompts


def encode_calibration(
    prompts: Sequence[tuple[str, bool]], tokenizer: Any, *, chat: bool
) -> list[list[int]]:
    """Return the tokens of calibration prompts, as `read_calibration` returns them.

    `chat` adds the chat template to prompts that aren't rendered.
    """
    tokens = []
    for text, is_rendered in prompts:
        prompt = render(tokenizer, text, chat=chat and not is_rendered)
        tokens.append(encode(tokenizer, prompt))
    return tokens
