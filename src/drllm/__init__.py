"""Layer routing for frozen Hugging Face language models: skip, execute or repeat each layer.

Public names are resolved on use, so that `import drllm` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drllm.models.grouping import generate_many as generate_many
    from drllm.models.routed import RoutedModel as RoutedModel
    from drllm.paths import to_decisions as to_decisions
    from drllm.paths import to_path as to_path
    from drllm.search.runner import search_path as search_path

_PUBLIC = {
    "RoutedModel": "drllm.models.routed",
    "generate_many": "drllm.models.grouping",
    "search_path": "drllm.search.runner",
    "to_decisions": "drllm.paths",
    "to_path": "drllm.paths",
}

__all__ = ["RoutedModel", "generate_many", "search_path", "to_decisions", "to_path"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'drllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
