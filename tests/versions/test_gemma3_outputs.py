"""A converted Gemma 3 says the same under every supported transformers.

A config that is misread would only change the numbers: the types of layers, the sliding window and
the two bases of the rotary embedding have other names in transformers 4 than in 5.
"""

import pytest
import torch
from safetensors.torch import load_file

from drllm.model.gemma3 import Gemma3
from drllm.records.codec import sha256
from gguf_files import GEMMA3_TOKENS, write_gemma3

OTHER_TORCH = 1e-5
"""Greatest difference of logits that another version of torch may make."""

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory):
    """A tiny Gemma 3, converted by this environment; the texts are longer than its window."""
    folder = tmp_path_factory.mktemp("converted")
    sizes = {"vocab_size": len(GEMMA3_TOKENS), "tie_word_embeddings": True, "sliding_window": 4}
    source = write_gemma3(folder / "tiny.gguf", tiny_model("gemma3_text", 3, **sizes))
    packaged = Gemma3()
    packaged.file_hash = sha256(source)
    return packaged.convert_once([source], folder / "model")


def test_tokens_and_logits_are_the_same(run, environment, converted, tmp_path):
    for name in ("here", environment):
        run(name, "gemma3_outputs.py", converted, tmp_path / f"{name}.safetensors")
    ours = load_file(tmp_path / "here.safetensors")
    theirs = load_file(tmp_path / f"{environment}.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if key.endswith("/tokens"):
            assert tensor.tolist() == theirs[key].tolist()
        else:
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=OTHER_TORCH)
