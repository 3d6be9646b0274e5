"""Planners make all decisions before the first layer runs, from what it reads of the prompt.

Reading prompts at a layer, following a planner (`UpFrontPolicy`), the depth bias for wanted
executions, how planners are trained, and the simplest one: a linear map for the whole model.

Axes: N examples or prompts, B rows, D hidden, L layers, C = 3 decisions.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drllm.bisection import Setting, nearest_setting
from drllm.models.routers.depth_control import routes_of
from drllm.models.routing.policies import Policy, PromptView, biased, full_precision
from drllm.models.routing.routed_model import RoutedModel

STEEPEST = 1024.0
"""Greatest bias in either direction; logits of planners lie far within."""
FEWEST_TO_HOLD_OUT = 10


class Planner(nn.Module):
    """Makes all decisions for a prompt from what is read of it at the first layer.

    First-layer inputs are small, and differ in scale from model to model, so every component is
    scaled to the mean 0 and deviation 1 that it has over the training prompts, `[N, D]`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        deviation = inputs.std(dim=0, correction=0)
        self.register_buffer("mean", inputs.mean(dim=0))
        # A component that never varies carries nothing: whatever it is, it counts as its mean.
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.inf))

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return `[B, D]`, scaled."""
        return (inputs - self.mean) / self.deviation

    @abstractmethod
    def likeliest(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return the likeliest decisions `[B, L]`, the bias taken off for each execution."""

    @torch.no_grad()
    def plans(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return decisions `[B, L]`; a row that would skip everything runs the last layer.

        Args:
            inputs: `[B, D]`, from `first_input`.
            depth_bias: The price of an execution; the higher it is, the fewer a row has.
        """
        plans = self.likeliest(inputs, depth_bias).clone()
        plans[plans.sum(dim=1) == 0, -1] = 1
        return plans


class UpFrontPolicy(Policy):
    """Takes all decisions at the first layer, from its pooled input, by a planner on the CPU."""

    def __init__(self, planner: Planner, depth_bias: float = 0.0) -> None:
        self.planner = planner
        self.depth_bias = depth_bias
        self._plans = torch.empty(0, 0, dtype=torch.long)

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one column of the plans."""
        if layer == 0:
            inputs = first_input(prompts).cpu()  # where the planner is
            with full_precision(inputs.device):
                self._plans = self.planner.plans(inputs, self.depth_bias)
        return self._plans[:, layer]


def find_bias(planner: Planner, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias under which prompts run the wanted executions on average.

    What such a planner reads doesn't depend on its decisions, so the mean only falls as the bias
    grows, and no forward pass is needed.

    Source: ours (D-20).
    """

    def mean(bias: float) -> float:
        return float(planner.plans(inputs, bias).sum(dim=1).double().mean())

    return nearest_setting(mean, executions, -STEEPEST, STEEPEST)


# --- reading prompts -----------------------------------------------------------------------------


def first_input(prompts: PromptView) -> Tensor:
    """Return the mean of each prompt's real tokens as a layer reads them, `[B, D]` in float32."""
    return prompts.windows(1).means[:, 0]


def first_inputs(
    routed: RoutedModel, prompts: Sequence[Sequence[int]], *, batch_size: int = 16
) -> Tensor:
    """Return `first_input` at the first layer, where nothing but the embedding has run, `[N, D]`.

    All layers are skipped, of which routing runs the last one all the same; see `recorded`.
    """
    return recorded(routed, prompts, first_input, [0], decision=0, batch_size=batch_size)[:, 0]


def recorded(
    routed: RoutedModel,
    prompts: Sequence[Sequence[int]],
    read: Callable[[PromptView], Tensor],
    layers: Collection[int],
    *,
    decision: int,
    batch_size: int = 16,
) -> Tensor:
    """Return what is read of every prompt at some layers, while all take the same decision.

    Prompts of like length share a batch. The model's policy and its last route stay what they are.

    Returns:
        `[N, layers, …]` on the CPU, in the order of the prompts.

    Raises:
        ConfigError: No prompts, one without tokens, or one longer than the model's context.
    """
    kept: list[Tensor] = []  # batch by batch, layer by layer

    class Recorder(Policy):
        def decide(self, layer: int, prompts: PromptView) -> list[int]:
            if layer in layers:
                kept.append(read(prompts).cpu())
            return [decision] * prompts.num_rows

    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    routes_of(routed, Recorder(), [prompts[row] for row in by_length], batch_size=batch_size)
    starts = range(0, len(kept), len(layers))
    values = torch.cat([torch.stack(kept[at : at + len(layers)], dim=1) for at in starts])
    return values[torch.tensor(by_length).argsort()]


# --- training ------------------------------------------------------------------------------------


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    num_examples: int,
    generator: torch.Generator,
    *,
    num_epochs: int = 100,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    held_out: float = 0.2,
) -> None:
    """Train a module in place by AdamW and freeze it; the same arguments give the same weights.

    The epoch kept is the one after which the loss on examples held out was least, so that a
    baseline is neither cut short nor left to learn its few examples by heart.

    Args:
        module: What is trained.
        loss: Returns the mean loss of the examples at some places, given as `[B]` indices.
        num_examples: How many there are.
        generator: Draws what is held out, and the order of the others in every epoch.
        num_epochs: Passes over the examples.
        learning_rate: At the first step; from there half a cosine leads to 0.
        batch_size: Examples a step.
        held_out: Share of the examples that isn't learned from. With 0, or below 10 examples,
            none is held out and the last epoch counts.
    """
    examples = torch.randperm(num_examples, generator=generator)
    num_held_out = round(held_out * num_examples) if num_examples >= FEWEST_TO_HOLD_OUT else 0
    unseen, learned = examples[:num_held_out], examples[num_held_out:]
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.01)
    num_steps = num_epochs * math.ceil(len(learned) / batch_size)
    step, least, best = 0, math.inf, None
    for _ in range(num_epochs):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for places in torch.split(order, batch_size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
            optimizer.zero_grad()
            loss(places).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        if num_held_out:
            with torch.no_grad():
                found = float(loss(unseen))
            if found < least:
                least, best = found, copy.deepcopy(module.state_dict())
    if best is not None:
        module.load_state_dict(best)
    module.eval().requires_grad_(False)


def linear(
    num_inputs: int, num_outputs: int, generator: torch.Generator | None = None
) -> nn.Linear:
    """Return a linear map with zero bias and Xavier weights of this generator, or zeros."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)  # type: ignore[no-untyped-call]
    nn.init.zeros_(made.bias)
    if generator is None:
        nn.init.zeros_(made.weight)
    else:
        nn.init.xavier_uniform_(made.weight, generator=generator)
    return made


# --- one router for the whole model --------------------------------------------------------------


class SequenceRouter(Planner):
    """Gives the logits of every layer's decision from one linear map of the pooled prompt.

    Source: MindSkip in Router-Tuning (arXiv 2410.13184), changed as D-18 says.
    """

    def __init__(self, inputs: Tensor, num_layers: int) -> None:
        super().__init__(inputs)
        self.num_layers = num_layers
        # Zeros: of fewer prompts than components, training would never move what random weights
        # say about the others.
        self.linear = linear(inputs.shape[1], num_layers * 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of skip, execute and repeat, `[B, D]` to `[B, L, C]`."""
        logits: Tensor = self.linear(self.scaled(inputs))
        return logits.view(-1, self.num_layers, 3)

    def likeliest(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """See `Planner.likeliest`."""
        return biased(self(inputs), depth_bias).argmax(dim=-1)


def train_sequence_router(
    inputs: Tensor, labels: Tensor, *, seed: int = 0, **settings: Any
) -> SequenceRouter:
    """Train a router on target paths, by cross-entropy at every layer.

    Executions are set by a bias afterwards, which moves all layers alike, so the decisions' classes
    are not weighted: with the routers' weights, near 1, little would change. Inputs are
    `first_inputs` of the targets' prompts, labels their decisions `[N, L]`; settings are `fit`'s.
    """
    router = SequenceRouter(inputs, labels.shape[1])

    def loss(places: Tensor) -> Tensor:
        logits = router(inputs[places])  # [B, L, C]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[places].flatten())

    fit(router, loss, len(labels), torch.Generator().manual_seed(seed), **settings)
    return router
