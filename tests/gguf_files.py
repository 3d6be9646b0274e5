"""Tiny GGUF files, laid out as llama.cpp's converter lays out those of the packaged models."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # gguf's types of tokens

SMOLLM2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMOLLM2_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SMOLLM2_HEADS, SMOLLM2_KV_HEADS = 4, 2

GEMMA3_CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
GEMMA3_USER_DEFINED = ["\n", "\n\n", "  ", "   ", "<b>"]
GEMMA3_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GEMMA3_MERGED = ["▁t", "he", "▁the", "▁a", "in", "th", "aa", "the", "▁in", "aaa", "ab", "1▁"]
GEMMA3_LETTERS = ["▁", *"abehint123.<>"]
GEMMA3_TOKENS = [
    *GEMMA3_CONTROL,
    *GEMMA3_USER_DEFINED,
    *GEMMA3_BYTES,
    *GEMMA3_MERGED,
    *GEMMA3_LETTERS,
]
GEMMA3_TYPES = [
    *[CONTROL] * len(GEMMA3_CONTROL),
    *[USER_DEFINED] * len(GEMMA3_USER_DEFINED),
    *[BYTE] * len(GEMMA3_BYTES),
    *[NORMAL] * (len(GEMMA3_MERGED) + len(GEMMA3_LETTERS)),
]
GEMMA3_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Transformers' name of a weight in a layer → llama.cpp's name of it."""


def write_smollm2(path: Path, model: Any) -> Path:
    """Write a GGUF file of a tiny Llama with 264 tokens and 2 layers."""
    config = model.config
    tokens = [*SMOLLM2_SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "ĠĠĠ", "Ġt", "th", "Ġth"]
    num_special = len(SMOLLM2_SPECIAL)
    fields = {
        "vocab_size": len(tokens),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "head_count": SMOLLM2_HEADS,
        "head_count_kv": SMOLLM2_KV_HEADS,
        "rope_dimension_count": config.hidden_size // SMOLLM2_HEADS,
        "context_length": 256,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 100000.0,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [CONTROL] * num_special + [NORMAL] * (len(tokens) - num_special),
        "token_merges": ["Ġ Ġ", "ĠĠ Ġ", "t h", "Ġ th", "Ġ t"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "unk_token_id": 0,
        "add_bos_token": False,
        "add_space_prefix": False,
        "chat_template": SMOLLM2_TEMPLATE,
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = []
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        for part, heads in (("q_proj", SMOLLM2_HEADS), ("k_proj", SMOLLM2_KV_HEADS)):
            if part in name:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
                rows, columns = values.shape
                halves = values.reshape(heads, 2, rows // heads // 2, columns)
                values = halves.swapaxes(1, 2).reshape(rows, columns)
        tensors.append((names.get_name(name, try_suffixes=(".weight",)), values))
    return _write(path, "llama", fields, tensors)


def write_gemma3(path: Path, model: Any) -> Path:
    """Write a GGUF file of a tiny Gemma 3 whose vocabulary is `GEMMA3_TOKENS`."""
    config = model.config
    fields = {
        "context_length": 256,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "layer_norm_rms_eps": 1e-6,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_freq_base": 1000000.0,
        "sliding_window": config.sliding_window,
        "head_count_kv": config.num_key_value_heads,
        "tokenizer_model": "llama",
        "tokenizer_pre": "default",
        "token_list": GEMMA3_TOKENS,
        "token_scores": gemma3_scores(),
        "token_types": GEMMA3_TYPES,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unk_token_id": 3,
        "pad_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    tensors = []
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        if "norm" in name:  # Gemma3Model.modify_tensors of llama.cpp's convert_hf_to_gguf.py
            values = values + 1
        tensors.append((_name_gemma3_tensor(name), values))
    return _write(path, "gemma3", fields, tensors)


def gemma3_scores() -> list[float]:
    """Return the scores of `GEMMA3_TOKENS`: merged tokens by their order, then the letters."""
    first_merged = len(GEMMA3_TOKENS) - len(GEMMA3_MERGED) - len(GEMMA3_LETTERS)
    scores = []
    for index, token_type in enumerate(GEMMA3_TYPES):
        if token_type == NORMAL:
            scores.append(float(first_merged - index))
        elif token_type == BYTE:
            scores.append(0.0)
        else:
            scores.append(-1000.0)
    return scores


def _name_gemma3_tensor(name: str) -> str:
    """Return llama.cpp's name of a weight of Gemma 3."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, _, weight = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GEMMA3_NAMES[weight.removesuffix('.weight')]}.weight"


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray[Any, Any]]],
) -> Path:
    """Write a GGUF file from the names and values of its fields and tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    for name, values in tensors:
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
