"""Write a shortened model as an ordinary checkpoint, with a card, and check it.

The folder appears only when everything is written, and the checkpoint was loaded again and found
equal. Loading it needs nothing but transformers.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from drllm.errors import ArchitectureError
from drllm.model import hub
from drllm.model.cards import CARD_FILE, describe_alias, name_base_model, render_card
from drllm.model.layers import find_layers
from drllm.model.load import BaseModel
from drllm.model.older_names import add_names_of_transformers_4
from drllm.model.path_config import check_layers
from drllm.model.prompts import context_length
from drllm.model.submodel import list_kept_layers
from drllm.records.codec import write_json
from drllm.records.places import check_new_folder, create_folder, make_output_error
from drllm.records.published import hide_model_place

NUM_TOKENS = 32  # length of the row on which the loaded checkpoint is compared
CARD_TEMPLATE = Path(__file__).with_name("card.md.j2")


def export(
    model: Any,
    base: BaseModel,
    output_dir: Path | str,
    *,
    report: Mapping[str, Any] | None = None,
    records: Mapping[str, Any] | None = None,
) -> int:
    """Write a shortened model as a checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    The folder holds config, weights, generation config, tokenizer and a model card. The checkpoint
    is loaded again. Its weights must be the model's, bit for bit, and so must its logits for a
    short row of tokens.

    Args:
        model: What `shorten` returned, repaired or not. It isn't changed.
        base: The full model, whose tokenizer and name are written.
        output_dir: The folder to make. An empty folder may exist.
        report: What `learn` returned, for the card.
        records: Name of a file → a record to write beside the weights; the card says the verdict of
            `shrink.json`.

    Returns:
        The bytes of all weights.

    Raises:
        ArchitectureError: Loaded again, the model differs.
        ConfigError: The folder isn't empty.
        RecordError: The folder can't be written.

    Source: ours.
    """
    output = Path(output_dir)
    check_new_folder(output)
    records = records or {}
    card = _write_card(model, base, report or {}, records.get("shrink.json"))
    try:
        with hub.quiet(), create_folder(output) as folder:
            # save_pretrained refuses generation settings that loading accepts, so they are written
            # below.
            generation_config = model.generation_config
            model.generation_config = GenerationConfig()
            try:
                model.save_pretrained(folder)
            finally:
                model.generation_config = generation_config
            generation_config.to_json_file(folder / "generation_config.json")
            base.tokenizer.save_pretrained(folder)
            add_names_of_transformers_4(folder)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            for name, record in records.items():
                write_json(folder / name, record)
            for file in folder.glob("*.safetensors"):
                # safetensors makes its files readable only by the owner, whatever the umask is.
                file.chmod((folder / CARD_FILE).stat().st_mode)
            _verify(folder, model)
    except SafetensorError as error:  # it has no class of its own for a full disk
        raise make_output_error(output, hub.first_line(error)) from error
    return count_bytes(model)


def count_bytes(model: Any) -> int:
    """Return the size of a model's weights in bytes; tied weights count once."""
    return sum(weight.nbytes for weight in model.parameters())


def _verify(folder: Path, model: Any) -> None:
    """Load a checkpoint, and refuse it if it differs from the model."""
    name = type(model).__name__
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
        use_safetensors=True,
    )
    places = range(len(list_kept_layers(model)))
    check_layers(find_layers(loaded)[1], find_layers(model)[1], places)
    weights = model.state_dict()
    loaded_weights = loaded.state_dict()
    for key in weights.keys() | loaded_weights.keys():
        values = weights.get(key)
        loaded_values = loaded_weights.get(key)
        is_equal = (
            values is not None
            and loaded_values is not None
            and loaded_values.dtype == values.dtype
            and torch.equal(loaded_values, values.cpu())
        )
        if not is_equal:
            raise ArchitectureError(
                f"the export was removed, since after loading it has other values in {key!r}; this "
                f"{name} can't be exported"
            )
    # The last bits of a product depend on the memory addresses of its factors, so both models get
    # the same tensors.
    loaded.load_state_dict(weights, assign=True)
    loaded.to(model.device).eval()
    difference = float((_compute_logits(loaded) - _compute_logits(model)).abs().max())
    if not difference == 0:  # a NaN is refused too
        raise ArchitectureError(
            f"the export was removed, since after loading its logits differ by up to "
            f"{difference:.3g}: this {name} computes something from a layer's place, or was "
            f"changed after it was loaded; load it with the right --dtype, and on an accelerator "
            f"try --device cpu, where sums always have the same order"
        )


@torch.no_grad()
def _compute_logits(model: Any) -> Tensor:
    """Return a model's logits for a row of random tokens, always the same, `[1, T, V]`."""
    length = min(NUM_TOKENS, context_length(model) or NUM_TOKENS)
    num_tokens = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(num_tokens, (1, length), generator=generator).to(model.device)
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def _write_card(model: Any, base: BaseModel, report: Mapping[str, Any], shrink: Any | None) -> str:
    """Write the card: where the checkpoint comes from, what it loses, and how to load it."""
    identity = base.identity
    metadata = ModelCardData(library_name="transformers", tags=["fewer-layers"])
    is_on_hub = bool(identity["revision"])
    relation = "finetune" if any(each["kept"] for each in report.get("repairs", [])) else "merge"
    name_base_model(metadata, identity["id"], relation, is_on_hub=is_on_hub)
    kept = list_kept_layers(model)
    return render_card(
        CARD_TEMPLATE,
        metadata,
        base=hide_model_place(identity),
        alias=describe_alias(identity["id"]),
        kept=kept,
        skipped=sorted(set(range(base.num_layers)) - set(kept)),
        dtype=str(model.dtype).removeprefix("torch."),
        repairs=[each for each in report.get("repairs", []) if each["kept"]],
        shrink=shrink,
        version=importlib.metadata.version("drllm"),
    )
