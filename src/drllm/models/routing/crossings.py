"""What runs in place of the layers that a path leaves out between two of its layers.

Axes: D hidden.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Crossings(Protocol):
    """Changes the state that crosses a gap: the layers that a path leaves out between two others.

    Without crossings the state enters the next layer as it is. Whoever runs the layers calls
    `cross`, and doesn't know where the change comes from.
    """

    def cross(self, layer: int, next_layer: int, states: Tensor, is_first: Tensor) -> Tensor:
        """Return what enters the layer after a gap, `[..., D]`.

        Args:
            layer: The layer before the gap.
            next_layer: The layer after the gap; L if the last layers are left out, so that the
                final norm comes next.
            states: What `layer` returned, `[..., D]`. The result has the same dtype and device.
            is_first: Whether a token is the first real token of its text, bool `[...]`.
        """
