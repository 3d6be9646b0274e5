"""Formats the lines that a tuning prints, one for each level of the search.

A line says what the best path of the level saves, and its gain on the part `select` of the
questions: by how much its objective is better than the full path's, in nats, with the low and the
high end of its 95 % interval. A path that loses has a negative gain.
"""

from drllm.statistics.words import signed

AXIS_FROM = -0.4  # nats at the first column of the axis on which intervals are drawn
AXIS_STEP = 0.02  # nats for each column
AXIS_WIDTH = 31  # columns
AXIS = f"−0.4{'0':>17}{'+0.2':>10}"
"""The numbers above the axis: −0.4 at its first column, 0 and +0.2 above their columns."""
HEAD = f"{'layers saved, gain on select (95 %)':<46}  {AXIS}"
"""The heading of the lines."""
REPAIRED_HEAD = f"{'layers saved, refitted, gain on select':<46}  {AXIS}"
"""The heading of the lines of a tuning that repairs paths."""


def format_level(saved: float, gain: tuple[float, float, float]) -> str:
    """Return the line of a level: its description, then its interval on the axis of `HEAD`."""
    return f"{describe_level(saved, gain):<46}  {draw_interval(*gain)}"


def describe_level(saved: float, gain: tuple[float, float, float]) -> str:
    """Describe the best path of a level: how many layers it saves, and its gain."""
    mean, low, high = (signed(value, 3) for value in gain)
    saving = f"{saved:.3g} saved".replace("-", "−")
    return f"{saving}  {mean} nats ({low} to {high})"


def draw_interval(mean: float, low: float, high: float) -> str:
    """Draw a mean and its interval on the axis. An end outside of the axis is drawn as an arrow."""
    first = _find_column(low)
    last = _find_column(high)
    cells = [" "] * AXIS_WIDTH
    for column in range(_clip_column(first), _clip_column(last) + 1):
        cells[column] = "─"
    cells[_find_column(0.0)] = "│"
    cells[_clip_column(first)] = "├"
    cells[_clip_column(last)] = "┤"
    cells[_clip_column(_find_column(mean))] = "●"
    if first < 0:
        cells[0] = "<"
    if last >= AXIS_WIDTH:
        cells[-1] = ">"
    return "".join(cells).rstrip()


def _find_column(value: float) -> int:
    """Return the column of a value. It may be outside of the axis."""
    return round((value - AXIS_FROM) / AXIS_STEP)


def _clip_column(column: int) -> int:
    """Return the nearest column of the axis."""
    return min(max(column, 0), AXIS_WIDTH - 1)
