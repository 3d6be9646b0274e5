"""What the tests of the search share: a tiny model, questions, and when two runs are the same."""

import sys
from pathlib import Path
from typing import Any

import pytest

from drllm.models.routed_model import RoutedModel
from drllm.tasks.base import Task
from drllm.tasks.registry import get_task

sys.path.insert(0, str(Path(__file__).parent))  # listeners.py


@pytest.fixture(scope="module")
def routed(tiny_llama: Any, tiny_tokenizer: Any) -> RoutedModel:
    return RoutedModel(tiny_llama(max_position_embeddings=1024), tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def facts() -> Task:
    return get_task("builtin_facts")
