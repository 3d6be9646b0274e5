"""Settings of `drllm gaps`, which chooses the layers that a model can do without."""

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
            if not word.strip().isdecimal() or not 0 < int(word) < num_layers:
                raise ConfigError(
                    f"--layers is {self.layers!r}; give numbers of layers to keep, from 1 to "
                    f"{num_layers - 1}, such as {num_layers // 2}"
                )
            numbers.append(num_layers - int(word))
        return numbers
