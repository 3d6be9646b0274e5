"""A small folder of a healed path as `drllm heal` writes it, for tests of whatever reads one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.models.routed_model import RoutedModel
from drllm.models.routing.healed import save_healed
from drllm.models.routing.lora import LoraWeights
from drllm.paths import StaticPath
from drllm.records.healed import HealedPath, HealPoint, Losses
from drllm.records.manifest import new_manifest
from drllm.records.static_paths import steps_to_write
from slow_way import tiny_adapter

PATH = [0, 1, 3, 4, 4, 5]


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
        "name": "less",
        "steps": steps_to_write(StaticPath(path)),
        "executions": float(len(path)),
        "num_layers": identity["num_layers"],
        "first_layer": first_layer,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "adapter_sha256": "",
        "tasks": ("arc_easy",),
        "texts": ("books.jsonl",),
        "curve": (HealPoint(step=9, tokens=99, seconds=1.5, train_kl=0.5, held_out_kl=0.6),),
        "held_out": {"arc_easy": Losses(full=2.0, path=3.0, healed=2.2)},
    }
    manifest = new_manifest("healed_path", model=identity, config={"rank": adapter.rank})
    try:
        record = HealedPath(**manifest, **values | fields)
        return save_healed(folder, record, routed.injection, "written")
    finally:
        routed.detach()
