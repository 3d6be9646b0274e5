"""From a name to a frozen model, and one clear line for everything that can go wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from drllm.config import ModelConfig
from drllm.errors import ConfigError, ModelError
from drllm.models.base import load as loading
from drllm.models.base import smollm2 as alias
from drllm.models.base.identity import fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(model_folder):
    return model_folder(num_layers=3)


@pytest.fixture
def copied(saved, tmp_path):
    """A model folder that the test may break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def on_cpu(model, **settings):
    return ModelConfig(model=str(model), device="cpu", **settings)


def refused(kind, config):
    with pytest.raises(kind) as caught:
        loading.load(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what is loaded ----------------------------------------------------------------------------


def test_a_local_folder_gives_its_model_frozen(saved, tiny_llama):
    base = loading.load(on_cpu(saved))
    expected = tiny_llama(num_layers=3).state_dict()
    assert all(torch.equal(expected[name], w) for name, w in base.model.state_dict().items())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_tokenizer_pads_on_the_left(saved):
    tokenizer = loading.load(on_cpu(saved)).tokenizer
    mask = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt").attention_mask
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(copied):
    settings = copied / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    del values["pad_token"]
    settings.write_text(json.dumps(values))
    assert loading.load(on_cpu(copied)).tokenizer.pad_token == "</s>"


def test_identity_names_the_model_and_its_shape(saved):
    base = loading.load(on_cpu(saved))
    assert base.identity == {
        "id": str(saved),
        "revision": None,
        "class": "LlamaForCausalLM",
        "num_layers": 3,
        "hidden_size": 32,
        "fingerprint": fingerprint(base.model),
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("float32", "sdpa")),
        ({"dtype": "bfloat16"}, ("bfloat16", "sdpa")),
        ({"dtype": "float16", "attn_implementation": "sdpa"}, ("float16", "sdpa")),
        ({"dtype": "float32", "attn_implementation": "eager"}, ("float32", "eager")),
    ],
)
def test_runtime_tells_how_the_model_runs_as_resolved(saved, given, expected):
    dtype, attention = expected
    base = loading.load(on_cpu(saved, **given))
    assert base.model.dtype == getattr(torch, dtype)
    assert base.runtime == {"dtype": dtype, "device": "cpu", "attn_implementation": attention}


def test_loading_says_nothing_and_leaves_the_libraries_as_talkative_as_before(saved, capfd):
    before = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    loading.load(on_cpu(saved))
    assert capfd.readouterr() == ("", "")
    assert before == (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )


def test_the_alias_loads_by_its_own_name(smollm2):
    assert (smollm2.num_layers, smollm2.hidden_size) == (30, 576)
    assert smollm2.model.name_or_path == "smollm2-135m"
    assert "converted in" in alias.describe()


@pytest.fixture
def cached_hub_model(cached, saved):
    return cached(saved, "someone/tiny")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_works_like_a_folder_and_is_pinned_to_its_commit(
    cached_hub_model, saved, revision
):
    base = loading.load(on_cpu(cached_hub_model, revision=revision))
    assert base.identity["id"] == "someone/tiny"
    assert base.identity["revision"] == COMMIT
    assert base.identity["fingerprint"] == loading.load(on_cpu(saved)).identity["fingerprint"]


# --- device and dtype --------------------------------------------------------------------------


def test_auto_device_is_the_first_there_is_of_cuda_mps_cpu():
    kinds = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    expected = next(kind for kind, available in kinds.items() if available)
    assert loading.resolve_device("auto") == torch.device(expected)


def test_auto_dtype_is_float32_on_a_cpu():
    assert loading.resolve_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", ["cuda:99", "cpu:1", "mps:7"])
def test_a_device_that_this_machine_lacks_is_refused_with_a_remedy(name):
    with pytest.raises(ConfigError, match=rf"'{name}', but this machine has .*--device auto"):
        loading.resolve_device(name)


# --- what is refused ---------------------------------------------------------------------------


def test_attention_that_is_not_installed_says_what_to_do(saved, monkeypatch):
    def refuse(*_, **options):
        assert options["attn_implementation"] == "flash_attention_2"
        raise ImportError(
            "FlashAttention2 has been toggled on, but there is no package flash_attn."
        )

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", refuse)
    message = refused(ConfigError, on_cpu(saved, attn_implementation="flash_attention_2"))
    assert message.startswith("--attn-implementation 'flash_attention_2' can't be used with ")
    assert message.endswith(
        "there is no package flash_attn; install what it needs, or give --attn-implementation "
        "sdpa or eager"
    )


def test_an_unknown_attention_is_refused_with_the_nearest(saved):
    message = refused(ConfigError, on_cpu(saved, attn_implementation="spda"))
    assert "unknown attention implementation 'spda'; did you mean 'sdpa'?" in message


def test_a_revision_of_a_folder_has_no_effect_and_is_refused(saved):
    assert "--revision 'v2' has no effect" in refused(ConfigError, on_cpu(saved, revision="v2"))


@pytest.mark.parametrize("setting", [{"revision": "main"}, {"trust_remote_code": True}])
def test_hub_options_have_no_effect_on_an_alias_and_are_refused(setting):
    message = refused(ConfigError, on_cpu("smollm2-135m", **setting))
    assert "has no effect on 'smollm2-135m', which is an alias" in message


@pytest.mark.parametrize(
    ("pattern", "lacking"),
    [
        ("config.json", "config.json"),
        ("*.safetensors", "weights (*.safetensors)"),
        ("tokenizer*", "a tokenizer (tokenizer.json)"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_with_its_name(copied, pattern, lacking):
    for file in copied.glob(pattern):
        file.unlink()
    message = refused(ModelError, on_cpu(copied))
    assert f"doesn't hold a model: it lacks {lacking};" in message


def _without_a_tensor(folder):
    _rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _of_another_shape(folder):
    _rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))


def _cut_off(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _of_routers(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "router_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_of_routers, "--routers"),
        # Instead of being filled with noise, as transformers does.
        (_without_a_tensor, "missing keys model.layers.1.mlp.up_proj.weight (1 in all)"),
        (_of_another_shape, "mismatched keys model.norm.weight"),
        (_cut_off, "are broken or cut off"),
        (lambda folder: (folder / "config.json").write_text("{"), "copy"),
        (lambda folder: _edit_config(folder, model_type="flying_llama"), "flying_llama"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
            "decoder-only",
        ),
    ],
)
def test_a_folder_that_holds_no_usable_model_is_refused(copied, spoil, said):
    spoil(copied)
    assert said in refused(ModelError, on_cpu(copied))


@pytest.mark.parametrize(
    ("place", "said"), [("copy/config.json", "is a file"), ("nowhere", "there is no folder")]
)
def test_a_place_that_is_no_folder_is_refused(copied, place, said):
    assert said in refused(ModelError, on_cpu(copied.parent / place))


CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(copied):
    (copied / "own.py").write_text(CUSTOM_CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _edit_config(copied, model_type="own-llama", auto_map=auto_map)
    return copied


def test_code_that_comes_with_a_model_isnt_run_unasked(with_code):
    (with_code / "own.py").write_text("raise AssertionError('this code was run')")
    message = refused(ModelError, on_cpu(with_code))
    assert "needs modelling code of its own" in message
    assert "--trust-remote-code" in message


def test_code_that_comes_with_a_model_runs_where_asked_for(with_code):
    base = loading.load(on_cpu(with_code, trust_remote_code=True))
    assert base.identity["class"] == "OwnModel"


def _edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- the hub -----------------------------------------------------------------------------------


def test_a_hub_model_that_isnt_cached_is_refused_offline_with_the_token_variable():
    message = refused(ModelError, on_cpu("someone/absent"))
    assert "'someone/absent' isn't in the local cache, and HF_HUB_OFFLINE is set" in message
    assert "HF_TOKEN" in message


def test_a_misspelt_alias_is_answered_with_the_alias():
    assert "did you mean 'smollm2-135m'?" in refused(ModelError, on_cpu("smollm2-135"))


@pytest.mark.parametrize("name", ["a/b/c", "what is this?", "-/..x"])
def test_a_name_that_cant_be_a_hub_id_is_refused(name):
    assert "hub id" in refused(ModelError, on_cpu(name))
