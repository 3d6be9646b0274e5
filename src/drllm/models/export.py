"""Write a path as an ordinary checkpoint: the base model's layers, in the order of the path.

The export builds the model's own class with the layers of the path, gives it the base model's
weights, writes it, loads it again, and compares. The folder appears only after that. Whether a
config expresses the path is checked on the layers that the class builds from the config, not by the
model's name.

Axes: T tokens, D hidden, V vocabulary, L layers.
"""

import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from drllm.errors import ArchitectureError, ConfigError, DrllmError, ModelError
from drllm.models.base import hub
from drllm.models.base.layers import find_layers
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import context_length
from drllm.models.cards import CARD_FILE, render_card
from drllm.models.healed import load_path
from drllm.models.routing.lora import name_of_layers
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.healed import HealedPath
from drllm.records.identity import QUANTISED
from drllm.records.static_paths import PathFile, StaticPaths

NUM_TOKENS = 32  # length of the row on which the checkpoint is compared with the path

MERGED_TOLERANCE = 1e-4
MERGED_TOLERANCE_16_BITS = 0.25
"""With a merged adapter, logits may differ by this share of their standard deviation. The sum of a
weight and its update is rounded, and more coarsely in 16 bits."""

BUILD_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    StrictDataclassError,
    NotImplementedError,  # from a class that looks at its weights while it is built
)
"""What transformers raises if a class can't be built from a config."""

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CARD_TEMPLATE = Path(__file__).with_name("export_card.md.j2")

PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype)
"""Types of the attributes that two layers are compared by."""
STATE_ATTRIBUTES = ("training", "gradient_checkpointing")
"""Attributes that depend on how a layer is used, and aren't compared."""
TOKEN_SUFFIXES = ("_token_id", "_token_ids")
"""Names of settings that hold tokens end like this. Their lists aren't lists of layers."""

OLDER_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""By model type: the name of a setting in transformers 5 → its name in transformers 4."""


class Export(NamedTuple):
    """A checkpoint that was written.

    Attributes:
        folder: The checkpoint's folder.
        path: Indices of the base model's layers, in the order executed.
        dtype: The dtype of the weights.
        num_bytes: The size of the weights.
        num_repeated_bytes: The size of the layers that are written a second time or more.
        is_healed: Whether an adapter is merged into the weights.
    """

    folder: Path
    path: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_repeated_bytes: int
    is_healed: bool


def export_path(
    base: BaseModel, path: StaticPath | PathFile | Sequence[int], output: Path | str
) -> Export:
    """Write a path as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    The folder holds config, weights, generation config, tokenizer and a model card. Loading it
    doesn't need drllm. PEFT merges a healed path's adapter into the weights. An ordinary checkpoint
    can't share a layer, so a layer that the path runs twice is written twice.

    The folder appears only when everything is written and checked. For the check, the checkpoint is
    loaded again. Its weights must equal those of the base model along the path bit for bit, and so
    must its logits for a short row of tokens. With a merged adapter the logits must be equal up to
    rounding.

    Args:
        base: The base model, which isn't routed. It isn't changed.
        path: A path, or layer indices in the order executed. The order is free, and a layer may
            come any number of times. For a `PathFile` the card says how the path was found.
        output: The folder to make. An empty folder may exist.

    Raises:
        PathError: The path is empty, has a layer that the model doesn't have, or is for another
            model.
        ArchitectureError: The model's config can't express the path, its class isn't one of
            transformers, or its weights are quantised.
        ConfigError: The folder isn't empty.
        ModelError: The folder can't be written.
        RoutingError: The model is routed.

    Source: ours.
    """
    output = Path(output)
    file = path if isinstance(path, PathFile) else None
    if isinstance(path, PathFile):
        path = path.path_for(base.identity)
    elif not isinstance(path, StaticPath):
        path = StaticPath(path)
    path.check(base.num_layers)
    check_output(output)
    if base.identity["fingerprint"].startswith(QUANTISED):
        raise ArchitectureError(
            f"the weights of {base.name} are quantised, and an export copies weights as they were "
            f"trained; export from the model without quantisation, then quantise the checkpoint"
        )
    with hub.quiet():
        exported = _build(base.model, path.layers)
        merged, logits = _run_base(base.model, path, file)
        num_bytes, num_repeated_bytes = _fill(exported, base.model, path.layers, merged)
        export = Export(
            folder=output,
            path=path.layers,
            dtype=base.runtime["dtype"],
            num_bytes=num_bytes,
            num_repeated_bytes=num_repeated_bytes,
            is_healed=bool(path.adapter),
        )
        card = model_card(base.identity, path, export.dtype, num_repeated_bytes, file)
        with _create_folder(output) as folder:
            _write(folder, exported, base, card)
            del exported  # frees its copies of weights before the checkpoint is loaded
            _verify(folder, base.model, path, merged, logits)
    return export


def _run_base(
    model: Any, path: StaticPath, file: PathFile | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the base model along a path. Return the adapter's merged weights, and the logits."""
    routed = RoutedModel(model)
    try:
        if file is not None:
            load_path(routed, file)
        with routed.fixed(path):
            logits = _compute_logits(model)
        merged: dict[str, Tensor] = {}
        if path.adapter:
            merged = routed.injection.lora.merged_weights(path.adapter)
        return merged, logits
    finally:
        routed.detach()


@contextmanager
def _create_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes the output folder if the block succeeds."""
    place = output.resolve()
    folder = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.is_dir():
            place.rmdir()
        folder.rename(place)
    except DrllmError:  # some kinds of it are OSErrors too
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or hub.first_line(error)
        raise ModelError(
            f"can't write {output}: {reason}; free some space, or give a folder that you may "
            f"write to"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output(folder: Path) -> None:
    """Raise ConfigError if the output is a file, or a folder that isn't empty."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the name of a folder to make")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} isn't empty; give the name of a new one")


def _build(base: Any, path: tuple[int, ...]) -> Any:
    """Build the model for a path, without weights, and check the kinds of its layers."""
    name = type(base).__name__
    if not type(base).__module__.startswith("transformers."):
        raise ArchitectureError(
            f"{name} isn't a class of transformers, and an export must load without other code; "
            f"give a model that needs no code of its own and has no adapter around it"
        )
    try:
        config = config_along(base.config, path)
        with torch.device("meta"):
            exported = AutoModelForCausalLM.from_config(
                config, attn_implementation=base.config._attn_implementation
            )
    except BUILD_ERRORS as error:
        raise ArchitectureError(
            f"the config of {name} can't express this path: {hub.first_line(error)}; give another "
            f"path"
        ) from error
    if type(exported) is not type(base):
        raise ArchitectureError(
            f"this is a {name}, but AutoModelForCausalLM would load its export as a "
            f"{type(exported).__name__}; give the language model alone"
        )
    check_layers(find_layers(exported)[1], find_layers(base)[1], path)
    return exported.eval()


class NamedWeight(NamedTuple):
    """A weight of an exported model."""

    name: str
    values: Tensor
    is_copy: bool  # whether the path runs the weight's layer earlier too


def _weights_along(
    base: Any, path: tuple[int, ...], merged: Mapping[str, Tensor]
) -> Iterator[NamedWeight]:
    """Yield the weights of the exported model. The merged weights replace the base model's."""
    layers = find_layers(base)[1]
    prefix = name_of_layers(base, layers)
    for name, weight in base.state_dict().items():
        if not name.startswith(f"{prefix}."):
            yield NamedWeight(name, weight, is_copy=False)
    for place, layer in enumerate(path):
        is_copy = layer in path[:place]
        for name, weight in layers[layer].state_dict().items():
            values = weight
            if name.endswith(".weight"):
                values = merged.get(f"{layer}.{name.removesuffix('.weight')}", weight)
            yield NamedWeight(f"{prefix}.{place}.{name}", values, is_copy)


def _fill(
    exported: Any, base: Any, path: tuple[int, ...], merged: Mapping[str, Tensor]
) -> tuple[int, int]:
    """Give an exported model its weights. Return the bytes of all, and of the repeated layers."""
    weights: dict[str, Tensor] = {}
    num_repeated_bytes = 0
    for weight in _weights_along(base, path, merged):
        weights[weight.name] = weight.values
        if weight.is_copy:
            # safetensors refuses tensors that share memory, except those that the class ties.
            weights[weight.name] = weight.values.clone()
            num_repeated_bytes += weight.values.nbytes
    shapes = {name: weight.shape for name, weight in exported.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape:
            raise ArchitectureError(
                f"the weight {name!r} of this {type(base).__name__} isn't as its class makes it; "
                f"merge or remove what was put on the model, then export it"
            )
    exported.load_state_dict(weights, assign=True)
    exported.tie_weights()
    by_address = {weight.data_ptr(): weight.nbytes for weight in weights.values()}
    return sum(by_address.values()), num_repeated_bytes


def config_along(config: Any, path: Sequence[int]) -> Any:
    """Return a copy of a model's config with its layers in path order.

    A list of L values is taken to have one value per layer, and follows the path. So does a list of
    layer indices, which is recognised by its name. Everything else stays; `check_layers` finds out
    whether that was enough.

    Raises:
        ValueError: The config's class refuses the values.
    """
    text = config.get_text_config()
    values = config.to_dict()
    fields = values
    if text is not config:
        fields = values[next(name for name, part in vars(config).items() if part is text)]
    fields.update(lists_along(fields, path, text.num_hidden_layers))
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(path)
    add_older_names(values)  # transformers 5.0 loses some of its own settings in `from_dict`
    return type(config).from_dict(values)


def lists_along(fields: Mapping[str, Any], path: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Return the lists of a config that have values or indices of layers, in path order.

    Example:
        >>> lists_along({"dense_layers": [0, 2], "windows": [4, 8, 8], "width": 64}, [2, 1, 2], 3)
        {'dense_layers': [0, 2], 'windows': [8, 8, 8]}
    """
    lists = {}
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or name.endswith(TOKEN_SUFFIXES):
            continue
        indices = [layer for layer in range(num_layers) if layer in value]
        if "layer" in name and list(value) == indices:
            lists[name] = [place for place, layer in enumerate(path) if layer in value]
        elif len(value) == num_layers:
            lists[name] = [value[layer] for layer in path]
    return lists


def check_layers(ours: nn.ModuleList, theirs: nn.ModuleList, path: Sequence[int]) -> None:
    """Refuse exported layers that differ from the layers of the base model that they copy.

    The function compares the classes, the names and shapes of tensors, every plain attribute (a
    window, a switch for RoPE, a scale) except a layer's index, and the values of buffers. On the
    meta device values aren't compared.

    Args:
        ours: The exported layers, built from the config for the path.
        theirs: The layers of the base model.
        path: The layer of the base model that each exported layer copies.

    Raises:
        ArchitectureError: A layer differs. The message names the layer and the difference.
    """
    for place, origin in enumerate(path):
        difference = _find_difference(ours[place], theirs[origin], place, origin)
        if difference is not None:
            raise ArchitectureError(
                f"layer {origin}, executed as number {place} (counted from 0), would have "
                f"{difference}: the config derives that from a layer's place or from the number of "
                f"layers, and can't say it otherwise; give a path that leaves it as it is"
            )


def _find_difference(ours: nn.Module, theirs: nn.Module, place: int, origin: int) -> str | None:
    """Describe how a copied layer differs from its source; return None if it doesn't."""
    ours_by_name = _describe_layer(ours)
    theirs_by_name = _describe_layer(theirs)
    for name in {**theirs_by_name, **ours_by_name}:
        our_value = ours_by_name.get(name)
        their_value = theirs_by_name.get(name)
        is_missing = name not in ours_by_name or name not in theirs_by_name
        is_index = our_value == place and their_value == origin
        if not is_index and (is_missing or our_value != their_value):
            return f"{our_value!r} as {name} instead of {their_value!r}"
    buffers = dict(theirs.named_buffers())
    for name, values in ours.named_buffers():
        if not values.is_meta and not torch.equal(values, buffers[name]):
            return f"other values in {name}"
    return None


def _describe_layer(layer: nn.Module) -> dict[str, Any]:
    """Return the classes, shapes and plain attributes of a layer's modules, by name."""
    modules = dict(layer.named_modules())
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    description: dict[str, Any] = {}
    for name, module in modules.items():
        description[f"the class of {name or 'the layer'}"] = type(module).__name__
    for name, tensor in tensors:
        description[f"the shape of {name}"] = tuple(tensor.shape)
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute in STATE_ATTRIBUTES:
                continue
            if isinstance(value, PLAIN_TYPES):
                description[f"{name}.{attribute}".lstrip(".")] = value
    return description


def _write(folder: Path, exported: Any, base: BaseModel, card: str) -> None:
    """Write an exported model with its generation config, tokenizer and card."""
    # save_pretrained refuses generation settings that loading accepts, so they are written below.
    exported.generation_config = GenerationConfig()
    exported.save_pretrained(folder)
    base.model.generation_config.to_json_file(folder / "generation_config.json")
    base.tokenizer.save_pretrained(folder)
    add_names_of_transformers_4(folder)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        # safetensors makes its files readable only by the owner, whatever the umask is.
        file.chmod((folder / CARD_FILE).stat().st_mode)


def add_names_of_transformers_4(folder: Path) -> None:
    """Add the names that transformers 4 reads to the files of a folder of `save_pretrained`."""
    for name, add_names in (
        (CONFIG_FILE, add_older_names),
        (TOKENIZER_CONFIG_FILE, _rename_tokens),
    ):
        file = folder / name
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        add_names(values)
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
        file.write_text(text + "\n", encoding="utf-8")


def _rename_tokens(tokenizer: dict[str, Any]) -> None:
    """Give a tokenizer's config, in place, names that transformers 4 and 5 both read."""
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        # This class loads tokenizer.json in both versions.
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")


def add_older_names(config: dict[str, Any]) -> None:
    """Add to a config, in place, the names that transformers 4 and early versions of 5 read.

    Transformers 5 keeps the settings of RoPE under `rope_parameters`. Transformers 4 doesn't read
    that key, and uses its defaults without a warning. A config may have both names. Transformers 5
    still reads the older names.
    """
    for part in [config, *config.values()]:  # a composite config has a part for the text
        if not isinstance(part, dict):
            continue
        if "attention_layers" in part and "attention_types" in part:  # gpt_neo: runs of kinds
            part["attention_types"] = [[[kind], 1] for kind in part["attention_layers"]]
        if "rope_parameters" in part:
            older_names = OLDER_NAMES.get(part.get("model_type", ""), {})
            for name, value in {**part, **_older_rope(part)}.items():
                part[older_names.get(name, name)] = value


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE as transformers 4 has them, outside of `rope_parameters`."""
    parameters = config["rope_parameters"] or {}
    local = {}
    if any(isinstance(value, dict) for value in parameters.values()):
        kinds = {"full_attention", "sliding_attention"}
        if parameters.keys() != kinds or not all(parameters.values()):
            return {}  # only transformers 5 has models with other kinds
        sliding = parameters["sliding_attention"]
        parameters = parameters["full_attention"]
        if sliding["rope_theta"] != parameters["rope_theta"]:
            local = {"rope_local_base_freq": sliding["rope_theta"]}
    outside = ("rope_theta", "partial_rotary_factor")
    older = {name: parameters[name] for name in outside if parameters.get(name) is not None}
    kind = parameters.get("rope_type", "default")
    scaling: dict[str, Any] | None = None
    if kind != "default":
        scaling = {name: value for name, value in parameters.items() if name not in outside}
    if kind == "longrope" and "original_max_position_embeddings" in config:
        # If the config has this length outside of the scaling, as in phi3, only these three keys
        # may be in the scaling.
        factors = {name: parameters[name] for name in ("short_factor", "long_factor")}
        scaling = {"type": kind, **factors}
    return {**older, "rope_scaling": scaling, **local}


def _make_tokens(model: Any) -> Tensor:
    """Return a row of random tokens, always the same, `[1, T]`."""
    length = min(NUM_TOKENS, context_length(model) or NUM_TOKENS)
    num_tokens = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(num_tokens, (1, length), generator=generator).to(model.device)


def _compute_logits(model: Any) -> Tensor:
    """Return a model's logits for the row of `_make_tokens`, `[1, T, V]`."""
    with torch.no_grad():
        logits: Tensor = model(_make_tokens(model), use_cache=False).logits
    return logits


def _verify(
    folder: Path, base: Any, path: StaticPath, merged: Mapping[str, Tensor], expected: Tensor
) -> None:
    """Load the checkpoint, and refuse it if it differs from the base model along the path."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        use_safetensors=True,
    )
    loaded.to(base.device).eval()
    check_layers(find_layers(loaded)[1], find_layers(base)[1], path.layers)
    loaded_weights = loaded.state_dict()
    weights = {}
    for weight in _weights_along(base, path.layers, merged):
        weights[weight.name] = weight.values
    for name, values in weights.items():
        loaded_values = loaded_weights[name]
        if loaded_values.dtype != values.dtype or not torch.equal(loaded_values, values):
            raise ArchitectureError(
                f"loaded again, the export has other values in {name!r}, so it was removed; this "
                f"{type(base).__name__} can't be exported"
            )
    # The last bits of a product depend on the memory addresses of its factors, so both models get
    # the same tensors.
    loaded.load_state_dict(weights, assign=True)
    logits = _compute_logits(loaded)
    difference = float((logits - expected).abs().max())
    allowed = 0.0
    if path.adapter:
        tolerance = MERGED_TOLERANCE if logits.dtype.itemsize > 2 else MERGED_TOLERANCE_16_BITS
        allowed = tolerance * float(expected.std())
    if not difference <= allowed:
        raise ArchitectureError(
            f"loaded again, the export's logits differ from the path's by up to {difference:.3g}, "
            f"so it was removed: this {type(base).__name__} computes something from a layer's "
            f"place, or was changed after it was loaded (load it with the right --dtype; on an "
            f"accelerator also try --device cpu, where sums have one order)"
        )


def model_card(
    base: Mapping[str, Any],
    path: StaticPath,
    dtype: str,
    num_repeated_bytes: int,
    file: PathFile | None = None,
) -> str:
    """Write the card of an exported checkpoint: where it comes from, and how to load it.

    For a path of a `paths.json`, the card also says how the path was found and how it scored.
    """
    layers = path.layers
    num_layers = base["num_layers"]
    plan = path.with_adapter("").plan(num_layers)
    record = None if file is None else file.record
    return render_card(
        CARD_TEMPLATE,
        _describe_for_hub(base),
        base=base,
        steps=layers,
        decisions=() if isinstance(plan, StaticPath) else plan,
        skipped=sorted(set(range(num_layers)) - set(layers)),
        repeated=sorted({layer for layer in layers if layers.count(layer) > 1}),
        in_order=list(layers) == sorted(layers),
        dtype=dtype,
        num_repeated_bytes=num_repeated_bytes,
        named=None if file is None else file.named,
        record=record if isinstance(record, StaticPaths) else None,
        healed=record if isinstance(record, HealedPath) else None,
        version=importlib.metadata.version("drllm"),
    )


def _describe_for_hub(base: Mapping[str, Any]) -> ModelCardData:
    """Return metadata for the hub. It names the base model only if that came from the hub."""
    metadata = ModelCardData(library_name="transformers", tags=["layer-path"])
    if base["revision"]:
        metadata.base_model = base["id"]
        metadata["base_model_relation"] = "merge"
    return metadata
