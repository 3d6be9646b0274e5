"""Write to a file what SmolLM2-135M answers under the transformers of the running Python.

    python tests/versions/smollm2_outputs.py FILE.safetensors

`test_smollm2_outputs` compares the files of several environments.
"""

import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from drllm.config import ModelConfig
from drllm.model import load as loading
from drllm.model.prompts import encode
from drllm.models.routed_model import RoutedModel

NUM_NEW = 32
NUM_POSITIONS = 8
"""Positions at a prompt's end whose logits are kept; 8 of them are 1.6 MB."""

TEXTS = {
    "sentence": "The capital of France is",
    "numbers": "Q: What is 12 * 34 + 5,678?\nA: Let's see. 12 * 34 =",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    "other scripts": "Der Bär geht über die Straße. «Привет», 你好, naïve café 🙂:",
    "long": " ".join(f"On day {day} the ship sailed {7 * day} miles." for day in range(1, 61)),
}
CHAT = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Why is the sky blue?"},
]
ROUTED = ("sentence", "chat")


def plan(num_layers):
    """Return decisions that skip three layers and repeat three."""
    edited = random.Random(0).sample(range(3, num_layers), 6)
    return [
        0 if layer in edited[:3] else 2 if layer in edited[3:] else 1 for layer in range(num_layers)
    ]


def answers(model, tokens):
    """Return the last logits of a prompt and the tokens that greedy decoding adds to it."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids, logits_to_keep=NUM_POSITIONS).logits[0].clone()  # [positions, V]
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
        )
    return {"logits": logits, "greedy": output[0, len(tokens) :].clone()}


def outputs():
    """Return everything that is compared, by name.

    `PROMPT/tokens`; of the base model `PROMPT/base/logits` and `PROMPT/base/greedy`; of a path of
    other layers, for ROUTED alone, `PROMPT/path/logits` and `PROMPT/path/greedy`; and `inverse
    frequencies` of the rotary embedding, from which its base can be read.
    """
    base = loading.load(ModelConfig(model="smollm2-135m", device="cpu", dtype="float32"))
    chat = base.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    rows = {name: encode(base.tokenizer, text) for name, text in {**TEXTS, "chat": chat}.items()}
    found = {"inverse frequencies": base.model.model.rotary_emb.inv_freq.clone()}
    for name, tokens in rows.items():
        found[f"{name}/tokens"] = torch.tensor(tokens)
        for kind, tensor in answers(base.model, tokens).items():
            found[f"{name}/base/{kind}"] = tensor
    routed = RoutedModel(base.model)
    with routed.fixed(plan(routed.num_layers)):
        for name in ROUTED:
            for kind, tensor in answers(routed.model, rows[name]).items():
                found[f"{name}/path/{kind}"] = tensor
    return found


if __name__ == "__main__":
    save_file(outputs(), Path(sys.argv[1]))
