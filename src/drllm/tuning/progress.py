"""How far a tuning is: the line that each level gets while it runs. Loads no torch."""

from collections.abc import Sequence

from drllm.statistics.verdicts import signed

AXIS_FROM, AXIS_STEP, AXIS_WIDTH = -0.4, 0.02, 31
AXIS = f"−0.4{'0':>17}{'+0.2':>10}"
"""The numbers at the axis of a drawn interval, whose columns stand for `AXIS_STEP` each."""


def drawn(mean: float, low: float, high: float) -> str:
    """Draw a mean and its interval in columns of a fixed axis; what lies outside is an arrow."""
    marks = [round((value - AXIS_FROM) / AXIS_STEP) for value in (0.0, low, mean, high)]
    zero, first, middle, last = (min(max(mark, 0), AXIS_WIDTH - 1) for mark in marks)
    cells = [" "] * first + ["─"] * (last - first + 1) + [" "] * (AXIS_WIDTH - 1 - last)
    for mark, place in zip("│├┤●", (zero, first, last, middle), strict=True):
        cells[place] = mark
    cells[0] = "<" if marks[1] < 0 else cells[0]
    cells[-1] = ">" if marks[3] >= AXIS_WIDTH else cells[-1]
    return "".join(cells).rstrip()


HEAD = f"{'layers saved, change on select (95 %)':<46}  {AXIS}"
"""What stands above the lines."""


def told(saved: float, change: tuple[float, float, float]) -> str:
    """Say what the best path of a level saves, and its change on `select`."""
    mean, low, high = (signed(value, 3) for value in change)
    return f"{saved:.3g} saved".replace("-", "−") + f"  {mean} nats ({low} to {high})"


def line(saved: float, change: tuple[float, float, float]) -> str:
    """Return the same with the interval drawn on the axis of `HEAD`."""
    return f"{told(saved, change):<46}  {drawn(*change)}"


def num_pairs(num_paths: int, rungs: Sequence[tuple[int, int]]) -> int:
    """Return how many questions times paths a level scores, given `parts.rungs`.

    Example:
        >>> num_pairs(28, [(38, 12), (100, 6), (300, 3)])  # 28 * 38 + 12 * 62 + 6 * 200
        3008
    """
    pairs = asked = 0
    for num_questions, kept in rungs:
        pairs += num_paths * (num_questions - asked)
        num_paths, asked = min(num_paths, kept), num_questions
    return pairs
