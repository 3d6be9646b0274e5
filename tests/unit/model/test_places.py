"""What is known of a model from its config, before it is loaded."""

import json

import pytest

from drllm.config import ModelConfig
from drllm.model.places import read_num_layers


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({"num_hidden_layers": 30}, 30),
        ({"n_layer": 12}, 12),
        ({"num_hidden_layers": 4, "text_config": {"num_hidden_layers": 26}}, 26),
        ({"text_config": "no object"}, None),
        ({"num_hidden_layers": "many"}, None),
        ({}, None),
    ],
    ids=["llama", "gpt2", "text part", "no text part", "no number", "no field"],
)
def test_the_number_of_layers_is_read_from_the_config_if_it_says_it(tmp_path, values, number):
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_num_layers(ModelConfig(model=str(tmp_path))) == number


def test_nothing_is_known_of_a_broken_config_or_of_a_model_that_is_elsewhere(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert read_num_layers(ModelConfig(model=str(tmp_path))) is None
    assert read_num_layers(ModelConfig(model="owner/nowhere")) is None


def test_a_model_in_the_cache_of_the_hub_is_read_there(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text('{"num_hidden_layers": 7}')
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    assert read_num_layers(ModelConfig(model="owner/name")) == 7
