"""Trained baseline: one router for the whole model, reading the sequence before the first layer.

Axes: N targets, B rows, D hidden, L layers, C = 3 decisions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drllm.evaluation.baselines.fitting.training import FitSettings, fit
from drllm.evaluation.baselines.fitting.up_front import Standardise, with_one_execution
from drllm.models.routing.policies import biased
from drllm.paths import Decision


class SequenceRouter(nn.Module):
    """Gives the logits of every layer's decision from one linear map of the pooled prompt.

    MindSkip puts one linear map of the mean hidden state before every block it may skip, and
    trains it with the language-model loss and a penalty on what runs. This one reads the same mean
    once, before the first layer, for all layers, chooses among skip, execute and repeat, and
    learns the targets that the routers learn. It shows what knowing the prompt's tokens, but
    nothing that a layer made of them, is worth.

    Args:
        inputs: `[N, D]` of the training prompts, for their scale.
        num_layers: L.

    Source: MindSkip in Router-Tuning (arXiv 2410.13184), as changed above.
    """

    def __init__(self, inputs: Tensor, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.scale = Standardise(inputs)
        # Zeros: of fewer prompts than components, training would never move what random weights
        # say about the others.
        self.linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, inputs.shape[1], num_layers * len(Decision)
        )
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of skip, execute and repeat, `[B, D]` to `[B, L, C]`."""
        logits: Tensor = self.linear(self.scale(inputs))
        return logits.view(-1, self.num_layers, len(Decision))

    @torch.no_grad()
    def plans(self, inputs: Tensor, depth_bias: float) -> Tensor:
        """Return the likeliest decisions `[B, L]`, each execution charged a price."""
        return with_one_execution(biased(self(inputs), depth_bias).argmax(dim=-1))


def train_sequence_router(
    inputs: Tensor, labels: Tensor, settings: FitSettings | None = None
) -> SequenceRouter:
    """Train a router on target paths, by cross-entropy at every layer.

    Executions are set by a bias afterwards, which moves all layers alike, so the decisions' classes
    are not weighted: with the routers' weights, near 1, little would change.

    Args:
        inputs: `[N, D]` from `first_inputs`, of the targets' prompts.
        labels: `[N, L]` target decisions.
        settings: Of the training.
    """
    settings = settings or FitSettings()
    generator = torch.Generator().manual_seed(settings.seed)
    router = SequenceRouter(inputs, labels.shape[1])

    def loss(places: Tensor) -> Tensor:
        logits = router(inputs[places])  # [B, L, C]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[places].flatten())

    fit(router, loss, len(labels), settings, generator)
    return router.eval().requires_grad_(False)
