"""Routers and their base model: what fits, what is saved of both, and what is loaded."""

import dataclasses
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from drllm.errors import CheckpointError, ConfigError, ModelError, RoutingError
from drllm.model.identity import fingerprint
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.card import write_card
from drllm.models.routers.checkpoint import (
    check_routers,
    complete_config,
    load_routers,
    save_routers,
)
from drllm.models.routers.config import RouterConfig, read_config
from drllm.models.routers.stack import RouterStack

IDS = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 29, 31]])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def base_folder(model_folder):
    return model_folder(num_layers=3)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_layers=3)


def make_routers(**values):
    """Routers that nobody trained, different at every layer and far from a tie."""
    config = RouterConfig(**{"num_layers": 3, "hidden_size": 32, "router_width": 4, **values})
    stack = RouterStack(config, torch.Generator().manual_seed(5))
    for weight in stack.parameters():
        weight.data.mul_(3)
    return stack


def make_routers_for(model, **values):
    """The same, with all that the base model is recognised by."""
    stack = make_routers(**values)
    stack.config = complete_config(stack.config, model)
    return stack


def route(routed):
    routed.model(IDS)
    return routed.last_route.tolist()


OTHER = {
    "base_class": ("Qwen3ForCausalLM", "this model has LlamaForCausalLM"),
    "num_layers": (4, "this model has 3"),
    "hidden_size": (16, "this model has 32"),
    "base_fingerprint": ("f" * 16, "this model has "),
}


@pytest.mark.parametrize("changed", [*([name] for name in OTHER), list(OTHER)])
def test_routers_of_another_model_are_refused_with_all_that_differs(model, changed):
    values = {name: OTHER[name][0] for name in changed}
    config = dataclasses.replace(make_routers_for(model).config, base_model="org/other", **values)
    with pytest.raises(CheckpointError) as caught:
        check_routers(model, RouterStack(config))
    message = str(caught.value)
    assert message.startswith("these routers were trained for org/other with ")
    assert all(f"{name} {OTHER[name][0]}, {OTHER[name][1]}" in message for name in changed)
    assert message.count("this model has") == len(changed)
    assert message.endswith("load the model they belong to, or train routers for this one")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: make_routers_for(model, base_model="org/tiny"), "the weights are the same"),
        (lambda model: make_routers(base_model="org/tiny"), "they have no fingerprint"),
    ],
)
def test_routers_that_name_another_base_are_a_warning_if_nothing_else_differs(model, make, message):
    model.name_or_path = "mirror/tiny"
    with pytest.warns(UserWarning, match=f"name 'org/tiny' as .*'mirror/tiny'; {message}"):
        check_routers(model, make(model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_base_under_an_adapter_is_what_is_saved_and_what_routers_fit(model, tmp_path):
    model.name_or_path, before = "org/tiny", fingerprint(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    RoutedModel(adapted, make_routers()).save_pretrained(tmp_path)
    saved = load_routers(tmp_path)
    assert (saved.config.base_class, saved.config.base_model) == ("LlamaForCausalLM", "org/tiny")
    assert saved.config.base_fingerprint == before
    check_routers(adapted, saved)  # not even a warning


def test_routers_fit_and_route_their_model_with_its_weights_offloaded_too(model):
    routers = make_routers_for(model)
    routed = RoutedModel(model, routers)
    expected = route(routed)
    accelerate.cpu_offload(routed.detach(), execution_device=torch.device("cpu"))
    assert route(RoutedModel(model, routers)) == expected


def test_a_saved_checkpoint_routes_as_before(model, tmp_path):
    routed = RoutedModel(model, make_routers())
    expected = route(routed)
    assert len(set(expected[0])) > 1, "these routers would agree with any others"
    routed.save_pretrained(tmp_path / "routers")
    again = RoutedModel.from_pretrained(tmp_path / "routers", routed.detach())
    assert route(again) == expected


def test_what_routers_made_by_hand_dont_say_of_their_base_is_filled_in(model, tmp_path):
    model.name_or_path = "org/tiny"
    model.config._commit_hash = COMMIT
    routers = make_routers()
    before = routers.config
    RoutedModel(model, routers).save_pretrained(tmp_path)
    base = {"base_class": "LlamaForCausalLM", "base_fingerprint": fingerprint(model)}
    base |= {"base_model": "org/tiny", "base_revision": COMMIT}
    assert read_config(tmp_path) == dataclasses.replace(before, **base)
    assert routers.config == before


def test_what_trained_routers_say_of_their_base_is_kept(model, tmp_path):
    model.config._commit_hash = COMMIT
    record = {"metrics": [{"split": "train", "routers_loss": 0.5}], "num_trained": 7}
    fields = {"base_model": "org/tiny", "label_counts": ((1, 2, 3),) * 3, "training": record}
    routers = make_routers_for(model, **fields)
    RoutedModel(model, routers).save_pretrained(tmp_path)
    assert read_config(tmp_path) == routers.config
    assert (tmp_path / "README.md").read_text() == write_card(routers.config)


def test_a_model_without_routers_has_nothing_to_save(model, tmp_path):
    routed = RoutedModel(model)
    with pytest.raises(RoutingError, match="no routers to save"):
        routed.save_pretrained(tmp_path)
    with pytest.raises(RoutingError, match="no routers to save"):
        routed.push_to_hub("someone/routers")


@pytest.fixture
def routers_folder(base_folder, model, tmp_path):
    save_routers(make_routers_for(model, base_model=str(base_folder)), tmp_path / "routers")
    return tmp_path / "routers"


@pytest.mark.parametrize("kind", [None, str, Path])
def test_the_base_model_is_the_one_that_the_routers_name_or_that_is_given_by_its_place(
    routers_folder, base_folder, kind
):
    if kind:
        save_routers(make_routers(), routers_folder)  # which name none
    base = kind and kind(base_folder)
    routed = RoutedModel.from_pretrained(routers_folder, base, dtype="float32", device="cpu")
    assert (routed.model.name_or_path, routed.model.dtype) == (str(base_folder), torch.float32)
    assert routed.tokenizer("a").input_ids
    assert route(routed)


def test_routers_of_another_model_are_refused_on_loading(routers_folder, tiny_llama):
    with pytest.raises(CheckpointError, match="base_fingerprint"):
        RoutedModel.from_pretrained(routers_folder, tiny_llama(num_layers=3, seed=1))


def test_routers_that_name_no_base_model_ask_for_one(tmp_path):
    save_routers(make_routers(), tmp_path)
    with pytest.raises(CheckpointError, match=r"don't name their base model; give it as base="):
        RoutedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "bfloat16"}, "on a base model that is loaded already"),
        ({"device": "cpu"}, "on a base model that is loaded already"),
        ({"revision": "v2"}, "the revision 'v2' has no effect on the folder"),
    ],
)
def test_settings_without_effect_are_refused(routers_folder, model, setting, message):
    with pytest.raises(ConfigError, match=message):
        RoutedModel.from_pretrained(routers_folder, model, **setting)


def test_a_tokenizer_that_is_given_is_kept_and_one_that_isnt_is_the_base_models(
    routers_folder, base_folder
):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert RoutedModel.from_pretrained(routers_folder, base).tokenizer("ab").input_ids == [69, 70]
    assert RoutedModel.from_pretrained(routers_folder, base, tokenizer="own").tokenizer == "own"
    assert RoutedModel.from_pretrained(routers_folder, tokenizer="own").tokenizer == "own"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_arguments_of_transformers_reach_the_base_model(routers_folder, tmp_path, dtype):
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb")
    placed = {**dict.fromkeys(parts, "cpu"), "lm_head": "disk"}
    routed = RoutedModel.from_pretrained(
        routers_folder,
        dtype=dtype,
        device_map=placed,
        offload_folder=tmp_path / "offloaded",
        attn_implementation="eager",
    )
    assert (routed.dtype, routed.config._attn_implementation) == (torch.bfloat16, "eager")
    assert routed.hf_device_map == placed
    assert RoutedModel.from_pretrained(routers_folder, torch_dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "bf16"}, ConfigError, "--dtype: unknown value 'bf16'; did you mean 'bfloat16'"),
        ({"dtpye": "bfloat16"}, ConfigError, "doesn't fit the model .*argument 'dtpye'"),
        ({"device_map": "auto", "device": "cpu"}, ConfigError, "no effect with device_map; leave"),
        ({"device_map": "gpus"}, ModelError, "can't be opened: .*gpus"),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            ModelError,
            "needs a package that isn't installed: .*bitsandbytes",
        ),
    ],
)
def test_arguments_that_dont_fit_are_refused_in_one_line(routers_folder, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        RoutedModel.from_pretrained(routers_folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_hub_id_works_like_a_folder(cached, routers_folder, model, revision):
    name = cached(routers_folder, "someone/routers")
    routed = RoutedModel.from_pretrained(name, model, revision=revision)
    config = RouterConfig.from_pretrained(name, revision=revision)
    assert routed.routers.config == config == read_config(routers_folder)


def test_a_folder_comes_before_the_hub(cached, routers_folder, model, tmp_path, monkeypatch):
    name = cached(routers_folder, "someone/routers")
    save_routers(make_routers(num_windows=3), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert RoutedModel.from_pretrained(name, model).routers.config.num_windows == 3
