"""What an exported checkpoint says so that transformers 4 reads it alike, and its card."""

import json

import pytest
import yaml

from drllm.model.older_names import add_names_of_transformers_4
from drllm.models.export import model_card
from drllm.paths import StaticPath
from drllm.records.static_paths import load_path
from paths_json import written_paths

IDENTITY = {"id": "owner/name", "revision": "abc123", "fingerprint": "0123456789abcdef"}
IDENTITY |= {"class": "LlamaForCausalLM", "num_layers": 5, "hidden_size": 32}
PLAIN = {"rope_type": "default", "rope_theta": 50000.0}
SCALING = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 2.2]}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}
LINEAR = {"rope_type": "linear", "factor": 8.0}
PARTIAL = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
OUTSIDE = {"rope_theta": 5e4, "partial_rotary_factor": 0.5}
KINDS = {
    "full_attention": {**LINEAR, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CONFIGS = {
    "plain": ({"rope_parameters": PLAIN}, {"rope_theta": 50000.0, "rope_scaling": None}),
    "scaled": ({"rope_parameters": SCALING | OUTSIDE}, {"rope_scaling": SCALING, **OUTSIDE}),
    "long with its length outside": (
        {"original_max_position_embeddings": 64, "rope_parameters": LONG | {"rope_theta": 1e4}},
        {"rope_scaling": {"type": "longrope", **FACTORS}, "rope_theta": 1e4},
    ),
    "long": (
        {"rope_parameters": LONG | {"rope_theta": 1e4}},
        {"rope_scaling": LONG, "rope_theta": 1e4},
    ),
    "two kinds of layers": (
        {"rope_parameters": KINDS},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    ),
    "own names": (
        {"model_type": "gpt_neox", "rope_parameters": PARTIAL},
        {"rotary_emb_base": 5000.0, "rotary_pct": 0.25, "rope_scaling": None},
    ),
    "own name of experts": (
        {"model_type": "qwen3_moe", "rope_parameters": PLAIN, "num_local_experts": 4},
        {"num_experts": 4, "rope_theta": 50000.0, "rope_scaling": None},
    ),
    "kinds as runs": (
        {"attention_layers": ["global", "local"], "attention_types": [[["global"], 5]]},
        {"attention_types": [[["global"], 1], [["local"], 1]]},
    ),
    "older words": ({"rope_theta": 50000.0, "rope_scaling": {"type": "linear"}}, {}),
    "without RoPE": ({"model_type": "gpt2", "n_layer": 2}, {}),
}


def said(folder, name, values):
    """Return what a file says afterwards."""
    (folder / "config.json").write_text("{}")
    (folder / name).write_text(json.dumps(values))
    add_names_of_transformers_4(folder)
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(("config", "added"), CONFIGS.values(), ids=CONFIGS.keys())
def test_older_words_are_added_to_a_config_and_to_its_text_part(tmp_path, config, added):
    expected = {**config, **added}
    assert said(tmp_path, "config.json", config) == expected
    composite = {"model_type": "composite", "text_config": config}
    assert said(tmp_path, "config.json", composite) == {**composite, "text_config": expected}


def test_the_tokenizers_class_and_extra_tokens_have_names_that_both_know(tmp_path):
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "pad": 1}
    older = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert said(tmp_path, "tokenizer_config.json", newer) == {**older, "pad": 1}
    own = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<i>"}}
    assert said(tmp_path, "tokenizer_config.json", own) == own


def test_the_card_says_where_the_weights_come_from_and_which_path_it_is():
    card = model_card(IDENTITY, StaticPath([0, 1, 3, 3, 4]), "bfloat16", 1234)
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["library_name"], matter["base_model"]) == ("transformers", "owner/name")
    for text in (
        "revision `abc123`",
        "fingerprint `0123456789abcdef`",
        "    0 1 3 3 4\n",
        "As decisions, one per layer: 1 1 0 2 1.",
        "left out 2, executed more than once 3, in the base model's order.",
        "copies are 1,234 bytes",
        "bfloat16",
    ):
        assert text in card


def test_a_path_without_decisions_and_a_base_model_that_is_not_from_the_hub_are_said():
    card = model_card(
        {**IDENTITY, "id": "models/tiny", "revision": None}, StaticPath([1, 0]), "float32", 0
    )
    assert "can't express this path" in card
    assert "executed more than once none, in another order." in card
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "`models/tiny`: LlamaForCausalLM" in card


def test_the_card_names_no_folder_of_this_machine():
    base = IDENTITY | {"id": "/home/me/llama", "revision": None}
    card = model_card(base, StaticPath([0, 1]), "bfloat16", 0)
    assert "`llama`" in card
    assert "/home/me" not in card


def card_of(tmp_path, name, **options):
    identity = {**IDENTITY, "num_layers": 6}
    file = load_path(f"{written_paths(tmp_path / 'paths.json', identity, **options)}:{name}")
    return model_card(identity, file.path_for(identity), "float32", 0, file)


def test_the_card_of_a_tuned_path_says_for_what_it_was_found_how_and_how_it_did(tmp_path):
    card = card_of(tmp_path, "5.00")
    for text in (
        "one of 4 that `drllm tune`",
        "for arc_easy, builtin_facts.",
        "Objective: `gold_logprob` on arc_easy, `gold_logprob` on builtin_facts.",
        "| arc_easy | test | 400 | -1.25 | 0.05 (-0.01 to 0.11) | 0.62 | 2.5 |\n",
        "`test` had no part in that",
        "arc_easy, test:\n\n- Accuracy of the path minus the full path: +0.5 points",
        "; a loss of more than 2.0 points is excluded; ",
        "Settings: `max_skipped` 0.2, `seed` 3.",
    ):
        assert text in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "owner/name"


def test_the_card_gives_verdicts_on_no_questions_that_the_path_was_chosen_on(tmp_path):
    card = card_of(tmp_path, "5.00")
    assert "| arc_easy | select | 200 |" in card
    assert "arc_easy, select:" not in card
    assert card.count("Accuracy of the path minus the full path") == 1


def test_the_card_says_which_set_was_divided_anew(tmp_path):
    said = "of arc_easy were divided again, so test isn't the set's own"
    assert said in card_of(tmp_path, "5.00", divided=("arc_easy",))
    assert "divided again" not in card_of(tmp_path, "5.00")


def test_the_card_of_a_path_from_another_file_claims_no_tuning(tmp_path):
    (tmp_path / "plan.json").write_text('{"path": [0, 1, 2, 3, 4]}')
    file = load_path(str(tmp_path / "plan.json"))
    card = model_card(IDENTITY, file.path_for(IDENTITY), "float32", 0, file)
    assert "tune" not in card
