"""Logit lens: a model's final norm and output head applied after any of its layers.

The two are found by rule, and checked to be all that lies between the last layer and the logits.

Axes: N states, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of, hooked
from drllm.models.routing.injection import Driver
from drllm.models.routing.routed_model import RoutedModel

NUM_TOKENS = 8  # of the check; more than one, since a padding token's embedding may be all zeros
RELATIVE_TOLERANCE = 1e-3
"""How far the logits of the check may differ from the model's own, as a share of the largest: the
same two modules give them, so all but the last bits agree; a missed cap or scale is far above."""


class LogitLens:
    """The final norm and the output head of a model.

    The norm is the module that runs after the last layer among the direct children of the module
    whose loop runs the layers; a model may have none. A few tokens are run through the untouched
    model, whatever its policy, to find it, and to compare the result with the model's own logits.
    One without an output head, or that makes its logits in another way (a cap, a scale, a
    projection in between), is an ArchitectureError.
    """

    def __init__(self, routed: RoutedModel) -> None:
        model = base_of(routed.model)
        self.head: nn.Module = model.get_output_embeddings()
        if self.head is None:
            raise ArchitectureError(
                f"{type(model).__name__} has no output head, so a hidden state has no logits"
            )
        states: list[Tensor] = []
        after: list[nn.Module] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        def note(module: nn.Module, _inputs: Any) -> None:
            if states:
                after.append(module)

        layers = routed.injection.layers
        others = [child for child in routed.injection.decoder.children() if child is not layers]
        hooks = [layers[-1].register_forward_hook(keep)]
        hooks += [child.register_forward_pre_hook(note) for child in others]
        with hooked(hooks), torch.no_grad(), routed.injection.driven_by(Driver()):
            tokens = torch.arange(NUM_TOKENS, device=routed.model.device)[None]
            expected = routed.model(input_ids=tokens, use_cache=False).logits[0]
        self.norm: nn.Module = after[0] if after else nn.Identity()
        with torch.no_grad():
            difference = float((self.logits(states[0][0]) - expected).abs().max())
        if len(after) > 1 or not difference <= RELATIVE_TOLERANCE * float(expected.abs().max()):
            raise ArchitectureError(
                f"{type(model).__name__} makes its logits with more than a final norm and a head, "
                f"so the logits after an earlier layer aren't known"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, `[N, D]` to `[N, V]`, at least in float32."""
        logits: Tensor = self.head(self.norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
