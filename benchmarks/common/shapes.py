"""Models of real shapes with random weights, which need no network: `--model random:3b`.

What a pass costs depends on a model's shape and not on its weights, so times are those of a trained
model. What it answers means nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from drllm.config import ModelConfig
from drllm.model.load import BaseModel, load

PREFIX = "random:"
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_hidden_layers": 12,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "3b": {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
"""The shapes of Llama 3.2 1B and 3B and of Llama 3.1 8B, and one for tests."""


def make_base(shape: str, device: str, dtype: str) -> BaseModel:
    """Make a model of a shape with random weights, and SmolLM2's tokenizer.

    Args:
        shape: A key of `SHAPES`.
        device: Where the weights are made.
        dtype: Their dtype.
    """
    if shape not in SHAPES:
        raise SystemExit(f"there is no shape {shape!r}; give one of {', '.join(SHAPES)}")
    tokenizer = load(ModelConfig(device="cpu")).tokenizer
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    return BaseModel(model=model, tokenizer=tokenizer, name=f"{PREFIX}{shape}")
