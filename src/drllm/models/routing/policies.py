"""Policies, which decide for a prompt which layers are skipped, executed or repeated.

A policy is a class with a method `decide`, which may read the prompt in its `PromptView`.
`@POLICIES.register(...)` gives it a name, as in `examples/own_policy.py`. The driver pins the
decisions: all later tokens of the prompt follow them. It also makes every prompt run at least one
layer. torch is imported inside functions, so that `drllm ls policies` doesn't load it.

Axes: B rows, T tokens, D hidden, L layers, W windows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from drllm.config import DepthConfig
from drllm.errors import RoutingError
from drllm.paths import Decision, Plan, StaticPath, check_decisions, get_layers
from drllm.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from drllm.models.routers.stack import RouterStack, Spans, Windows

POLICIES: Registry[type[Policy]] = Registry("policy", ["drllm.models.routing.policies"])
"""Policies by name; `drllm ls policies` lists them."""


@dataclass(frozen=True, slots=True)
class PromptView:
    """The prompts of a batch as they arrive at one layer.

    Attributes:
        hidden: `[B, T, D]`, the layer's input. Padded positions may hold anything.
        readable: `[B, T]` bool, the tokens that the policy may read: no padding, and no token
            after the prompt if the caller gave the prompt's length.
    """

    hidden: Tensor
    readable: Tensor
    # The places of the windows, by the number of windows and the device. All layers of a pass share
    # this dictionary.
    spans: dict[tuple[int, torch.device], Spans] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """The number of rows, B."""
        return int(self.hidden.shape[0])

    def windows(self, num_windows: int) -> Windows:
        """Return the means of each prompt in W windows, in float32."""
        from drllm.models.routers.stack import Spans

        device = self.hidden.device  # the layers may be on several devices
        with without_autocast(device):
            spans = self.spans.get((num_windows, device))
            if spans is None:
                spans = Spans(self.readable.to(device), num_windows)
                self.spans[num_windows, device] = spans
            return spans.means(self.hidden)

    def mean(self) -> Tensor:
        """Return the mean of each prompt's readable tokens, `[B, D]` in float32."""
        return self.windows(1).means[:, 0]


class Policy(Protocol):
    """Decides for every row of a batch how often a layer runs.

    Attributes:
        reads_prompt: Whether `decide` may read the `PromptView`. A policy that never reads it sets
            this to False. It is then called for all layers before the first layer runs. It also
            works if a pass doesn't hold the whole prompt, or if the mask doesn't say which tokens
            are padding.
    """

    reads_prompt: ClassVar[bool] = True

    @abstractmethod
    def decide(self, layer: int, prompts: PromptView) -> Tensor | Sequence[int]:
        """Return `[B]` integers 0, 1 or 2: a tensor on any device, or a sequence.

        The driver calls it once per prompt for each layer, in order from 0.
        """


@POLICIES.register("full")
class FullPolicy(Policy):
    """Execute every layer once: the base model."""

    reads_prompt = False

    def decide(self, layer: int, prompts: PromptView) -> Sequence[int]:
        """Return 1 for every row."""
        return [1] * prompts.num_rows


@POLICIES.register("fixed")
class FixedPolicy(Policy):
    """Follow decisions that were made beforehand.

    Args:
        decisions: `[L]` for all prompts, or `[B, L]` with a row for each prompt of a batch.
        num_layers: L of the model.

    Raises:
        PathError: A model of L layers can't run these decisions.
    """

    reads_prompt = False

    def __init__(
        self, decisions: Sequence[int] | Sequence[Sequence[int]] | Tensor, num_layers: int
    ) -> None:
        import torch

        plan = torch.as_tensor(decisions).cpu()
        self.is_shared = plan.dim() == 1  # whether one row is for all prompts
        rows = plan.tolist() if plan.dim() == 2 else [plan.tolist()]
        self.plan = [check_decisions(row, num_layers) for row in rows]  # [B][L], or [1][L]

    def decide(self, layer: int, prompts: PromptView) -> Sequence[int]:
        """Return every prompt's decision at a layer.

        Raises:
            RoutingError: There are rows for more or fewer prompts than the batch has.
        """
        if self.is_shared:
            return [self.plan[0][layer]] * prompts.num_rows
        if len(self.plan) != prompts.num_rows:
            raise RoutingError(
                f"decisions for {len(self.plan)} prompts were given, the batch has "
                f"{prompts.num_rows}; give a row for each prompt, or one for all"
            )
        return [row[layer] for row in self.plan]


class PathPolicy(Policy):
    """Run one static path for all prompts. Unlike decisions, a path may run layers in any order.

    Raises:
        PathError: The path has a layer that a model of `num_layers` doesn't have.
    """

    reads_prompt = False

    def __init__(self, path: StaticPath, num_layers: int) -> None:
        self.path = path.check(num_layers)

    def decide(self, layer: int, prompts: PromptView) -> Sequence[int]:
        """Return how often the path runs the layer. The driver runs the path itself."""
        return [self.path.layers.count(layer)] * prompts.num_rows


def find_shared_plan(policy: Policy, num_layers: int) -> Plan | None:
    """Return the plan that a policy follows for every prompt; None if plans may differ."""
    if type(policy) is FullPolicy:  # a subclass may decide otherwise
        return (1,) * num_layers
    if type(policy) is FixedPolicy and policy.is_shared:
        return policy.plan[0]
    if type(policy) is PathPolicy:
        return policy.path
    return None


def describe_policy(policy: Policy, num_layers: int) -> str:
    """Describe a policy in a few words: its path, its routers, or the name of its class.

    Args:
        policy: The policy.
        num_layers: L of the model.
    """
    plan = find_shared_plan(policy, num_layers)
    if plan is not None:
        path = plan if isinstance(plan, StaticPath) else StaticPath(get_layers(plan))
        return path.edits(num_layers)
    if type(policy) is FixedPolicy:
        return f"decisions for {len(policy.plan)} prompts"
    if type(policy) is RouterPolicy:
        return _describe_routers(policy)
    return type(policy).__name__


def _describe_routers(policy: RouterPolicy) -> str:
    description = f"routers with {policy.routers.config.num_windows} windows"
    if policy.depth_bias:
        description += f", depth bias {policy.depth_bias:g}"
    if policy.router_penalty is not None:
        description += f", router penalty {policy.router_penalty:g}"
    return description


@dataclass(eq=False)
class RecordingPolicy(Policy):
    """Follow another policy, and record the input that every router would read.

    If the other policy follows target paths, the record is for teacher forcing. If it follows
    routers, the record is what they read at inference.

    Attributes:
        policy: The other policy.
        num_windows: W of the routers.
        filled: After a forward pass, the number of windows that hold tokens, `[B]`.

    Source: Dr.LLM section 3.3; recording instead of training in the loop is ours (D-09).
    """

    policy: Policy
    num_windows: int
    filled: Tensor = field(init=False)
    _means: list[Tensor] = field(default_factory=list, init=False)

    def decide(self, layer: int, prompts: PromptView) -> Tensor | Sequence[int]:
        """Record the windows at this layer and return the other policy's decisions."""
        if layer == 0:
            self._means.clear()
        windows = prompts.windows(self.num_windows)
        self._means.append(windows.means)
        self.filled = windows.filled
        return self.policy.decide(layer, prompts)

    @property
    def means(self) -> Tensor:
        """After a forward pass, every router's input, `[B, L, W, D]` in float32.

        It is on the device of the first layer.
        """
        import torch

        device = self._means[0].device
        return torch.stack([means.to(device) for means in self._means], dim=1)


@POLICIES.register("routers")
class RouterPolicy(Policy):
    """Let trained routers decide: the argmax of a layer's logits on the windows of its input.

    Args:
        routers: One router per layer.
        depth_bias: See `apply_depth_bias`; 0 leaves the logits as they are.
        router_penalty: See `apply_router_penalty`; None leaves the logits as they are. It can't be
            combined with a depth bias.

    Raises:
        ConfigError: Both a depth bias and a router penalty are given, or a value is out of range.

    Source: Dr.LLM section 3.2; `depth_bias` is ours (D-20).
    """

    def __init__(
        self,
        routers: RouterStack,
        *,
        depth_bias: float = 0.0,
        router_penalty: float | None = None,
    ) -> None:
        DepthConfig(depth_bias=depth_bias, router_penalty=router_penalty).check_combination()
        self.routers = routers
        self.depth_bias = depth_bias
        self.router_penalty = router_penalty

    def decide(self, layer: int, prompts: PromptView) -> Tensor | Sequence[int]:
        """Return the routers' decisions, `[B]`."""
        import torch

        windows = prompts.windows(self.routers.config.num_windows)
        device = self.routers.hidden_weight.device
        with without_autocast(device), torch.no_grad():
            logits = self.routers.layer_logits(layer, windows)
            if self.router_penalty is not None:
                logits = apply_router_penalty(logits, self.router_penalty)
            elif self.depth_bias:
                logits = apply_depth_bias(logits, self.depth_bias)
            return logits.argmax(dim=-1)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off inside the block, so that routers and a bypass compute in float32.

    If it is off already, this costs nothing.
    """
    import torch

    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def apply_depth_bias(logits: Tensor, depth_bias: float) -> Tensor:
    """Lower the logit of decision d by `depth_bias · d`, so that each execution costs the same.

    With a bias above 0, the layers whose routers are least sure are skipped first. With a bias
    below 0, layers are repeated. Logits are `[B, 3]`: skip, execute and repeat.

    Source: ours (D-20).
    """
    import torch

    counts = torch.arange(len(Decision), dtype=logits.dtype, device=logits.device)
    return logits - depth_bias * counts


def apply_router_penalty(logits: Tensor, router_penalty: float) -> Tensor:
    """Blend the routers' probabilities with a fixed decision, as published; return `[B, 3]`.

    At a penalty of -1 every layer is skipped. At -0.5 the routers decide alone. At 0.5 every layer
    is executed, and at 1 every layer is repeated. In between, two neighbours are mixed. So the
    routers have a say only from -0.75 to 0. Below -0.75 every layer is skipped, from 0 to 0.75
    every layer is executed, and above 0.75 every layer is repeated.

    Source: Dr.LLM figure 7 and its code for Qwen2 (D-20).
    """
    import torch

    # The probabilities of a decision that is certain, `[3]` each.
    skip, execute, repeat = torch.eye(len(Decision), dtype=logits.dtype, device=logits.device)
    routers = logits.softmax(dim=-1)  # [B, 3]
    if router_penalty <= -0.5:
        return torch.lerp(skip.expand_as(routers), routers, (router_penalty + 1) / 0.5)
    if router_penalty <= 0.5:
        return torch.lerp(routers, execute.expand_as(routers), router_penalty + 0.5)
    return torch.lerp(execute, repeat, (router_penalty - 0.5) / 0.5).expand_as(routers)
