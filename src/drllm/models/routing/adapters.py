"""The adapters of healed paths: LoRA weights, a refit, or both under one name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from drllm.errors import RoutingError
from drllm.models.routing.lora import (
    LoraAdapters,
    LoraWeights,
    check_new_name,
    refuse_missing,
)
from drllm.models.routing.refits import Refit, Refits


@dataclass(frozen=True, eq=False, slots=True)
class AdapterWeights:
    """The weights of one adapter."""

    lora: LoraWeights | None = None
    refit: Refit = field(default_factory=dict)

    def num_entries(self, layer: int) -> int:
        """Return how many weights the adapter adds to a layer. A refit replaces, and adds none."""
        return 0 if self.lora is None else self.lora.num_entries(layer)


class Adapters:
    """The adapters in a model, by name.

    Args:
        lora: The LoRA weights in the model.
        refits: The refits in the model.
    """

    def __init__(self, lora: LoraAdapters, refits: Refits) -> None:
        self.lora = lora
        self.refits = refits

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(dict.fromkeys((*self.lora.names, *self.refits.names)))

    def check(self, name: str) -> str:
        """Return the name if the model has this adapter; raise a RoutingError if not."""
        return refuse_missing(name, self.names)

    def add(
        self,
        name: str,
        weights: AdapterWeights,
        lora_maps: Mapping[str, nn.Module],
        refittable_modules: Mapping[str, nn.Module],
    ) -> None:
        """Put an adapter into the model, wholly or not at all.

        The maps are those that LoRA and a refit may change, by name.

        Raises what `LoraAdapters.add` and `Refits.add` raise, and a RoutingError if there are no
        weights, the name is in use, or a map has both a new weight and LoRA.
        """
        if weights.lora is None and not weights.refit:
            raise RoutingError(f"the adapter {name!r} has no weights; give LoRA weights or a refit")
        check_new_name(name, self.names)
        if weights.lora is not None:
            both = sorted(weights.lora.maps.keys() & weights.refit.keys())
            if both:
                raise RoutingError(
                    f"the adapter {name!r} has LoRA weights and a new weight for {both[0]}; a "
                    f"refitted map can't have LoRA too"
                )
        if weights.refit:
            self.refits.add(name, weights.refit, refittable_modules)
        if weights.lora is None:
            return
        try:
            self.lora.add(name, weights.lora, lora_maps, excluded=weights.refit)
        except BaseException:
            if weights.refit:
                self.refits.drop(name)
            raise

    def create_lora(
        self,
        name: str,
        rank: int,
        alpha: float,
        layers: Collection[int],
        maps: Mapping[str, nn.Module],
        seed: int,
    ) -> list[nn.Parameter]:
        """Put new LoRA weights on all linear maps of some layers, and return their parameters.

        The adapter may have a refit already. Its refitted maps get no LoRA. See
        `LoraAdapters.create`.
        """
        refit = self.refits.weights(name)
        free_maps = {key: module for key, module in maps.items() if key not in refit}
        return self.lora.create(name, rank, alpha, layers, free_maps, seed, excluded=refit)

    def weights(self, name: str) -> AdapterWeights:
        """Return the weights of an adapter. The tensors aren't copied."""
        self.check(name)
        lora = self.lora.weights(name) if name in self.lora.names else None
        return AdapterWeights(lora, self.refits.weights(name))

    def all_weights(self) -> dict[str, AdapterWeights]:
        """Return the weights of all adapters, by name."""
        return {name: self.weights(name) for name in self.names}

    def drop(self, name: str) -> None:
        """Take an adapter out of the model."""
        self.check(name)
        if name in self.refits.names:
            self.refits.drop(name)
        if name in self.lora.names:
            self.lora.drop(name)
