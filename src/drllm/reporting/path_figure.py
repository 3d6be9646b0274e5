"""The drawing of what static paths keep: the accuracy and the next-token loss of each.

The style of the drawing is in `drawing`. Axes of numbers: percent, and nats a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drllm.records.results import BASE, Evaluation, System
from drllm.reporting.drawing import Colours, make_panels
from drllm.reporting.numbers import write_executions, write_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.42  # inches; height of a system's row
MARGIN = 0.75  # inches; height of a panel's axis and title
ROOM = 0.25  # room for a number right of the last interval, as a share of the range


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number of a system with its 95 % interval, as it is drawn.

    Attributes:
        value: The number.
        low: The lower end of the interval.
        high: The upper end of the interval.
        text: The number in words.
    """

    value: float
    low: float
    high: float
    text: str


def can_draw_paths(evaluation: Evaluation) -> bool:
    """Tell whether only static paths are compared with base, each with its next-token loss."""
    if not evaluation.paths or evaluation.routed is not None:
        return False
    return all(system.text_loss is not None for system in evaluation.systems)


def draw_paths(evaluation: Evaluation, colours: Colours, width: float) -> Figure:
    """Draw the accuracy and the next-token loss of base and every path, one row for each.

    In a narrow figure, the two panels are below each other.
    """
    systems = list(evaluation.systems)
    height = ROW * len(systems) + MARGIN
    if width > 5:
        figure, panels = make_panels(1, 2, width, height, sharey=True)
    else:
        figure, panels = make_panels(2, 1, width, 2 * height)
    accuracies = [_measure_accuracy(system) for system in systems]
    losses = [_measure_loss(system, evaluation.base) for system in systems]
    _draw_rows(panels[0], systems, accuracies, colours)
    _draw_rows(panels[1], systems, losses, colours)
    panels[0].set_title(f"{evaluation.score}, % (more is better)", loc="left")
    panels[1].set_title("next-token loss, nats a token (less is better)", loc="left")
    for axes in panels:
        axes.set_yticks(range(len(systems)), [_name_row(system) for system in systems])
        axes.set_ylim(len(systems) - 0.5, -0.5)  # base is at the top
    return figure


def _measure_accuracy(system: System) -> Measurement:
    """Return a system's accuracy in percent."""
    low, high = system.interval
    value = 100 * system.accuracy
    return Measurement(value, 100 * low, 100 * high, write_number(value))


def _measure_loss(system: System, base: System) -> Measurement:
    """Return a system's next-token loss; its interval is that of the difference from base."""
    assert system.text_loss is not None
    assert base.text_loss is not None
    low = system.text_loss
    high = system.text_loss
    if system.against_base is not None and system.against_base.text_loss is not None:
        low, high = (base.text_loss + end for end in system.against_base.text_loss.interval)
    return Measurement(system.text_loss, low, high, write_number(system.text_loss, 2))


def _name_row(system: System) -> str:
    """Name a system and the number of layers that it runs."""
    num_layers = write_executions(system.executions)
    if system.name == BASE:
        return f"{BASE}\nall {num_layers} layers"
    return f"{system.name}\n{num_layers} layers"


def _draw_rows(
    axes: Axes, systems: Sequence[System], measurements: Sequence[Measurement], colours: Colours
) -> None:
    """Draw a number of every system as a dot with its interval; a line marks base's number."""
    for row, (system, measured) in enumerate(zip(systems, measurements, strict=True)):
        colour = colours["s0"] if system.name == BASE else colours["s1"]
        axes.plot([measured.low, measured.high], [row, row], color=colour, linewidth=1.6)
        axes.plot(measured.value, row, "o", color=colour, markersize=6)
        axes.annotate(
            measured.text,
            (measured.high, row),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=colour,
        )
    axes.axvline(measurements[0].value, color=colours["s0"], linewidth=0.8, linestyle=":")
    low = min(measured.low for measured in measurements)
    high = max(measured.high for measured in measurements)
    span = (high - low) or 1.0
    axes.set_xlim(low - 0.05 * span, high + ROOM * span)
    axes.grid(visible=False, axis="y")
