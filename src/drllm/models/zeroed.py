"""Which weights are zeros in a checkpoint that leaves out a layer's attention or MLP.

A stock class computes every sublayer, so one that is left out gets weights of zeros and adds
nothing. That zeros do so is tried out on states that it meets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drllm.errors import ArchitectureError
from drllm.models.routing.injection import Driver, Injection
from drllm.paths import ALL, MLP, Step


def zeroed_weights(injection: Injection, steps: Sequence[Step], tokens: Tensor) -> list[set[str]]:
    """Return for each step the names, within its layer, of the weights to write as zeros.

    `tokens` `[1, T]` pass the model once. A sublayer that doesn't give zeros where all of its
    weights are zeros is an ArchitectureError.
    """
    left_out: list[list[nn.Module]] = []
    for step in steps:
        if step.run == ALL:
            left_out.append([])
        elif step.run == MLP:
            left_out.append([injection.sublayers.attention[step.layer]])
        else:
            left_out.append(injection.sublayers.mlps[step.layer])
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        calls[module] = args, kwargs

    modules = list(dict.fromkeys(module for own in left_out for module in own))
    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    with torch.no_grad(), injection.driven_by(Driver()):
        if modules:
            injection.model(tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        for module in modules:
            _check_silent(module, calls[module])
    zeroed = []
    for step, own in zip(steps, left_out, strict=True):
        parts = {part: name for name, part in injection.layers[step.layer].named_modules()}
        zeroed.append({f"{parts[m]}.{name}" for m in own for name, _ in m.named_parameters()})
    return zeroed


def _check_silent(module: nn.Module, call: tuple[Any, Any]) -> None:
    weights = dict(module.named_parameters())
    is_silent = all(weight.is_floating_point() for weight in weights.values())
    if is_silent:
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        output = functional_call(module, zeros, *call)
        is_silent = not bool((output[0] if isinstance(output, tuple) else output).any())
    if not is_silent:
        raise ArchitectureError(
            f"{type(module).__name__} doesn't give zeros where all of its weights are zeros, so no "
            f"checkpoint can leave it out; load the model without quantisation, or give a path of "
            f"whole layers"
        )
