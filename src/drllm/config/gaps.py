"""Settings of `drllm gaps`, which chooses the layers that a model can do without."""

from dataclasses import dataclass

from drllm.config.constants import DATA_DIR_HELP, TASKS_HELP, TEXT_HELP, TRUST_HELP
from drllm.config.fields import Settings, basic, incidental, setting
from drllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GapsConfig(Settings):
    """Which layers to leave out."""

    tasks: str | None = basic(None, placeholder="TASKS", alias="dataset", help=TASKS_HELP)
    text: str | None = incidental(None, basic=True, placeholder="FILE,...", help=TEXT_HELP)
    data_dir: str | None = incidental(None, help=DATA_DIR_HELP)
    trust_task_code: bool = incidental(False, help=TRUST_HELP)
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
    max_tokens: int = setting(
        512, minimum=2, placeholder="TOKENS", help="maximum tokens of a question or text"
    )
    seed: int = setting(0, minimum=0, help="seed of all draws")

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
