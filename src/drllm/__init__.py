"""Layer routing for frozen Hugging Face language models: skip, execute or repeat each layer.

The public names are listed in `__init__.pyi`. A name is imported when it is first used, so that
`import drllm` doesn't load torch.
"""

import importlib
import pkgutil
import re
from typing import Any

_STUB = (pkgutil.get_data(__name__, "__init__.pyi") or b"").decode()
# The stub has a line `from MODULE import NAME as NAME` for each public name.
_PUBLIC = {name: module for module, name in re.findall(r"(?m)^from (\S+) import (\w+) as", _STUB)}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes as long as the rest of `import drllm`

        return version("drllm")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'drllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
