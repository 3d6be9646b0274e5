"""A path written as an ordinary checkpoint: the base model's layers, listed in path order.

Build the stock class for the path, give it the base model's weights, write it, load it again and
compare; only then the folder appears. What a config means is found out by comparing the layers that
a class builds from it, not looked up by the model's name.

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

MERGED_TOLERANCE, MERGED_TOLERANCE_16_BITS = 1e-4, 0.25
"""Largest difference of two logits, in their standard deviations, that counts as rounding where an
adapter is merged: the sum of a weight and its update is rounded once, in 16 bits coarsely."""

BUILD_ERRORS = (
    *(ValueError, TypeError, KeyError, IndexError, StrictDataclassError),
    NotImplementedError,  # a class that looks at its weights while it is built
)
"""What a class of transformers raises where it can't be built from a config."""

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CARD_TEMPLATE = Path(__file__).with_name("export_card.md.j2")

PLAIN = (bool, int, float, str, type(None), torch.dtype)
PASSING = ("training", "gradient_checkpointing")
"""Attributes that say what is being done with a layer, not what it is."""
TOKENS = ("_token_id", "_token_ids")
"""Ends of names whose lists hold tokens: they say nothing of layers, however many they are."""

OLDER_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""Type of model → name of a setting in transformers 5 → its name in 4, where that is another."""


class Export(NamedTuple):
    """What was written.

    Attributes:
        folder: The checkpoint.
        path: Indices of the base model's layers in the order executed.
        dtype: Of the weights.
        num_bytes: Size of the weights.
        num_repeated_bytes: The part of it that is there a second time or more.
        is_healed: An adapter is merged into the weights.
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
    """Write a path as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads by itself.

    The folder holds config, weights, generation config, tokenizer and a model card, and loading it
    needs no code of ours. PEFT merges a healed path's adapter into the weights. A stock checkpoint
    can't say that two layers are the same, so a layer that the path runs twice is written twice.
    The folder appears when all is written and checked: loaded again, every weight is as it should
    be, and the logits of a short row of tokens equal those of the base model run along the path,
    bit by bit; to rounding where an adapter is merged.

    Args:
        base: The base model, not routed; it stays as it is.
        path: A path, or layer indices in the order executed: in any order, each any number of
            times. Of a `PathFile` the card says how the path was found.
        output: The folder to make; an empty one may be there.

    Raises:
        PathError: An empty path, a layer that the model doesn't have, or paths of another model.
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
        listed = _build(base.model, path.layers)
        merged, logits = _run_base(base.model, path, file)
        num_bytes, num_repeated_bytes = _fill(listed, base.model, path.layers, merged)
        export = Export(
            folder=output,
            path=path.layers,
            dtype=base.runtime["dtype"],
            num_bytes=num_bytes,
            num_repeated_bytes=num_repeated_bytes,
            is_healed=bool(path.adapter),
        )
        card = model_card(base.identity, path, export.dtype, num_repeated_bytes, file)
        with _appearing(output) as folder:
            _write(folder, listed, base, card)
            del listed  # the copies of weights; the checkpoint is loaded now
            _verify(folder, base.model, path, merged, logits)
    return export


def _run_base(
    model: Any, path: StaticPath, file: PathFile | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the base model along a path; return the weights merged with its adapter, and logits."""
    routed = RoutedModel(model)
    try:
        if file is not None:
            load_path(routed, file)
        with routed.fixed(path):
            logits = _logits(model)
        merged: dict[str, Tensor] = {}
        if path.adapter:
            merged = routed.injection.lora.merged_weights(path.adapter)
        return merged, logits
    finally:
        routed.detach()


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Yield a folder beside its place, which is moved there if the block succeeds."""
    place = output.resolve()
    folder = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.is_dir():
            place.rmdir()
        folder.rename(place)
    except DrllmError:  # of which some are an OSError too
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
    """Refuse, by a ConfigError, a folder that isn't empty, and a file."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the name of a folder to make")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} isn't empty; give the name of a new one")


def _build(base: Any, path: tuple[int, ...]) -> Any:
    """Return the stock model for a path on the meta device, its layers of the right kinds."""
    name = type(base).__name__
    if not type(base).__module__.startswith("transformers."):
        raise ArchitectureError(
            f"{name} isn't a class of transformers, and an export must load without other code; "
            f"give a model that needs no code of its own and has no adapter around it"
        )
    theirs = find_layers(base)[1]
    try:
        config = config_along(base.config, path)
        with torch.device("meta"):
            listed = AutoModelForCausalLM.from_config(
                config, attn_implementation=base.config._attn_implementation
            )
    except BUILD_ERRORS as error:
        raise ArchitectureError(
            f"the config of {name} can't express this path: {hub.first_line(error)}; give another "
            f"path"
        ) from error
    if type(listed) is not type(base):
        raise ArchitectureError(
            f"this is a {name}, but AutoModelForCausalLM would load its export as a "
            f"{type(listed).__name__}; give the language model alone"
        )
    check_layers(find_layers(listed)[1], theirs, path)
    return listed.eval()


class NamedWeight(NamedTuple):
    """A weight of the model for a path."""

    name: str
    values: Tensor
    is_copy: bool  # of a layer that stands earlier in the path already


def _weights_along(
    base: Any, path: tuple[int, ...], merged: Mapping[str, Tensor]
) -> Iterator[NamedWeight]:
    """Yield the weights of the model for a path, those of an adapter merged."""
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
    listed: Any, base: Any, path: tuple[int, ...], merged: Mapping[str, Tensor]
) -> tuple[int, int]:
    """Give the model on the meta device the base's weights; return their and the copies' bytes."""
    weights: dict[str, Tensor] = {}
    num_repeated_bytes = 0
    for weight in _weights_along(base, path, merged):
        weights[weight.name] = weight.values
        if weight.is_copy:
            # safetensors refuses tensors that share memory, but for those that the class ties.
            weights[weight.name] = weight.values.clone()
            num_repeated_bytes += weight.values.nbytes
    shapes = {name: weight.shape for name, weight in listed.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape:
            raise ArchitectureError(
                f"the weight {name!r} of this {type(base).__name__} isn't as its class makes it; "
                f"merge or remove what was put on the model, then export it"
            )
    listed.load_state_dict(weights, assign=True)
    listed.tie_weights()
    by_address = {weight.data_ptr(): weight.nbytes for weight in weights.values()}
    return sum(by_address.values()), num_repeated_bytes


def config_along(config: Any, path: Sequence[int]) -> Any:
    """Return a copy of a model's config with its layers in path order.

    Lists of L values are taken for one value per layer and follow the path, and so do lists of
    layer indices, told by their name. Everything else stays; whether that was enough is for
    `check_layers` to say. Values that the config's class refuses are a ValueError.
    """
    text = config.get_text_config()
    values = config.to_dict()
    fields = values
    if text is not config:
        fields = values[next(name for name, part in vars(config).items() if part is text)]
    fields.update(lists_along(fields, path, text.num_hidden_layers))
    fields[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(path)
    add_older_words(values)  # as it will be read: 5.0 forgets some of its own on the way
    return type(config).from_dict(values)


def lists_along(fields: Mapping[str, Any], path: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Return the lists of a config that say something layer by layer, in path order.

    Example:
        >>> lists_along({"dense_layers": [0, 2], "windows": [4, 8, 8], "width": 64}, [2, 1, 2], 3)
        {'dense_layers': [0, 2], 'windows': [8, 8, 8]}
    """
    lists = {}
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or name.endswith(TOKENS):
            continue
        if "layer" in name and list(value) == [at for at in range(num_layers) if at in value]:
            lists[name] = [place for place, layer in enumerate(path) if layer in value]
        elif len(value) == num_layers:
            lists[name] = [value[layer] for layer in path]
    return lists


def check_layers(ours: nn.ModuleList, theirs: nn.ModuleList, path: Sequence[int]) -> None:
    """Refuse layers of another kind than those they stand for, naming the layer and what differs.

    Compared are classes, names and shapes of tensors, every plain attribute (a window, a switch
    for RoPE, a scale) except a layer's index, and the values of tensors that no checkpoint holds.
    `ours` are built from the config for the path; on the meta device no values are compared.
    """
    for place, origin in enumerate(path):
        difference = _difference(ours[place], theirs[origin], place, origin)
        if difference is not None:
            raise ArchitectureError(
                f"layer {origin}, executed as number {place} (counted from 0), would have "
                f"{difference}: the config derives that from a layer's place or from their number, "
                f"and can't say it otherwise; give a path that leaves it as it is"
            )


def _difference(ours: nn.Module, theirs: nn.Module, place: int, origin: int) -> str | None:
    """Say in what a layer differs from the one that it stands for, or return None."""
    new, old = _description(ours), _description(theirs)
    for name in {**old, **new}:
        found, wanted = new.get(name), old.get(name)
        is_index = (found, wanted) == (place, origin)
        if not is_index and (name not in new or name not in old or found != wanted):
            return f"{found!r} as {name} instead of {wanted!r}"
    buffers = dict(theirs.named_buffers())
    for name, values in ours.named_buffers():
        if not values.is_meta and not torch.equal(values, buffers[name]):
            return f"other values in {name}"
    return None


def _description(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer is made of, by name: classes, shapes, plain attributes."""
    modules = dict(layer.named_modules())
    tensors = dict((*layer.named_parameters(), *layer.named_buffers()))
    return {
        **{f"the class of {name or 'the layer'}": type(m).__name__ for name, m in modules.items()},
        **{f"the shape of {name}": tuple(tensor.shape) for name, tensor in tensors.items()},
        **{
            f"{name}.{attribute}".lstrip("."): value
            for name, module in modules.items()
            for attribute, value in vars(module).items()
            if isinstance(value, PLAIN) and attribute[0] != "_" and attribute not in PASSING
        },
    }


def _write(folder: Path, listed: Any, base: BaseModel, card: str) -> None:
    # Written by its own method below: save_pretrained refuses settings that loading accepted.
    listed.generation_config = GenerationConfig()
    listed.save_pretrained(folder)
    base.model.generation_config.to_json_file(folder / "generation_config.json")
    base.tokenizer.save_pretrained(folder)
    say_for_transformers_4(folder)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        # safetensors makes its files readable by the owner alone, whatever the umask says.
        file.chmod((folder / CARD_FILE).stat().st_mode)


def say_for_transformers_4(folder: Path) -> None:
    """Add what transformers 4 reads under other names to a folder of `save_pretrained`."""
    for name, add in ((CONFIG_FILE, add_older_words), (TOKENIZER_CONFIG_FILE, _rename_tokens)):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            add(values)
            text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _rename_tokens(tokenizer: dict[str, Any]) -> None:
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        # The name that both know for "whatever tokenizer.json says".
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")


def add_older_words(config: dict[str, Any]) -> None:
    """Add to a config, in place, what transformers 4 and the first of 5 read under other names.

    Transformers 5 keeps all of RoPE under `rope_parameters`. Transformers 4 doesn't know that key
    and takes its defaults: other numbers, and no warning. Both may stand in one config. The older
    names are those that transformers 5 itself still reads.
    """
    for part in [config, *config.values()]:  # a composite config has one for the text
        if not isinstance(part, dict):
            continue
        if "attention_layers" in part and "attention_types" in part:  # gpt_neo: runs of kinds
            part["attention_types"] = [[[kind], 1] for kind in part["attention_layers"]]
        if "rope_parameters" in part:
            names = OLDER_NAMES.get(part.get("model_type", ""), {})
            older = {**part, **_older_rope(part)}
            part.update({names.get(name, name): value for name, value in older.items()})


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of RoPE outside of `rope_parameters`, in transformers 4."""
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
    scaling: dict[str, Any] | None = {k: v for k, v in parameters.items() if k not in outside}
    if kind == "default":
        scaling = None
    elif kind == "longrope" and "original_max_position_embeddings" in config:
        # Models that say this length outside, such as phi3, accept these three inside and no more.
        factors = {name: parameters[name] for name in ("short_factor", "long_factor")}
        scaling = {"type": kind, **factors}
    return {**older, "rope_scaling": scaling, **local}


def _tokens(model: Any) -> Tensor:
    """Return one row of tokens, always the same, `[1, T]`."""
    length = min(NUM_TOKENS, context_length(model) or NUM_TOKENS)
    num_tokens = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(num_tokens, (1, length), generator=generator).to(model.device)


def _logits(model: Any) -> Tensor:
    """Return a model's logits for that row, `[1, T, V]`."""
    with torch.no_grad():
        logits: Tensor = model(_tokens(model), use_cache=False).logits
    return logits


def _verify(
    folder: Path, base: Any, path: StaticPath, merged: Mapping[str, Tensor], expected: Tensor
) -> None:
    """Load the checkpoint and refuse it unless it is the base model along the path."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        use_safetensors=True,
    )
    loaded.to(base.device).eval()
    check_layers(find_layers(loaded)[1], find_layers(base)[1], path.layers)
    found = loaded.state_dict()
    wanted = {each.name: each.values for each in _weights_along(base, path.layers, merged)}
    for name, weight in wanted.items():
        if found[name].dtype != weight.dtype or not torch.equal(found[name], weight):
            raise ArchitectureError(
                f"loaded again, the export has other values in {name!r}, so it was removed; this "
                f"{type(base).__name__} can't be exported"
            )
    # The last bits of a product depend on where in memory its factors lie, so let them be the same.
    loaded.load_state_dict(wanted, assign=True)
    logits = _logits(loaded)
    difference = float((logits - expected).abs().max())
    allowed = 0.0
    if path.adapter:
        tolerance = MERGED_TOLERANCE if logits.dtype.itemsize > 2 else MERGED_TOLERANCE_16_BITS
        allowed = tolerance * float(expected.std())
    if not difference <= allowed:
        raise ArchitectureError(
            f"loaded again, the export's logits differ from the path's by up to {difference:.3g}, "
            f"so it was removed: this {type(base).__name__} computes something from a layer's "
            f"place, or was changed after it was loaded (load it in the wanted dtype; on an "
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

    For a path of a `paths.json` the card also says how the path was found and how it did.
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
    """Return the hub's metadata; it names the base model only if that came from the hub."""
    metadata = ModelCardData(library_name="transformers", tags=["layer-path"])
    if base["revision"]:
        metadata.base_model = base["id"]
        metadata["base_model_relation"] = "merge"
    return metadata
