"""A path written as an ordinary checkpoint: the base model's layers, listed in path order.

Owns the steps and their safety: build the stock class for the path, give it the base model's
weights, write it, load it again and compare, and only then let the folder appear. Leaves what a
config can say to `config` and the files beside the weights to `files`.

Axes: T tokens, D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from drllm.errors import ArchitectureError, DrllmError, ModelError
from drllm.models.base import hub
from drllm.models.base.layers import find_layers
from drllm.models.base.load import BaseModel
from drllm.models.base.prompts import context_length
from drllm.models.export.config import check_layers, config_along
from drllm.models.export.files import (
    CARD_FILE,
    check_output,
    model_card,
    say_for_transformers_4,
)
from drllm.models.routing.injection import Injection
from drllm.models.routing.path_driver import PathsDriver
from drllm.paths import check_path

NUM_TOKENS = 32
"""Length of the row on which the checkpoint is compared with the path."""
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Export:
    """What was written.

    Attributes:
        folder: The checkpoint.
        path: Layer indices of the base model in the order executed.
        dtype: Of the weights.
        num_bytes: Size of the weights.
        num_repeated_bytes: The part of it that is there a second time or more.
    """

    folder: Path
    path: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_repeated_bytes: int


def export_path(base: BaseModel, path: Sequence[int], output: Path | str) -> Export:
    """Write a path as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads by itself.

    The folder holds config, weights, generation config, tokenizer and a model card, and loading it
    needs no code of ours. A stock checkpoint can't say that two layers are the same, so a layer
    that the path runs twice is written twice. The folder appears when all is written and checked:
    loaded again, every weight is the base model's, and the logits of a short row of tokens equal
    those of the base model run along the path, bit by bit.

    Args:
        base: The base model, not routed; it stays as it is.
        path: Layer indices in the order executed: in any order, each any number of times.
        output: The folder to make; an empty one may be there.

    Returns:
        What was written.

    Raises:
        PathError: An empty path, or a layer that the model doesn't have.
        ArchitectureError: The model's config can't express the path, or its class isn't one of
            transformers.
        ConfigError: The folder isn't empty.
        ModelError: The folder can't be written.
        RoutingError: The model is routed.

    Source: ours.
    """
    output = Path(output)
    path = check_path(path, base.num_layers)
    check_output(output)
    with hub.quiet():
        listed = _build(base.model, path)
        expected = _logits_along(base.model, path)
        made = Export(output, path, base.runtime["dtype"], *_fill(listed, base.model, path))
        with _appearing(output) as folder:
            _write(folder, listed, base, made)
            del listed  # the copies of weights; the checkpoint is loaded now
            _verify(folder, base.model, path, expected)
    return made


# --- the model for the path --------------------------------------------------------------------


def _build(base: Any, path: tuple[int, ...]) -> Any:
    """Return the stock model for a path on the meta device, its layers of the right kinds.

    Raises:
        ArchitectureError: There is none.
    """
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
    except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError) as error:
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


def _weights_along(base: Any, path: tuple[int, ...]) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the name of each weight in the model for a path, its values, and whether it is a copy.

    A copy is a weight of a layer that stands earlier in the path already.
    """
    layers = find_layers(base)[1]
    prefix = next(name for name, module in base.named_modules() if module is layers) + "."
    for name, weight in base.state_dict().items():
        if not name.startswith(prefix):
            yield name, weight, False
    for place, layer in enumerate(path):
        for name, weight in layers[layer].state_dict().items():
            yield f"{prefix}{place}.{name}", weight, layer in path[:place]


def _fill(listed: Any, base: Any, path: tuple[int, ...]) -> tuple[int, int]:
    """Give the model on the meta device its weights, sharing memory with the base model's.

    Returns:
        Size of the weights, and of the copies among them, in bytes.

    Raises:
        ArchitectureError: The base model has other weights than its class makes.
    """
    weights, num_repeated_bytes = {}, 0
    for name, weight, is_copy in _weights_along(base, path):
        # safetensors refuses tensors that share memory, but for those that the class ties.
        weights[name] = weight.clone() if is_copy else weight
        num_repeated_bytes += weight.nbytes if is_copy else 0
    shapes = {name: weight.shape for name, weight in listed.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape:
            raise ArchitectureError(
                f"the weight {name!r} of this {type(base).__name__} isn't as its class makes it; "
                f"merge or remove what was put on the model, then export it"
            )
    listed.load_state_dict(weights, assign=True)
    listed.tie_weights()
    num_bytes = sum({weight.data_ptr(): weight.nbytes for weight in weights.values()}.values())
    return num_bytes, num_repeated_bytes


# --- the folder --------------------------------------------------------------------------------


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Let a folder be filled beside its place, and move it there when the block has ended well."""
    place = output.resolve()
    folder = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if place.is_dir():
            place.rmdir()
        folder.rename(place)
    except (OSError, SafetensorError) as error:
        if isinstance(error, DrllmError):
            raise
        reason = getattr(error, "strerror", None) or hub.first_line(error)
        raise ModelError(
            f"can't write {output}: {reason}; free some space, or give a folder that you may "
            f"write to"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, listed: Any, base: BaseModel, made: Export) -> None:
    # Written by its own method below: save_pretrained refuses settings that loading put up with.
    listed.generation_config = GenerationConfig()
    listed.save_pretrained(folder)
    base.model.generation_config.to_json_file(folder / GENERATION_FILE)
    base.tokenizer.save_pretrained(folder)
    say_for_transformers_4(folder)
    card = model_card(base.identity, made.path, made.dtype, made.num_repeated_bytes)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        # safetensors makes its files readable by the owner alone, whatever the umask says.
        file.chmod((folder / CARD_FILE).stat().st_mode)


# --- the proof ---------------------------------------------------------------------------------


def _logits(model: Any) -> Tensor:
    """Return a model's logits for one row of tokens, always the same, `[1, T, V]`."""
    most = context_length(model) or NUM_TOKENS
    num_tokens = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(num_tokens, (1, min(NUM_TOKENS, most)), generator=generator)
    with torch.no_grad():
        logits: Tensor = model(tokens.to(model.device), use_cache=False).logits
    return logits


def _logits_along(base: Any, path: tuple[int, ...]) -> Tensor:
    """Return the logits of the base model run along a path."""
    injection = Injection(base, PathsDriver([path]))
    try:
        return _logits(base)
    finally:
        injection.remove()


def _verify(folder: Path, base: Any, path: tuple[int, ...], expected: Tensor) -> None:
    """Load the checkpoint and refuse it unless it is the base model along the path.

    Raises:
        ArchitectureError: A layer, a weight or the logits differ.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=base.dtype,
        attn_implementation=base.config._attn_implementation,
        use_safetensors=True,
    )
    loaded.to(base.device).eval()
    check_layers(find_layers(loaded)[1], find_layers(base)[1], path)
    found, wanted = loaded.state_dict(), {n: w for n, w, _ in _weights_along(base, path)}
    for name, weight in wanted.items():
        if found[name].dtype != weight.dtype or not torch.equal(found[name], weight):
            raise ArchitectureError(
                f"loaded again, the export has other values in {name!r}, so it was removed; this "
                f"{type(base).__name__} can't be exported"
            )
    # The last bits of a product depend on where in memory its factors lie, so let them be the same.
    loaded.load_state_dict(wanted, assign=True)
    logits = _logits(loaded)
    if not torch.equal(logits, expected):
        difference = float((logits - expected).abs().max())
        raise ArchitectureError(
            f"loaded again, the export's logits differ from the path's by up to {difference:.3g}, "
            f"so it was removed: this {type(base).__name__} computes something from a layer's "
            f"place, or was changed after it was loaded (load it in the wanted dtype; on an "
            f"accelerator also try --device cpu, where sums have one order)"
        )
