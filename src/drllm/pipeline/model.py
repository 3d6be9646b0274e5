"""Loads the base model for a block of code, at once or when it is needed first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from drllm.config import ModelConfig
from drllm.work.listener import Listener

if TYPE_CHECKING:
    from drllm.model.load import BaseModel


@contextmanager
def open_model(config: ModelConfig, listener: Listener) -> Iterator[BaseModel]:
    """Load the base model for the block, and keep transformers quiet until the block ends."""
    with listener.busy(f"loading {config.model}"):
        from drllm.models.routed_model import unrouted  # this import takes seconds
    with unrouted(config, listener=listener) as base:
        yield base


@contextmanager
def open_model_lazily(config: ModelConfig, listener: Listener) -> Iterator[Callable[[], BaseModel]]:
    """Yield a function that returns the base model. Only its first call loads the model."""
    with ExitStack() as stack:  # at the end it closes the model, if the model was loaded
        yield functools.cache(lambda: stack.enter_context(open_model(config, listener)))
