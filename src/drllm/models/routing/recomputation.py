"""Lets a checkpointed layer, which a backward pass computes again, find its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drllm.models.routing.context import ThreadValue


@dataclass(frozen=True)
class RoutedRecomputation:
    """Wraps a layer's checkpointing function, so that a recomputed layer finds its pass again.

    A backward pass calls a checkpointed layer again. By then the forward pass is over, and the
    thread may be another. Up to transformers 5.22 the call goes through the layer's override, which
    needs the pass. In later versions the call doesn't reach the override, and this class changes
    nothing.
    """

    checkpoint: Callable[..., Any]
    current: ThreadValue[Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the checkpoint, now and when it is recomputed."""
        forward = self.current.get()

        def run_in_pass(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if forward is None or self.current.get() is forward:  # this isn't a recomputation
                return function(*inner_args, **inner_kwargs)
            self.current.begin(forward)
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                self.current.end()

        return self.checkpoint(run_in_pass, *args, **kwargs)
