"""The drawing of every system's accuracy over the layers it runs.

The style of the drawing is in `drawing`. Axes of numbers: executions and percent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from drllm.records.results import BASE, PERMUTED, ROUTED, Evaluation, Point, System
from drllm.reporting.drawing import Colours, make_panels, spread_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTER = 0.066  # inches; width of a letter in a label
LINE = 0.15  # inches; height of a label's line
MARGIN = 0.6  # inches; room for the labels of an axis
STATIC = "static paths"
LOOKS = {BASE: ("s0", "o"), ROUTED: ("s1", "o"), PERMUTED: ("s2", "s"), STATIC: ("s3", "^")}
"""The colour and marker of the curves that stand out."""
OTHER_LOOK = ("faint", "D")

Curves: TypeAlias = Mapping[str, Sequence[System | Point]]
"""The name of a system, or `STATIC` → its points, from the fewest executions to the most."""


def group_curves(evaluation: Evaluation) -> dict[str, list[System | Point]]:
    """Group the points of each system at all depths, sorted by executions.

    The depth that the routers were trained for is one of the depths. All static paths form one
    curve, and base, which runs the full path, belongs to it.
    """
    curves: dict[str, list[System | Point]] = {}
    if evaluation.paths:
        curves[STATIC] = [evaluation.base]
    for system in evaluation.systems:
        name = STATIC if system.name in evaluation.paths else system.name
        curves.setdefault(name, []).append(system)
    for point in evaluation.curve:
        if point.setting:
            curves.setdefault(point.system, []).append(point)
    return {
        name: sorted(points, key=lambda point: point.executions) for name, points in curves.items()
    }


def draw_accuracy(evaluation: Evaluation, colours: Colours, width: float) -> Figure:
    """Draw the accuracy of every system over the layers it runs.

    A system at several depths is a curve, and the static paths are a curve too. The labels of the
    curves are left of all points, and a line joins each label to the curve's first point. Base and
    the main curve have intervals. Static paths have their own names where there is room.
    """
    curves = group_curves(evaluation)
    main = STATIC if evaluation.paths and evaluation.routed is None else ROUTED
    styles = {name: _choose_style(name, main, colours) for name in curves}
    labelled = {name: points for name, points in curves.items() if name != BASE}
    height = max(0.42 * width, 1.2 + LINE * 1.25 * len(labelled), 3.0)
    figure, (axes,) = make_panels(1, 1, width, height)
    layout = _compute_layout(evaluation, curves, width, height)
    axes.set_xlim(layout.left - layout.room, layout.right + 0.03 * layout.span)
    axes.set_ylim(layout.low, layout.high)
    _draw_levels(axes, evaluation, layout, colours)
    for name, points in labelled.items():
        _draw_curve(axes, points, styles[name])
        _draw_label(axes, name, points[0], layout, styles[name], colours["grid"])
    axes.plot(*_find_position(evaluation.base), "o", color=colours["s0"], ms=7, zorder=4)
    for name in (main, BASE):
        if name in curves:
            _draw_intervals(axes, curves[name], styles[name].colour)
    if STATIC in curves:
        _name_static_paths(axes, evaluation, curves[STATIC], layout, styles[STATIC].colour)
    _name_base(axes, evaluation, colours["s0"])
    ticks = [tick for tick in axes.get_xticks() if layout.has_tick(tick)]
    axes.set_xticks(ticks or [evaluation.num_layers])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(f"layers run a forward pass (full path: {evaluation.num_layers})", loc="right")
    axes.set_ylabel(f"{evaluation.score}, %")
    return figure


@dataclass(frozen=True, slots=True)
class _Style:
    """The look of a curve and its label."""

    colour: str
    marker: str
    label_colour: str
    stands_out: bool  # whether the curve has a colour of its own
    is_main: bool  # whether it is the most important curve; at most one is


def _choose_style(name: str, main: str, colours: Colours) -> _Style:
    """Choose the style of a curve; `main` is the name of the main curve."""
    colour, marker = LOOKS.get(name, OTHER_LOOK)
    if name == main:
        colour, marker = LOOKS[ROUTED]
    stands_out = name in LOOKS
    return _Style(
        colour=colours[colour],
        marker=marker,
        label_colour=colours[colour] if stands_out else colours["ink"],
        stands_out=stands_out,
        is_main=name == main,
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """The ranges of the axes and the places of the labels.

    The horizontal axis has executions, and the vertical axis has percent.
    """

    left: float  # fewest executions of any point, or half an execution below the full path
    right: float  # most executions of any point
    room: float  # width of the column of labels, left of all points, in executions
    low: float  # lowest percent of the panel
    high: float  # highest percent of the panel
    inches: float  # width of one execution in inches
    labels: Mapping[str, str]  # name of a curve → its label
    label_heights: Mapping[str, float]  # name of a curve → height of its label, in percent

    @property
    def span(self) -> float:
        """The width of the panel in executions, from the labels to the last point."""
        return self.right - self.left + self.room

    def has_tick(self, value: float) -> bool:
        """Tell whether a tick is below the points; there are no ticks below the labels."""
        return self.left - 0.06 * (self.right - self.left) <= value <= self.right


def _compute_layout(evaluation: Evaluation, curves: Curves, width: float, height: float) -> _Layout:
    """Find the ranges of both axes, and places for the labels."""
    points = list(itertools.chain.from_iterable(curves.values()))
    executions = [point.executions for point in points]
    left = min(evaluation.num_layers - 0.5, *executions)
    right = max(executions)
    labelled = {name: curve for name, curve in curves.items() if name != BASE}
    labels = {name: _write_label(name, curve) for name, curve in labelled.items()}
    num_letters = max((len(label) for label in labels.values()), default=0)
    # The labels take this share of the panel's width, and the points take what is left.
    share = min(0.6, (LETTER * num_letters + 0.3) / (width - MARGIN))
    room = (right - left) * share / (1 - share)
    low, high = _find_accuracy_range(points, evaluation.chance)
    accuracies = [100 * curve[0].accuracy for curve in labelled.values()]
    heights: list[float] = []
    # The height of a line in percent depends on the range, and the range must hold all lines.
    for _ in range(3):
        line = LINE * (high - low) / (height - MARGIN)
        heights = spread_apart(accuracies, line)
        if heights:
            low = min(low, min(heights) - line)
            high = max(high, max(heights) + line / 2)
    return _Layout(
        left=left,
        right=right,
        room=room,
        low=low,
        high=high,
        inches=(width - MARGIN) / (right - left + room),
        labels=labels,
        label_heights=dict(zip(labelled, heights, strict=True)),
    )


def _find_accuracy_range(points: Sequence[System | Point], chance: float) -> tuple[float, float]:
    """Find the lowest and the highest percent to show, so that all intervals and chance fit."""
    ends: list[float] = []
    for point in points:
        ends += [100 * end for end in point.interval]
    if chance > 0:
        ends.append(100 * chance)
    space = 0.06 * (max(ends) - min(ends))
    if space == 0:
        space = 1.0
    return max(min(ends) - space, -3.0), min(max(ends) + space, 103.0)


def _write_label(name: str, points: Sequence[System | Point]) -> str:
    """Write the label of a curve: its name and, if it has a single point, the accuracy."""
    if len(points) > 1:
        return name
    return f"{name}  {100 * points[0].accuracy:.1f} %"


def _find_position(point: System | Point) -> tuple[float, float]:
    """Return the executions and the percent of a point."""
    return point.executions, 100 * point.accuracy


def _draw_levels(axes: Axes, evaluation: Evaluation, layout: _Layout, colours: Colours) -> None:
    """Draw the accuracy of base and of guessing as horizontal lines."""
    look: dict[str, Any] = {"color": colours["faint"], "linewidth": 0.8, "zorder": 0}
    axes.hlines(100 * evaluation.base.accuracy, layout.left, layout.right, **look)
    if evaluation.chance > 0:
        chance = 100 * evaluation.chance
        axes.hlines(chance, layout.left, layout.right, linestyle=":", **look)
        axes.annotate(
            "chance",
            (layout.right, chance),
            xytext=(0, 2),
            textcoords="offset points",
            color=colours["faint"],
            ha="right",
        )


def _draw_curve(axes: Axes, points: Sequence[System | Point], style: _Style) -> None:
    executions = [point.executions for point in points]
    accuracies = [100 * point.accuracy for point in points]
    order = 2  # curves with a higher number are drawn over the other curves
    size = 4.5
    if style.stands_out:
        order = 3
    if style.is_main:
        order = 4
        size = 7
    axes.plot(
        executions,
        accuracies,
        f"{style.marker}-",
        color=style.colour,
        markersize=size,
        zorder=order,
    )


def _draw_label(
    axes: Axes,
    name: str,
    first: System | Point,
    layout: _Layout,
    style: _Style,
    line_colour: str,
) -> None:
    """Write the label of a curve left of all points, with a line to the curve's first point."""
    height = layout.label_heights[name]
    edge = layout.left - 0.09 * layout.room
    executions, accuracy = _find_position(first)
    axes.plot([edge, executions], [height, accuracy], color=line_colour, linewidth=0.8, zorder=1)
    axes.text(
        edge - 0.015 * layout.room,
        height,
        layout.labels[name],
        color=style.label_colour,
        fontweight="bold" if style.is_main else "normal",
        ha="right",
        va="center",
    )


def _draw_intervals(axes: Axes, points: Sequence[System | Point], colour: str) -> None:
    for point in points:
        low, high = point.interval
        axes.vlines(point.executions, 100 * low, 100 * high, color=colour, linewidth=1.8)


def _name_static_paths(
    axes: Axes,
    evaluation: Evaluation,
    points: Sequence[System | Point],
    layout: _Layout,
    colour: str,
) -> None:
    """Write the names of the static paths that are far enough from the next path."""
    for point, next_point in itertools.pairwise(points):
        # In inches; the name of base is left of its point and needs room too.
        least_distance = 1.2 if next_point is evaluation.base else 0.6
        distance = (next_point.executions - point.executions) * layout.inches
        if distance > least_distance:
            # The labels of the curves are left of the first point.
            align = "left" if point.executions == layout.left else "center"
            axes.annotate(
                point.name,
                _find_position(point),
                xytext=(3, 5),
                textcoords="offset points",
                color=colour,
                ha=align,
            )


def _name_base(axes: Axes, evaluation: Evaluation, colour: str) -> None:
    label = f"base  {100 * evaluation.base.accuracy:.1f} %"
    axes.annotate(
        label,
        _find_position(evaluation.base),
        xytext=(-7, 5),
        textcoords="offset points",
        color=colour,
        ha="right",
        fontweight="bold",
    )
