"""A tiny model for the tests of tuning."""

import pytest

from drllm.models.routed_model import RoutedModel


@pytest.fixture(scope="module")
def routed(tiny_llama, tiny_tokenizer):
    return RoutedModel(tiny_llama(max_position_embeddings=1024), tokenizer=tiny_tokenizer)
