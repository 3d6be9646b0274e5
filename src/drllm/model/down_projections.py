"""Find the down-projection of each layer's MLP, and how its output enters the layer's output.

A refit solves a down-projection anew (prune/repairs/refit.py). In most models the projection's
output is added to the state, maybe times a factor: 1 mostly, a constant in Granite, a gate that
differs from token to token at a shared expert of Qwen2-MoE. In others a norm follows the MLP, and
the norm's output is added: Gemma 2 and 3, GLM-4, OLMo 2 and 3, EXAONE 4. No table of models says
which case a layer is: runs with a changed output show it.

Axes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drllm.errors import ArchitectureError
from drllm.model.layers import (
    MAP_ROWS,
    MAP_TOKENS,
    find_layers,
    list_linear_maps,
    list_norms,
    parse_layer,
    run_batch,
    unwrap_peft,
)
from drllm.model.sublayers import (
    Sublayers,
    find_sublayers,
    first_argument,
    first_output,
)

STEPS = (0.0, 1.0, 8.0)
"""The multiples of a random vector that are added to a projection's output. The layer's output has
to move by the same multiples, times the factor. The vector is as long as the layer's output, since
the output of bfloat16 is rounded to a share of its own size."""
TOLERANCE = 0.05
"""Maximum error of a layer's movement, as a share of the movement. bfloat16 rounds away 2 %; a norm
behind the MLP makes an error of 50 % and more."""
SAME_FACTOR = 0.01  # maximum relative difference between the factors of tokens that count as equal


@dataclass(frozen=True, slots=True, eq=False)
class PostNorm:
    """The norm behind a layer's MLP: it returns g ⊙ m / rms(m).

    Attributes:
        name: Its name, such as `14.post_feedforward_layernorm`.
        module: The module.
        gain: g, `[D]` in float64 on the CPU.
        epsilon: What is added to the mean square of m.
    """

    name: str
    module: nn.Module
    gain: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class DownProjection:
    """The last linear map of a layer's MLP.

    Attributes:
        layer: The layer.
        name: The map's name, such as `14.mlp.down_proj`.
        module: The map, an `nn.Linear` or a `Conv1D`.
        factor: What the map's output, or the norm's, is multiplied by before it is added to the
            state; None if this differs from token to token.
        norm: The norm that the MLP's output goes through before it is added; None without one.
    """

    layer: int
    name: str
    module: nn.Module
    factor: float | None
    norm: PostNorm | None = None

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
            experts whose weights are packed; or more happens to the projection's output than a norm
            or a multiplication before it is added to the state.
    """
    name = type(unwrap_peft(model)).__name__
    decoder, all_layers = find_layers(model)
    ends = _find_ends(model)
    probes: dict[int, _Probe] = {}
    for layer in layers:
        if layer not in ends:
            raise ArchitectureError(
                f"layer {layer} of {name} has no linear map that ends its MLP (weights of experts "
                f"are packed into one tensor), so it can't be refitted"
            )
        probes[layer] = _Probe(name, layer, ends[layer])
    for step in STEPS:
        hooks: list[RemovableHandle] = []
        for layer, probe in probes.items():
            hooks += probe.register_hooks(all_layers[layer], step)
        run_batch(model, decoder, hooks)
    return {layer: probe.result() for layer, probe in probes.items()}


@dataclass
class _MlpEnd:
    """How the MLP of a layer ends.

    Attributes:
        map_name: The name of the linear map that runs last.
        map: This map.
        norm_name: The name of the norm that reads the MLP's output; empty if there is none.
        norm: This norm.
    """

    map_name: str
    map: nn.Module
    norm_name: str = ""
    norm: nn.Module | None = None


def _find_ends(model: Any) -> dict[int, _MlpEnd]:
    """Return how each layer's MLP ends, by layer.

    Only linear maps to the size of the state that read every token count. Experts read some of the
    tokens.
    """
    decoder, _ = find_layers(model)
    width = model.config.get_text_config().hidden_size
    watches = [_EndWatch(width, sublayers) for sublayers in find_sublayers(model)]
    hooks: list[RemovableHandle] = []
    for watch in watches:
        hooks += watch.watch_mlps()
    for name, module in list_linear_maps(model).items():
        hooks += watches[parse_layer(name)].watch_map(name, module)
    for name, module in list_norms(model).items():
        hooks += watches[parse_layer(name)].watch_norm(name, module)
    run_batch(model, decoder, hooks)
    return {layer: watch.end for layer, watch in enumerate(watches) if watch.end is not None}


class _EndWatch:
    """Watches the modules of one layer while a batch passes."""

    def __init__(self, width: int, sublayers: Sublayers) -> None:
        self.width = width
        self.mlps = sublayers.mlps
        self.end: _MlpEnd | None = None
        self._mlp_output: Any = None

    def watch_mlps(self) -> Iterator[RemovableHandle]:
        """Register the hooks of the MLPs, and yield their handles."""
        for mlp in self.mlps:
            yield mlp.register_forward_hook(self._after_mlp)

    def watch_map(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook of a linear map if it is in an MLP, and yield its handle."""
        for mlp in self.mlps:
            if module in mlp.modules():
                yield module.register_forward_hook(partial(self._after_map, name))

    def watch_norm(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hook of a norm, and yield its handle."""
        yield module.register_forward_pre_hook(partial(self._before_norm, name))

    def _after_map(self, name: str, module: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.shape[-1] != self.width:
            return
        # Some models run a shared expert on all tokens as one long row, so rows aren't compared.
        if output.numel() == MAP_ROWS * MAP_TOKENS * self.width:
            self.end = _MlpEnd(name, module)

    def _after_mlp(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._mlp_output = first_output(output)

    def _before_norm(self, name: str, module: nn.Module, args: Any) -> None:
        """Note a norm that reads what the MLP has returned."""
        if self.end is not None and args and args[0] is self._mlp_output:
            self.end.norm_name = name
            self.end.norm = module


@dataclass
class _Probe:
    """Measures how a layer's output follows the output of its MLP, or of the norm behind it."""

    model_name: str
    layer: int
    end: _MlpEnd
    # The layer's output `[B, T, D]` for each of `STEPS`, on the CPU, since MPS has no float64.
    outputs: list[Tensor] = field(default_factory=list)
    norm_input: Tensor | None = None  # `[B, T, D]`, and the norm's output for it
    norm_output: Tensor | None = None

    def register_hooks(self, layer: nn.Module, step: float) -> Iterator[RemovableHandle]:
        """Register the hooks of one run, in which `step` times a vector is added."""
        yield layer.register_forward_pre_hook(self._put_noise, with_kwargs=True)
        yield layer.register_forward_hook(self._keep_output)
        if self.end.norm is None:
            yield self.end.map.register_forward_hook(partial(self._move_output, step))
            return
        if step == 0:
            yield self.end.norm.register_forward_hook(self._keep_norm)
        yield self.end.norm.register_forward_hook(partial(self._move_output, step))

    def result(self) -> DownProjection:
        """Return the down-projection with its factor, from the outputs of all runs."""
        start = self.outputs[0]
        direction = self._direction(start).double()
        movements = [(output - start).double() / step for output, step in self._moved()]
        # The longest movement is rounded least.
        factors = (movements[-1] * direction).sum(dim=-1) / direction.square().sum(dim=-1)  # [B, T]
        expected = factors[..., None] * direction
        for movement in movements:
            error = (movement - expected).norm() / expected.norm()
            if not error < TOLERANCE:  # NaN is refused too
                raise self._error("adds more to its state than the output of its MLP or of a norm")
        mean = float(factors.mean())
        is_same = float((factors - mean).abs().max()) <= SAME_FACTOR * abs(mean)
        factor = mean if is_same else None
        if factor is not None and abs(factor - 1) <= SAME_FACTOR:
            factor = 1.0
        norm = self._measure_norm()
        if norm is not None and factor is None:
            raise self._error("multiplies the output of the norm behind its MLP token by token")
        return DownProjection(self.layer, self.end.map_name, self.end.map, factor, norm)

    def _measure_norm(self) -> PostNorm | None:
        """Return the norm behind the MLP with its gain; refuse a norm of another form."""
        if self.end.norm is None:
            return None
        if getattr(self.end.map, "bias", None) is not None:
            raise self._error("has a norm behind an MLP whose last map has a bias")
        assert self.norm_input is not None
        assert self.norm_output is not None
        module: Any = self.end.norm
        epsilon = float(getattr(module, "eps", getattr(module, "variance_epsilon", 0.0)))
        values = self.norm_input.double()
        normed = values / (values.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
        output = self.norm_output.double()
        gain = (output * normed).sum(dim=(0, 1)) / normed.square().sum(dim=(0, 1))
        error = (output - gain * normed).norm() / output.norm()
        if not error < TOLERANCE:
            raise self._error(f"has a norm behind its MLP that isn't g ⊙ m / rms(m) ({module})")
        return PostNorm(self.end.norm_name, module, gain, epsilon)

    def _error(self, reason: str) -> ArchitectureError:
        return ArchitectureError(
            f"layer {self.layer} of {self.model_name} {reason}, so it can't be refitted"
        )

    def _moved(self) -> list[tuple[Tensor, float]]:
        """Return the outputs of the runs with a changed projection, each with its step."""
        return list(zip(self.outputs[1:], STEPS[1:], strict=True))

    def _put_noise(self, _layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Replace the layer's input by noise, the same in each run."""
        noise = self._draw(first_argument(args, kwargs), "input")
        if args:
            return (noise, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": noise}

    def _keep_norm(self, _module: nn.Module, args: Any, output: Tensor) -> None:
        self.norm_input = args[0].cpu()
        self.norm_output = output.cpu()

    def _move_output(self, step: float, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Add a vector to the output of the projection at each token."""
        if step == 0:
            return output
        return output + step * self._direction(output)

    def _keep_output(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self.outputs.append(first_output(output).cpu())

    def _direction(self, like: Tensor) -> Tensor:
        """Return a random vector for each token, as large as the layer's unchanged output."""
        size = float(self.outputs[0].double().square().mean().sqrt())
        return size * self._draw(like, "direction")

    def _draw(self, like: Tensor, use: str) -> Tensor:
        """Return random numbers of a tensor's shape, the same for each call with the same use."""
        seed = 2 * self.layer + (use == "direction")
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
