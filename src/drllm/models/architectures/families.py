"""Tiny models with random weights, one of every family of transformers that we know about.

Owns the table of families and making a model from it. No weights are loaded and nothing is asked
of a network: a family is its configuration class, with numbers small enough to try everything on.
What trying shows is `architectures`' business; that table says nothing about it.

Axes: L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drllm.errors import ArchitectureError, unknown_name

NUM_LAYERS = 6
VOCAB_SIZE = 101
WINDOW = 8
"""Tokens that a sliding layer sees: fewer than most prompts with their answers have."""

COMMON: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    # A random model says one token for ever with the usual 0.02, and so it does where the token
    # that it reads is also the likeliest to be said.
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    **_EXPERTS,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

IN_SUITE = (
    "llama",
    "qwen2",
    "qwen3",
    "olmoe",
    "mistral",
    "gemma3_text",
    "phi3",
    "smollm3",
    "gpt_neox",
    "gpt2",
)
"""Families on which the tests try every way of generating, and export."""

FAMILIES: dict[str, dict[str, Any]] = {
    # Those of IN_SUITE. (tanh: with an activation whose mean isn't zero, random layers without
    # gates add up to one answer for all prompts.)
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **_SLIDING},
    "phi3": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0, 1, 1]},
    "gpt_neox": {"hidden_act": "tanh", "initializer_range": 0.5},
    "gpt2": {"activation_function": "tanh"},
    # Those that follow the same rule.
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, **_SLIDING},
    "cwm": {"head_dim": 8, "sliding_window": WINDOW},
    "deepseek_v2": {**_ROUTED_EXPERTS, **_LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**_ROUTED_EXPERTS, **_LATENT},
    "diffllama": {},
    "dots1": {**_ROUTED_EXPERTS},
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": {**_SLIDING},
    "falcon": {},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, **_ROUTED_EXPERTS},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": NUM_LAYERS,
        "attention_types": [[["global", "local"], NUM_LAYERS // 2]],
        "window_size": WINDOW,
    },
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, **_SLIDING},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": WINDOW,
    },
    "minicpm3": {**_LATENT},
    "minimax_m2": {
        "head_dim": 8,
        "rotary_dim": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "ministral": {"head_dim": 8, "sliding_window": WINDOW},
    "ministral3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"expansion_ratio": 2},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {**_SLIDING},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.25},
    "persimmon": {},
    "phi": {},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **_EXPERTS},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **_EXPERTS},
    "seed_oss": {"head_dim": 8},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "xglm": {"ffn_dim": 64, "init_std": 0.25, "activation_function": "tanh"},
    # Those that share K/V between layers, or keep another state than K/V.
    "bamba": {"attn_layer_indices": [2, 5], **_MAMBA},
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, **_MAMBA, "mamba_n_heads": 4},
    "gemma3n_text": {
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * NUM_LAYERS,
        **_SLIDING,
    },
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        **_SLIDING,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **_MAMBA,
    },
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "minimax": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        "head_dim": 8,
        "hybrid_override_pattern": "M*-M*-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "qwen3_5_text": {**_DELTA},
    "qwen3_next": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        **_EXPERTS,
        **_DELTA,
    },
    "recurrent_gemma": {
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32},
    "zamba2": {
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
    },
}
"""Family, by the `model_type` of transformers → what its configuration says beside `COMMON`."""


def known_to_transformers(family: str) -> bool:
    """Whether the installed transformers has a family."""
    return family in CONFIG_MAPPING


def make_tiny(family: str, seed: int = 0, attention: str | None = None, **overrides: Any) -> Any:
    """Make a model of a family, 6 layers of width 32, with random weights.

    Args:
        family: A name of `FAMILIES`.
        seed: Of the weights.
        attention: Attention code of transformers; None takes what the model takes by itself.
        overrides: Fields of the family's configuration, in place of those of the table.

    Returns:
        A model in float32 and evaluation mode, whose parameters ask for no gradients.

    Raises:
        ArchitectureError: A name that isn't in the table, or a family that the installed
            transformers doesn't have.

    Example:
        >>> type(make_tiny("qwen2")).__name__
        'Qwen2ForCausalLM'
    """
    if family not in FAMILIES:
        raise ArchitectureError(unknown_name("family", family, FAMILIES))
    if not known_to_transformers(family):
        raise ArchitectureError(f"the installed transformers has no {family}; upgrade it")
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval().requires_grad_(False)
