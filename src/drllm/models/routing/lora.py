"""PEFT's LoRA adapters for healed paths. An adapter is switched on only while its path runs.

While an adapter is in the model, PEFT's LoRA layers wrap the linear maps that it changes, so the
state-dict keys differ. `LoraAdapters.remove` puts the maps back. Along other paths the LoRA layers
are switched off. Then a LoRA layer only calls its map, so results equal those of the base model bit
by bit.

Axes: R rank.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drllm.errors import ArchitectureError, RoutingError, nearest_name
from drllm.extras import need
from drllm.model.layers import find_layers, parse_layer, unwrap_peft

_switching = threading.Lock()  # held while the LoRA layers of a model are switched


@dataclass(frozen=True, eq=False, slots=True)
class LoraWeights:
    """The weights of one adapter, which adds `alpha / rank · B A x` to a linear map of x."""

    rank: int  # R
    alpha: float
    # A `[R, in]` and B `[out, R]` of each linear map, by its name LAYER.PLACE; see
    # `find_linear_maps`.
    maps: dict[str, tuple[Tensor, Tensor]]

    def layers(self) -> list[int]:
        """Return the layers that the adapter changes, in order."""
        return sorted({parse_layer(name) for name in self.maps})

    def num_entries(self, layer: int) -> int:
        """Return how many weights the adapter has in a layer.

        Each weight costs one multiplication per token.
        """
        total = 0
        for name, (a, b) in self.maps.items():
            if parse_layer(name) == layer:
                total += a.numel() + b.numel()
        return total


@dataclass(slots=True)
class LoraPlace:
    """A LoRA layer and its place in the model."""

    parent: nn.Module
    attribute: str
    lora: Any  # PEFT's layer, with the model's own map as its `base_layer`


class LoraAdapters:
    """The adapters in a model, by name. `running` switches one of them on.

    At most one adapter runs at a time, since the LoRA layers are switched for the whole model.
    """

    def __init__(self, model: Any) -> None:
        self._base = unwrap_peft(model)
        self._configs: dict[str, Any] = {}  # by adapter
        self._places: dict[str, LoraPlace] = {}  # by linear map
        self._running = ""  # the adapter of the passes that run now; empty for none
        self._num_passes = 0  # that run now, in all threads

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._configs)

    def check(self, name: str) -> str:
        """Return the name if the model has this adapter; raise a RoutingError if not."""
        return refuse_missing(name, self.names)

    def add(
        self,
        name: str,
        weights: LoraWeights,
        maps: Mapping[str, nn.Module],
        excluded: Collection[str] = (),
    ) -> None:
        """Put an adapter with given weights into the model.

        Args:
            name: The adapter's name in the model.
            weights: The adapter's weights.
            maps: The linear maps that an adapter may change, by name.
            excluded: Names of linear maps that PEFT must leave alone, such as refitted maps.

        Raises:
            RoutingError: The name is empty or in use, the weights are for other maps or have other
                shapes, or the model has PEFT layers of its own.
            ArchitectureError: PEFT can't find exactly these maps by their names.
        """
        for key, (a, b) in weights.maps.items():
            if key not in maps:
                reason = nearest_name("linear map", key, maps)
                raise RoutingError(f"the adapter {name!r} is for another model: {reason}")
            num_in, num_out = read_map_sizes(maps[key])
            if [*a.shape, *b.shape] != [weights.rank, num_in, num_out, weights.rank]:
                raise RoutingError(
                    f"the adapter {name!r} is for another model: at {key}, from {num_in} to "
                    f"{num_out}, it has A {list(a.shape)} and B {list(b.shape)}"
                )
        target_maps = {key: maps[key] for key in weights.maps}
        self._inject(name, weights.rank, weights.alpha, target_maps, excluded)
        for key, (a, b) in weights.maps.items():
            lora = self._places[key].lora
            lora.lora_A[name].weight.data.copy_(a)
            lora.lora_B[name].weight.data.copy_(b)

    def create(
        self,
        name: str,
        rank: int,
        alpha: float,
        layers: Collection[int],
        maps: Mapping[str, nn.Module],
        seed: int,
        excluded: Collection[str] = (),
    ) -> list[nn.Parameter]:
        """Put a new adapter on all linear maps of some layers, and return its parameters.

        PEFT leaves the maps named in `excluded` alone. The adapter has no effect yet: A is random,
        as in PEFT, and B is zero. The parameters are float32 and need gradients. Raises what `add`
        raises, and a RoutingError if the layers have no linear maps or the model's weights are
        offloaded.
        """
        target_maps: dict[str, Any] = {
            key: module for key, module in maps.items() if parse_layer(key) in layers
        }
        if not target_maps:
            raise RoutingError(
                f"the layers {sorted(layers)} have no nn.Linear that can have an adapter"
            )
        if any(module.weight.device.type == "meta" for module in target_maps.values()):
            raise RoutingError(
                "the weights of this model are offloaded, and an adapter can't be trained beside "
                "offloaded weights; load the model onto one device"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._inject(name, rank, alpha, target_maps, excluded)
        for place in self._find_places(name).values():
            place.lora.lora_A[name].float()
            place.lora.lora_B[name].float()
        parameters = self.parameters(name)
        for parameter in parameters:
            parameter.requires_grad_()
        return parameters

    def parameters(self, name: str) -> list[nn.Parameter]:
        """Return A and B of every map of an adapter."""
        parameters = []
        for place in self._find_places(name).values():
            parameters += [place.lora.lora_A[name].weight, place.lora.lora_B[name].weight]
        return parameters

    def weights(self, name: str) -> LoraWeights:
        """Return the weights of an adapter. The tensors aren't copied."""
        config = self._configs[self.check(name)]
        maps = {}
        for key, place in self._find_places(name).items():
            a = place.lora.lora_A[name].weight.detach()
            b = place.lora.lora_B[name].weight.detach()
            maps[key] = (a, b)
        return LoraWeights(config.r, config.lora_alpha, maps)

    def config(self, name: str) -> Any:
        """Return the `LoraConfig` of an adapter."""
        return self._configs[self.check(name)]

    def merged_weights(self, name: str) -> dict[str, Tensor]:
        """Return the weight of each map with the adapter merged by PEFT, in the map's dtype."""
        merged = {}
        for key, place in self._find_places(self.check(name)).items():
            lora = copy.deepcopy(place.lora)  # merging changes a weight in place
            lora.merge(safe_merge=True, adapter_names=[name])
            merged[key] = lora.base_layer.weight.data
        return merged

    def drop(self, name: str) -> None:
        """Take an adapter out of the model. After the last adapter, put the linear maps back."""
        self.check(name)
        for place in self._find_places(name).values():
            place.lora.delete_adapter(name)
        del self._configs[name]
        if not self._configs:
            self.remove()
            self._places = {}

    def install(self) -> None:
        """Put the LoRA layers into the model. This also works after `remove`."""
        for place in self._places.values():
            setattr(place.parent, place.attribute, place.lora)

    def remove(self) -> None:
        """Put the linear maps back in place of the LoRA layers."""
        for place in self._places.values():
            setattr(place.parent, place.attribute, place.lora.base_layer)

    def find_replaced(self) -> str | None:
        """Return the name of a linear map whose LoRA layer other code has replaced, or None."""
        for key, place in self._places.items():
            if getattr(place.parent, place.attribute) is not place.lora:
                return key
        return None

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Switch one adapter on inside the block, for one pass. With an empty name all stay off.

        Raises:
            RoutingError: The model has no such adapter, or another thread runs a pass with a
                different adapter or without one.
        """
        if name:
            self.check(name)
        with _switching:
            if self._num_passes and self._running != name:
                raise RoutingError(
                    "another thread runs this model along another path right now, and a healed "
                    "path needs the model for itself; run one after the other, or load the model "
                    "a second time"
                )
            if not self._num_passes:
                self._running = name
                self._switch(name)
            self._num_passes += 1
        try:
            yield
        finally:
            with _switching:
                self._num_passes -= 1
                if not self._num_passes:
                    self._switch("")

    def _switch(self, name: str) -> None:
        """Switch the LoRA layers to an adapter, or off if the name is empty.

        This sets PEFT's own attributes. Its `enable_adapters` takes ten times as long, and also
        changes which weights get gradients.
        """
        for place in self._places.values():
            place.lora._disable_adapters = not name
            place.lora._active_adapter = [name] if name else []

    def _find_places(self, name: str) -> dict[str, LoraPlace]:
        """Return the places of an adapter's LoRA layers, by linear map."""
        return {key: place for key, place in self._places.items() if name in place.lora.lora_A}

    def _inject(
        self,
        name: str,
        rank: int,
        alpha: float,
        target_maps: Mapping[str, nn.Module],
        excluded: Collection[str],
    ) -> None:
        """Let PEFT put LoRA layers around linear maps, and leave everything else as it was.

        If that fails, for lack of memory for example, the model is as it was before.
        """
        self._check_new(name)
        config = make_config(self._base, rank, alpha, target_maps, excluded)
        with ExitStack() as undo:
            self._configs[name] = config
            undo.callback(self.drop, name)
            self._call_peft(name, config)
            places = self._find_places(name)
            for place in places.values():
                _allocate_adapter(place.lora, name)
            for parameter in self.parameters(name):
                parameter.requires_grad_(False)
            if places.keys() != target_maps.keys():
                examples = ", ".join(sorted(places.keys() ^ target_maps.keys())[:3])
                raise ArchitectureError(
                    f"PEFT can't tell the linear maps of {type(self._base).__name__} apart by "
                    f"their names ({examples}), so this model can't have an adapter"
                )
            undo.pop_all()

    def _call_peft(self, name: str, config: Any) -> None:
        """Let PEFT put in LoRA layers, and record their places, also if PEFT fails halfway."""
        from peft import inject_adapter_in_model

        gradients = [(weight, weight.requires_grad) for weight in self._base.parameters()]
        try:
            inject_adapter_in_model(config, self._base, name)
        finally:
            vars(self._base).pop("peft_config", None)
            for weight, requires_grad in gradients:
                weight.requires_grad_(requires_grad)
            self._record_places()
            self._switch("")

    def _check_new(self, name: str) -> None:
        """Refuse a name that can't be used, and a model with PEFT layers of its own."""
        need("heal", "a healed path")
        check_new_name(name, self._configs)
        from peft.tuners.tuners_utils import BaseTunerLayer

        ours = {id(place.lora) for place in self._places.values()}
        for module in self._base.modules():
            if isinstance(module, BaseTunerLayer) and id(module) not in ours:
                raise RoutingError(
                    "a healed path has an adapter of its own, and this model has PEFT layers "
                    "already; merge them first (merge_and_unload)"
                )

    def _record_places(self) -> None:
        """Find the LoRA layers in the model, and record their places."""
        from peft.tuners.lora import LoraLayer

        _, layers = find_layers(self._base)
        for index, layer in enumerate(layers):
            for place, module in layer.named_modules():
                if isinstance(module, LoraLayer):
                    parent, _, attribute = place.rpartition(".")
                    key = f"{index}.{place}"
                    self._places[key] = LoraPlace(layer.get_submodule(parent), attribute, module)


def _allocate_adapter(lora: Any, name: str) -> None:
    """Give an adapter memory if the weight of its map is offloaded.

    PEFT puts A and B where the weight is, which is the meta device. Here they get memory on the
    device where the map runs.
    """
    if lora.lora_A[name].weight.device.type != "meta":
        return
    hook = getattr(lora.base_layer, "_hf_hook", None)  # accelerate's hook
    device = getattr(hook, "execution_device", None)
    device = torch.device("cpu") if device is None else torch.device(device)
    lora.lora_A[name].to_empty(device=device)
    lora.lora_B[name].to_empty(device=device)


def refuse_missing(name: str, names: Collection[str]) -> str:
    """Return the name of an adapter; raise a RoutingError if it isn't among a model's adapters."""
    if name not in names:
        raise RoutingError(
            f"this model has no adapter {name!r} (it has {', '.join(names) or 'none'}); load the "
            f"healed path that it belongs to"
        )
    return name


def check_new_name(name: str, names: Collection[str]) -> None:
    """Refuse a name for an adapter that is empty, or that an adapter of the model has already."""
    if not name:
        raise RoutingError("an adapter can't be called ''; give it a name")
    if name in names:
        raise RoutingError(f"an adapter can't be called {name!r}, which is in the model already")


def make_config(
    base: Any,
    rank: int,
    alpha: float,
    maps: Mapping[str, nn.Module],
    excluded: Collection[str],
) -> Any:
    """Return the `LoraConfig` of an adapter on linear maps of a model's layers.

    The config excludes the maps named in `excluded` by their full names, since PEFT finds maps by
    the end of their names.
    """
    from peft import LoraConfig

    _, layers = find_layers(base)
    prefix = find_layers_name(base, layers)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted({key.partition(".")[2] for key in maps}),
        layers_to_transform=sorted({parse_layer(key) for key in maps}),
        layers_pattern=prefix.rpartition(".")[2],
        exclude_modules=sorted(f"{prefix}.{key}" for key in excluded) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps.values()),
        task_type="CAUSAL_LM",
    )


def find_layers_name(base: Any, layers: nn.ModuleList) -> str:
    """Return the name of the list of layers in a model, such as `model.layers`."""
    for name, module in base.named_modules():
        if module is layers:
            return str(name)
    raise ValueError("these aren't the layers of this model")


def read_map_sizes(module: Any) -> tuple[int, int]:
    """Return the input and output size of a linear map, whose weight may be packed."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return module.in_features, module.out_features
