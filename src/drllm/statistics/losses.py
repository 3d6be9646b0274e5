"""Says what a path loses, in one short sentence, and whether it is shown to lose too much."""

from collections.abc import Iterator
from typing import NamedTuple

from drllm.config.constants import MAX_DROP, MAX_LOSS_INCREASE
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.power import FEWEST_DIFFERENT, questions_to_exclude, round_up
from drllm.statistics.words import signed


class LossIncrease(NamedTuple):
    """How much a loss rises on questions whose answers aren't graded, with its 95 % interval.

    A loss that falls has a negative increase.
    """

    mean: float
    low: float
    high: float
    num_questions: int

    @property
    def is_shown(self) -> bool:
        """Whether the loss is shown to rise or to fall."""
        excludes_zero = self.low > 0 or self.high < 0
        return excludes_zero and self.num_questions >= FEWEST_DIFFERENT

    def exceeds(self, limit: float) -> bool:
        """Tell whether the loss is shown to rise by more than a limit."""
        return self.is_shown and self.low > limit


def describe_loss(name: str, differences: Differences) -> str:
    """Say in one sentence, without its full stop, what becomes of answers and of text.

    A loss of `MAX_DROP` points is the one that matters. A path that is shown to lose, and may lose
    more than that, shouldn't be used. If no loss is shown, the questions are enough if they exclude
    such a loss. Otherwise the sentence says about how many would be.

    Args:
        name: The name of the path.
        differences: The path minus the full path, on questions that had no part in its choice.
    """
    sentence = _describe_answers(name, differences.accuracy)
    if differences.text_loss is None:
        return sentence
    return f"{sentence}; {_describe_text(differences.text_loss)}"


def _describe_answers(name: str, accuracy: Verdict) -> str:
    """Say what becomes of the answers."""
    if accuracy.shown == "guessing":
        return (
            f"{name} can't be judged: on {accuracy.n:,} questions the full path isn't shown to "
            f"answer better than by chance"
        )
    size = write_points(abs(accuracy.mean))
    largest_loss = max(0.0, -accuracy.interval[0])
    is_excluded = 100 * largest_loss < MAX_DROP
    bound = write_points(largest_loss)
    if accuracy.is_better:
        return f"{name} answers better, by {size} points"
    if accuracy.is_better is False and is_excluded:
        return f"{name} loses {size} points, at most {bound}"
    if accuracy.is_better is False:
        return f"{name} loses {size} points: don't use it"
    if is_excluded:
        return (
            f"{name} keeps its answers as far as {accuracy.n:,} questions can tell (a loss of more "
            f"than {bound} points is excluded)"
        )
    reason = f"{accuracy.n:,} test questions don't exclude a loss of {bound} points"
    return f"{name}: {reason}; {_describe_needed(accuracy)}"


def _describe_needed(accuracy: Verdict) -> str:
    """Say about how many questions would be enough to exclude a loss of `MAX_DROP`.

    If the measured loss is larger, no number would be. Then say how many would show that it is no
    chance.
    """
    loss = -accuracy.mean
    needed = questions_to_exclude(accuracy.n, loss, -accuracy.interval[0], MAX_DROP / 100)
    if needed is not None:
        return f"about {round_up(needed):,} would exclude one of {MAX_DROP:g}"
    chance = f"the measured loss of {write_points(loss)} points may be chance"
    if accuracy.needed is None:
        return chance
    return f"{chance}; about {round_up(accuracy.needed):,} questions would tell"


def _describe_text(text_loss: Verdict) -> str:
    """Say what becomes of the text."""
    size = f"{abs(text_loss.mean):.2g} nats a token"
    if text_loss.is_better is False:
        return f"its text gets worse by {size}"
    if text_loss.is_better:
        return f"its text gets better by {size}"
    if text_loss.excluded_loss is None:
        return f"{text_loss.n:,} texts are too few to judge its text"
    if text_loss.excluded_loss == 0:
        return "its text gets no worse"
    return f"its text gets worse by at most {text_loss.excluded_loss:.2g} nats a token"


def describe_increase(loss: str, unit: str, increase: LossIncrease) -> str:
    """Say in a part of a sentence whether a loss rises or falls, and by how much.

    Args:
        loss: What the loss is called, such as "its loss".
        unit: Its unit, such as "nats a token".
        increase: How much it rises.
    """
    mean, low, high, num_questions = increase
    questions = f"{num_questions:,} test questions"
    if not increase.is_shown:
        interval = f"{signed(low, 2)} to {signed(high, 2)} {unit}"
        return f"{questions} can't tell whether {loss} rises or falls ({interval})"
    if mean < 0:
        interval = f"{-high:.2f} to {-low:.2f}"
        return f"{loss} falls by {-mean:.2f} {unit} ({interval}) on {questions}"
    sentence = f"{loss} rises by {mean:.2f} {unit} ({low:.2f} to {high:.2f}) on {questions}"
    if increase.exceeds(MAX_LOSS_INCREASE):
        sentence += ": don't use it"
    return sentence


def list_excessive_losses(
    differences: Differences, max_drop: float, max_loss_increase: float
) -> Iterator[str]:
    """Yield which losses are shown to be larger than the bounds, with their intervals.

    Such a loss is shown by its test, and its whole 95 % interval is beyond the bound.

    Args:
        differences: The path minus the full path.
        max_drop: The largest allowed loss of accuracy, in points.
        max_loss_increase: The largest allowed increase of the next-token loss, in nats a token.
    """
    accuracy = differences.accuracy
    low, high = accuracy.interval
    if accuracy.is_better is False and 100 * high < -max_drop:
        interval = f"{write_points(-high)} to {write_points(-low)}"
        yield (
            f"{write_points(-accuracy.mean)} points of accuracy (95 %: {interval}; {max_drop:g} "
            f"are allowed)"
        )
    text_loss = differences.text_loss
    if text_loss is None:
        return
    low, high = text_loss.interval
    if text_loss.is_better is False and low > max_loss_increase:
        yield (
            f"{text_loss.mean:.3g} nats a token of text (95 %: {low:.3g} to {high:.3g}; "
            f"{max_loss_increase:g} are allowed)"
        )


def write_points(share: float) -> str:
    """Write a loss of accuracy in points, from 10 on without a decimal.

    Example:
        >>> write_points(0.021), write_points(0.333)
        ('2.1', '33')
    """
    points = 100 * share
    if points < 9.95:  # 9.95 would be written as 10.0
        return f"{points:.1f}"
    return f"{points:.0f}"
