"""Formats the lines that a tuning prints, one for each level of the search.

A line says what the best path of the level saves, and how much it changes the objective on the part
`select` of the questions. A *change* is a mean difference from the full path in nats, with the low
and the high end of its 95 % interval.

At the end, a tuning that repairs paths prints a table of the best paths, plain and with their
refits (`compare_repairs`).
"""

from collections.abc import Sequence
from statistics import fmean

from drllm.records.static_paths import TEST, NamedPath, PathScore
from drllm.statistics.words import signed

AXIS_FROM = -0.4  # nats at the first column of the axis on which intervals are drawn
AXIS_STEP = 0.02  # nats for each column
AXIS_WIDTH = 31  # columns
AXIS = f"−0.4{'0':>17}{'+0.2':>10}"
"""The numbers above the axis: −0.4 at its first column, 0 and +0.2 above their columns."""
HEAD = f"{'layers saved, change on select (95 %)':<46}  {AXIS}"
"""The heading of the lines."""
REPAIRED_HEAD = f"{'layers saved, change with the stand-in (95 %)':<46}  {AXIS}"
"""The heading of the lines of a tuning that repairs paths."""


def format_level(saved: float, change: tuple[float, float, float]) -> str:
    """Return the line of a level: its description, then its interval on the axis of `HEAD`."""
    return f"{describe_level(saved, change):<46}  {draw_interval(*change)}"


def describe_level(saved: float, change: tuple[float, float, float]) -> str:
    """Describe the best path of a level: how many layers it saves, and its change."""
    mean, low, high = (signed(value, 3) for value in change)
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


def compare_repairs(paths: Sequence[NamedPath]) -> list[str]:
    """Return a table of paths on the part `test`: plain, and with the refit after an arrow.

    Values are means over the tasks. A value that wasn't measured is a dash.

    Args:
        paths: The paths, the full one first.
    """
    lines = [
        f"{'on test, plain → refit':<24}{'change, nats':>18}{'loss of texts':>16}"
        f"{'accuracy, %':>16}"
    ]
    for path in paths:
        plain = _list_test_scores(path.measured)
        repaired = _list_test_scores(path.repaired)
        cells = [f"{path.name:<24}"]
        for write_mean, width in ((_mean_change, 18), (_mean_loss, 16), (_mean_accuracy, 16)):
            cell = write_mean(plain)
            if path is not paths[0]:
                cell += f" → {write_mean(repaired)}"
            cells.append(f"{cell:>{width}}")
        lines.append("".join(cells).rstrip())
    return lines


def _list_test_scores(scores: Sequence[PathScore]) -> list[PathScore]:
    """Return the scores on the part `test`, one for each task."""
    return [score for score in scores if score.part == TEST]


def _mean_change(scores: Sequence[PathScore]) -> str:
    """Write the mean change of the objective from the full path."""
    changes = [score.change[0] for score in scores if score.change is not None]
    return signed(fmean(changes), 3) if changes else "–"


def _mean_loss(scores: Sequence[PathScore]) -> str:
    """Write the mean next-token loss of the texts of questions with their right answers."""
    losses = [score.text_loss for score in scores if score.text_loss is not None]
    return f"{fmean(losses):.3f}" if losses else "–"


def _mean_accuracy(scores: Sequence[PathScore]) -> str:
    """Write the mean accuracy."""
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    return f"{100 * fmean(accuracies):.1f}" if accuracies else "–"
