"""A linear map for the whole model: all decisions, from the mean of the prompt's embeddings.

Source: MindSkip in Router-Tuning (arXiv 2410.13184), changed as D-18 of docs/differences.md says.

Axes: N examples or prompts, B rows, D hidden, L layers, C = 3 decisions.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drllm.bisection import Setting, nearest_setting
from drllm.models.routers.depth_control import recorded
from drllm.models.routing.policies import Policy, PromptView, biased, full_precision
from drllm.models.routing.routed_model import RoutedModel

STEEPEST = 1024.0
"""Greatest bias in either direction; the router's logits lie far within."""
FEWEST_TO_HOLD_OUT = 10


class SequenceRouter(nn.Module):
    """Gives the logits of every layer's decision from one linear map of the pooled prompt.

    First-layer inputs are small, and differ in scale from model to model, so every component is
    scaled to the mean 0 and deviation 1 that it has over the training prompts, `[N, D]`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: Tensor, num_layers: int) -> None:
        super().__init__()
        deviation = inputs.std(dim=0, correction=0)
        self.register_buffer("mean", inputs.mean(dim=0))
        # A component that never varies carries nothing: whatever it is, it counts as its mean.
        self.register_buffer("deviation", torch.where(deviation > 0, deviation, torch.inf))
        self.num_layers = num_layers
        # Zeros, without a draw: with fewer prompts than components, training would never move
        # random weights in the directions that no prompt has.
        self.linear = nn.utils.skip_init(nn.Linear, inputs.shape[1], num_layers * 3)  # type: ignore[no-untyped-call]
        for weights in self.linear.parameters():
            nn.init.zeros_(weights)

    def scaled(self, inputs: Tensor) -> Tensor:
        """Return `[B, D]`, scaled."""
        return (inputs - self.mean) / self.deviation

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of skip, execute and repeat, `[B, D]` to `[B, L, C]`."""
        logits: Tensor = self.linear(self.scaled(inputs))
        return logits.view(-1, self.num_layers, 3)

    @torch.no_grad()
    def plans(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return decisions `[B, L]` of what `first_input` gives, `[B, D]`.

        The higher the bias, the price of an execution, the fewer a row has; one that would skip
        everything runs the last layer.
        """
        plans = biased(self(inputs), depth_bias).argmax(dim=-1)
        plans[plans.sum(dim=1) == 0, -1] = 1
        return plans


class SequenceRouterPolicy(Policy):
    """Takes all decisions at the first layer, from its pooled input, by a router on the CPU."""

    def __init__(self, router: SequenceRouter, depth_bias: float = 0.0) -> None:
        self.router = router
        self.depth_bias = depth_bias
        self._plans = torch.empty(0, 0, dtype=torch.long)

    def decide(self, layer: int, prompts: PromptView) -> Tensor:
        """Return one column of the plans."""
        if layer == 0:
            inputs = first_input(prompts).cpu()  # where the router is
            with full_precision(inputs.device):
                self._plans = self.router.plans(inputs, self.depth_bias)
        return self._plans[:, layer]


def find_bias(router: SequenceRouter, inputs: Tensor, executions: float) -> Setting:
    """Find the depth bias under which prompts run the wanted executions on average.

    What the router reads doesn't depend on its decisions, so no forward pass is needed.

    Source: ours (D-20).
    """

    def mean(bias: float) -> float:
        return float(router.plans(inputs, bias).sum(dim=1).double().mean())

    return nearest_setting(mean, executions, -STEEPEST, STEEPEST)


def first_input(prompts: PromptView) -> Tensor:
    """Return the mean of each prompt's real tokens as a layer reads them, `[B, D]` in float32."""
    return prompts.windows(1).means[:, 0]


def first_inputs(routed: RoutedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return `first_input` at the first layer, where nothing but the embedding has run, `[N, D]`.

    All layers are skipped, of which routing runs the last one all the same; see `recorded`.
    """
    return recorded(routed, prompts, first_input, [0], decision=0)[:, 0]


def train_sequence_router(
    inputs: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    num_epochs: int = 100,
    learning_rate: float = 3e-3,
    batch_size: int = 16,
    held_out: float = 0.2,
) -> SequenceRouter:
    """Train a router on target paths, by AdamW on the cross-entropy at every layer; then freeze it.

    Classes are not weighted, since a bias sets the executions afterwards. The epoch kept is the one
    after which the loss on examples held out was least, so that the baseline is neither cut short
    nor left to learn its few examples by heart. With a share of 0 held out, or below 10 examples,
    none is and the last epoch counts. From the learning rate half a cosine leads to 0. The seed
    draws what is held out, and the order of the others in every epoch. Inputs are `first_inputs` of
    the targets' prompts, labels their decisions `[N, L]`.
    """
    router = SequenceRouter(inputs, labels.shape[1])
    generator = torch.Generator().manual_seed(seed)

    def loss(places: Tensor) -> Tensor:
        logits = router(inputs[places])  # [B, L, C]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[places].flatten())

    examples = torch.randperm(len(labels), generator=generator)
    num_held_out = round(held_out * len(labels)) if len(labels) >= FEWEST_TO_HOLD_OUT else 0
    unseen, learned = examples[:num_held_out], examples[num_held_out:]
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.01)
    num_steps = num_epochs * math.ceil(len(learned) / batch_size)
    step, least, best = 0, math.inf, None
    [group] = optimizer.param_groups
    for _ in range(num_epochs):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for places in torch.split(order, batch_size):
            group["lr"] = learning_rate * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
            optimizer.zero_grad()
            loss(places).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        if num_held_out:
            with torch.no_grad():
                found = float(loss(unseen))
            if found < least:
                least, best = found, copy.deepcopy(router.state_dict())
    if best is not None:
        router.load_state_dict(best)
    return router.eval().requires_grad_(False)
