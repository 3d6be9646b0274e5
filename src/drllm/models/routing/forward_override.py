"""Replaces the forward of a module, and finds the overrides that lie over one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ForwardOverride:
    """Replaces the forward of one module.

    An override is a plain object, so that a model with it can be copied and pickled.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        # The override that was on the module before ours, if there was one.
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")

    def original(self) -> Callable[..., Any]:
        """Return the forward that the override replaced. It is looked up at each call."""
        if self.previous is not None:
            return self.previous
        forward: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward. Subclasses override this."""
        return self.original()(*args, **kwargs)

    @property
    def is_on_top(self) -> bool:
        """Whether this is the outermost override of the module."""
        return getattr(self.module.__dict__.get("forward"), "__self__", None) is self

    def put_on(self) -> None:
        """Put the override on the module. This also works after `take_off`."""
        self.module.forward = self.forward

    def take_off(self) -> None:
        """Take the override off, if no other override lies over it."""
        if self.is_on_top and self.previous is None:
            del self.module.forward
        elif self.is_on_top:
            self.module.forward = self.previous


def find_overrides(layer: Any) -> list[Any]:
    """Return the objects whose methods wrap a layer's forward, the outermost first."""
    overrides = []
    forward = layer.forward
    while forward is not None:
        overrides.append(getattr(forward, "__self__", None))
        forward = getattr(forward, "__wrapped__", None)  # set by accelerate's hooks
    return overrides
