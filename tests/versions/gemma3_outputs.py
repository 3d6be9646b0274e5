"""Write to a file what a converted Gemma 3 answers under the transformers of the running Python.

    python tests/versions/gemma3_outputs.py FOLDER FILE.safetensors

`test_gemma3_outputs` compares the files of several environments.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from drllm.model.load import load
from drllm.model.prompts import encode

TEXTS = {
    "words": "the in a the hint the bin then that ab in the",
    "blanks": "a  the   in\n\n\n    12\tb",
    "other scripts": "1 é🙂 2 <b>the</b> <start_of_turn>a",
}


def outputs(folder):
    """Return `TEXT/tokens` and `TEXT/logits` of every text."""
    base = load(folder, device="cpu", dtype="float32")
    results = {}
    for name, text in TEXTS.items():
        ids = torch.tensor([encode(base.tokenizer, text)])
        with torch.no_grad():
            results[f"{name}/logits"] = base.model(ids).logits[0].clone()  # [T, V]
        results[f"{name}/tokens"] = ids[0].clone()
    return results


if __name__ == "__main__":
    save_file(outputs(sys.argv[1]), Path(sys.argv[2]))
