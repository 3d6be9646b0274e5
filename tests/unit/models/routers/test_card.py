"""What a model card says, and that it says nothing that isn't recorded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from drllm.models.routers.card import METRICS, model_card
from drllm.models.routers.stack import RouterConfig, RouterStack

BY_HAND = RouterConfig(
    num_layers=3,
    hidden_size=6,
    num_windows=4,
    router_width=5,
    base_model="org/tiny",
    base_revision="abc123",
    base_class="LlamaForCausalLM",
    base_fingerprint="0123456789abcdef",
)
TRAINED = dataclasses.replace(
    BY_HAND,
    label_counts=((1, 2, 3), (0, 6, 0), (4, 1, 1)),
    training={
        "settings": {"learning_rate": 0.001, "gamma": 2.0},
        "num_trained": 30,
        "num_held_out": 10,
        "tasks": {"arc_easy": 25, "dart": 15},
        "metrics": [
            {"split": "train", **{key: 0.25 for key, _ in METRICS}},
            {"split": "validation", **{key: 0.125 for key, _ in METRICS}, "f1_skip": None},
        ],
    },
)


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values


# --- the base model and how to load ------------------------------------------------------------


@pytest.mark.parametrize("config", [BY_HAND, TRAINED])
def test_the_card_names_the_base_model_with_all_that_it_is_recognised_by(
    config: RouterConfig,
) -> None:
    assert (
        "`org/tiny`, revision `abc123`: LlamaForCausalLM, 3 layers, hidden size 6, "
        "fingerprint `0123456789abcdef`.\nOn another model these routers are refused."
        in model_card(config)
    )


@pytest.mark.parametrize("place", ["path/to/this/folder", "someone/routers"])
def test_the_card_says_how_to_load_from_where_the_routers_are(place: str) -> None:
    card = model_card(BY_HAND, place)
    assert f'    routed = drllm.RoutedModel.from_pretrained("{place}")\n' in card
    assert f"`drllm generate --routers {place} " in card


def test_routers_without_the_name_of_a_base_say_that_one_has_to_be_given() -> None:
    card = model_card(dataclasses.replace(BY_HAND, base_model="", base_revision=None))
    assert "# Routers for LlamaForCausalLM\n" in card
    assert "Not named: LlamaForCausalLM, 3 layers" in card
    assert 'from_pretrained("path/to/this/folder", base=model)' in card
    assert "--model MODEL" in card
    assert "base_model" not in front_matter(card)


def test_without_a_fingerprint_the_card_doesnt_claim_that_other_models_are_refused() -> None:
    card = model_card(RouterConfig(num_layers=3, hidden_size=6))
    assert "3 layers, hidden size 6; no fingerprint is recorded." in card
    assert "refused" not in card
    assert "# Routers for a language model\n" in card


def test_the_hub_is_told_the_base_model_and_that_routers_are_no_fine_tune() -> None:
    assert front_matter(model_card(BY_HAND)) == {
        "library_name": "drllm",
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "tags": ["layer-routing", "dynamic-depth"],
    }


@pytest.mark.parametrize("name", ["smollm2-135m", "/home/me/models/tiny", "a/b\nlicense: mit"])
def test_a_name_that_is_no_hub_id_is_not_given_to_the_hub(name: str) -> None:
    card = model_card(dataclasses.replace(BY_HAND, base_model=name))
    assert set(front_matter(card)) == {"library_name", "tags"}


def test_a_name_breaks_out_of_neither_line_nor_code() -> None:
    card = model_card(
        dataclasses.replace(BY_HAND, base_model="a`b\n\n# Great routers", training={})
    )
    assert "\n# Great" not in card
    assert "`a'b # Great routers`, revision" in card


def test_the_number_of_parameters_is_the_real_one() -> None:
    stack = RouterStack(BY_HAND)
    number = sum(weight.numel() for weight in stack.parameters())
    assert f"\n{number} parameters in float32: width 5, 4 windows.\n" in model_card(BY_HAND)


# --- data and metrics --------------------------------------------------------------------------


def test_the_card_of_trained_routers_tells_data_metrics_and_settings() -> None:
    card = model_card(TRAINED)
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


@pytest.mark.parametrize("rounds", [0, 2])
def test_the_card_says_whether_routers_were_teacher_forced_alone(rounds: int) -> None:
    settings = TRAINED.training["settings"] | {"on_policy_rounds": rounds}
    training = TRAINED.training | {"settings": settings}
    card = model_card(dataclasses.replace(TRAINED, training=training))
    assert ("The routers were teacher-forced here" in card) == (rounds == 0)
    assert ("what the routes of the earlier routers give it" in card) == (rounds == 2)


def test_routers_made_by_hand_say_that_nothing_is_known_of_data_and_metrics() -> None:
    card = model_card(BY_HAND)
    assert "There is no record of a training: these routers were not made by `drllm train`" in card
    for claim in ("## Data\n", "## Metrics", "## Settings", "Labels", "Target paths", "| loss"):
        assert claim not in card


@pytest.mark.parametrize("absent", ["settings", "num_trained", "num_held_out", "tasks", "metrics"])
def test_what_isnt_recorded_of_a_training_is_left_out_and_the_rest_stays(absent: str) -> None:
    training = {name: value for name, value in TRAINED.training.items() if name != absent}
    card = model_card(dataclasses.replace(TRAINED, training=training))
    gone = {
        "settings": "## Settings",
        "num_trained": "Target paths trained on",
        "num_held_out": "held out",
        "tasks": "By task",
        "metrics": "## Metrics",
    }[absent]
    assert gone not in card
    assert "Labels trained on" in card
    assert card.count("## ") == model_card(TRAINED).count("## ") - (
        absent in ("settings", "metrics")
    )


@pytest.mark.parametrize(
    "training",
    [
        {"note": "merged from two"},
        {"metrics": "good", "tasks": 5, "settings": [1]},
        {"metrics": [{"split": 1}, 5, {"split": "x", "routers_loss": "low"}]},
    ],
)
def test_a_record_of_another_kind_is_not_made_into_claims(training: dict[str, Any]) -> None:
    card = model_card(dataclasses.replace(BY_HAND, training=training))
    assert "There is no record of a training" in card
