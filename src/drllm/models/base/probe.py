"""One token through a model, before anything is put on it: can its loop be routed at all?

Owns what no configuration says reliably: that the loop calls each layer once, that a layer hands
on its hidden state and nothing else, and that all a layer remembers is K/V. Return annotations
lie, and a state may lie in the modules themselves, so the model is tried instead of read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from drllm.errors import ArchitectureError
from drllm.models.base.layers import base_of
from drllm.models.routing.kv_cache import is_kv


def probe(model: Any, decoder: nn.Module, layers: nn.ModuleList) -> bool:
    """Run one token with the model's own cache, and tell whether its layers return tuples.

    Args:
        model: A model of transformers that isn't routed yet, or a PEFT model around one.
        decoder: The module whose loop runs the layers.
        layers: Its layers.

    Returns:
        Whether the loop takes a layer's output out of a tuple.

    Raises:
        ArchitectureError: The loop doesn't call each layer once, uses more of a layer's output
            than its hidden state, or the layers remember anything but K/V.

    Source: ours.
    """
    name = type(base_of(model)).__name__
    device = base_of(model).device
    if device.type == "meta":  # offloaded: accelerate's hooks move the input where it belongs
        device = torch.device("cpu")
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    outputs: list[Any] = []

    def run(hook: Callable[[nn.Module, Any, Any], Any]) -> Any:
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            with torch.no_grad(), _evaluating(decoder):
                return decoder(input_ids=token, use_cache=True)
        finally:
            for handle in handles:
                handle.remove()

    result = run(lambda _layer, _inputs, output: outputs.append(output))
    if len(outputs) != len(layers):
        raise ArchitectureError(
            f"{name} called {len(outputs)} of its {len(layers)} layers in a forward pass; "
            f"its loop can't be routed"
        )
    _check_state(name, result, len(layers))
    if not isinstance(outputs[0], tuple):
        return False
    try:
        alone = run(lambda _layer, _inputs, output: output[:1])
    except (IndexError, TypeError, ValueError):  # the loop unpacks more
        alone = None
    if alone is None or not torch.equal(_hidden(alone), _hidden(result)):
        raise ArchitectureError(
            f"the layers of {name} hand on more than a hidden state; what a skipped layer should "
            f"hand on isn't known, so it can't be routed"
        )
    return True


def _check_state(name: str, output: Any, num_layers: int) -> None:
    """Refuse a model whose layers remember a token in anything but one K/V entry each."""
    cache = next((value for value in output.values() if isinstance(value, Cache)), None)
    entries = getattr(cache, "layers", [])
    foreign = sorted({type(entry).__name__ for entry in entries if not is_kv(entry)})
    if cache is None:
        reason = "no K/V cache comes back from a forward pass"
    elif foreign:
        reason = f"its cache holds {', '.join(foreign)}"
    elif len(entries) != num_layers:
        reason = f"its cache has {len(entries)} entries for {num_layers} layers"
    elif any(int(entry.get_seq_length()) != 1 for entry in entries):
        reason = "some of its layers store nothing of a token"
    else:
        return
    raise ArchitectureError(
        f"{name} keeps state other than K/V in its layers ({reason}); it can't be routed"
    )


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0]
    return hidden


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and checkpointing off inside the block, each submodule restored after."""
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.training = False
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
