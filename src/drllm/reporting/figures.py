"""The drawings of a report: systems, baselines and depths; routes, search and training.

Differences are drawn with their own paired intervals, which are narrower than those of the systems.
How it is drawn is in `drawing`. Axes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from drllm.records.results import BASE, PERMUTED, ROUTED, Evaluation, Point, System
from drllm.reporting.drawing import WIDTH, Colours, legend, side_by_side, stacked, whole_numbers
from drllm.reporting.edits import EditEffect
from drllm.reporting.run import Epoch
from drllm.statistics.verdicts import Differences, Verdict

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

    def of(self, differences: Differences | None) -> Verdict | None:
        """Return the difference of this quantity, where it is known."""
        found: Verdict | None = getattr(differences, self.key, None)
        return found


MEASURES = (
    Measure("accuracy", 100, "accuracy, points"),
    Measure("gold_logprob", 1, "gold log-prob., nats"),
    Measure("text_loss", 1, "next-token loss, nats"),
)


Placed: TypeAlias = System | Point
"""A system at some depth, with differences to base."""


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
    return {name: sorted(each, key=lambda p: p.executions) for name, each in found.items()}


def known(evaluation: Evaluation) -> list[Measure]:
    """Return the quantities in which a depth curve has differences to base."""
    placed = [each for points in by_system(evaluation).values() for each in points]
    return [m for m in MEASURES if any(m.of(each.against_base) is not None for each in placed)]


# --- each system in a row ----------------------------------------------------------------------


def accuracy_of_systems(evaluation: Evaluation, colours: Colours) -> Figure:
    """Draw each system's accuracy with its interval in a row of its own, base's as a line."""
    systems = evaluation.systems
    figure, (axes,) = stacked([FRAME + ROW * len(systems)])
    for row, system in enumerate(systems):
        _interval_of(axes, row, 100, system.accuracy, system.interval, colours, system.name)
    axes.axvline(100 * evaluation.base.accuracy, color=colours["faint"], linewidth=0.8, zorder=0)
    axes.axvline(100 * evaluation.chance, color=colours["faint"], linewidth=1, linestyle=":")
    _rows(axes, [system.name for system in systems])
    axes.set_xlabel(f"{evaluation.score}, %, with 95 % interval")
    return figure


def routed_against(evaluation: Evaluation, colours: Colours) -> Figure:
    """Draw what the routed model has more than each baseline, by question."""
    baselines = [system for system in evaluation.baselines if system.routed_against is not None]
    measures = [m for m in MEASURES if any(m.of(s.routed_against) is not None for s in baselines)]
    figure, panels = side_by_side(len(measures), FRAME + 0.1 + ROW * len(baselines))
    for axes, measure in zip(panels, measures, strict=True):
        for row, system in enumerate(baselines):
            found = measure.of(system.routed_against)
            if found is not None:
                shown = found.is_better is not None
                _interval_of(
                    axes, row, measure.scale, found.mean, found.interval, colours, ROUTED, shown
                )
        axes.axvline(0, color=colours["ink"], linewidth=0.8, zorder=0)
        axes.set_xlabel(measure.label.replace(", ", ",\n"))
        axes.locator_params(axis="x", nbins=3)
    _rows(panels[0], [system.name for system in baselines])
    return figure


def _interval_of(
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

    Outstanding systems, at most four, have colour, markers and intervals; the others are faint
    lines, and may leave the panel.
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


def _points(placed: Sequence[Placed], measure: Measure) -> list[tuple[float, Verdict]]:
    found = [(each.executions, measure.of(each.against_base)) for each in placed]
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


# --- routes, search and training ---------------------------------------------------------------


def labels_against_routes(
    skips: Mapping[str, Sequence[float]],
    repeats: Mapping[str, Sequence[float]],
    colours: Colours,
) -> Figure:
    """Draw the share of skips and of repeats by layer, each panel on a scale of its own.

    Skips and repeats are `[L]` shares by what they are shares of (targets, routes).
    """
    figure, panels = stacked([1.75, 1.75])
    for axes, name, series in zip(panels, ("skip", "repeat"), (skips, repeats), strict=True):
        for number, (label, values) in enumerate(series.items()):
            layers = range(len(values))
            percents = [100 * value for value in values]
            if number == 0:
                axes.bar(layers, percents, color=colours[name], alpha=0.4, label=label)
            else:
                axes.plot(
                    layers,
                    percents,
                    "o-",
                    color=colours["ink"],
                    markersize=3,
                    linewidth=0.9,
                    label=label,
                )
        axes.set_xlim(-0.8, max(map(len, series.values())) - 0.2)
        # Where nothing is drawn above 0, an axis of its own would be one of thousandths.
        axes.set_ylim(0, None if any(map(any, series.values())) else 1)
        axes.set_ylabel(f"{name}, %")
        whole_numbers(axes)
        legend(axes, columns=2)
    panels[-1].set_xlabel("layer")
    return figure


def single_edits(
    skips: Sequence[EditEffect],
    repeats: Sequence[EditEffect],
    num_layers: int,
    colours: Colours,
) -> Figure:
    """Draw the mean change of reward by edited layer, skips above repeats."""
    figure, panels = stacked([1.75, 1.75])
    for axes, name, effects in zip(panels, ("skip", "repeat"), (skips, repeats), strict=True):
        layers = [effect.layer for effect in effects]
        changes = [effect.reward for effect in effects]
        # Stems with dots, so that "no change" and "not tried" look different.
        axes.vlines(layers, 0, changes, color=colours[name], linewidth=1.6)
        axes.plot(layers, changes, "o", color=colours[name], markersize=3.2)
        axes.axhline(0, color=colours["ink"], linewidth=0.8)
        axes.set_xlim(-0.8, num_layers - 0.2)
        axes.set_ylabel(f"one {name}:\nreward change")
        whole_numbers(axes)
    panels[-1].set_xlabel("edited layer")
    return figure


def target_executions(lengths: Sequence[int], num_layers: int, colours: Colours) -> Figure:
    """Draw how many targets have how many executions, with the full path marked."""
    figure, (axes,) = stacked([2.4])
    values = range(min(lengths), max(lengths) + 1)
    axes.bar(values, [lengths.count(value) for value in values], color=colours["s1"])
    axes.axvline(num_layers, color=colours["ink"], linewidth=1, linestyle="--", label="full path")
    axes.set_xlabel("executions of the target path")
    axes.set_ylabel("questions")
    whole_numbers(axes)
    legend(axes, columns=1)
    return figure


def router_metrics(
    epochs: Sequence[Epoch],
    baselines: Mapping[str, Mapping[str, float | None]],
    colours: Colours,
) -> Figure:
    """Draw macro-F1, labels hit, the F1 of each decision and loss by epoch.

    Of the baselines, decisions that ignore the question, each metric's best is a dashed line.
    """
    splits = [name for name in ("train", "validation") if any(e.split == name for e in epochs)]
    shown = splits[-1]
    judged = [("macro_f1", "macro-F1"), ("accuracy", "labels hit")]
    figure, panels = stacked([1.6] * (len(judged) + 2))
    of_decisions, of_loss = panels[-2:]
    single = [(axes, key) for axes, (key, _) in zip(panels, judged, strict=False)]
    for split in splits:
        dashed = "-" if split == shown else ":"
        for axes, key in (*single, (of_loss, "routers_loss")):
            _line(axes, epochs, split, key, colours["s1"], dashed, split)
    for axes, key in single:
        known = {name: v for name, each in baselines.items() if (v := each.get(key)) is not None}
        if known:
            best = max(known, key=lambda name: known[name])
            looks: dict[str, Any] = {"color": colours["ink"], "linewidth": 1, "linestyle": "--"}
            axes.axhline(known[best], label=best.replace("_", " "), **looks)
    for key, colour in (("f1_skip", "skip"), ("f1_execute", "faint"), ("f1_repeat", "repeat")):
        _line(of_decisions, epochs, shown, key, colours[colour], "-", key.removeprefix("f1_"))
    for axes, (_, title) in zip(panels, judged, strict=False):
        axes.set_ylabel(title)
    of_decisions.set_ylabel(f"F1, {shown}")
    of_decisions.set_ylim(-0.03, 1.03)
    of_loss.set_ylabel("loss")
    of_loss.set_ylim(bottom=0)
    of_loss.set_xlabel("epoch")
    for axes in panels:
        whole_numbers(axes)
        legend(axes, columns=3)
    return figure


def router_layers(
    shares: Sequence[Sequence[float]],
    routers: Sequence[Mapping[str, float | None]],
    majority: Sequence[Mapping[str, float | None]],
    colours: Colours,
) -> Figure:
    """Draw each layer's labels, the share of them that is hit, and the F1 of skip.

    `shares` `[L][3]` says how many of each layer's labels are skip, execute and repeat; `routers`
    and `majority` hold the metrics `[L]` of the routers and of the layer's commonest label.
    """
    figure, panels = stacked([1.7, 1.7, 1.7])
    labels, *judged = panels
    layers = range(len(shares))
    skips, repeats = ([100 * share[value] for share in shares] for value in (0, 2))
    labels.bar(layers, skips, color=colours["skip"], label="skip")
    labels.bar(layers, repeats, bottom=skips, color=colours["repeat"], label="repeat")
    labels.set_ylabel("labels, %")
    for axes, key, title in zip(
        judged, ("accuracy", "f1_skip"), ("labels hit, %", "F1 skip"), strict=True
    ):
        scale = 100 if key == "accuracy" else 1
        for name, scores in (("layer majority", majority), ("routers", routers)):
            known = [
                (x, scale * v) for x, each in enumerate(scores) if (v := each[key]) is not None
            ]
            places, values = [x for x, _ in known], [y for _, y in known]
            if name == "routers":
                axes.plot(places, values, "o", color=colours["s1"], markersize=3.2, label=name)
            else:
                # A stroke a layer, not a line through them: layers have nothing between them.
                left, right = ([x + half for x in places] for half in (-0.4, 0.4))
                axes.hlines(values, left, right, color=colours["ink"], linewidth=1.2, label=name)
        axes.set_ylabel(title)
    judged[1].set_ylim(-0.05, 1.05)
    for axes in panels:
        axes.set_xlim(-0.8, len(shares) - 0.2)
        whole_numbers(axes)
        legend(axes, columns=2)
    panels[-1].set_xlabel("layer")
    return figure


def router_reliability(
    series: Mapping[str, Sequence[tuple[float, float]]], colours: Colours
) -> Figure:
    """Draw the share of hits over the probability of what was decided.

    The series hold points (probability, share of hits) by name, at most two.
    """
    figure, (axes,) = stacked([3.2])
    lowest = min(value for points in series.values() for point in points for value in point)
    ends = (max(0.0, lowest - 0.04), 1.02)
    axes.plot(ends, ends, color=colours["ink"], linewidth=0.8, linestyle="--")
    looks = (("s1", "o", "full"), ("s2", "s", "none"))
    for (name, points), (colour, marker, fill) in zip(series.items(), looks, strict=False):
        axes.plot(
            [probability for probability, _ in points],
            [hits for _, hits in points],
            marker=marker,
            fillstyle=fill,
            color=colours[colour],
            markersize=4,
            linewidth=1,
            label=name,
        )
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.set_xlabel("probability of what was decided")
    axes.set_ylabel("share of hits")
    axes.legend(loc="upper left")
    return figure


def _line(
    axes: Axes,
    epochs: Sequence[Epoch],
    split: str,
    key: str,
    colour: str,
    dashes: str,
    label: str,
) -> None:
    points = [
        (epoch.epoch, value)
        for epoch in epochs
        if epoch.split == split and (value := epoch.values.get(key)) is not None
    ]
    if points:
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            dashes,
            color=colour,
            linewidth=1.6,
            marker="o" if len(points) == 1 else None,
            markersize=3,
            label=label,
        )
