"""A stage's model in this process, and its shape where the weights are in workers of Ray."""

import pytest
import torch

import drllm
from drllm.config import ExecutorConfig, ModelConfig
from drllm.errors import ConfigError
from drllm.model.load import load, load_without_weights
from drllm.models.routed_model import RoutedModel
from drllm.models.workers import open_workers
from drllm.work.listener import Listener

RAY = ExecutorConfig(executor="ray")


def test_the_model_is_as_it_was_after_the_block(tiny_llama, tiny_tokenizer):
    model = tiny_llama()
    with open_workers(model, tiny_tokenizer, ExecutorConfig(), Listener()) as workers:
        assert workers.base.model is model
        assert isinstance(workers.executor.model, RoutedModel)
        assert workers.executor.identity == workers.base.identity
    assert drllm.attach(model).detach() is model


def test_ray_takes_a_name_and_refuses_a_model(tiny_llama, tiny_tokenizer):
    with (
        pytest.raises(
            ConfigError, match=r"takes a model's name or folder, not a Llama.*ModelConfig"
        ),
        open_workers(tiny_llama(), tiny_tokenizer, RAY, Listener()),
    ):
        pass


def test_a_model_without_weights_tokenises_and_has_its_layers(model_folder):
    config = ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")
    base = load(config)
    shape = load_without_weights(config, base.identity, base.runtime)
    assert shape.identity == base.identity
    assert shape.runtime == base.runtime
    assert shape.num_layers == base.num_layers
    assert all(parameter.is_meta for parameter in shape.model.parameters())
    assert shape.model.dtype == torch.float32
    assert shape.tokenizer("one two")["input_ids"] == base.tokenizer("one two")["input_ids"]
    assert RoutedModel(shape.model, tokenizer=shape.tokenizer).num_layers == base.num_layers


@pytest.mark.thorough
def test_workers_of_ray_load_the_model_by_its_folder(model_folder, leaving_things_open):
    pytest.importorskip("ray")
    config = ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")
    base = load(config)
    ray = ExecutorConfig(executor="ray", num_workers=2)
    with leaving_things_open(), open_workers(config, None, ray, Listener()) as workers:
        assert workers.executor.identity == base.identity
        assert workers.base.identity == base.identity
        assert workers.executor.num_workers == 2
        assert workers.executor.num_sharing == 2
