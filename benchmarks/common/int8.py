"""Models with int8 weights by torchao."""

from __future__ import annotations

from importlib.util import find_spec

from drllm.model.load import BaseModel, load

LABEL = "int8 weights (torchao)"


def is_available() -> bool:
    """Tell whether torchao is installed."""
    return find_spec("torchao") is not None


def load_int8(name: str) -> BaseModel:
    """Load a model whose linear maps have int8 weights, on the CPU."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    return load(name, device="cpu", dtype="float32", quantization_config=config)
