"""Settings of `drllm shrink`, which writes a smaller checkpoint and says what it loses."""

from dataclasses import dataclass, fields

from drllm.config.constants import MAX_DROP
from drllm.config.fields import basic, to_flag
from drllm.config.gaps import count_fewest_layers
from drllm.config.questions import QuestionsConfig
from drllm.errors import ConfigError

LIMITS = ("max_drop", "max_loss_increase")
"""The settings that say what may be lost."""


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig(QuestionsConfig):
    """A smaller checkpoint: what it may lose, and how long finding it may take."""

    max_drop: float = basic(
        MAX_DROP,
        above=0.0,
        maximum=100.0,
        placeholder="POINTS",
        alias="epsilon",
        help="largest allowed loss of accuracy, in points; a test on held-out questions must "
        "exclude a larger loss",
    )
    max_loss_increase: float = basic(
        0.05,
        above=0.0,
        placeholder="NATS",
        help="largest allowed increase of the next-token loss, in nats a token; a test on held-out "
        "texts must exclude a larger increase",
    )
    minutes: float = basic(
        30.0,
        above=0.0,
        placeholder="MINUTES",
        help="minutes to choose layers, to refit and to learn; measuring comes after that",
    )
    save: str | None = basic(
        None,
        placeholder="PERCENT",
        help="share of the layers to leave out, such as 15%, however much is lost",
    )
    layers: int | None = basic(
        None,
        minimum=1,
        help="number of layers to keep, however much is lost",
    )
    compare_trained: bool = basic(
        False,
        help="train the full model alike too, and compare: it takes as long as a candidate",
    )

    @property
    def has_given_size(self) -> bool:
        """Whether the number of layers is given, and not decided by what is lost."""
        return self.layers is not None or self.save is not None

    def check(self) -> None:
        """Refuse two numbers of layers, a wrong percentage, and limits without effect."""
        if self.save is not None and self.layers is not None:
            raise ConfigError(
                f"--save {self.save} and --layers {self.layers} both say how many layers stay; "
                f"give one of them"
            )
        if self.save is not None:
            self._read_share(self.save)
            self._refuse_limits(f"--save {self.save}")
        if self.layers is not None:
            self._refuse_limits(f"--layers {self.layers}")

    def _refuse_limits(self, request: str) -> None:
        """Refuse limits of the loss, which isn't tested if the number of layers is given."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in LIMITS and value != field.default:
                flag = to_flag(field.name)
                raise ConfigError(
                    f"{flag} {value:g} has no effect with {request}, which writes the checkpoint "
                    f"however much is lost; leave {flag} out, or that"
                )

    def choose_num_skipped(self, num_layers: int) -> int | None:
        """Return how many layers to leave out of `num_layers`; None if the losses decide.

        Raises:
            ConfigError: No layer would be left out, or none would stay.
        """
        if self.layers is not None:
            num_skipped = num_layers - self.layers
            request = f"--layers {self.layers}"
        elif self.save is not None:
            num_skipped = round(num_layers * self._read_share(self.save))
            request = f"--save {self.save}"
        else:
            return None
        num_kept = num_layers - num_skipped
        fewest = count_fewest_layers(num_layers)
        if not fewest <= num_kept < num_layers:
            raise ConfigError(
                f"{request} keeps {num_kept} layers of a model of {num_layers}; keep {fewest} to "
                f"{num_layers - 1}"
            )
        return num_skipped

    @staticmethod
    def _read_share(text: str) -> float:
        """Read a percentage such as `15%`."""
        number = text.strip().removesuffix("%")
        try:
            share = float(number) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ConfigError(
                f"--save is {text!r}; give a percentage of the layers between 0 and 100, such as "
                f"15%"
            )
        return share
