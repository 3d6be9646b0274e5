"""Depth control: the depth bias for a wanted number of executions, and the policy for settings.

The bias is found on a calibration set by measuring the routes that its prompts take.

Axes: N prompts, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drllm.config import DepthConfig
from drllm.cost import mean_executions
from drllm.errors import ConfigError, RecordError
from drllm.models.base.prompts import context_length, encode, left_padded, render
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FullPolicy, Policy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import read_json_lines

TOLERANCE = 0.25
"""Executions that the mean over the calibration set may differ from the wanted one. Less is often
impossible: where a layer is skipped, later routers read something else, and a single prompt may
lose twenty executions at once."""
DECIMALS = 6
"""Biases are looked for among numbers that can be written down as they are."""
RESOLUTION = 1e-5
"""Two biases nearer than this are not told apart."""
WIDEST = 2.0**19
"""No bias beyond this is tried; routers whose logits lie within that are skipped or repeated."""
SCANNED = 16
"""Biases, evenly spaced, from which the search starts again where it ended in a jump."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A depth bias, and what it gives on the prompts that it was found on.

    Attributes:
        depth_bias: For `RouterPolicy`, or as `--depth-bias`.
        executions: Mean executions over the prompts as routed under this bias, measured.
        num_prompts: N.
        num_probes: Times that all prompts were routed to find it.
    """

    depth_bias: float
    executions: float
    num_prompts: int
    num_probes: int


@torch.no_grad()
def routes_of(
    routed: RoutedModel, policy: Policy, prompts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> Tensor:
    """Return the route that each prompt takes under a policy; nothing is generated.

    Prompts of similar length share a left-padded batch. `routed.last_route` and the model's own
    policy stay what they are.

    Args:
        routed: The model.
        policy: What decides; it is asked about several batches, so no plan with rows of its own.
        prompts: Token ids of each prompt.
        batch_size: Prompts in a forward pass.

    Returns:
        `[N, L]` on the CPU, in the order of the prompts.

    Raises:
        ConfigError: No prompts, one without tokens, or one longer than the model's context.
    """
    _check_prompts(prompts, context_length(routed.model))
    routes = torch.empty(len(prompts), routed.num_layers, dtype=torch.long)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    before = routed.driver.last_route
    try:
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            ids, mask = left_padded([prompts[row] for row in rows], routed.model.device)
            with routed.using(policy):
                routed.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                    use_cache=False,
                    logits_to_keep=1,
                )
            routes[rows] = routed.last_route
    finally:
        routed.driver.last_route = before
    return routes


def find_depth_bias(
    routed: RoutedModel,
    prompts: Sequence[Sequence[int]],
    target_executions: float,
    *,
    routers: RouterStack | None = None,
    batch_size: int = 16,
    tolerance: float = TOLERANCE,
) -> Calibration:
    """Find the depth bias under which prompts run a wanted number of executions on average.

    Every bias tried is measured by routing all prompts, since a decision changes what later
    routers read. So the mean is a step function of the bias, may jump over values, and needn't be
    monotone. It is bisected all the same; where bisection ends in a jump, it starts again between
    evenly spaced biases. The bias returned was measured to give what it says.

    Args:
        routed: A model with routers.
        prompts: The calibration set, token ids of each prompt.
        target_executions: Wanted mean, from 1 to 2L.
        routers: Whose bias is wanted; the model's own unless given.
        batch_size: Prompts in a forward pass.
        tolerance: How far the mean may be from the target.

    Returns:
        The first bias found within the tolerance, and what it gives.

    Raises:
        ConfigError: No routers, no usable prompts, a target that no model of L layers can run, or
            one that lies in a jump; the message then has the nearest values with their biases.

    Source: ours (D-20).
    """
    L, routers = routed.num_layers, routed.routers if routers is None else routers
    if routers is None:
        raise ConfigError(
            "--target-executions has no effect on a model without routers; give routers, or pin a "
            "plan with routed.fixed(...)"
        )
    if not 1 <= target_executions <= 2 * L:
        raise ConfigError(
            f"--target-executions is {target_executions:g}, but a model of {L} layers runs 1 to "
            f"{2 * L} executions; give a number from 1 to {2 * L}"
        )
    seen: dict[float, float] = {}

    def measure(bias: float) -> float:
        if bias not in seen:
            policy = RouterPolicy(routers, depth_bias=bias)
            routes = routes_of(routed, policy, prompts, batch_size=batch_size)
            seen[bias] = mean_executions(routes.tolist())
        return seen[bias]

    for bias in _biases_to_try(measure, target_executions):
        if abs(measure(bias) - target_executions) <= tolerance:
            return Calibration(
                depth_bias=bias,
                executions=seen[bias],
                num_prompts=len(prompts),
                num_probes=len(seen),
            )
    raise ConfigError(_describe_jump(seen, target_executions, len(prompts)))


def policy_for(
    routed: RoutedModel, config: DepthConfig, prompts: Sequence[Sequence[int]] = ()
) -> tuple[Policy, Calibration | None]:
    """Return the policy that the settings of depth control ask for.

    Args:
        routed: The model, with routers where a knob is turned.
        config: At most one knob turned.
        prompts: Token ids of the calibration set, for `target_executions` alone.

    Returns:
        The policy (without a knob the one in force), and what was found on the calibration set.

    Raises:
        ConfigError: Several knobs, a knob without routers, or a target that can't be reached.
    """
    knob = config.knob()
    if knob is None:
        return routed.policy, None
    if routed.routers is None:
        raise ConfigError(
            f"--{knob.replace('_', '-')} has no effect without routers; give --routers, or leave "
            f"it out"
        )
    if knob == "static_routing":  # the routers need not be asked
        return FullPolicy(), None
    if config.target_executions is not None:
        found = find_depth_bias(routed, prompts, config.target_executions)
        return RouterPolicy(routed.routers, depth_bias=found.depth_bias), found
    policy = RouterPolicy(
        routed.routers, depth_bias=config.depth_bias, router_penalty=config.router_penalty
    )
    return policy, None


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """One line of a calibration file.

    Attributes:
        text: The prompt.
        rendered: It is what the model reads, as in `supervision.jsonl`, a chat template included.
    """

    text: str
    rendered: bool


def read_calibration(path: Path) -> list[CalibrationText]:
    """Read the prompts of a calibration file.

    Each line is an object with `prompt`, or else `question`. Lines of our own `supervision.jsonl`
    and `search.jsonl` are known by what else they hold, and read as search and training read them.

    Raises:
        RecordError: A file that can't be read, or a line without a text; names file and line.
    """
    texts = []
    for line, row in read_json_lines(path, dict[str, Any]):
        name = "prompt" if "prompt" in row else "question"
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise RecordError(
                f"{path}, line {line}: {name!r} is {text!r}; expected a text, as 'prompt' or "
                f"'question'"
            )
        rendered = "optimal_layer_config" in row or "paths" in row
        texts.append(CalibrationText(text, rendered))
    return texts


def encode_calibration(
    texts: Sequence[CalibrationText], tokenizer: Any, *, chat: bool
) -> list[list[int]]:
    """Return the tokens of calibration prompts.

    Args:
        texts: From `read_calibration`.
        tokenizer: The base model's.
        chat: Put texts that aren't rendered yet into the chat template.
    """
    return [
        encode(tokenizer, render(tokenizer, item.text, chat=chat and not item.rendered))
        for item in texts
    ]


def _check_prompts(prompts: Sequence[Sequence[int]], context: int | None) -> None:
    if not prompts:
        raise ConfigError("there are no prompts to route; give at least one")
    for place, tokens in enumerate(prompts, start=1):
        if not tokens:
            raise ConfigError(f"prompt {place} has no tokens; leave it out")
        if context is not None and len(tokens) > context:
            raise ConfigError(
                f"prompt {place} has {len(tokens)} tokens, the model's context holds {context}; "
                f"shorten it or leave it out"
            )


def _biases_to_try(measure: Callable[[float], float], target: float) -> Iterator[float]:
    """Yield biases one by one, each chosen by what those before it gave."""
    yield 0.0
    direction = 1.0 if measure(0.0) > target else -1.0
    near, far = 0.0, direction
    yield far
    while (measure(far) - target) * direction > 0 and abs(far) < WIDEST:
        near, far = far, 2 * far
        yield far
    yield from _halvings(measure, target, near, far)
    grid = [round(far * place / SCANNED, DECIMALS) for place in range(SCANNED + 1)]
    yield from grid
    for start, end in itertools.pairwise(grid):
        yield from _halvings(measure, target, start, end)


def _halvings(
    measure: Callable[[float], float], target: float, start: float, end: float
) -> Iterator[float]:
    """Bisect between two biases on different sides of the target; yield nothing between others."""
    above = measure(start) > target
    if above == (measure(end) > target):
        return
    while abs(end - start) > RESOLUTION:
        middle = round((start + end) / 2, DECIMALS)
        yield middle
        if (measure(middle) > target) == above:
            start = middle
        else:
            end = middle


def _describe_jump(seen: dict[float, float], target: float, num_prompts: int) -> str:
    """Name the nearest means on either side of a target, with the smallest biases for them."""
    sides = (
        {bias: mean for bias, mean in seen.items() if mean < target},
        {bias: mean for bias, mean in seen.items() if mean > target},
    )
    nearest = []
    for side in filter(None, sides):
        bias = min(side, key=lambda bias: (abs(side[bias] - target), abs(bias)))
        nearest.append(f"{side[bias]:.2f} (--depth-bias {bias})")
    return (
        f"no depth bias gives {target:g} executions on these {num_prompts} prompts, whose mean "
        f"jumps over it: the nearest are {' and '.join(nearest)}; take one of these, or calibrate "
        f"on more prompts"
    )
