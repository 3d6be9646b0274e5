"""Find the down-projection of each layer's MLP, and how its output enters the layer's output.

A refit solves a down-projection anew (tuning/refit.py). This is exact only where the projection's
output is added to the state, maybe times a factor: 1 in most models, a constant in Granite, a gate
that differs from token to token at a shared expert of Qwen2-MoE. Where a norm follows the MLP, as
in Gemma 2 and 3, it isn't added. No table of models says which case a layer is: runs with a changed
output show it.

Axes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from drllm.errors import ArchitectureError
from drllm.models.base.layers import (
    MAP_ROWS,
    MAP_TOKENS,
    evaluation_mode,
    find_layers,
    one_token,
    temporary_hooks,
    unwrap_peft,
)
from drllm.models.base.sublayers import find_sublayers, first_argument, first_output

STEPS = (0.0, 1.0, 8.0)
"""The multiples of a random vector that are added to a projection's output. The layer's output has
to move by the same multiples, times the factor."""
TOLERANCE = 0.05
"""Maximum error of a layer's movement, as a share of the movement. bfloat16 rounds away 2 %; a norm
behind the MLP makes an error of 50 % and more."""
SAME_FACTOR = 0.01  # maximum relative difference between the factors of tokens that count as equal


@dataclass(frozen=True, slots=True)
class DownProjection:
    """The last linear map of a layer's MLP.

    Attributes:
        layer: The layer.
        name: The map's name, such as `14.mlp.down_proj`.
        module: The map, an `nn.Linear` or a `Conv1D`.
        factor: What the map's output is multiplied by before it is added to the state; None if this
            differs from token to token.
    """

    layer: int
    name: str
    module: nn.Module
    factor: float | None

    @property
    def weight(self) -> Tensor:
        """The map's weight, `[D, F]`; `[F, D]` of a `Conv1D`."""
        assert isinstance(self.module.weight, Tensor)
        return self.module.weight


def find_down_projections(model: Any, layers: Sequence[int]) -> dict[int, DownProjection]:
    """Find the down-projections of some layers, by layer.

    Args:
        model: A model that isn't routed, or whose routing is switched off.
        layers: The layers.

    Raises:
        ArchitectureError: A layer has no MLP with a down-projection of its own, such as a layer of
            experts whose weights are packed; or more happens to the projection's output than a
            multiplication before it is added to the state.
    """
    name = type(unwrap_peft(model)).__name__
    decoder, all_layers = find_layers(model)
    candidates = _find_last_maps(model)
    probes: dict[int, _Probe] = {}
    for layer in layers:
        if layer not in candidates:
            raise ArchitectureError(
                f"layer {layer} of {name} has no linear map that ends its MLP (weights of experts "
                f"are packed into one tensor), so it can't be refitted"
            )
        map_name, module = candidates[layer]
        probes[layer] = _Probe(name, layer, map_name, module)
    for step in STEPS:
        hooks: list[RemovableHandle] = []
        for layer, probe in probes.items():
            hooks += probe.register_hooks(all_layers[layer], step)
        _run_batch(model, decoder, hooks)
    return {layer: probe.result() for layer, probe in probes.items()}


def _find_last_maps(model: Any) -> dict[int, tuple[str, nn.Module]]:
    """Return the linear map that each layer's MLP runs last, with its name, by layer.

    Only maps to the size of the state that read every token count. Experts read some of the tokens.
    """
    decoder, layers = find_layers(model)
    width = model.config.get_text_config().hidden_size
    last_maps: dict[int, tuple[str, nn.Module]] = {}

    def note_last(layer: int, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.shape[-1] != width:
            return
        # Some models run a shared expert on all tokens as one long row, so rows aren't compared.
        if output.numel() == MAP_ROWS * MAP_TOKENS * width:
            last_maps[layer] = (name, module)

    hooks = []
    for index, (layer, sublayers) in enumerate(zip(layers, find_sublayers(model), strict=True)):
        in_mlp = {id(part) for mlp in sublayers.mlps for part in mlp.modules()}
        for place, module in layer.named_modules():
            is_map = isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in place
            if is_map and id(module) in in_mlp:
                name = f"{index}.{place.removesuffix('.base_layer')}"
                hooks.append(module.register_forward_hook(partial(note_last, index, name)))
    _run_batch(model, decoder, hooks)
    return last_maps


@dataclass
class _Probe:
    """Measures how a layer's output follows the output of its down-projection."""

    model_name: str
    layer: int
    map_name: str
    module: nn.Module
    # The layer's output `[B, T, D]` for each of `STEPS`.
    outputs: list[Tensor] = field(default_factory=list)

    def register_hooks(self, layer: nn.Module, step: float) -> list[RemovableHandle]:
        """Register the hooks of one run, in which `step` times a vector is added to the output."""
        return [
            layer.register_forward_pre_hook(self._put_noise, with_kwargs=True),
            layer.register_forward_hook(self._keep_output),
            self.module.register_forward_hook(partial(self._move_output, step)),
        ]

    def result(self) -> DownProjection:
        """Return the down-projection with its factor, from the outputs of all runs."""
        start = self.outputs[0]
        direction = self._draw(start, "direction").double()
        movements = [(output - start).double() / step for output, step in self._moved()]
        # The longest movement is rounded least.
        factors = (movements[-1] * direction).sum(dim=-1) / direction.square().sum(dim=-1)  # [B, T]
        expected = factors[..., None] * direction
        for movement in movements:
            error = (movement - expected).norm() / expected.norm()
            if not error < TOLERANCE:  # NaN is refused too
                raise ArchitectureError(
                    f"layer {self.layer} of {self.model_name} doesn't add the output of "
                    f"{self.map_name} to its state (a norm follows its MLP), so it can't be "
                    f"refitted"
                )
        mean = float(factors.mean())
        is_same = float((factors - mean).abs().max()) <= SAME_FACTOR * abs(mean)
        factor = mean if is_same else None
        if factor is not None and abs(factor - 1) <= SAME_FACTOR:
            factor = 1.0
        return DownProjection(self.layer, self.map_name, self.module, factor)

    def _moved(self) -> list[tuple[Tensor, float]]:
        """Return the outputs of the runs with a changed projection, each with its step."""
        return list(zip(self.outputs[1:], STEPS[1:], strict=True))

    def _put_noise(self, _layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replace the layer's input by noise, the same in each run."""
        noise = self._draw(first_argument(args, kwargs), "input")
        if args:
            return (noise, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": noise}

    def _move_output(self, step: float, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Add a vector to the output of the projection at each token."""
        return output + step * self._draw(output, "direction")

    def _keep_output(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self.outputs.append(first_output(output))

    def _draw(self, like: Tensor, use: str) -> Tensor:
        """Return random numbers of a tensor's shape, the same for each call with the same use."""
        seed = 2 * self.layer + (use == "direction")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)


def _run_batch(model: Any, decoder: nn.Module, hooks: list[RemovableHandle]) -> None:
    """Run a small batch through the model with hooks, and remove the hooks."""
    ids = one_token(model).expand(MAP_ROWS, MAP_TOKENS)
    with temporary_hooks(hooks), torch.no_grad(), evaluation_mode(decoder):
        decoder(input_ids=ids, use_cache=False)
