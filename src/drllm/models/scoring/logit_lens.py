"""Logit lens: apply a model's final norm and output head to the states after any layer.

The lens finds the norm and the head by a rule, for any model. It then checks that nothing else lies
between the last layer and the logits.

Axes: N states, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drllm.errors import ArchitectureError
from drllm.model.layers import temporary_hooks, unwrap_peft
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.injection import Driver

NUM_TOKENS = 8  # number of tokens for the check; a padding token alone may have zeros as embedding
RELATIVE_TOLERANCE = 1e-3
"""Maximum difference between the lens' logits and the model's own, as a share of the largest logit.
The same two modules compute both, so only the last bits differ. A model that caps or scales its
logits differs far more."""


class LogitLens:
    """The final norm and the output head of a model.

    The norm is a sibling of the list of layers, and runs after the last layer. A model may have no
    norm. To find it, a few tokens run through the model without routing. Then the lens' logits are
    compared with the model's own.

    Raises:
        ArchitectureError: The model has no output head, or does more between the last layer and the
            logits, such as a cap, a scale or a projection.
    """

    def __init__(self, routed: RoutedModel) -> None:
        model = unwrap_peft(routed.model)
        name = type(model).__name__
        self.head: nn.Module = model.get_output_embeddings()
        if self.head is None:
            raise ArchitectureError(f"{name} has no output head, so a hidden state has no logits")
        trace = _trace(routed)
        self.norm: nn.Module = trace.modules[0] if trace.modules else nn.Identity()
        with torch.no_grad():
            difference = float((self.logits(trace.last_state) - trace.logits).abs().max())
        tolerance = RELATIVE_TOLERANCE * float(trace.logits.abs().max())
        if len(trace.modules) > 1 or not difference <= tolerance:  # a NaN is refused too
            raise ArchitectureError(
                f"{name} makes its logits with more than a final norm and a head, "
                f"so the logits after an earlier layer aren't known"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits `[N, V]` of hidden states `[N, D]`, in float32 or a wider dtype."""
        logits: Tensor = self.head(self.norm(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class _Trace:
    """What happens after the last layer in a pass without routing."""

    last_state: Tensor  # [N, D], the last layer's output
    modules: list[nn.Module]  # siblings of the layers that run after the last layer, in order
    logits: Tensor  # [N, V]


def _trace(routed: RoutedModel) -> _Trace:
    """Run a few tokens through the model without routing, and note what follows the last layer."""
    states: list[Tensor] = []
    modules: list[nn.Module] = []

    def keep_state(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    def note_module(module: nn.Module, _inputs: Any) -> None:
        if states:
            modules.append(module)

    layers = routed.injection.layers
    children = [child for child in routed.injection.decoder.children() if child is not layers]
    hooks = [layers[-1].register_forward_hook(keep_state)]
    hooks += [child.register_forward_pre_hook(note_module) for child in children]
    with temporary_hooks(hooks), torch.no_grad(), routed.injection.driven_by(Driver()):
        tokens = torch.arange(NUM_TOKENS, device=routed.model.device)[None]
        logits = routed.model(input_ids=tokens, use_cache=False).logits[0]
    return _Trace(states[0][0], modules, logits)
