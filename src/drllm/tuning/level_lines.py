"""Formats the lines that a tuning prints: what the best path of a level saves and loses."""

from drllm.statistics.verdicts import signed

AXIS_FROM, AXIS_STEP, AXIS_WIDTH = -0.4, 0.02, 31
AXIS = f"−0.4{'0':>17}{'+0.2':>10}"
"""The numbers above the axis of a drawn interval. One column of the axis is `AXIS_STEP` nats."""
HEAD = f"{'layers saved, change on select (95 %)':<46}  {AXIS}"
"""The heading of the lines."""


def level_line(saved: float, change: tuple[float, float, float]) -> str:
    """Return the line of a level: a description, then the interval on the axis of `HEAD`."""
    return f"{describe_level(saved, change):<46}  {draw_interval(*change)}"


def describe_level(saved: float, change: tuple[float, float, float]) -> str:
    """Describe what the best path of a level saves, and its change on `select`."""
    mean, low, high = (signed(value, 3) for value in change)
    saving = f"{saved:.3g} saved".replace("-", "−")
    return f"{saving}  {mean} nats ({low} to {high})"


def draw_interval(mean: float, low: float, high: float) -> str:
    """Draw a mean and its interval on a fixed axis; an end outside of it is an arrow."""
    first = _column(low)
    last = _column(high)
    cells = [" "] * AXIS_WIDTH
    for column in range(_within(first), _within(last) + 1):
        cells[column] = "─"
    cells[_column(0.0)] = "│"
    cells[_within(first)] = "├"
    cells[_within(last)] = "┤"
    cells[_within(_column(mean))] = "●"
    if first < 0:
        cells[0] = "<"
    if last >= AXIS_WIDTH:
        cells[-1] = ">"
    return "".join(cells).rstrip()


def _column(value: float) -> int:
    """Return the column of a value; it may be outside of the axis."""
    return round((value - AXIS_FROM) / AXIS_STEP)


def _within(column: int) -> int:
    """Return the nearest column of the axis."""
    return min(max(column, 0), AXIS_WIDTH - 1)
