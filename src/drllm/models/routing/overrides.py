"""A forward in the place of a module's own: a layer's, a sublayer's or any other's."""

from collections.abc import Callable
from typing import Any

from torch import nn


class ForwardOverride:
    """Replaces the forward of one module; a plain object, so that models copy and pickle."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        # The override that was on the module before ours, if there was one.
        self.previous: Callable[..., Any] | None = module.__dict__.get("forward")

    def original(self) -> Callable[..., Any]:
        """Return the forward that the override replaced, looked up anew at each call."""
        if self.previous is not None:
            return self.previous
        forward: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the module does; a subclass does something else."""
        return self.original()(*args, **kwargs)

    @property
    def is_on_top(self) -> bool:
        """Whether nobody has put anything over our override, or taken it off."""
        return getattr(self.module.__dict__.get("forward"), "__self__", None) is self

    def put_on(self) -> None:
        """Put the override on; after `take_off`, on again."""
        self.module.forward = self.forward

    def take_off(self) -> None:
        """Give the module back what it had, where the override is on top."""
        if self.is_on_top and self.previous is None:
            del self.module.forward
        elif self.is_on_top:
            self.module.forward = self.previous
