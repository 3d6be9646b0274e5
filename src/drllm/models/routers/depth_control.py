"""Depth control: the depth bias for a wanted number of executions, and the policy for settings.

The bias is found on a calibration set by measuring the routes that its prompts take.

Axes: N prompts, L layers.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drllm.config import DepthConfig
from drllm.config.fields import flag_of
from drllm.cost import mean_executions
from drllm.errors import ConfigError, RecordError
from drllm.models.base.prompts import context_length, encode, left_padded, render
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FullPolicy, Policy, PromptView, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import batches
from drllm.records.codec import read_json_lines

TOLERANCE = 0.25
"""Executions that the mean over the calibration set may differ from the wanted one. Less is often
impossible: where a layer is skipped, later routers read something else, and a single prompt may
lose twenty executions at once."""
DECIMALS = 6  # biases are looked for among numbers that can be written down as they are
RESOLUTION = 1e-5  # two biases nearer than this are not told apart
WIDEST = 2.0**19
"""No bias beyond this is tried; routers whose logits lie within that are skipped or repeated."""
SCANNED = 16  # biases, evenly spaced, from which the search starts again where it ended in a jump


class Calibration(NamedTuple):
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

    It is `[N, L]` on the CPU, in the order of the prompts; prompts of similar length share a
    left-padded batch, so the policy can be no plan with rows of its own. `routed.last_route` and
    the model's own policy stay what they are.
    """
    if not prompts:
        raise ConfigError("there are no prompts to route; give at least one")
    context = context_length(routed.model)
    for place, tokens in enumerate(prompts, start=1):
        if not tokens:
            raise ConfigError(f"prompt {place} has no tokens; leave it out")
        if context is not None and len(tokens) > context:
            raise ConfigError(
                f"prompt {place} has {len(tokens)} tokens, the model's context holds {context}; "
                f"shorten it or leave it out"
            )
    routes = torch.empty(len(prompts), routed.num_layers, dtype=torch.long)
    before = routed.driver.last
    try:
        for rows in batches(list(map(len, prompts)), batch_size):
            read_under(routed, policy, [prompts[row] for row in rows])
            routes[rows] = routed.last_route
    finally:
        routed.driver.keep(before)
    return routes


def recorded(
    routed: RoutedModel,
    prompts: Sequence[Sequence[int]],
    read: Callable[[PromptView], Tensor],
    layers: Collection[int],
    *,
    decision: int,
) -> Tensor:
    """Return what is read, `[N, layers, …]`, at some layers, while all take the same decision."""
    kept: list[Tensor] = []  # batch by batch, layer by layer

    class Recorder(Policy):
        def decide(self, layer: int, prompts: PromptView) -> list[int]:
            if layer in layers:
                kept.append(read(prompts).cpu())
            return [decision if layer < max(layers) else 0] * prompts.num_rows  # none after

    # The longest first, as they run.
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    routes_of(routed, Recorder(), [prompts[row] for row in by_length])
    starts = range(0, len(kept), len(layers))
    values = torch.cat([torch.stack(kept[at : at + len(layers)], dim=1) for at in starts])
    return values[torch.tensor(by_length).argsort()]


def read_under(routed: RoutedModel, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
    """Have the model read one left-padded batch of prompts under a policy."""
    ids, mask = left_padded(prompts, routed.model.device)
    with routed.using(policy):
        routed.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )


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
    L, target = routed.num_layers, target_executions
    routers = routed.routers if routers is None else routers
    if routers is None:
        raise ConfigError(
            "--target-executions has no effect on a model without routers; give routers, or pin a "
            "plan with routed.fixed(...)"
        )
    if not 1 <= target <= 2 * L:
        raise ConfigError(
            f"--target-executions is {target:g}, but a model of {L} layers runs 1 to {2 * L} "
            f"executions; give a number from 1 to {2 * L}"
        )
    seen: dict[float, float] = {}

    def measure(bias: float) -> float:
        if bias not in seen:
            policy = RouterPolicy(routers, depth_bias=bias)
            routes = routes_of(routed, policy, prompts, batch_size=batch_size)
            seen[bias] = mean_executions(routes.tolist())
        return seen[bias]

    for bias in _biases_to_try(measure, target):
        if abs(measure(bias) - target) <= tolerance:
            return Calibration(bias, seen[bias], num_prompts=len(prompts), num_probes=len(seen))
    by_distance = sorted(seen, key=lambda bias: (abs(seen[bias] - target), abs(bias)))
    below = [bias for bias in by_distance if seen[bias] < target]
    above = [bias for bias in by_distance if seen[bias] > target]
    nearest = [*below[:1], *above[:1]]
    named = " and ".join(f"{seen[bias]:.2f} (--depth-bias {bias})" for bias in nearest)
    raise ConfigError(
        f"no depth bias gives {target:g} executions on these {len(prompts)} prompts, whose mean "
        f"jumps over it: the nearest are {named}; take one of these, or calibrate on more prompts"
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


def policy_for(
    routed: RoutedModel, config: DepthConfig, prompts: Sequence[Sequence[int]] = ()
) -> tuple[Policy, Calibration | None]:
    """Return the policy that settings ask for, and what was found on the calibration set.

    Without a knob it is the policy in force. Prompts are read for `target_executions` alone.
    """
    knob, routers = config.knob(), routed.routers
    if knob is None:
        return routed.policy, None
    if routers is None:
        raise ConfigError(
            f"{flag_of(knob)} has no effect without routers; give --routers, or leave it out"
        )
    if knob == "static_routing":  # the routers need not be asked
        return FullPolicy(), None
    if config.target_executions is not None:
        found = find_depth_bias(routed, prompts, config.target_executions)
        return RouterPolicy(routers, depth_bias=found.depth_bias), found
    penalty = config.router_penalty
    return RouterPolicy(routers, depth_bias=config.depth_bias, router_penalty=penalty), None


def read_calibration(path: Path) -> list[tuple[str, bool]]:
    """Return each prompt of a calibration file, and whether the model reads it as it is.

    Each line is an object with `prompt`, or else `question`. Lines of our own `supervision.jsonl`
    and `search.jsonl` are known by what else they hold: their prompts are what the model reads, a
    chat template included.
    """
    texts = []
    for line, row in read_json_lines(path, dict[str, Any]):
        name = "prompt" if "prompt" in row else "question"
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            said = f"{name!r} is {text!r}; expected a text, as 'prompt' or 'question'"
            raise RecordError(f"{path}, line {line}: {said}")
        texts.append((text, "optimal_layer_config" in row or "paths" in row))
    return texts


def encode_calibration(
    texts: Sequence[tuple[str, bool]], tokenizer: Any, *, chat: bool
) -> list[list[int]]:
    """Return the tokens of prompts; `chat` renders those that aren't rendered yet."""
    rendered = (render(tokenizer, text, chat=chat and not is_done) for text, is_done in texts)
    return [encode(tokenizer, text) for text in rendered]
