"""The folder of an exported checkpoint, but for its weights: JSON for old and new readers, a card.

Owns rewriting what transformers 5 says of RoPE and of the tokenizer in words that transformers 4
knows too, which otherwise reads wrong numbers without a word, and the model card. Leaves the
weights, and checking what was written, to `model`. Loads no torch. Axes: L layers.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, PathError
from drllm.paths import to_decisions

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CARD_FILE = "README.md"

OLDER_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""Type of model → name of a setting in transformers 5 → its name in 4, where that is another."""

_BY_KIND = {"full_attention", "sliding_attention"}


def check_output(folder: Path) -> None:
    """Refuse a folder that holds something already.

    Raises:
        ConfigError: It isn't empty, or it is a file.
    """
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give the name of a folder to make")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} isn't empty; give the name of a new one")


def say_for_transformers_4(folder: Path) -> None:
    """Add to config and tokenizer what transformers 4 reads under other names.

    Args:
        folder: A checkpoint as `save_pretrained` has written it.
    """
    config = _read(folder / CONFIG_FILE)
    add_older_words(config)
    _write(folder / CONFIG_FILE, config)
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        tokenizer = _read(folder / TOKENIZER_CONFIG_FILE)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            # The name that both know for "whatever tokenizer.json says".
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        _write(folder / TOKENIZER_CONFIG_FILE, tokenizer)


def add_older_words(config: dict[str, Any]) -> None:
    """Add to a config what transformers 4, and the first of 5, read under other names.

    Transformers 5 keeps all of RoPE under `rope_parameters`. Transformers 4 doesn't know that key
    and takes its defaults: other numbers, and no warning. Both may stand in one config. What
    transformers 4 says of RoPE stays as it is.

    Args:
        config: Changed in place.

    Source: ours; the older names are those that transformers 5 itself still reads.

    Example:
        >>> config = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
        >>> add_older_words(config)
        >>> config["rope_theta"], config["rope_scaling"]
        (50000.0, None)
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
    if not any(isinstance(value, dict) for value in parameters.values()):
        return _older_rope_of_one_kind(config, parameters)
    if parameters.keys() != _BY_KIND or not all(parameters.values()):
        return {}  # only transformers 5 has models with other kinds
    full, sliding = parameters["full_attention"], parameters["sliding_attention"]
    older = _older_rope_of_one_kind(config, full)
    if sliding["rope_theta"] != full["rope_theta"]:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    return older


def _older_rope_of_one_kind(
    config: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    outside = ("rope_theta", "partial_rotary_factor")
    older = {name: parameters[name] for name in outside if parameters.get(name) is not None}
    scaling: dict[str, Any] | None = {
        name: value for name, value in parameters.items() if name not in outside
    }
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        scaling = None
    elif kind == "longrope" and "original_max_position_embeddings" in config:
        # Models that say this length outside, such as phi3, accept these three inside and no more.
        factors = {name: parameters[name] for name in ("short_factor", "long_factor")}
        scaling = {"type": kind, **factors}
    return {**older, "rope_scaling": scaling}


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def model_card(
    base: Mapping[str, Any], path: Sequence[int], dtype: str, num_repeated_bytes: int
) -> str:
    """Write the card of an exported checkpoint: where it comes from, and how to load it.

    Args:
        base: Identity of the base model.
        path: Layer indices of the base model in the order executed.
        dtype: Of the weights.
        num_repeated_bytes: Size of the layers that are written again.

    Returns:
        Markdown with the front matter that the hub reads. `base_model` stands in it only where
        the base model came from the hub, so that it has a revision.
    """
    L, name = base["num_layers"], base["id"]
    link = f"base_model: {name}\nbase_model_relation: merge\n" if base["revision"] else ""
    revision = f", revision `{base['revision']}`" if base["revision"] else ""
    skipped = sorted(set(range(L)) - set(path))
    repeated = sorted({layer for layer in path if path.count(layer) > 1})
    version = importlib.metadata.version("drllm")
    return f"""---
library_name: transformers
{link}tags: [layer-path]
---

# {name}, its layers in another order

The weights of `{name}`, with its layers listed in the order in which a fixed path executes them.
Nothing was trained: every weight is a copy.

## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
    tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")

An ordinary checkpoint of class {base["class"]}; no other code is needed.

## Path

    {" ".join(map(str, path))}

{_decisions(path, L)}
Layers of this checkpoint: {len(path)}, of the base model: {L}.
Left out: {_listed(skipped)}.
Executed more than once: {_listed(repeated)}.
A checkpoint can't say that two layers are the same, so each execution has a copy of its own; the \
copies are {num_repeated_bytes:,} bytes.

## Base model

`{name}`{revision}: {base["class"]}, {L} layers, hidden size {base["hidden_size"]}, \
fingerprint `{base["fingerprint"]}`.
The weights here are {dtype}.

## Made by

`drllm export`, drllm {version}, which loaded this folder again and found its logits equal, bit by \
bit, to those of the base model run along the path.

## Licence

That of the base model.
"""


def _decisions(path: Sequence[int], num_layers: int) -> str:
    try:
        decisions = to_decisions(path, num_layers)
    except PathError:
        return "Decisions (one of skip, execute, repeat per layer) can't express this path."
    return f"As decisions, one per layer: {' '.join(map(str, decisions))}."


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
