"""Write a path as an ordinary checkpoint: the base model's layers, in the order of the path.

The export writes a config for the path, builds a model from it, and gives this model the base
model's weights. The model is written, loaded again, and compared with the base model. The folder
appears only after that.

Axes: T tokens, V vocabulary.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from drllm.errors import ArchitectureError
from drllm.model import hub
from drllm.model.cards import CARD_FILE, describe_alias, name_base_model, render_card
from drllm.model.layers import find_layers
from drllm.model.load import BaseModel
from drllm.model.older_names import add_names_of_transformers_4
from drllm.model.path_config import check_layers, reorder_config
from drllm.model.prompts import context_length
from drllm.models.routing.core import Routing
from drllm.models.routing.healed import install_path
from drllm.models.routing.lora import find_layers_name
from drllm.paths import StaticPath
from drllm.records.healed import HealedPath
from drllm.records.identity import QUANTISED
from drllm.records.path_losses import describe_evaluated_losses, describe_file_losses
from drllm.records.places import check_new_folder, create_folder, make_output_error
from drllm.records.published import hide_model_place, hide_places
from drllm.records.results import Evaluation
from drllm.records.static_paths import PathFile, StaticPaths

NUM_TOKENS = 32  # length of the row on which the checkpoint is compared with the path

MERGED_TOLERANCE = 1e-4
MERGED_TOLERANCE_16_BITS = 0.25
"""The largest difference of logits with a merged adapter, as a share of their standard deviation.
Merging rounds the sum of a weight and its update, in 16 bits more coarsely."""

BUILD_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    StrictDataclassError,
    NotImplementedError,  # from a class that looks at its weights while it is built
)
"""Errors that transformers raises if a model can't be built from a config."""

CARD_TEMPLATE = Path(__file__).with_name("export_card.md.j2")


class Export(NamedTuple):
    """A checkpoint that was written.

    Attributes:
        folder: The checkpoint's folder.
        path: Indices of the base model's layers, in the order executed.
        dtype: The dtype of the weights.
        num_bytes: The size of the weights.
        num_repeated_bytes: The size of the layers that are written a second time or more.
        is_merged: Whether LoRA weights are merged into the weights, which rounds them.
    """

    folder: Path
    path: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_repeated_bytes: int
    is_merged: bool


def export_path(
    base: BaseModel,
    path: StaticPath | PathFile | Sequence[int],
    output_dir: Path | str,
    *,
    evaluations: Sequence[Evaluation] = (),
) -> Export:
    """Write a path as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    The folder holds config, weights, generation config, tokenizer and a model card. Loading it
    doesn't need drllm. A healed path's refit replaces weights, and PEFT merges its LoRA weights
    into others. An ordinary checkpoint can't share a layer, so a layer that the path runs twice is
    written twice.

    The folder appears only when everything is written and checked. For the check, the checkpoint is
    loaded again. Its weights must be the base model's weights bit for bit. For a short row of
    tokens, its logits must be the logits of the base model along the path, bit for bit or, with
    merged LoRA weights, up to rounding.

    Args:
        base: The base model, which isn't routed. It isn't changed.
        path: A path, or layer indices in the order executed. The order is free, and a layer may
            come any number of times. For a `PathFile` the card says how the path was found.
        output_dir: The folder to make. An empty folder may exist.
        evaluations: What `drllm evaluate` measured; the card says what it found of this healed
            path.

    Raises:
        PathError: The path is empty, has a layer that the model doesn't have, or is for another
            model.
        ArchitectureError: The model's config can't express the path, its class isn't one of
            transformers, or its weights are quantised.
        ConfigError: The folder isn't empty.
        RecordError: The folder can't be written.
        RoutingError: The model is routed.

    Source: ours.
    """
    base.refuse_bypass("export writes an ordinary checkpoint")
    output = Path(output_dir)
    file: PathFile | None = None
    if isinstance(path, PathFile):
        file = path
        path = path.path_for(base.identity)
    elif not isinstance(path, StaticPath):
        path = StaticPath(path)
    path.check(base.num_layers)
    check_new_folder(output)
    refuse_quantised(base)
    with hub.quiet():
        exported = _build(base.model, path.layers)
        along_path = _run_base(base.model, path, file)
        num_bytes, num_repeated_bytes = _put_weights(
            exported, base.model, path.layers, along_path.new_weights
        )
        export = Export(
            folder=output,
            path=path.layers,
            dtype=base.runtime["dtype"],
            num_bytes=num_bytes,
            num_repeated_bytes=num_repeated_bytes,
            is_merged=along_path.is_merged,
        )
        card = model_card(base.identity, path, export.dtype, num_repeated_bytes, file, evaluations)
        try:
            with create_folder(output) as folder:
                _write(folder, exported, base, card)
                del exported  # frees its copies of weights before the checkpoint is loaded
                _verify(folder, base.model, path, along_path)
        except SafetensorError as error:  # it has no class of its own for a full disk
            raise make_output_error(output, hub.first_line(error)) from error
    return export


def refuse_quantised(base: BaseModel) -> None:
    """Raise ArchitectureError if the weights of a model are quantised: they can't be exported."""
    if base.identity["fingerprint"].startswith(QUANTISED):
        raise ArchitectureError(
            f"the weights of {base.name} are quantised, and an export copies weights as they were "
            f"trained; export from the model without quantisation, then quantise the checkpoint"
        )


class PathRun(NamedTuple):
    """The base model's run along a path."""

    new_weights: dict[str, Tensor]  # weights that differ from the base model's, by linear map
    is_merged: bool  # whether LoRA weights are merged into some of them
    logits: Tensor  # of the row of `_make_tokens`, [1, T, V]


def _run_base(model: Any, path: StaticPath, file: PathFile | None) -> PathRun:
    """Run the base model along a path, with the path's adapter if it has one."""
    routed = Routing(model)
    injection = routed.injection
    try:
        if file is not None:
            install_path(injection, file)
        with routed.fixed(path):
            logits = _compute_logits(model)
        new_weights: dict[str, Tensor] = {}
        if path.adapter:
            new_weights.update(injection.adapters.weights(path.adapter).refit)
        is_merged = path.adapter in injection.lora.names
        if is_merged:
            new_weights.update(injection.lora.merged_weights(path.adapter))
        return PathRun(new_weights, is_merged, logits)
    finally:
        routed.detach()


def _build(base: Any, path: tuple[int, ...]) -> Any:
    """Build the model for a path, without weights, and check its layers."""
    name = type(base).__name__
    if not type(base).__module__.startswith("transformers."):
        raise ArchitectureError(
            f"{name} isn't a class of transformers, and an export must load without other code; "
            f"give a model that needs no code of its own and isn't wrapped by PEFT"
        )
    try:
        config = reorder_config(base.config, path)
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
            f"{type(exported).__name__}; give only the language model"
        )
    check_layers(find_layers(exported)[1], find_layers(base)[1], path)
    return exported.eval()


class NamedWeight(NamedTuple):
    """A weight of an exported model."""

    name: str
    values: Tensor
    is_copy: bool  # whether an earlier place of the path has the same layer


def _list_weights(
    base: Any, path: tuple[int, ...], new_weights: Mapping[str, Tensor]
) -> Iterator[NamedWeight]:
    """Yield the weights of the model for a path.

    Args:
        base: The base model.
        path: Indices of the base model's layers, in the order executed.
        new_weights: Weights that replace the base model's weights, by linear map.
    """
    layers = find_layers(base)[1]
    prefix = find_layers_name(base, layers)
    for name, weight in base.state_dict().items():
        if not name.startswith(f"{prefix}."):
            yield NamedWeight(name, weight, is_copy=False)
    for place, layer in enumerate(path):
        is_copy = layer in path[:place]
        for name, weight in layers[layer].state_dict().items():
            values = weight
            if name.endswith(".weight"):
                values = new_weights.get(f"{layer}.{name.removesuffix('.weight')}", weight)
            yield NamedWeight(f"{prefix}.{place}.{name}", values, is_copy)


def _put_weights(
    exported: Any, base: Any, path: tuple[int, ...], new_weights: Mapping[str, Tensor]
) -> tuple[int, int]:
    """Put the weights into an exported model.

    Returns:
        The bytes of all weights, and the bytes of the copies.
    """
    weights: dict[str, Tensor] = {}
    num_copied_bytes = 0
    for weight in _list_weights(base, path, new_weights):
        weights[weight.name] = weight.values
        if weight.is_copy:
            # safetensors refuses tensors that share memory, except those that the class ties.
            weights[weight.name] = weight.values.clone()
            num_copied_bytes += weight.values.nbytes
    shapes = {name: weight.shape for name, weight in exported.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape:
            raise ArchitectureError(
                f"the weight {name!r} of this {type(base).__name__} isn't as its class makes it; "
                f"merge or remove what was added to the model, such as an adapter, then export it"
            )
    exported.load_state_dict(weights, assign=True)
    exported.tie_weights()
    sizes = {weight.data_ptr(): weight.nbytes for weight in weights.values()}  # tied weights once
    return sum(sizes.values()), num_copied_bytes


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


def _verify(folder: Path, base: Any, path: StaticPath, along_path: PathRun) -> None:
    """Load the checkpoint, and refuse it if it differs from the base model along the path."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        use_safetensors=True,
    )
    check_layers(find_layers(loaded)[1], find_layers(base)[1], path.layers)
    listed_weights = _list_weights(base, path.layers, along_path.new_weights)
    weights = {weight.name: weight.values for weight in listed_weights}
    loaded_weights = loaded.state_dict()
    for name, values in weights.items():
        # Compared on the CPU, since the device may have no room for all weights twice.
        loaded_values = loaded_weights[name].cpu()
        if loaded_values.dtype != values.dtype or not torch.equal(loaded_values, values.cpu()):
            raise ArchitectureError(
                f"the export was removed, since after loading it has other values in {name!r}; "
                f"this {type(base).__name__} can't be exported"
            )
    # The last bits of a product depend on the memory addresses of its factors, so both models get
    # the same tensors.
    loaded.load_state_dict(weights, assign=True)
    loaded.to(base.device).eval()
    _verify_logits(_compute_logits(loaded), along_path, type(base).__name__)


def _verify_logits(logits: Tensor, along_path: PathRun, class_name: str) -> None:
    """Refuse logits that differ from the path's, with merged LoRA by more than rounding."""
    expected = along_path.logits
    allowed = 0.0
    if along_path.is_merged:
        tolerance = MERGED_TOLERANCE if logits.dtype.itemsize > 2 else MERGED_TOLERANCE_16_BITS
        allowed = tolerance * float(expected.std())
    difference = float((logits - expected).abs().max())
    if not difference <= allowed:  # a NaN is refused too
        raise ArchitectureError(
            f"the export was removed, since after loading its logits differ from the path's by up "
            f"to {difference:.3g}: this {class_name} computes something from a layer's place, or "
            f"was changed after it was loaded; load it with the right --dtype, and on an "
            f"accelerator try --device cpu, where sums always have the same order"
        )


def model_card(
    base: Mapping[str, Any],
    path: StaticPath,
    dtype: str,
    num_repeated_bytes: int,
    file: PathFile | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """Write the card of an exported checkpoint: where it comes from, and how to load it.

    For a path of a `paths.json`, the card also says what the path loses, how it was found and how
    it scored; for a healed path, its losses by source.

    Args:
        base: The base model's identity.
        path: The path.
        dtype: The dtype of the weights.
        num_repeated_bytes: The size of the layers that are written a second time or more.
        file: The file that the path comes from; None without one.
        evaluations: What `drllm evaluate` measured.
    """
    layers = path.layers
    num_layers = base["num_layers"]
    plan = path.with_adapter("").plan(num_layers)
    decisions = () if isinstance(plan, StaticPath) else plan  # decisions can't express every path
    named = None
    record = None
    losses: list[str] = []
    if file is not None:
        named = file.named
        record = file.record
        losses = describe_file_losses(file)
        if isinstance(record, HealedPath):
            losses += describe_evaluated_losses(record, evaluations)
    return render_card(
        CARD_TEMPLATE,
        _describe_for_hub(base),
        base=hide_model_place(base),
        alias=describe_alias(base["id"]),
        steps=layers,
        decisions=decisions,
        skipped=sorted(set(range(num_layers)) - set(layers)),
        repeated=sorted({layer for layer in layers if layers.count(layer) > 1}),
        in_order=list(layers) == sorted(layers),
        dtype=dtype,
        num_repeated_bytes=num_repeated_bytes,
        named=named,
        record=record if isinstance(record, StaticPaths) else None,
        settings={} if record is None else hide_places(record.config),
        healed=record if isinstance(record, HealedPath) else None,
        losses=losses,
        version=importlib.metadata.version("drllm"),
    )


def _describe_for_hub(base: Mapping[str, Any]) -> ModelCardData:
    """Return metadata for the hub. It names the base model only if that came from the hub."""
    metadata = ModelCardData(library_name="transformers", tags=["layer-path"])
    name_base_model(metadata, base["id"], "merge", is_on_hub=bool(base["revision"]))
    return metadata
