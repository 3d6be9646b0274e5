"""A small folder of a healed path as `drllm heal` writes it, for tests of whatever reads one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from drllm.model.layers import parse_layer
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import save_healed
from drllm.models.routing.lora import LoraWeights
from drllm.paths import StaticPath
from drllm.records.healed import GapRecord, HealedPath, HealPoint, Losses, RefitRecord
from drllm.records.manifest import new_manifest
from drllm.records.static_paths import steps_to_write
from slow_way import tiny_adapter, tiny_refit

PATH = [0, 1, 3, 4, 4, 5]
REFIT_PATH = [0, 1, 3, 4]  # a path in order, with gaps after layers 1 and 4


def written_healed(
    folder: Path,
    model: Any,
    identity: Mapping[str, Any],
    *,
    path: Sequence[int] = PATH,
    first_layer: int = 1,
    adapter: LoraWeights | None = None,
    **fields: Any,
) -> HealedPath:
    """Write a healed path of a model with this identity, which isn't routed; return its record."""
    routed = RoutedModel(model)
    layers = {layer for layer in path if layer >= first_layer}
    adapter = adapter or tiny_adapter(routed, sorted(layers))
    routed.injection.add_adapter("written", adapter)
    values = {
        "first_layer": first_layer,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "curve": (HealPoint(step=9, tokens=99, seconds=1.5, train_kl=0.5, held_out_kl=0.6),),
    }
    return _write(folder, routed, identity, path, values | fields)


def written_refit(
    folder: Path,
    model: Any,
    identity: Mapping[str, Any],
    *,
    path: Sequence[int] = REFIT_PATH,
    has_lora: bool = False,
    refit: Mapping[str, Tensor] | None = None,
    **fields: Any,
) -> HealedPath:
    """Write a healed path with a refit, and with LoRA if that is wanted; return its record."""
    routed = RoutedModel(model)
    gaps = {gap.layer: gap.next_layer for gap in StaticPath(path).gaps(identity["num_layers"])}
    refit = refit or tiny_refit(routed, list(gaps))
    records = []
    for layer, next_layer in gaps.items():
        names = [name for name in refit if parse_layer(name) == layer]
        if names:
            modules = dict(zip(("map", "norm"), names, strict=False))
            records.append(GapRecord(layer=layer, next_layer=next_layer, ridge=0.1, **modules))
    lora = None
    if has_lora:
        lora = tiny_adapter(routed, path)
        lora = LoraWeights(
            lora.rank, lora.alpha, {k: v for k, v in lora.maps.items() if k not in refit}
        )
    routed.injection.add_adapter("written", lora, refit)
    values = {
        "first_layer": 0,
        "rank": lora.rank if lora else 0,
        "alpha": lora.alpha if lora else 0.0,
        "refit": RefitRecord(gaps=tuple(records), num_tokens=50_000),
        "held_out": {"arc_easy": Losses(full=2.0, path=3.0, refit=2.3, healed=2.2)},
    }
    return _write(folder, routed, identity, path, values | fields)


def _write(
    folder: Path,
    routed: RoutedModel,
    identity: Mapping[str, Any],
    path: Sequence[int],
    fields: Mapping[str, Any],
) -> HealedPath:
    """Write the adapter that is in the model, take the routing off, and return the record."""
    values = {
        "name": "less",
        "steps": steps_to_write(StaticPath(path)),
        "executions": float(len(path)),
        "num_layers": identity["num_layers"],
        "adapter_sha256": "",
        "tasks": ("arc_easy",),
        "texts": ("books.jsonl",),
        "held_out": {"arc_easy": Losses(full=2.0, path=3.0, healed=2.2)},
    }
    manifest = new_manifest("healed_path", model=identity, config={"rank": fields["rank"]})
    try:
        record = HealedPath(**manifest, **{**values, **fields})
        return save_healed(folder, record, routed.injection, "written")
    finally:
        routed.detach()
