"""What a model card says, and that it says nothing that isn't recorded."""

import dataclasses

import pytest
import yaml
from huggingface_hub import ModelCard

from drllm.models.routers.card import METRICS, write_card
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack

BASE = {"base_model": "org/tiny", "base_revision": "abc123", "base_class": "LlamaForCausalLM"}
SIZES = {"num_layers": 3, "hidden_size": 6, "num_windows": 4, "router_width": 5}
BY_HAND = RouterConfig(**SIZES, **BASE, base_fingerprint="0123456789abcdef")
TRAINING = {
    "settings": {"learning_rate": 0.001, "gamma": 2.0},
    "num_trained": 30,
    "num_held_out": 10,
    "tasks": {"arc_easy": 25, "dart": 15},
    "metrics": [
        {"split": "train", **dict.fromkeys(METRICS, 0.25)},
        {"split": "validation", **dict.fromkeys(METRICS, 0.125), "f1_skip": None},
    ],
}
TRAINED = dataclasses.replace(
    BY_HAND, label_counts=((1, 2, 3), (0, 6, 0), (4, 1, 1)), training=TRAINING
)


def card_with(config=BY_HAND, **values):
    return write_card(dataclasses.replace(config, **values))


def front_matter(card):
    return yaml.safe_load(card.split("---\n", 2)[1])


@pytest.mark.parametrize("config", [BY_HAND, TRAINED])
def test_the_card_names_the_base_model_with_all_that_it_is_recognised_by(config):
    assert (
        "`org/tiny`, revision `abc123`: LlamaForCausalLM, 3 layers, hidden size 6, "
        "fingerprint `0123456789abcdef`.\nOn another model these routers are refused."
        in write_card(config)
    )


@pytest.mark.parametrize("place", ["path/to/this/folder", "someone/routers"])
def test_the_card_says_how_to_load_from_where_the_routers_are(place):
    card = write_card(BY_HAND, place)
    assert f'    routed = drllm.RoutedModel.from_pretrained("{place}")\n' in card
    assert f"`drllm generate --routers {place} " in card


def test_routers_without_the_name_of_a_base_say_that_one_has_to_be_given():
    card = card_with(base_model="", base_revision=None)
    assert "# Routers for LlamaForCausalLM\n" in card
    assert "Not named: LlamaForCausalLM, 3 layers" in card
    assert 'from_pretrained("path/to/this/folder", base=model)' in card
    assert "--model MODEL" in card
    assert "base_model" not in front_matter(card)


def test_without_a_fingerprint_the_card_doesnt_claim_that_other_models_are_refused():
    card = write_card(RouterConfig(num_layers=3, hidden_size=6))
    assert "3 layers, hidden size 6; no fingerprint is recorded." in card
    assert "refused" not in card
    assert "# Routers for a language model\n" in card


def test_the_hub_is_told_the_base_model_and_that_routers_are_no_fine_tune():
    assert front_matter(write_card(BY_HAND)) == {
        "library_name": "drllm",
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "tags": ["layer-routing", "dynamic-depth"],
    }


def test_the_hubs_own_reader_finds_the_metadata_and_the_text():
    card = ModelCard(write_card(TRAINED))
    assert (card.data.library_name, card.data.base_model) == ("drllm", "org/tiny")
    assert card.data.tags == ["layer-routing", "dynamic-depth"]
    assert card.text.strip().startswith("# Routers for org/tiny\n")


@pytest.mark.parametrize("name", ["/home/me/models/tiny", "a/b\nlicense: mit"])
def test_a_name_that_is_no_hub_id_is_not_given_to_the_hub(name):
    assert set(front_matter(card_with(base_model=name))) == {"library_name", "tags"}


def test_an_alias_is_given_to_the_hub_by_the_name_that_the_hub_has_for_it():
    card = card_with(base_model="smollm2-135m")
    values = front_matter(card)
    assert values["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert values["license"] == "apache-2.0"
    assert "GGUF file in Q4_1" in card


def test_a_name_breaks_out_of_neither_line_nor_code():
    card = card_with(base_model="a`b\n\n# Great routers")
    assert "\n# Great" not in card
    assert "`a'b # Great routers`, revision" in card


def test_the_number_of_parameters_is_the_real_one():
    number = sum(weight.numel() for weight in RouterStack(BY_HAND).parameters())
    assert f"\n{number} parameters in float32: width 5, 4 windows.\n" in write_card(BY_HAND)


def test_the_card_of_trained_routers_tells_data_metrics_and_settings():
    card = write_card(TRAINED)
    for text in (
        "Target paths trained on: 30; held out: 10.",
        "By task: arc_easy (25), dart (15).",
        "Labels trained on, over all layers: 5 skip, 9 execute, 4 repeat.",
        "| | train | validation |\n|---|---|---|\n| loss | 0.25 | 0.125 |",
        "| F1 skip | 0.25 | – |",
        "- learning_rate: 0.001\n- gamma: 2.0",
        "measured by `drllm evaluate`, not by these numbers",
    ):
        assert text in card
    assert "no record" not in card


@pytest.mark.parametrize(
    ("field", "heading"),
    [
        ("settings", "## Settings"),
        ("num_trained", "Target paths trained on"),
        ("num_held_out", "held out"),
        ("tasks", "By task"),
        ("metrics", "## Metrics"),
    ],
)
def test_what_isnt_recorded_of_a_training_is_left_out_and_the_rest_stays(field, heading):
    training = {name: value for name, value in TRAINING.items() if name != field}
    card = card_with(TRAINED, training=training)
    assert heading not in card
    assert "Labels trained on" in card
    assert card.count("## ") == write_card(TRAINED).count("## ") - heading.startswith("## ")


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"note": "merged from two"},
        {"metrics": "good", "settings": [1]},
        {"metrics": [{"split": 1}, 5, {"split": "x", "routers_loss": "low"}]},
    ],
)
def test_without_a_record_of_a_training_the_card_claims_nothing(training):
    card = card_with(training=training)
    assert "There is no record of a training: these routers were not made by `drllm train`" in card
    for claim in ("## Data\n", "## Metrics", "## Settings", "Labels", "Target paths", "| loss"):
        assert claim not in card
