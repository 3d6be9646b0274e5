"""Write and load the folder of a healed path: `path.json`, and an adapter in PEFT's files.

The adapter holds two matrices for each linear map, A and B. While a layer runs with the adapter,
their product is added to the map's weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from drllm.errors import RecordError
from drllm.models.base.cards import CARD_FILE, render_card
from drllm.models.base.identity import describe
from drllm.models.base.layers import find_layers, unwrap_peft
from drllm.models.routing.injection import Injection
from drllm.models.routing.lora import LoraWeights, find_layers_name, parse_layer
from drllm.paths import StaticPath
from drllm.records.codec import sha256, write_atomically, write_json
from drllm.records.healed import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEALED_FILE, HealedPath
from drllm.records.static_paths import PathFile

CARD_TEMPLATE = Path(__file__).with_name("healed_card.md.j2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the weights in an adapter's file may have."""


def save_healed(folder: Path, record: HealedPath, injection: Injection, adapter: str) -> HealedPath:
    """Write a healed path's folder, and return its record with the adapter's hash.

    `path.json` is written last, so an incomplete folder is refused.

    Args:
        folder: The folder to write.
        record: The content of `path.json`, without the adapter's hash.
        injection: The routing of the model, which has the adapter.
        adapter: The adapter's name in the model.
    """
    lora = injection.lora
    prefix = _peft_prefix(injection.model)
    tensors = {}
    for name, (a, b) in lora.weights(adapter).maps.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = a.float().cpu().contiguous()
        tensors[f"{prefix}.{name}.lora_B.weight"] = b.float().cpu().contiguous()
    config = _list_config_values(lora.config(adapter), record)
    write_atomically(folder / ADAPTER_FILE, save(tensors, {"format": "pt"}))
    write_atomically(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    record = msgspec.structs.replace(record, adapter_sha256=sha256(folder / ADAPTER_FILE))
    card = render_card(CARD_TEMPLATE, _describe_for_hub(record), record=record)
    write_atomically(folder / CARD_FILE, card)
    write_json(folder / HEALED_FILE, record)
    return record


def _describe_for_hub(record: HealedPath) -> ModelCardData:
    """Return metadata for the hub. It names the base model only if that came from the hub."""
    metadata = ModelCardData(library_name="peft", tags=["lora", "layer-path"])
    if record.model.get("revision"):
        metadata.base_model = record.model["id"]
    return metadata


def install_path(injection: Injection, path_file: PathFile) -> StaticPath:
    """Return the path of a file, and put the adapter of a healed path into the model.

    An adapter that is in the model already isn't loaded again.

    Raises:
        PathError: The path is for another model.
        RecordError: The adapter is broken, or belongs to another path.
        RoutingError: The adapter is for other linear maps, or the model can't have an adapter.
        ConfigError: PEFT isn't installed.
    """
    name = getattr(unwrap_peft(injection.model), "name_or_path", "")
    path = path_file.path_for({"id": name, **describe(injection.model)})
    record = path_file.record
    if isinstance(record, HealedPath) and record.adapter not in injection.lora.names:
        read_adapter(injection.model, path_file.file, record).add_to(injection)
    return path


@dataclass(frozen=True)
class HealedAdapter:
    """The adapter of a healed path, as its file holds it. It can be pickled.

    Attributes:
        file: The file of the adapter.
        record: The healed path.
        weights: The weights in the file.
    """

    file: Path
    record: HealedPath
    weights: LoraWeights

    def add_to(self, injection: Injection) -> None:
        """Put the adapter into a model.

        Raises:
            RecordError: The adapter lacks a linear map that the path runs.
            RoutingError: It is for other linear maps, or the model can't have an adapter.
            ConfigError: PEFT isn't installed.
        """
        layers = self.weights.layers()
        for name in injection.linear_maps:
            if parse_layer(name) in layers and name not in self.weights.maps:
                raise RecordError(
                    f"{self.file} has no weights for {name}, which the path runs; heal again"
                )
        injection.add_adapter(self.record.adapter, self.weights)


def _list_config_values(config: Any, record: HealedPath) -> dict[str, Any]:
    """Return the values of `adapter_config.json`, always in the same order."""
    values = config.to_dict()
    for name, value in values.items():
        if isinstance(value, set):
            values[name] = sorted(value)
    values["base_model_name_or_path"] = record.model.get("id")
    values["inference_mode"] = True
    return dict(sorted(values.items()))


def read_adapter(model: Any, path_file: Path, record: HealedPath) -> HealedAdapter:
    """Read the adapter of a healed path, and check that it fits the path.

    Args:
        model: The model; its weights may be in other processes.
        path_file: The healed path's `path.json`.
        record: What the file holds.

    Raises:
        RecordError: The adapter is broken, or belongs to another path.
    """
    file = path_file.with_name(ADAPTER_FILE)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise RecordError(f"{file} can't be read: {error}") from error
    matrices_by_map = _group_by_map(file, tensors, _peft_prefix(model) + ".")
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    for name, matrices in matrices_by_map.items():
        if matrices.keys() != {"A", "B"} or matrices["A"].shape[0] != record.rank:
            raise RecordError(f"{file}: {name} has no A and B of rank {record.rank}; heal again")
        maps[name] = (matrices["A"], matrices["B"])
    weights = LoraWeights(record.rank, record.alpha, maps)
    if weights.layers() != record.adapted_layers:
        raise RecordError(
            f"{file} is for the layers {weights.layers()}, the path runs {record.adapted_layers} "
            f"with it"
        )
    return HealedAdapter(file, record, weights)


def _group_by_map(
    file: Path, tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of an adapter's file by linear map, then by matrix: `A` or `B`.

    `prefix` is the part of the tensors' names before the name of a map.

    Raises:
        RecordError: A tensor has another name, isn't a matrix of one of `DTYPES`, or has a number
            that isn't finite.
    """
    matrices_by_map: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, end = key.removeprefix(prefix).rpartition(".lora_")
        has_prefix = key.startswith(prefix)
        has_matrix = end in ("A.weight", "B.weight")
        has_layer = name.partition(".")[0].isdecimal()
        if not (has_prefix and has_matrix and has_layer):
            raise RecordError(
                f"{file} holds {key!r}, expected names such as {prefix}0.….lora_A.weight"
            )
        if tensor.dim() != 2 or tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise RecordError(
                f"{file}: {key} has {tensor.dim()} axes of {kind}, expected a matrix of float32, "
                f"bfloat16 or float16; heal again"
            )
        if not torch.isfinite(tensor).all():
            raise RecordError(f"{file}: {key} holds NaN or infinity; heal again")
        matrices_by_map.setdefault(name, {})[end[0]] = tensor
    return matrices_by_map


def _peft_prefix(model: Any) -> str:
    """Return the part of PEFT's tensor names before the index of a layer."""
    base = unwrap_peft(model)
    _, layers = find_layers(base)
    return f"base_model.model.{find_layers_name(base, layers)}"
