"""Add the names that transformers 4 reads to the config files of an exported model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

OLDER_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""By model type: the name of a setting in transformers 5 → its name in transformers 4."""

ROPE_WITHOUT_SCALING = ("rope_theta", "partial_rotary_factor")
"""Settings of RoPE that transformers 4 has outside of `rope_scaling`."""


def add_names_of_transformers_4(folder: Path) -> None:
    """Add the names that transformers 4 reads to the config files of a checkpoint."""
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
    that key, and uses its defaults without a warning. A config may have both names, since
    transformers 5 still reads the older names.
    """
    for part in [config, *config.values()]:  # a composite config has a part for the text
        if not isinstance(part, dict):
            continue
        if "attention_layers" in part and "attention_types" in part:
            # gpt_neo: transformers 4 reads runs of layers, as pairs of kinds and a number.
            part["attention_types"] = [[[kind], 1] for kind in part["attention_layers"]]
        if "rope_parameters" in part:
            _add_rope_names(part)


def _add_rope_names(config: dict[str, Any]) -> None:
    """Add to a config, in place, the older names of its settings of RoPE and of `OLDER_NAMES`."""
    older_names = OLDER_NAMES.get(config.get("model_type", ""), {})
    settings = {**config, **_list_rope_settings(config)}
    for name, value in settings.items():
        config[older_names.get(name, name)] = value


def _list_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `rope_parameters` says, as the settings that transformers 4 reads."""
    parameters = config["rope_parameters"] or {}
    if not any(isinstance(value, dict) for value in parameters.values()):
        return _flatten_rope(parameters, config)
    # The layers with a window have other settings than the layers without.
    kinds = {"full_attention", "sliding_attention"}
    if parameters.keys() != kinds or not all(parameters.values()):
        return {}  # only transformers 5 has models with other kinds
    full = parameters["full_attention"]
    sliding = parameters["sliding_attention"]
    settings = _flatten_rope(full, config)
    if sliding["rope_theta"] != full["rope_theta"]:
        settings["rope_local_base_freq"] = sliding["rope_theta"]
    return settings


def _flatten_rope(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one kind of layer as transformers 4 reads them."""
    settings = {}
    for name in ROPE_WITHOUT_SCALING:
        if parameters.get(name) is not None:
            settings[name] = parameters[name]
    kind = parameters.get("rope_type", "default")
    scaling: dict[str, Any] | None = None
    if kind == "longrope" and "original_max_position_embeddings" in config:
        # A config with this length of its own, such as phi3's, may have only these keys here.
        scaling = {
            "type": kind,
            "short_factor": parameters["short_factor"],
            "long_factor": parameters["long_factor"],
        }
    elif kind != "default":
        scaling = {
            name: value for name, value in parameters.items() if name not in ROPE_WITHOUT_SCALING
        }
    settings["rope_scaling"] = scaling
    return settings
