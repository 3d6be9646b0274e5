"""Layer routing for frozen Hugging Face language models: skip, execute or repeat each layer.

Public names are resolved on use, so that `import drllm` loads no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drllm.evaluation.run import evaluate as evaluate
    from drllm.models.routing.batch_generation import generate_many as generate_many
    from drllm.models.routing.routed_model import RoutedModel as RoutedModel
    from drllm.paths import to_decisions as to_decisions
    from drllm.paths import to_path as to_path
    from drllm.reporting.stage import report as report
    from drllm.search.run import search_paths as search_paths
    from drllm.supervision.select import supervise as supervise
    from drllm.training.stage import train as train

    __version__: str

_PUBLIC = {
    "RoutedModel": "drllm.models.routing.routed_model",
    "evaluate": "drllm.evaluation.run",
    "generate_many": "drllm.models.routing.batch_generation",
    "report": "drllm.reporting.stage",
    "search_paths": "drllm.search.run",
    "supervise": "drllm.supervision.select",
    "to_decisions": "drllm.paths",
    "to_path": "drllm.paths",
    "train": "drllm.training.stage",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("drllm")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'drllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
