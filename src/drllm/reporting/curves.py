"""The drawings of a report that are about the test: systems, baselines, depths.

Owns what is drawn. Leaves how it is drawn to `drawing` and which baselines stand out to `verdicts`.
Differences are drawn with their own paired intervals, which are narrower than those of the systems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drllm.reporting.depths import Difference, Differences
from drllm.reporting.drawing import WIDTH, Colours, beside, stacked
from drllm.reporting.results import PERMUTED, Evaluation
from drllm.reporting.samples import BASE, ROUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.21
"""Inches a system takes where each has a row."""
FRAME = 0.75
"""Inches that the axis and its title take."""
LOOKS = (("s1", "o", "-"), ("s2", "s", "--"), ("s3", "D", "-."), ("s4", "^", ":"))
"""Colour, marker and dashes of the systems that stand out, told apart without the colour too."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One quantity of a depth curve.

    Attributes:
        key: Field of `Differences`.
        scale: Factor to what is drawn.
        label: Of the axis.
    """

    key: str
    scale: float
    label: str

    def of(self, differences: Differences | None) -> Difference | None:
        """Return the difference of this quantity, where it is known."""
        found: Difference | None = getattr(differences, self.key, None)
        return found


MEASURES = (
    Measure("accuracy", 100, "accuracy, points"),
    Measure("gold_logprob", 1, "gold log-prob., nats"),
    Measure("text_loss", 1, "next-token loss, nats"),
)


@dataclass(frozen=True, slots=True)
class Placed:
    """One system at one depth: its executions and its differences to base."""

    executions: float
    differences: Differences


def by_system(evaluation: Evaluation) -> dict[str, list[Placed]]:
    """Return where each system stands, at all depths from the fewest executions; base is left out.

    The depth that the routers were trained for is one of them.
    """
    found: dict[str, list[Placed]] = {}
    for system in evaluation.systems:
        if system.against_base is not None:
            placed = Placed(system.executions, system.against_base)
            found.setdefault(system.name, []).append(placed)
    for point in evaluation.curve:
        if point.against_base is not None:
            placed = Placed(point.executions, point.against_base)
            found.setdefault(point.system, []).append(placed)
    return {name: sorted(each, key=lambda p: p.executions) for name, each in found.items()}


def known(evaluation: Evaluation) -> list[Measure]:
    """Return the quantities in which a depth curve has differences to base."""
    placed = [each for points in by_system(evaluation).values() for each in points]
    return [m for m in MEASURES if any(m.of(each.differences) is not None for each in placed)]


# --- each system in a row ----------------------------------------------------------------------


def accuracy_of_systems(evaluation: Evaluation, colours: Colours) -> Figure:
    """Draw each system's accuracy with its interval in a row of its own, base's as a line."""
    systems = evaluation.systems
    figure, (axes,) = stacked([FRAME + ROW * len(systems)])
    for row, system in enumerate(systems):
        _interval(axes, row, 100, system.accuracy, system.interval, colours, system.name)
    axes.axvline(100 * evaluation.base.accuracy, color=colours["faint"], linewidth=0.8, zorder=0)
    axes.axvline(100 * evaluation.chance, color=colours["faint"], linewidth=1, linestyle=":")
    _rows(axes, [system.name for system in systems])
    axes.set_xlabel(f"{evaluation.score}, %, with 95 % interval")
    return figure


def routed_against(evaluation: Evaluation, colours: Colours) -> Figure:
    """Draw what the routed model has more than each baseline, by question."""
    baselines = [system for system in evaluation.baselines if system.routed_against is not None]
    measures = [m for m in MEASURES if any(m.of(s.routed_against) is not None for s in baselines)]
    figure, panels = beside(len(measures), FRAME + 0.1 + ROW * len(baselines))
    for axes, measure in zip(panels, measures, strict=True):
        for row, system in enumerate(baselines):
            found = measure.of(system.routed_against)
            if found is not None:
                judged = evaluation.above_chance or measure.key == "text_loss"
                shown = judged and found.shown is not None
                _interval(
                    axes, row, measure.scale, found.mean, found.interval, colours, ROUTED, shown
                )
        axes.axvline(0, color=colours["ink"], linewidth=0.8, zorder=0)
        axes.set_xlabel(measure.label.replace(", ", ",\n"))
        axes.locator_params(axis="x", nbins=3)
    _rows(panels[0], [system.name for system in baselines])
    return figure


def _interval(
    axes: Axes,
    row: int,
    scale: float,
    middle: float,
    ends: tuple[float, float],
    colours: Colours,
    name: str,
    full: bool = True,
) -> None:
    looks = {BASE: ("s0", "o"), ROUTED: ("s1", "o"), PERMUTED: ("s2", "s")}
    colour, marker = looks.get(name, ("faint", "D"))
    low, high = ends
    axes.hlines(row, scale * low, scale * high, color=colours[colour], linewidth=1.6)
    axes.plot(
        [scale * middle],
        [row],
        marker,
        color=colours[colour],
        markersize=4.5,
        fillstyle="full" if full else "none",
    )


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


# --- depths ------------------------------------------------------------------------------------


def depth_curve(evaluation: Evaluation, outstanding: Sequence[str], colours: Colours) -> Figure:
    """Draw differences to base over executions, one panel a quantity.

    Args:
        evaluation: With a curve.
        outstanding: Systems drawn with colour, markers and intervals, at most four; the others
            are faint lines, and may leave the panel.
        colours: To draw with.
    """
    systems = by_system(evaluation)
    measures = known(evaluation)
    figure, panels = stacked([1.9] * len(measures), share_x=True)
    looks = dict(zip(outstanding, LOOKS, strict=False))
    for axes, measure in zip(panels, measures, strict=True):
        others = [name for name in systems if name not in looks]
        for name in others:
            points = _points(systems[name], measure)
            label = "each other baseline" if name == others[0] else None
            xs, ys = [x for x, _ in points], [measure.scale * y.mean for _, y in points]
            axes.plot(xs, ys, "-", color=colours["faint"], alpha=0.45, linewidth=0.9, label=label)
        _curves(axes, systems, looks, measure, colours)
        axes.set_ylabel(f"{measure.label},\nless base's")
        _base(axes, evaluation.num_layers, colours)
        _within(axes, [systems[name] for name in looks if name in systems], measure)
    panels[-1].set_xlabel(f"executions a forward pass (full path: {evaluation.num_layers})")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, handlelength=3)
    return figure


def one_by_one(evaluation: Evaluation, measure: Measure, colours: Colours) -> Figure:
    """Draw the routed model against every baseline over executions, a panel each."""
    from matplotlib.figure import Figure

    systems = by_system(evaluation)
    baselines = [name for name in systems if name != ROUTED]
    rows = math.ceil(len(baselines) / 2)
    figure = Figure(figsize=(WIDTH, 1.25 * rows + 0.45), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False, sharex=True).ravel()
    for axes, name in zip(panels, baselines, strict=False):
        looks = dict(zip((ROUTED, name), LOOKS, strict=False))
        _curves(axes, systems, looks, measure, colours)
        _base(axes, evaluation.num_layers, colours)
        axes.set_title(name, color=colours["s2"])
    for axes in panels[len(baselines) :]:
        axes.set_visible(False)
        panels[len(baselines) - 2].tick_params(labelbottom=True)
    figure.supxlabel("executions a forward pass", fontsize=8)
    figure.supylabel(f"{measure.label}, less base's", fontsize=8)
    return figure


def _within(axes: Axes, systems: Sequence[Sequence[Placed]], measure: Measure) -> None:
    """Show base and these systems with their intervals, whatever far away others do."""
    found = [difference for placed in systems for _, difference in _points(placed, measure)]
    ends = [0.0, *(measure.scale * end for difference in found for end in difference.interval)]
    space = 0.08 * (max(ends) - min(ends))
    if space:
        axes.set_ylim(min(ends) - space, max(ends) + space)


def _points(placed: Sequence[Placed], measure: Measure) -> list[tuple[float, Difference]]:
    found = [(each.executions, measure.of(each.differences)) for each in placed]
    return [(x, difference) for x, difference in found if difference is not None]


def _curves(
    axes: Axes,
    systems: Mapping[str, Sequence[Placed]],
    looks: Mapping[str, tuple[str, str, str]],
    measure: Measure,
    colours: Colours,
) -> None:
    every = [each.executions for points in systems.values() for each in points]
    step = 0.012 * (max(every) - min(every))
    for number, (name, (colour, marker, dashes)) in enumerate(looks.items()):
        points = _points(systems.get(name, ()), measure)
        if not points:
            continue
        # Systems of equal executions would be drawn on top of each other.
        aside = step * (number - (len(looks) - 1) / 2)
        xs, ys = [x + aside for x, _ in points], [measure.scale * y.mean for _, y in points]
        ends = [[measure.scale * end for end in y.interval] for _, y in points]
        axes.plot(
            xs,
            ys,
            marker=marker,
            linestyle=dashes,
            color=colours[colour],
            markersize=4,
            linewidth=1.4,
            label=name,
        )
        lows, highs = [low for low, _ in ends], [high for _, high in ends]
        axes.vlines(xs, lows, highs, color=colours[colour], linewidth=1)


def _base(axes: Axes, num_layers: int, colours: Colours) -> None:
    axes.axhline(0, color=colours["ink"], linewidth=0.8, zorder=0)
    axes.plot([num_layers], [0], "o", color=colours["s0"], markersize=4, clip_on=False)
