"""Gemma 3 from its GGUF file: its weights, its config and its tokenizer.

Most tests convert a tiny file of the same layout; the real one is converted once for all tests
that need it. How a conversion runs is in `test_packaged`.
"""

import json
import shutil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from drllm.errors import ModelError
from drllm.model.gemma3 import Gemma3
from drllm.model.load import load
from drllm.records.codec import sha256
from gguf_files import GEMMA3_TOKENS, GEMMA3_TYPES, NORMAL, gemma3_scores, write_gemma3

LAYER_TYPES = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
SIZES = {
    "num_hidden_layers": len(LAYER_TYPES),
    "layer_types": LAYER_TYPES,
    "vocab_size": len(GEMMA3_TOKENS),
    "tie_word_embeddings": True,
    "sliding_window": 8,
}
PROSE = (
    "When the rain had stopped, the children ran out into the garden. The grass was wet and the "
    "air smelled of earth. Their mother called after them to put on their shoes, but they did not "
    "hear her, or pretended not to."
)
SENTENCEPIECE = {
    "The quick brown fox can't jump over 13 lazy dogs; it isn't 2.5 m tall!": (
        "818 3823 8864 37423 740 236789 236745 9212 1024 236743 236770 236800 31770 12414 236793 "
        "625 5889 236789 236745 236743 236778 236761 236810 520 13030 236888"
    ),
    "  indented\n\n\ttabs and    blanks  ": "138 724 16764 108 255968 39218 532 140 1782 3687 138",
    "Zoë naïvely paid 5€ — 日本語 🙂\r\n": (
        "99700 237542 104214 78956 6382 236743 236810 237762 2192 33375 238582 57235 251 107"
    ),
    "def f(n):\n    return n**2  # <b>1234567890</b>": (
        "2063 517 236769 236749 1473 107 140 2060 538 1018 236778 138 236865 236743 200 236770 "
        "236778 236800 236812 236810 236825 236832 236828 236819 236771 209"
    ),
    " the   2024\n\n\n\n ": "506 139 236778 236771 236778 236812 110 236743",
}
"""The ids that SentencePiece 0.2.3 gives with the tokens, scores and types of the real file."""


@pytest.fixture(scope="module")
def tiny_gemma(tiny_model):
    """A tiny Gemma 3 whose norms have weights that float32 holds exactly, plus 1 too."""
    model = tiny_model("gemma3_text", 3, **SIZES)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(torch.randint(-128, 128, weight.shape) / 256)
    return model


@pytest.fixture(scope="module")
def tiny_folder(tiny_gemma, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    source = write_gemma3(folder / "tiny.gguf", tiny_gemma)
    packaged = Gemma3()
    packaged.file_hash = sha256(source)
    return packaged.convert_once([source], folder / "model")


def test_weights_are_those_that_the_file_was_made_from(tiny_folder, tiny_gemma):
    read = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    expected = tiny_gemma.state_dict()
    assert expected.keys() == read.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, read[name]), name


def test_every_sixth_layer_has_full_attention_and_the_others_rotate_by_another_base(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert model.config.layer_types == LAYER_TYPES
    assert model.config.sliding_window == 8
    for layer_type, base in (("sliding_attention", 1e4), ("full_attention", 1e6)):
        head_dim = model.config.head_dim
        expected = base ** -(torch.arange(0, head_dim, 2) / head_dim)
        torch.testing.assert_close(rotation(model.model, layer_type), expected)


def rotation(decoder, layer_type):
    """Return the frequencies by which the layers of a type rotate; transformers moved them."""
    if hasattr(decoder, "rotary_emb_local"):  # transformers 4
        is_sliding = layer_type == "sliding_attention"
        return (decoder.rotary_emb_local if is_sliding else decoder.rotary_emb).inv_freq
    return getattr(decoder.rotary_emb, f"{layer_type}_inv_freq")


def slow_encode(text):
    """Encode as SentencePiece does: join the two neighbours with the best score, again and again.

    For texts without control tokens. Runs of newlines or spaces are user-defined tokens, which
    aren't joined with anything.
    """
    ids = {token: index for index, token in enumerate(GEMMA3_TOKENS)}
    scores = gemma3_scores()
    pieces = split_user_defined(text)
    while True:
        best = None
        for place in range(len(pieces) - 1):
            joined = pieces[place] + pieces[place + 1]
            is_normal = joined in ids and GEMMA3_TYPES[ids[joined]] == NORMAL
            if is_normal and (best is None or scores[ids[joined]] > best[0]):
                best = (scores[ids[joined]], place)
        if best is None:
            break
        place = best[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    tokens = []
    for piece in pieces:
        if piece in ids:
            tokens.append(ids[piece])
        else:
            tokens.extend(ids[f"<0x{byte:02X}>"] for byte in piece.encode())
    return tokens


def split_user_defined(text):
    """Split a text into its user-defined tokens, the longest first, and characters."""
    pieces = []
    place = 0
    while place < len(text):
        length = 1
        for token in ("\n\n", "   ", "  ", "<b>"):
            if text.startswith(token, place):
                length = len(token)
                break
        piece = text[place : place + length]
        if piece == " ":
            piece = "▁"
        pieces.append(piece)
        place += length
    return pieces


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@example("the 12 in the\n\n\n  <b>aaaaa</b>    é🙂 the")
@example("1 a1  a1   a1    a")
@given(st.lists(st.sampled_from([*"thein ab12\n<>.é🙂\t", "<b>", "the"]), max_size=40).map("".join))
def test_a_text_is_encoded_as_sentencepiece_does_and_decoded_again(tiny_tokenizer, text):
    begin = [tiny_tokenizer.bos_token_id]
    assert tiny_tokenizer(text).input_ids == begin + slow_encode(text)
    assert tiny_tokenizer.decode(slow_encode(text)) == text


def test_control_tokens_in_a_text_are_tokens_and_the_begin_token_is_added_once(tiny_tokenizer):
    text = "<start_of_turn>the"
    assert tiny_tokenizer(text, add_special_tokens=False).tokens() == ["<start_of_turn>", "the"]
    assert tiny_tokenizer("the", "a").tokens() == ["<bos>", "the", "<bos>", "a"]
    assert tiny_tokenizer("").input_ids == [tiny_tokenizer.bos_token_id]
    settings = tiny_tokenizer.special_tokens_map
    assert settings["eos_token"] == "<eos>"
    assert settings["pad_token"] == "<pad>"
    assert tiny_tokenizer.chat_template is None


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real model, converted by the code under test rather than found in a cache."""
    try:
        parts = Gemma3().find_parts()
    except ModelError as error:
        pytest.skip(str(error))
    if parts is None:
        pytest.skip(f"the package {Gemma3.package} isn't installed (docs/install.md)")
    place = tmp_path_factory.mktemp("cache")
    yield Gemma3().convert_once(parts, place / "model")
    shutil.rmtree(place)  # pytest would keep 1.1 GB of each of the last three runs


@pytest.mark.thorough
def test_the_real_model_reads_and_writes_plain_english(real):
    base = load(str(real), device="cpu", dtype="float32")
    assert base.num_layers == 18
    config = json.loads((real / "config.json").read_text())
    assert config["layer_types"].count("full_attention") == 3
    inputs = base.tokenizer(PROSE, return_tensors="pt")
    with torch.no_grad():
        loss = base.model(**inputs, labels=inputs.input_ids).loss
    # 2.6834 with transformers 4.56.2, 5.0.0 and 5.24.0; 12.5 would be a guess.
    assert loss.item() == pytest.approx(2.6834, abs=1e-3)
    inputs = base.tokenizer("The capital of France is", return_tensors="pt")
    output = base.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert base.tokenizer.decode(output[0], skip_special_tokens=True) == (
        "The capital of France is the capital of the country of France. It is the largest"
    )


@pytest.mark.thorough
def test_the_real_tokenizer_gives_the_tokens_of_sentencepiece(real):
    tokenizer = AutoTokenizer.from_pretrained(real)
    for text, numbers in SENTENCEPIECE.items():
        ids = [int(number) for number in numbers.split()]
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
        assert tokenizer.decode(ids) == text
