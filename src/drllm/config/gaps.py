"""Settings of `drllm gaps`, which chooses the layers that a model can do without."""

import math
from dataclasses import dataclass

from drllm.config.fields import basic, setting
from drllm.config.questions import QuestionsConfig
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GapsConfig(QuestionsConfig):
    """Which layers to leave out."""

    layers: str | None = basic(
        None,
        placeholder="N,...",
        help="numbers of layers to keep, such as 20,15; default: five sixths, two thirds and half",
    )
    refit_tokens: int = setting(
        10_000,
        minimum=2,
        placeholder="TOKENS",
        help="maximum tokens that sets of layers are compared with",
    )

    def list_numbers(self, num_layers: int) -> list[int]:
        """Return how many layers to leave out of `num_layers`; empty for the default.

        Raises:
            ConfigError: A number isn't one of layers to keep.
        """
        numbers = []
        for word in (self.layers or "").split(","):
            if not word.strip():
                continue
            fewest = count_fewest_layers(num_layers)
            if not word.strip().isdecimal() or not fewest <= int(word) < num_layers:
                raise ConfigError(
                    f"--layers is {self.layers!r}; give numbers of layers to keep, from {fewest} "
                    f"to {num_layers - 1}, such as {math.ceil(num_layers / 2)}"
                )
            numbers.append(num_layers - int(word))
        return numbers


def count_fewest_layers(num_layers: int) -> int:
    """Return how many layers a shortened model keeps at least.

    The first and the last layer stay. A gap has at most half of the layers, and a layer stays
    between two gaps.
    """
    longest_gap = math.ceil(num_layers / 2)
    if num_layers - 2 <= longest_gap:
        return 2
    return 3
