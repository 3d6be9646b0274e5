"""Choose who runs the blocks of a stage: this process, or workers of Ray that load the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from drllm.config import ExecutorConfig, ModelConfig
from drllm.errors import ConfigError
from drllm.model.batching import share_memory
from drllm.model.hub import quiet
from drllm.model.load import BaseModel, load_without_weights
from drllm.models.routed_model import RoutedModel, load_with_bypass, unrouted
from drllm.models.routing.bypass_file import load_bypass
from drllm.work.listener import Listener
from drllm.work.local import LocalExecutor
from drllm.work.ray import RayExecutor, WorkerPlan
from drllm.work.run import Executor


@dataclass(frozen=True)
class RoutedModelLoader:
    """Loads a base model in a worker, and attaches an empty routing to it."""

    config: ModelConfig

    def __call__(
        self, plan: WorkerPlan
    ) -> tuple[RoutedModel, Mapping[str, Any], Mapping[str, Any]]:
        """Return the routed model, the base model's identity, and how it runs."""
        torch.set_num_threads(plan.num_threads)
        share_memory(plan.num_sharing)
        with quiet():
            base = load_with_bypass(dataclasses.replace(self.config, device=plan.device))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer, bypass=base.bypass)
        return routed, base.identity, base.runtime


@dataclass(frozen=True)
class Workers:
    """A model and who runs it.

    Attributes:
        base: The base model. With Ray its weights are in the workers alone; here are its config,
            its tokenizer and its layers without weights.
        routed: The base model as a `RoutedModel` without routers. In this process it is the model
            that functions get in `prepare`.
        executor: Runs blocks. Functions get a `RoutedModel` without routers in `prepare`.
    """

    base: BaseModel
    routed: RoutedModel
    executor: Executor


@contextmanager
def open_workers(
    model: Any, tokenizer: Any, config: ExecutorConfig, listener: Listener
) -> Iterator[Workers]:
    """Load a model in this process or in the workers of Ray, and take it down afterwards.

    Args:
        model: A name or a `ModelConfig`; without Ray also what `load` returns, a `RoutedModel`, or
            a causal language model of transformers.
        tokenizer: The model's tokenizer; None takes the one that the model comes with, or loads it
            by the model's name.
        config: Which executor.
        listener: Receives progress and notes.

    Raises:
        ConfigError: Ray is to run a model that isn't named, or its workers can't be started.
        ModelError: The model can't be loaded.
    """
    if config.executor == "ray":
        with _open_ray(model, config, listener) as workers:
            yield workers
        return
    with unrouted(model, tokenizer, listener) as base:
        routed = RoutedModel(base.model, tokenizer=base.tokenizer, bypass=base.bypass)
        try:
            yield Workers(base, routed, LocalExecutor(routed, base.identity, base.runtime))
        finally:
            routed.detach()


@contextmanager
def _open_ray(model: Any, config: ExecutorConfig, listener: Listener) -> Iterator[Workers]:
    if isinstance(model, str):
        model = ModelConfig(model=model)
    if not isinstance(model, ModelConfig):
        raise ConfigError(
            "--executor ray loads the model in each worker, so it takes a model's name or folder, "
            f"not a {type(model).__name__}; give the name, or a ModelConfig"
        )
    with listener.busy("starting Ray"):
        executor = RayExecutor(
            RoutedModelLoader(model),
            device=model.device,
            num_workers=config.num_workers,
            address=config.ray_address,
        )
    with executor:
        base = load_without_weights(model, executor.identity, executor.runtime)
        if model.bypass is not None:
            # Without the identity of its model, which the workers have compared: there are no
            # weights here.
            bypass = dataclasses.replace(load_bypass(model.bypass), model={})
            base = dataclasses.replace(base, bypass=bypass)
        routed = RoutedModel(base.model, tokenizer=base.tokenizer, bypass=base.bypass)
        yield Workers(base, routed, executor)
