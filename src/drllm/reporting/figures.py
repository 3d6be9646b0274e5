"""The drawings of a report: systems, baselines and depths; routes, search and training.

Differences are drawn with their own paired intervals, which are narrower than those of the systems.
How it is drawn is in `drawing`. Axes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from drllm.metrics import NAMES, TRAIN, VALIDATION
from drllm.records.results import BASE, PERMUTED, ROUTED, Evaluation, Point, System
from drllm.reporting.drawing import Colours, legend, panels, whole_numbers
from drllm.reporting.run import Epoch
from drllm.statistics.intervals import Floats
from drllm.statistics.verdicts import Differences, Verdict
from drllm.supervision.summary import EditEffect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.21
"""Inches a system takes where each has a row."""
FRAME = 0.75
"""Inches that the axis and its title take."""
LOOKS = (("s1", "o", "-"), ("s2", "s", "--"), ("s3", "D", "-."), ("s4", "^", ":"))
"""Colour, marker and dashes of the systems that stand out, told apart without the colour too."""

Scores: TypeAlias = Mapping[str, float | None]
Placed: TypeAlias = System | Point
"""A system at some depth, with differences to base."""


class Measure(NamedTuple):
    """One quantity of a depth curve: field of `Differences`, factor to what is drawn, label."""

    key: str
    scale: float
    label: str

    def of(self, differences: Differences | None) -> Verdict | None:
        """Return the difference of this quantity, where it is known."""
        found: Verdict | None = getattr(differences, self.key, None)
        return found


MEASURES = (
    Measure("accuracy", 100, "accuracy, points"),
    Measure("gold_logprob", 1, "gold log-prob., nats"),
    Measure("text_loss", 1, "next-token loss, nats"),
)


def by_system(evaluation: Evaluation) -> dict[str, list[Placed]]:
    """Return where each system stands, at all depths from the fewest executions; base is left out.

    The depth that the routers were trained for is one of them.
    """
    found: dict[str, list[Placed]] = {}
    placed: list[Placed] = [*evaluation.systems, *evaluation.curve]
    for each in placed:
        if each.against_base is not None:
            name = each.name if isinstance(each, System) else each.system
            found.setdefault(name, []).append(each)
    return {name: sorted(each, key=lambda one: one.executions) for name, each in found.items()}


def known(evaluation: Evaluation) -> list[Measure]:
    """Return the quantities in which a depth curve has differences to base."""
    placed = [each.against_base for points in by_system(evaluation).values() for each in points]
    return [measure for measure in MEASURES if any(map(measure.of, placed))]


# --- each system in a row ----------------------------------------------------------------------


def accuracy_of_systems(evaluation: Evaluation, colours: Colours) -> Figure:
    """Draw each system's accuracy with its interval in a row of its own, base's as a line."""
    systems = evaluation.systems
    figure, (axes,) = panels(1, 1, FRAME + ROW * len(systems))
    looks = {BASE: ("s0", "o"), ROUTED: ("s1", "o"), PERMUTED: ("s2", "s")}
    for row, system in enumerate(systems):
        colour, marker = looks.get(system.name, ("faint", "D"))
        values = (system.accuracy, *system.interval)
        _interval(axes, row, 100, values, (colours[colour], marker), "full")
    axes.axvline(100 * evaluation.base.accuracy, color=colours["faint"], linewidth=0.8, zorder=0)
    axes.axvline(100 * evaluation.chance, color=colours["faint"], linewidth=1, linestyle=":")
    _rows(axes, systems)
    axes.set_xlabel(f"{evaluation.score}, %, with 95 % interval")
    return figure


def routed_against(evaluation: Evaluation, colours: Colours) -> Figure:
    """Draw what the routed model has more than each baseline, by question."""
    baselines = [system for system in evaluation.baselines if system.routed_against is not None]
    measures = [m for m in MEASURES if any(m.of(s.routed_against) for s in baselines)]
    height = FRAME + 0.1 + ROW * len(baselines)
    figure, found = panels(1, len(measures), height, sharey=True)
    for axes, measure in zip(found, measures, strict=True):
        for row, system in enumerate(baselines):
            if (v := measure.of(system.routed_against)) is not None:
                fill = "none" if v.is_better is None else "full"
                values = (v.mean, *v.interval)
                _interval(axes, row, measure.scale, values, (colours["s1"], "o"), fill)
        axes.axvline(0, color=colours["ink"], linewidth=0.8, zorder=0)
        axes.set_xlabel(measure.label.replace(", ", ",\n"))
        axes.locator_params(axis="x", nbins=3)
    _rows(found[0], baselines)
    return figure


def _interval(
    axes: Axes, row: int, scale: float, values: Sequence[float], look: Sequence[str], fill: Any
) -> None:
    middle, low, high = (scale * value for value in values)
    axes.hlines(row, low, high, color=look[0], linewidth=1.6)
    axes.plot([middle], [row], look[1], color=look[0], markersize=4.5, fillstyle=fill)


def _rows(axes: Axes, systems: Sequence[System]) -> None:
    axes.set_yticks(range(len(systems)), [system.name for system in systems])
    axes.set_ylim(len(systems) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


# --- depths ------------------------------------------------------------------------------------


def depth_curve(evaluation: Evaluation, outstanding: Sequence[str], colours: Colours) -> Figure:
    """Draw differences to base over executions, one panel a quantity.

    Outstanding systems, at most four, have colour, markers and intervals; the others are faint
    lines, and may leave the panel.
    """
    systems, measures = by_system(evaluation), known(evaluation)
    looks = dict(zip(outstanding, LOOKS, strict=False))
    figure, found = panels(len(measures), 1, 1.9 * len(measures), sharex=True)
    for axes, measure in zip(found, measures, strict=True):
        label: str | None = "each other baseline"
        for name in (name for name in systems if name not in looks):
            xs, ys, *_ = _points(systems[name], measure)
            axes.plot(xs, ys, "-", color=colours["faint"], alpha=0.45, linewidth=0.9, label=label)
            label = None
        _curves(axes, systems, looks, measure, evaluation.num_layers, colours)
        axes.set_ylabel(f"{measure.label},\nless base's")
        # Base and these systems are shown with their intervals, whatever far away others do.
        shown = [_points(systems[name], measure)[2:] for name in looks if name in systems]
        ends = np.concatenate([[0.0], *(np.ravel(each) for each in shown)])
        if space := 0.08 * np.ptp(ends):
            axes.set_ylim(ends.min() - space, ends.max() + space)
    found[-1].set_xlabel(f"executions a forward pass (full path: {evaluation.num_layers})")
    handles, names = found[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, handlelength=3)
    return figure


def one_by_one(evaluation: Evaluation, measure: Measure, colours: Colours) -> Figure:
    """Draw the routed model against every baseline over executions, a panel each."""
    systems = by_system(evaluation)
    baselines = [name for name in systems if name != ROUTED]
    rows = math.ceil(len(baselines) / 2)
    figure, found = panels(rows, 2, 1.25 * rows + 0.45, sharex=True)
    for axes, name in zip(found, baselines, strict=False):
        looks = dict(zip((ROUTED, name), LOOKS, strict=False))
        _curves(axes, systems, looks, measure, evaluation.num_layers, colours)
        axes.set_title(name, color=colours["s2"])
    for axes in found[len(baselines) :]:
        axes.set_visible(False)
        found[len(baselines) - 2].tick_params(labelbottom=True)
    figure.supxlabel("executions a forward pass", fontsize=8)
    figure.supylabel(f"{measure.label}, less base's", fontsize=8)
    return figure


def _points(placed: Sequence[Placed], measure: Measure) -> tuple[Floats, Floats, Floats, Floats]:
    """Return executions, differences and the ends of their intervals, where they are known."""
    found = [
        (each.executions, difference.mean, *difference.interval)
        for each in placed
        if (difference := measure.of(each.against_base)) is not None
    ]
    xs, *values = np.array(found, dtype=np.float64).reshape(-1, 4).T
    means, lows, highs = (measure.scale * each for each in values)
    return xs, means, lows, highs


def _curves(
    axes: Axes,
    systems: Mapping[str, Sequence[Placed]],
    looks: Mapping[str, tuple[str, str, str]],
    measure: Measure,
    num_layers: int,
    colours: Colours,
) -> None:
    """Draw systems with intervals, and base as a dot."""
    step = 0.012 * np.ptp([each.executions for points in systems.values() for each in points])
    for number, (name, (colour, marker, dashes)) in enumerate(looks.items()):
        xs, ys, lows, highs = _points(systems.get(name, ()), measure)
        if not len(xs):
            continue
        # Systems of equal executions would be drawn on top of each other.
        xs = xs + step * (number - (len(looks) - 1) / 2)
        look: dict[str, Any] = {"marker": marker, "linestyle": dashes, "color": colours[colour]}
        axes.plot(xs, ys, markersize=4, linewidth=1.4, label=name, **look)
        axes.vlines(xs, lows, highs, color=colours[colour], linewidth=1)
    axes.axhline(0, color=colours["ink"], linewidth=0.8, zorder=0)
    axes.plot([num_layers], [0], "o", color=colours["s0"], markersize=4, clip_on=False)


# --- routes, search and training ---------------------------------------------------------------


def _by_layer(axes: Axes, num_layers: int) -> None:
    axes.set_xlim(-0.8, num_layers - 0.2)
    whole_numbers(axes)


def labels_against_routes(
    skips: Mapping[str, Sequence[float]], repeats: Mapping[str, Sequence[float]], colours: Colours
) -> Figure:
    """Draw the share of skips and of repeats by layer, each panel on a scale of its own.

    Skips and repeats are `[L]` shares of `targets` and of `routes`.
    """
    figure, found = panels(2, 1, 3.5)
    for axes, name, series in zip(found, ("skip", "repeat"), (skips, repeats), strict=True):
        targets, routes = (
            [100 * share for share in series[label]] for label in ("targets", "routes")
        )
        layers = range(len(targets))
        axes.bar(layers, targets, color=colours[name], alpha=0.4, label="targets")
        look: dict[str, Any] = {"color": colours["ink"], "markersize": 3, "linewidth": 0.9}
        axes.plot(layers, routes, "o-", label="routes", **look)
        # Where nothing is drawn above 0, an axis of its own would be one of thousandths.
        axes.set_ylim(0, None if any(targets) or any(routes) else 1)
        axes.set_ylabel(f"{name}, %")
        _by_layer(axes, len(targets))
        legend(axes, columns=2)
    found[-1].set_xlabel("layer")
    return figure


def single_edits(
    skips: Sequence[EditEffect], repeats: Sequence[EditEffect], num_layers: int, colours: Colours
) -> Figure:
    """Draw the mean change of reward by edited layer, skips above repeats."""
    figure, found = panels(2, 1, 3.5)
    for axes, name, effects in zip(found, ("skip", "repeat"), (skips, repeats), strict=True):
        layers = [effect.layer for effect in effects]
        changes = [effect.reward for effect in effects]
        # Stems with dots, so that "no change" and "not tried" look different.
        axes.vlines(layers, 0, changes, color=colours[name], linewidth=1.6)
        axes.plot(layers, changes, "o", color=colours[name], markersize=3.2)
        axes.axhline(0, color=colours["ink"], linewidth=0.8)
        axes.set_ylabel(f"one {name}:\nreward change")
        _by_layer(axes, num_layers)
    found[-1].set_xlabel("edited layer")
    return figure


def target_executions(lengths: Sequence[int], num_layers: int, colours: Colours) -> Figure:
    """Draw how many targets have how many executions, with the full path marked."""
    figure, (axes,) = panels(1, 1, 2.4)
    values = range(min(lengths), max(lengths) + 1)
    axes.bar(values, [lengths.count(value) for value in values], color=colours["s1"])
    axes.axvline(num_layers, color=colours["ink"], linewidth=1, linestyle="--", label="full path")
    axes.set(xlabel="executions of the target path", ylabel="questions")
    whole_numbers(axes)
    legend(axes, columns=1)
    return figure


def router_metrics(
    epochs: Sequence[Epoch], baselines: Mapping[str, Scores], colours: Colours
) -> Figure:
    """Draw macro-F1, labels hit, the F1 of each decision and loss by epoch.

    Of the baselines, decisions that ignore the question, each metric's best is a dashed line.
    """
    splits = [name for name in (TRAIN, VALIDATION) if any(e.split == name for e in epochs)]
    shown = splits[-1]
    figure, found = panels(4, 1, 6.4)
    of_decisions, of_loss = found[2:]

    def line(axes: Axes, split: str, key: str, colour: str, dashes: str, label: str) -> None:
        points = [
            (epoch.epoch, value)
            for epoch in epochs
            if epoch.split == split and (value := epoch.values.get(key)) is not None
        ]
        if points:
            marker = "o" if len(points) == 1 else None
            look: dict[str, Any] = {"marker": marker, "markersize": 3, "color": colours[colour]}
            axes.plot(*zip(*points, strict=True), dashes, linewidth=1.6, label=label, **look)

    judged = (("macro_f1", "macro-F1"), ("accuracy", "labels hit"), ("routers_loss", "loss"))
    for axes, (key, title) in zip((*found[:2], of_loss), judged, strict=True):
        for split in splits:
            line(axes, split, key, "s1", "-" if split == shown else ":", split)
        known = {name: v for name, each in baselines.items() if (v := each.get(key)) is not None}
        if known and axes is not of_loss:
            best = max(known, key=lambda name: known[name])
            look: dict[str, Any] = {"color": colours["ink"], "linewidth": 1, "linestyle": "--"}
            axes.axhline(known[best], label=best.replace("_", " "), **look)
        axes.set_ylabel(title)
    for name in NAMES:
        line(of_decisions, shown, f"f1_{name}", "faint" if name == "execute" else name, "-", name)
    of_decisions.set(ylabel=f"F1, {shown}", ylim=(-0.03, 1.03))
    of_loss.set_ylim(bottom=0)
    of_loss.set_xlabel("epoch")
    for axes in found:
        whole_numbers(axes)
        legend(axes, columns=3)
    return figure


def router_layers(
    shares: Sequence[Sequence[float]],
    routers: Sequence[Scores],
    majority: Sequence[Scores],
    colours: Colours,
) -> Figure:
    """Draw each layer's labels, the share of them that is hit, and the F1 of skip.

    `shares` `[L][3]` says how many of each layer's labels are skip, execute and repeat; `routers`
    and `majority` hold the metrics `[L]` of the routers and of the layer's commonest label.
    """
    figure, (labels, hits, skip) = panels(3, 1, 5.1)
    skips, repeats = ([100 * share[value] for share in shares] for value in (0, 2))
    labels.bar(range(len(shares)), skips, color=colours["skip"], label="skip")
    look: dict[str, Any] = {"color": colours["repeat"], "label": "repeat"}
    labels.bar(range(len(shares)), repeats, bottom=skips, **look)
    labels.set_ylabel("labels, %")
    for axes, key, scale in ((hits, "accuracy", 100), (skip, "f1_skip", 1)):
        theirs, ours = (
            scale * np.array([each[key] for each in scores], dtype=np.float64)
            for scores in (majority, routers)
        )
        # A stroke a layer, not a line through them: layers have nothing between them.
        x = np.flatnonzero(~np.isnan(theirs))
        look = {"color": colours["ink"], "label": "layer majority"}
        axes.hlines(theirs[x], x - 0.4, x + 0.4, linewidth=1.2, **look)
        x = np.flatnonzero(~np.isnan(ours))
        axes.plot(x, ours[x], "o", color=colours["s1"], markersize=3.2, label="routers")
    hits.set_ylabel("labels hit, %")
    skip.set(xlabel="layer", ylabel="F1 skip", ylim=(-0.05, 1.05))
    for axes in (labels, hits, skip):
        _by_layer(axes, len(shares))
        legend(axes, columns=2)
    return figure


def router_reliability(
    series: Mapping[str, Sequence[tuple[float, float]]], colours: Colours
) -> Figure:
    """Draw the share of hits over the probability of what was decided.

    The series hold points (probability, share of hits) by name, at most two.
    """
    figure, (axes,) = panels(1, 1, 3.2)
    lowest = min(value for points in series.values() for point in points for value in point)
    ends = (max(0.0, lowest - 0.04), 1.02)
    axes.plot(ends, ends, color=colours["ink"], linewidth=0.8, linestyle="--")
    looks = (("s1", "o", "full"), ("s2", "s", "none"))
    for (name, points), (colour, marker, fill) in zip(series.items(), looks, strict=False):
        look: dict[str, Any] = {"marker": marker, "fillstyle": fill, "color": colours[colour]}
        axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1, label=name, **look)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="probability of what was decided", ylabel="share of hits")
    axes.legend(loc="upper left")
    return figure
