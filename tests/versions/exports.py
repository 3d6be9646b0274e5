"""Export tiny models, or read such exports, under the transformers of the running Python.

python tests/versions/exports.py write FOLDER
python tests/versions/exports.py read FOLDER FILE.safetensors
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from drllm.model.load import BaseModel
from drllm.model.submodel import shorten
from drllm.models.check import make_tiny
from drllm.models.families import COMMON
from drllm.prune.export import export

SKIP = (1, 4)
PROMPT = list(range(5, 25))
TEXT = "w7 w12 <more> w3"

ROPE = {"rope_theta": 50000.0}  # no model's default
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0] * 4}

EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ROPE),
    "llama, scaled": ("llama", {**ROPE, "rope_scaling": LLAMA3}),
    "qwen2": ("qwen2", ROPE),
    "qwen3": ("qwen3", ROPE),
    "qwen3_moe": ("qwen3_moe", ROPE),
    "olmoe": ("olmoe", ROPE),
    "mistral": ("mistral", ROPE),
    "gemma3_text": ("gemma3_text", {**ROPE, "rope_local_base_freq": 3000.0}),
    "phi3": ("phi3", {**ROPE, "partial_rotary_factor": 0.5}),
    "phi3, long": ("phi3", {**ROPE, "rope_scaling": LONG, "original_max_position_embeddings": 16}),
    "smollm3": ("smollm3", ROPE),
    "gpt_neox": ("gpt_neox", {"rotary_emb_base": 5000, "rotary_pct": 0.5}),
    "gpt2": ("gpt2", {}),
    "gpt_neo": ("gpt_neo", {}),
}
"""Name → family, and what its config says in words that every transformers reads."""


def tokenizer():
    """Return a tokenizer of one token a word, with a special token of its own."""
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<more>"])}
    vocab |= {f"w{index}": index for index in range(len(vocab), COMMON["vocab_size"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<more>"],
    )


def write(folder):
    """Export every model without some layers, under its name."""
    for name, (family, options) in EXPORTED.items():
        base = BaseModel(make_tiny(family, **options), tokenizer(), name)
        export(shorten(base.model, SKIP), base, folder / name)


def read(folder):
    """Return the logits of every export in a folder, and the tokenizer's tokens."""
    found = {}
    for name in EXPORTED:
        model = AutoModelForCausalLM.from_pretrained(folder / name).eval()
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0]  # [T, V]
        found[name] = logits.contiguous()
    # The same for all; but some versions give a qwen2 another tokenizer, whatever lies beside it.
    words = AutoTokenizer.from_pretrained(folder / "llama")
    found["tokens"] = torch.tensor(words(TEXT).input_ids)
    found["special tokens"] = torch.tensor(sorted(words.all_special_ids))
    return found


if __name__ == "__main__":
    verb, place, *file = sys.argv[1:]
    if verb == "write":
        write(Path(place))
    else:
        versions = {name: version(name) for name in ("torch", "transformers")}
        save_file(read(Path(place)), Path(file[0]), metadata=versions)
