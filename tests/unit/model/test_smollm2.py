"""SmolLM2 from its GGUF file: its weights, its config and its tokenizer.

Most tests convert a tiny file of the same layout; the real one is converted once for all tests
that need it. How a conversion runs is in `test_packaged`.
"""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drllm.errors import ModelError
from drllm.model.smollm2 import SmolLM2
from drllm.records.codec import sha256
from gguf_files import write_smollm2


@pytest.fixture(scope="module")
def tiny_model(tiny_llama):
    return tiny_llama(num_layers=2, seed=3, tie_word_embeddings=True, vocab_size=264)


@pytest.fixture(scope="module")
def tiny_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    source = write_smollm2(folder / "tiny.gguf", tiny_model)
    packaged = SmolLM2()
    packaged.file_hash = sha256(source)
    return packaged.convert_once([source], folder / "model")


@pytest.fixture(scope="module")
def real_gguf():
    try:
        parts = SmolLM2().find_parts()
    except ModelError as error:
        pytest.skip(str(error))
    if parts is None:
        pytest.skip(f"the wheel {SmolLM2.package} isn't installed (make setup)")
    return parts[0]


@pytest.fixture(scope="module")
def real(real_gguf, tmp_path_factory):
    """The real model, converted by the code under test rather than found in a cache."""
    place = tmp_path_factory.mktemp("cache")
    yield SmolLM2().convert_once([real_gguf], place / "model")
    shutil.rmtree(place)  # pytest would keep 500 MB of each of the last three runs


def test_weights_are_those_that_the_file_was_made_from(tiny_folder, tiny_model):
    read = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    expected = tiny_model.state_dict()
    assert expected.keys() == read.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, read[name]), name


@pytest.mark.smollm2
@pytest.mark.thorough  # the tiny file and the answer of the real one tell enough
def test_reloaded_weights_give_the_logits_of_the_gguf_file_to_the_last_bit(real, real_gguf):
    direct = AutoModelForCausalLM.from_pretrained(
        real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32
    )
    reloaded = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real)
    ids = tokenizer("Water boils at 100 degrees. Ice\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(direct(ids).logits, reloaded(ids).logits)


@pytest.fixture
def tokenizer(real):
    return AutoTokenizer.from_pretrained(real)


@pytest.mark.thorough
@pytest.mark.smollm2
def test_the_real_model_answers_and_stops_at_the_end_of_its_turn(real, tokenizer):
    config = json.loads((real / "config.json").read_text())
    assert config["rope_theta"] == 100000.0  # for transformers 4, and for 5:
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(real)
    expected = 100000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0]) == "The capital of France is Paris."


@pytest.mark.thorough
@pytest.mark.smollm2
def test_the_tokenizer_has_the_settings_and_the_chat_template_of_the_file(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.thorough
@pytest.mark.smollm2
def test_encoding_adds_nothing_loses_nothing_and_is_transformers_own(tokenizer):
    for text in (
        "The quick brown fox can't jump over 13 lazy dogs; it isn't 2.5 m tall!",
        "  indented\n\n\ttabs and    blanks  ",
        "<|im_start|>user\nHi<|im_end|>\n",
        "Zoë naïvely paid 5€ — 日本語 🙂",
    ):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
    text = "Plants can't grow without light.\n\n  Which isn't a metal? (1995) <|im_end|>"
    # What AutoTokenizer.from_pretrained(..., gguf_file=...) of transformers 5.24 gives for it.
    ids = "34246 416 982 1075 1355 1420 30 8866 10366 3247 982 253 4718 47 365 33 41 41 37 25 216 2"
    assert tokenizer(text).input_ids == [int(token) for token in ids.split()]


def test_every_digit_is_split_off_before_the_blanks_are_grouped(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for text, tokens in (("a   1", "a ĠĠĠ 1"), ("12 34", "1 2 Ġ 3 4"), ("x th2", "x Ġth 2")):
        assert tokens.split() == tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
