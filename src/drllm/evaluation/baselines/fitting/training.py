"""The training of the baselines that are trained: initial weights, steps, and the best epoch.

The epoch kept is the one that is best on examples held out, so that a baseline is neither cut
short nor left to learn its few examples by heart.

Axes: B examples of a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FEWEST_TO_HOLD_OUT = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How a baseline is trained.

    Attributes:
        num_epochs: Maximum passes over the examples.
        learning_rate: At the first step; from there half a cosine leads to 0.
        weight_decay: Of AdamW.
        batch_size: Examples a step.
        held_out: Share of the examples that isn't learned from: the weights kept are those of the
            epoch after which their loss was least. With 0, or below 10 examples, none is held out
            and the last epoch counts.
        seed: Of initial weights, order and held-out examples.
    """

    num_epochs: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    batch_size: int = 16
    held_out: float = 0.2
    seed: int = 0


def fit(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    num_examples: int,
    settings: FitSettings,
    generator: torch.Generator,
) -> None:
    """Train a module in place; the same arguments give the same weights.

    Args:
        module: What is trained.
        loss: Returns the mean loss of the examples at some places, given as `[B]` indices.
        num_examples: How many there are.
        settings: The settings.
        generator: Draws what is held out, and the order of the others in every epoch.
    """
    examples = torch.randperm(num_examples, generator=generator)
    num_held_out = round(settings.held_out * num_examples)
    if num_examples < FEWEST_TO_HOLD_OUT:
        num_held_out = 0
    held_out, learned = examples[:num_held_out], examples[num_held_out:]
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    num_steps = settings.num_epochs * math.ceil(len(learned) / settings.batch_size)
    step, least, best = 0, math.inf, None
    for _ in range(settings.num_epochs):
        order = learned[torch.randperm(len(learned), generator=generator)]
        for places in torch.split(order, settings.batch_size):
            for group in optimizer.param_groups:
                share = 0.5 * (1 + math.cos(math.pi * step / num_steps))
                group["lr"] = settings.learning_rate * share
            optimizer.zero_grad()
            loss(places).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
        if num_held_out:
            with torch.no_grad():
                found = float(loss(held_out))
            if found < least:
                least, best = found, copy.deepcopy(module.state_dict())
    if best is not None:
        module.load_state_dict(best)


def linear(num_inputs: int, num_outputs: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear map with Xavier weights and zero bias, drawn from this generator alone."""
    made: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, num_inputs, num_outputs
    )
    nn.init.xavier_uniform_(made.weight, generator=generator)
    nn.init.zeros_(made.bias)
    return made
