"""Settings of `drllm export`, which writes a static path as an ordinary checkpoint."""

from dataclasses import dataclass

from drllm.config.constants import MAX_DROP, MAX_LOSS_INCREASE
from drllm.config.fields import Settings, basic


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Which measured losses of a path are too large to export it without `--force`."""

    max_drop: float = basic(
        MAX_DROP,
        above=0.0,
        maximum=100.0,
        placeholder="POINTS",
        alias="epsilon",
        help="refuse a path whose test scores show, with 95 % confidence, a larger loss of "
        "accuracy, in points; --force exports it",
    )
    max_loss_increase: float = basic(
        MAX_LOSS_INCREASE,
        above=0.0,
        placeholder="NATS",
        help="refuse a path whose test scores show, with 95 % confidence, a larger increase of the "
        "next-token loss, in nats a token; at 1 nat, each token is 2.7 times less likely on "
        "average, and without a tenth of the layers paths lose less than that",
    )
