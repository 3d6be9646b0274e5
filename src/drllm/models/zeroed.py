"""Which weights are zeros in a checkpoint that leaves out a layer's attention or MLP.

A stock class computes every sublayer, so one that is left out gets a last linear map of zeros,
weight and bias, and adds nothing. Which weights these are is tried out, not looked up by name.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drllm.errors import ArchitectureError
from drllm.models.routing.injection import Driver, Injection
from drllm.paths import ALL, MLP, Step


def zeroed_weights(injection: Injection, steps: Sequence[Step], tokens: Tensor) -> list[set[str]]:
    """Return for each step the names, within its layer, of the weights to write as zeros.

    `tokens` `[1, T]` pass the model once, so that sublayers are tried on states that they meet.
    """
    left_out: list[list[nn.Module]] = []
    for step in steps:
        if step.run == ALL:
            left_out.append([])
        elif step.run == MLP:
            left_out.append([injection.sublayers.attention[step.layer]])
        else:
            left_out.append(injection.sublayers.mlps[step.layer])
    trials = {module: _Trial(module) for modules in left_out for module in modules}
    with torch.no_grad(), injection.driven_by(Driver()):
        if trials:
            injection.model(tokens, use_cache=False)
        found = {module: trial.last_map() for module, trial in trials.items()}
    zeroed = []
    for step, modules in zip(steps, left_out, strict=True):
        parts = {part: name for name, part in injection.layers[step.layer].named_modules()}
        zeroed.append({f"{parts[m]}.{name}" for m in modules for name in found[m]})
    return zeroed


class _Trial:
    """Watches one call of a sublayer, and repeats it with other weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.call: tuple[Any, ...] = ()
        self.places: dict[str, int] = {}  # name of a weight → when its module was computed
        self.handles = [module.register_forward_hook(self._keep, with_kwargs=True)]
        for name, part in module.named_modules():
            self.handles.append(part.register_forward_hook(partial(self._computed, name)))

    def _keep(self, _module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        self.call = args, kwargs

    def _computed(self, name: str, part: nn.Module, _inputs: Any, _output: Any) -> None:
        for own, _ in part.named_parameters(recurse=False):
            self.places[f"{name}.{own}".lstrip(".")] = len(self.places)

    def last_map(self) -> set[str]:
        """Return the fewest weights, the last ones, whose zeros make the output zero.

        All are zeros first. From the first that is computed to the last, each gets its values back
        unless the output is then other than zero. What isn't computed (an expert that no token goes
        to) can't be tried, and stays zero.
        """
        for handle in self.handles:
            handle.remove()
        weights = dict(self.module.named_parameters())
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        is_exact = all(weight.is_floating_point() for weight in weights.values())
        if not is_exact or not self._gives_zeros(zeros):
            raise ArchitectureError(
                f"{type(self.module).__name__} doesn't give zeros where all of its weights are "
                f"zeros, so no checkpoint can leave it out; load the model without quantisation, "
                f"or give a path of whole layers"
            )
        for name in sorted(self.places, key=self.places.__getitem__):
            without = {other: zero for other, zero in zeros.items() if other != name}
            if self._gives_zeros(without):
                zeros = without
        return set(zeros)

    def _gives_zeros(self, zeros: dict[str, Tensor]) -> bool:
        output = functional_call(self.module, zeros, *self.call)
        return not bool((output[0] if isinstance(output, tuple) else output).any())
