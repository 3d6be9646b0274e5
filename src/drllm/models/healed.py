"""The folder of a healed path: `path.json` and its adapter in PEFT's files, written and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers.pytorch_utils import Conv1D

from drllm.errors import RecordError
from drllm.models.base.identity import describe
from drllm.models.base.layers import base_of
from drllm.models.cards import CARD_FILE, load_template
from drllm.models.routing.adapters import Adapter, layer_of_map
from drllm.paths import StaticPath
from drllm.records.codec import sha256, write_atomically, write_json
from drllm.records.healed import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEALED_FILE, HealedPath
from drllm.records.static_paths import PathFile

if TYPE_CHECKING:
    from drllm.models.routing.routed_model import RoutedModel


def save_healed(
    folder: Path, record: HealedPath, adapter: Adapter, routed: RoutedModel
) -> HealedPath:
    """Write a healed path's folder, and return its record with the adapter's hash filled in.

    `path.json` comes last, so a folder that was cut off is refused.
    """
    prefix, maps = _prefix(routed), routed.injection.adapters.maps
    tensors = {
        f"{prefix}.{name}.lora_{part}.weight": each.detach().float().cpu().contiguous()
        for name, pair in adapter.weights.items()
        for part, each in zip("AB", pair, strict=True)
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": record.model.get("id"),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": sorted({name.partition(".")[2] for name in adapter.weights}),
        "layers_to_transform": sorted(set(map(layer_of_map, adapter.weights))),
        "fan_in_fan_out": any(isinstance(maps[name], Conv1D) for name in adapter.weights),
    }
    write_atomically(folder / ADAPTER_FILE, save(tensors, {"format": "pt"}))
    write_atomically(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    record = msgspec.structs.replace(record, adapter_sha256=sha256(folder / ADAPTER_FILE))
    card = load_template(Path(__file__).with_name("healed_card.md.j2")).render(record=record)
    write_atomically(folder / CARD_FILE, card)
    write_json(folder / HEALED_FILE, record)
    return record


def load_path(routed: RoutedModel, plan: PathFile) -> StaticPath:
    """Return the path that a file says, with its adapter held by the model if it is a healed one.

    The adapter's name is `HealedPath.adapter`; one that is held already stays. A path of another
    model is a PathError, an adapter of another path a RecordError, of other maps a RoutingError.
    """
    model, record = routed.model, plan.record
    name = getattr(base_of(model), "name_or_path", "")
    path = plan.path_of({"id": name, **describe(model)})
    if isinstance(record, HealedPath) and record.adapter not in routed.adapters:
        routed.add_adapter(record.adapter, _read(routed, plan.file.parent, record))
    return path


def _read(routed: RoutedModel, folder: Path, record: HealedPath) -> Adapter:
    """Read the adapter of a healed path, in the dtype of the model."""
    file, prefix = folder / ADAPTER_FILE, _prefix(routed) + "."
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{file} can't be read: {error}") from error
    halves: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(prefix).rpartition(".lora_")
        if not key.startswith(prefix) or part not in ("A.weight", "B.weight"):
            raise RecordError(f"{file} holds {key!r}, expected {prefix}0.….lora_A.weight and such")
        if not torch.isfinite(tensor).all():
            raise RecordError(f"{file}: {key} holds NaN or infinity; heal again")
        halves.setdefault(name, {})[part[0]] = tensor.to(routed.model.dtype)
    for name, half in halves.items():
        if len(half) < 2 or len(half["A"]) != record.rank:
            raise RecordError(f"{file}: {name} has no A and B of rank {record.rank}; heal again")
    found = sorted(set(map(layer_of_map, halves)))
    run = {s.layer for s in record.steps if s.layer >= record.first_layer}
    # Of several paths each has the adapter from a layer of its own on.
    others = {s.layer for steps in record.others for s in steps}
    if not run <= set(found) <= run | others:
        raise RecordError(f"{file} is for the layers {found}, the path runs {sorted(run)} with it")
    weights = {name: (half["A"], half["B"]) for name, half in halves.items()}
    return Adapter(record.rank, record.alpha, weights)


def _prefix(routed: RoutedModel) -> str:
    """Return what PEFT writes before the index of a layer."""
    modules, layers = base_of(routed.model).named_modules(), routed.injection.layers
    return f"base_model.model.{next(name for name, module in modules if module is layers)}"
