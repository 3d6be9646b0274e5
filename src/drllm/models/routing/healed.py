"""Write and load the folder of a healed path: `path.json`, and an adapter in PEFT's files.

The adapter has LoRA weights, a refit, or both. LoRA has two matrices for each linear map, A and B.
While a layer runs with the adapter, their product is added to the map's weight. A refit has a new
weight for each of its maps. PEFT calls these maps `modules_to_save`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
from drllm.model.cards import CARD_FILE, describe_alias, name_base_model, render_card
from drllm.model.identity import describe
from drllm.model.layers import find_layers, parse_layer, unwrap_peft
from drllm.models.routing.adapters import AdapterWeights
from drllm.models.routing.injection import Injection
from drllm.models.routing.lora import LoraWeights, find_layers_name
from drllm.paths import StaticPath
from drllm.records.codec import delete_file, sha256, write_atomically, write_json
from drllm.records.healed import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEALED_FILE, HealedPath
from drllm.records.static_paths import PathFile

CARD_TEMPLATE = Path(__file__).with_name("healed_card.md.j2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the weights in an adapter's file may have."""

PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".weight": "weight", ".bias": "bias"}
"""What a tensor in an adapter's file is, by the end of its name."""


def save_healed(folder: Path, record: HealedPath, injection: Injection, adapter: str) -> HealedPath:
    """Write a healed path's folder, and return its record with the adapter's hash.

    Without LoRA weights, or if PEFT can't tell the refitted maps from others by their names, there
    is no `adapter_config.json`, so PEFT refuses the folder. `path.json` is written last, so an
    incomplete folder is refused.

    Args:
        folder: The folder to write.
        record: The content of `path.json`, without the adapter's hash. Its `rank`, `alpha` and
            `refit` describe the adapter; without LoRA weights `rank` and `alpha` are 0.
        injection: The routing of the model, which has the adapter.
        adapter: The adapter's name in the model.

    Raises:
        ValueError: The record is about another adapter.
    """
    weights = injection.adapters.weights(adapter)
    _check_record(record, weights)
    tensors = _list_tensors(injection, weights)
    config = _make_peft_config(injection, adapter, record)
    write_atomically(folder / ADAPTER_FILE, save(tensors, {"format": "pt"}))
    if config is None:
        delete_file(folder / ADAPTER_CONFIG_FILE)  # from an earlier healing
    else:
        write_atomically(folder / ADAPTER_CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    record = msgspec.structs.replace(record, adapter_sha256=sha256(folder / ADAPTER_FILE))
    alias = describe_alias(record.model.get("id", ""))
    card = render_card(CARD_TEMPLATE, _describe_for_hub(record), record=record, alias=alias)
    write_atomically(folder / CARD_FILE, card)
    write_json(folder / HEALED_FILE, record)
    return record


def _check_record(record: HealedPath, weights: AdapterWeights) -> None:
    """Raise ValueError if a record doesn't describe these weights."""
    rank = 0 if weights.lora is None else weights.lora.rank
    maps = () if record.refit is None else record.refit.modules
    if record.rank != rank or set(maps) != weights.refit.keys():
        raise ValueError(
            f"the record has rank {record.rank} and a refit of {sorted(maps)}, the adapter rank "
            f"{rank} and a refit of {sorted(weights.refit)}"
        )


def _list_tensors(injection: Injection, weights: AdapterWeights) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file, by PEFT's names."""
    prefix = _peft_prefix(injection.model)
    tensors = {}
    if weights.lora is not None:
        for name, (a, b) in weights.lora.maps.items():
            tensors[f"{prefix}.{name}.lora_A.weight"] = a.float().cpu().contiguous()
            tensors[f"{prefix}.{name}.lora_B.weight"] = b.float().cpu().contiguous()
    for name, weight in weights.refit.items():
        tensors[f"{prefix}.{name}.weight"] = _to_file(weight)
        bias = getattr(injection.refittable_modules[name], "bias", None)
        if weights.lora is not None and isinstance(bias, Tensor):
            # PEFT doesn't load a module without its bias. The bias is the base model's own.
            tensors[f"{prefix}.{name}.bias"] = _to_file(bias)
    return tensors


def _to_file(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU in a dtype that an adapter's file may have."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.dtype in DTYPES else tensor.float()


def _make_peft_config(
    injection: Injection, adapter: str, record: HealedPath
) -> dict[str, Any] | None:
    """Return the values of `adapter_config.json`, or None if PEFT can't load the adapter right."""
    if adapter not in injection.lora.names:
        return None
    values = _list_config_values(injection.lora.config(adapter), record)
    if record.refit is None:
        return values
    base = unwrap_peft(injection.model)
    prefix = find_layers_name(base, injection.layers)
    names = [f"{prefix}.{name}" for name in record.refit.modules]
    for name, _ in base.named_modules(remove_duplicate=False):
        # PEFT takes every module whose name has one of these endings.
        if name not in names and name.endswith(tuple(names)):
            return None
    return values | {"modules_to_save": sorted(names)}


def _describe_for_hub(record: HealedPath) -> ModelCardData:
    """Return metadata for the hub. It names the base model only if that came from the hub."""
    metadata = ModelCardData(library_name="peft", tags=["lora", "layer-path"])
    if record.rank == 0:
        metadata = ModelCardData(library_name="drllm", tags=["layer-path"])
    is_on_hub = bool(record.model.get("revision"))
    name_base_model(metadata, record.model.get("id", ""), "adapter", is_on_hub=is_on_hub)
    return metadata


def install_path(injection: Injection, path_file: PathFile) -> StaticPath:
    """Return the path of a file, and put the adapter of a healed path into the model.

    An adapter that is in the model already isn't loaded again.

    Raises:
        PathError: The path is for another model.
        RecordError: The adapter is broken, or belongs to another path.
        RoutingError: The adapter is for other linear maps, or the model can't have an adapter.
        ConfigError: The adapter has LoRA weights, and PEFT isn't installed.
    """
    name = getattr(unwrap_peft(injection.model), "name_or_path", "")
    path = path_file.path_for({"id": name, **describe(injection.model)})
    record = path_file.record
    if isinstance(record, HealedPath) and record.adapter not in injection.adapters.names:
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
    weights: AdapterWeights

    def add_to(self, injection: Injection) -> None:
        """Put the adapter into a model.

        Raises:
            RecordError: The adapter lacks a linear map that the path runs.
            RoutingError: It is for other linear maps, or the model can't have an adapter.
            ConfigError: It has LoRA weights, and PEFT isn't installed.
        """
        lora = self.weights.lora
        refit = self.weights.refit
        if lora is not None:
            layers = lora.layers()
            for name in injection.linear_maps:
                is_adapted = name in lora.maps or name in refit
                if parse_layer(name) in layers and not is_adapted:
                    raise RecordError(
                        f"{self.file} has no weights for {name}, which the path runs; heal again"
                    )
        injection.add_adapter(self.record.adapter, lora, refit)


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
    refitted_modules = () if record.refit is None else record.refit.modules
    norms = () if record.refit is None else record.refit.norms
    prefix = _peft_prefix(model) + "."
    tensors_by_map = _group_by_map(file, tensors, prefix, refitted_modules, norms)
    refit = {}
    for name in refitted_modules:
        map_tensors = tensors_by_map.pop(name, {})
        if "weight" not in map_tensors or map_tensors.keys() & {"A", "B"}:
            raise RecordError(
                f"{file}: {name} has no new weight, or LoRA beside it, and {path_file.name} says "
                f"that it is refitted; heal again"
            )
        refit[name] = map_tensors["weight"]
    lora = _read_lora(file, record, tensors_by_map)
    return HealedAdapter(file, record, AdapterWeights(lora, refit))


def _read_lora(
    file: Path, record: HealedPath, tensors_by_map: Mapping[str, Mapping[str, Tensor]]
) -> LoraWeights | None:
    """Return the LoRA weights of an adapter's file; None if the record says there are none."""
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensors in tensors_by_map.items():
        if tensors.keys() != {"A", "B"} or tensors["A"].shape[0] != record.rank:
            raise RecordError(f"{file}: {name} has no A and B of rank {record.rank}; heal again")
        maps[name] = (tensors["A"], tensors["B"])
    weights = LoraWeights(record.rank, record.alpha, maps)
    if weights.layers() != record.adapted_layers:
        raise RecordError(
            f"{file} is for the layers {weights.layers()}, the path runs {record.adapted_layers} "
            f"with it"
        )
    return weights if record.rank > 0 else None


def _group_by_map(
    file: Path,
    tensors: Mapping[str, Tensor],
    prefix: str,
    refitted_modules: Collection[str],
    norms: Collection[str],
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of an adapter's file by module, then by what they are.

    A tensor is LoRA's `A` or `B` of a linear map, or the `weight` or `bias` of a refitted module.

    Args:
        file: The file, for the error message.
        tensors: The tensors by their names in the file.
        prefix: The part of these names before the name of a module.
        refitted_modules: The names of the refitted modules.
        norms: The names of those that are norms, whose weight is a vector.

    Raises:
        RecordError: A tensor has another name, another number of axes, or a dtype that isn't one of
            `DTYPES`, or it has a number that isn't finite.
    """
    tensors_by_map: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _parse_key(key, prefix, refitted_modules)
        if not part:
            raise RecordError(
                f"{file} holds {key!r}, expected names such as {prefix}0.….lora_A.weight, or the "
                f"weight of a refitted module"
            )
        is_vector = part == "bias" or name in norms
        if tensor.dim() != (1 if is_vector else 2) or tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            expected = "vector" if is_vector else "matrix"
            raise RecordError(
                f"{file}: {key} has {tensor.dim()} axes of {kind}, expected a {expected} of "
                f"float32, bfloat16 or float16; heal again"
            )
        if not torch.isfinite(tensor).all():
            raise RecordError(f"{file}: {key} holds NaN or infinity; heal again")
        tensors_by_map.setdefault(name, {})[part] = tensor
    return tensors_by_map


def _parse_key(key: str, prefix: str, refitted_modules: Collection[str]) -> tuple[str, str]:
    """Return the name of a tensor's linear map, and what the tensor is; empty if unknown.

    See `_group_by_map`.
    """
    place = key.removeprefix(prefix)
    if not key.startswith(prefix) or not place.partition(".")[0].isdecimal():
        return "", ""
    for ending, part in PARTS.items():
        name = place.removesuffix(ending)
        is_lora = part in ("A", "B")
        if name != place and (is_lora or name in refitted_modules):
            return name, part
    return "", ""


def _peft_prefix(model: Any) -> str:
    """Return the part of PEFT's tensor names before the index of a layer."""
    base = unwrap_peft(model)
    _, layers = find_layers(base)
    return f"base_model.model.{find_layers_name(base, layers)}"
