"""The words and units of what is compared, and how a change is written."""

from typing import Literal, NamedTuple, TypeAlias

Quantity: TypeAlias = Literal["accuracy", "gold_logprob", "text_loss", "label_accuracy"]


def signed(value: float, digits: int) -> str:
    """Write a change with its sign (the minus is U+2212); a change that rounds to 0 has no sign."""
    text = f"{value:+.{digits}f}"
    is_zero = not text.strip("+-0.")
    if is_zero:
        return text[1:]
    return text.replace("-", "−")


def capitalize(text: str) -> str:
    """Write the first letter of a text in upper case, as at the start of a sentence."""
    return text[0].upper() + text[1:]


class QuantityWords(NamedTuple):
    """How a quantity is written, and which difference matters.

    Attributes:
        title: The quantity's name at the start of a sentence.
        unit: The unit of a difference.
        scale: The factor from a value to this unit.
        digits: Digits after the decimal point.
        samples: The word for the samples that the quantity is measured on.
        loss: The word for a change for the worse.
        a_loss: The same word with its article.
        relevant: The smallest difference that matters, unscaled. A comparison should be able to
            show it.
    """

    title: str
    unit: str
    scale: float
    digits: int
    samples: str
    loss: str
    a_loss: str
    relevant: float


_ACCURACY = QuantityWords(
    title="Accuracy",
    unit="points",
    scale=100,
    digits=1,
    samples="questions",
    loss="loss",
    a_loss="a loss",
    relevant=0.05,
)
WORDS: dict[Quantity, QuantityWords] = {
    "accuracy": _ACCURACY,
    "label_accuracy": _ACCURACY._replace(samples="held-out targets"),
    "gold_logprob": QuantityWords(
        title="Log-probability of the gold answers",
        unit="nats a question",
        scale=1,
        digits=3,
        samples="questions",
        loss="loss",
        a_loss="a loss",
        relevant=0.1,
    ),
    "text_loss": QuantityWords(
        title="Next-token loss",
        unit="nats a token",
        scale=1,
        digits=3,
        samples="texts",
        loss="increase",
        a_loss="an increase",
        relevant=0.05,
    ),
}
