"""What lies beside the weights of an exported checkpoint."""

import json

import pytest
import yaml

from drllm.errors import ConfigError
from drllm.models.export import check_output, model_card, say_for_transformers_4

IDENTITY = {
    "id": "owner/name",
    "revision": "abc123",
    "class": "LlamaForCausalLM",
    "num_layers": 5,
    "hidden_size": 32,
    "fingerprint": "0123456789abcdef",
}


def said(folder, config, tokenizer=None):
    """Return what the files say afterwards."""
    (folder / "config.json").write_text(json.dumps(config))
    names = ["config.json"]
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        names.append("tokenizer_config.json")
    say_for_transformers_4(folder)
    found = [json.loads((folder / name).read_text()) for name in names]
    return found if tokenizer is not None else found[0]


# --- RoPE --------------------------------------------------------------------------------------


def test_the_base_of_the_rotation_is_said_twice(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    config = said(tmp_path, {"model_type": "llama", "rope_parameters": rope})
    assert config == {
        "model_type": "llama",
        "rope_parameters": rope,
        "rope_theta": 50000.0,
        "rope_scaling": None,
    }


def test_a_scaling_is_said_twice(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    rope = {**scaling, "rope_theta": 50000.0, "partial_rotary_factor": 0.5}
    config = said(tmp_path, {"model_type": "llama", "rope_parameters": rope})
    assert config["rope_scaling"] == scaling
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (50000.0, 0.5)


def test_a_long_rotation_is_said_in_the_three_keys_that_phi3_accepts(tmp_path):
    factors = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 2.2]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    inside = {"model_type": "phi3", "rope_parameters": {**rope, **factors}}
    config = said(tmp_path, {**inside, "original_max_position_embeddings": 64})
    assert config["rope_scaling"] == {"type": "longrope", **factors}
    assert said(tmp_path, inside)["rope_scaling"]["original_max_position_embeddings"] == 64


def test_two_kinds_of_layers_have_two_bases(tmp_path):
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    kinds = {"full_attention": full, "sliding_attention": sliding}
    config = said(tmp_path, {"model_type": "gemma3_text", "rope_parameters": kinds})
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_names_of_a_family_of_its_own_are_used(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    config = said(tmp_path, {"model_type": "gpt_neox", "rope_parameters": rope})
    assert (config["rotary_emb_base"], config["rotary_pct"]) == (5000.0, 0.25)
    assert "rope_theta" not in config
    moe = {"model_type": "qwen3_moe", "rope_parameters": rope, "num_local_experts": 4}
    assert said(tmp_path, moe)["num_experts"] == 4


def test_kinds_of_attention_are_said_as_runs_too(tmp_path):
    kinds = {"attention_layers": ["global", "local"], "attention_types": [[["global"], 5]]}
    config = said(tmp_path, {"model_type": "gpt_neo", **kinds})
    assert config["attention_types"] == [[["global"], 1], [["local"], 1]]


def test_the_text_part_of_a_composite_config_is_found(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    text = {"model_type": "llama", "rope_parameters": rope}
    config = said(tmp_path, {"model_type": "composite", "text_config": text})
    assert config["text_config"]["rope_theta"] == 50000.0
    assert "rope_theta" not in config


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_theta": 50000.0, "rope_scaling": {"type": "linear"}},
        {"model_type": "gpt2", "n_layer": 2},
    ],
)
def test_a_config_without_the_newer_words_stays(tmp_path, config):
    assert said(tmp_path, config) == config


# --- the tokenizer -----------------------------------------------------------------------------


def test_the_tokenizers_class_and_extra_tokens_have_names_that_both_know(tmp_path):
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "pad": 1}
    assert said(tmp_path, {}, newer)[1] == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "pad": 1,
    }


def test_a_tokenizer_of_a_family_of_its_own_stays(tmp_path):
    own = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<i>"}}
    assert said(tmp_path, {}, own)[1] == own


# --- the card and the place --------------------------------------------------------------------


def test_the_card_says_where_the_weights_come_from_and_which_path_it_is():
    card = model_card(IDENTITY, (0, 1, 3, 3, 4), "bfloat16", 1234)
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["library_name"], matter["base_model"]) == ("transformers", "owner/name")
    for text in (
        "revision `abc123`",
        "fingerprint `0123456789abcdef`",
        "    0 1 3 3 4\n",
        "As decisions, one per layer: 1 1 0 2 1.",
        "Left out: 2.",
        "Executed more than once: 3.",
        "copies are 1,234 bytes",
        "bfloat16",
    ):
        assert text in card


def test_the_card_of_a_path_without_decisions_says_so():
    assert "can't express this path" in model_card(IDENTITY, (1, 0), "float32", 0)


def test_a_base_model_that_is_not_from_the_hub_is_no_link():
    card = model_card({**IDENTITY, "id": "models/tiny", "revision": None}, (0,), "float32", 0)
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "`models/tiny`: LlamaForCausalLM" in card


def test_a_new_or_an_empty_folder_may_be_written(tmp_path):
    check_output(tmp_path / "new" / "deep")
    check_output(tmp_path)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="isn't empty"):
        check_output(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "file")
