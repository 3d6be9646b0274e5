"""The drawings of a report: systems by the layers they run; routes, search and training.

How it is drawn is in `drawing`. Axes: L layers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from drllm.agreement import NAMES, TRAIN, VALIDATION
from drllm.paths import Decision
from drllm.records.healed import Checked
from drllm.records.results import BASE, PERMUTED, ROUTED, Evaluation, Point, System
from drllm.records.static_paths import FIT, SELECT, TEST, StaticPaths
from drllm.reporting.drawing import Colours, apart, legend, panels, whole_numbers
from drllm.reporting.run import Epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTER, LINE = 0.066, 0.15  # inches that a letter of a label takes, and a label's line
STATIC = "static paths"
LOOKS = {BASE: ("s0", "o"), ROUTED: ("s1", "o"), PERMUTED: ("s2", "s"), STATIC: ("s3", "^")}
"""Colour and marker of what stands out."""

Scores: TypeAlias = Mapping[str, float | None]
Shares: TypeAlias = Sequence[Sequence[float]]


def places(evaluation: Evaluation) -> dict[str, list[System | Point]]:
    """Return where each system stands, at all depths from the fewest executions.

    The depth that the routers were trained for is one of them. Static paths are one curve, on which
    base is, the full path.
    """
    found: dict[str, list[System | Point]] = {STATIC: [evaluation.base]} if evaluation.paths else {}
    for each in evaluation.systems:
        found.setdefault(STATIC if each.name in evaluation.paths else each.name, []).append(each)
    for point in evaluation.curve:
        if point.setting:
            found.setdefault(point.system, []).append(point)
    return {name: sorted(each, key=lambda one: one.executions) for name, each in found.items()}


def accuracy_by_executions(evaluation: Evaluation, colours: Colours, width: float) -> Figure:
    """Draw every system's accuracy over the layers it runs, each named beside its first point.

    Base and what is compared with it have their intervals; a system at several depths is a line,
    and so are static paths, each named where there is room.
    """
    ours = STATIC if evaluation.paths and evaluation.routed is None else ROUTED
    looks = {**LOOKS, ours: LOOKS[ROUTED]}
    found, base = places(evaluation), evaluation.base
    others = {name: points for name, points in found.items() if name != BASE}
    height = max(0.42 * width, 1.2 + LINE * 1.25 * len(others), 3.0)
    figure, (axes,) = panels(1, 1, width, height)
    every = [each for points in found.values() for each in points]
    right = max(each.executions for each in every)
    left = min(evaluation.num_layers - 0.5, *(each.executions for each in every))
    names = {
        name: f"{name}  {100 * points[0].accuracy:.1f} %" if len(points) == 1 else name
        for name, points in others.items()
    }
    # The labels stand in a column of their own, left of all points.
    share = min(0.6, (LETTER * max(map(len, names.values()), default=0) + 0.3) / (width - 0.6))
    room = (right - left) * share / (1 - share)
    axes.set_xlim(left - room, right + 0.03 * (right - left + room))
    levels = [100 * evaluation.chance] if evaluation.chance > 0 else []
    heights = [100 * end for each in every for end in each.interval] + levels
    space = 0.06 * (max(heights) - min(heights)) or 1.0
    low, high = max(min(heights) - space, -3.0), min(max(heights) + space, 103.0)
    label_places: list[float] = []
    for _ in range(3):  # the room that labels take depends on the range, which depends on them
        line = LINE * (high - low) / (height - 0.6)
        label_places = apart([100 * points[0].accuracy for points in others.values()], line)
        low = min([low, *(y - line for y in label_places)])
        high = max([high, *(y + line / 2 for y in label_places)])
    axes.set_ylim(low, high)

    def at(each: System | Point) -> tuple[float, float]:
        return each.executions, 100 * each.accuracy

    at_level: dict[str, Any] = {"color": colours["faint"], "linewidth": 0.8, "zorder": 0}
    axes.hlines(100 * base.accuracy, left, right, **at_level)
    beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right"}
    for level in levels:
        axes.hlines(level, left, right, linestyle=":", **at_level)
        axes.annotate("chance", (right, level), (0, 2), color=colours["faint"], **beside)
    for (name, points), place in zip(others.items(), label_places, strict=True):
        colour, marker = looks.get(name, ("faint", "D"))
        stands_out = name in looks
        xs, ys = zip(*map(at, points), strict=True)
        look: dict[str, Any] = {"color": colours[colour], "zorder": 2 + stands_out + (name == ours)}
        axes.plot(xs, ys, f"{marker}-", markersize=7 if name == ours else 4.5, **look)
        edge = left - 0.09 * room
        axes.plot([edge, xs[0]], [place, ys[0]], color=colours["grid"], linewidth=0.8, zorder=1)
        look = {"fontweight": "bold" if name == ours else "normal", "ha": "right"}
        ink = colours[colour if stands_out else "ink"]
        axes.text(edge - 0.015 * room, place, names[name], color=ink, va="center", **look)
    axes.plot(*at(base), "o", color=colours["s0"], ms=7, zorder=4)
    for name in (ours, BASE):
        for each in found.get(name, ()):
            low, high = (100 * end for end in each.interval)
            axes.vlines(each.executions, low, high, color=colours[looks[name][0]], linewidth=1.8)
    inches = (width - 0.6) / (right - left + room)  # that one layer takes
    for each, after in itertools.pairwise(found.get(STATIC, ())):
        if (after.executions - each.executions) * inches > (1.2 if after is base else 0.6):
            align = "left" if each.executions == left else "center"  # left are the labels
            look = {"color": colours[looks[STATIC][0]], "ha": align}
            axes.annotate(each.name, at(each), (3, 5), textcoords="offset points", **look)
    said = f"base  {100 * base.accuracy:.1f} %"
    axes.annotate(said, at(base), (-7, 5), color=colours["s0"], fontweight="bold", **beside)
    ticks = [tick for tick in axes.get_xticks() if left - 0.06 * (right - left) <= tick <= right]
    axes.set_xticks(ticks or [evaluation.num_layers])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(f"layers run a forward pass (full path: {evaluation.num_layers})", loc="right")
    axes.set_ylabel(f"{evaluation.score}, %")
    return figure


def routes_by_layer(
    routes: Shares, targets: Shares | None, colours: Colours, width: float
) -> Figure:
    """Draw how often each layer is skipped, executed and repeated: `[L][3]` shares, stacked.

    The targets' share of skips is a stroke at each layer.
    """
    figure, (axes,) = panels(1, 1, width, max(2.2, 0.24 * width))
    layers, bottom = range(len(routes)), [0.0] * len(routes)
    for decision, colour in zip(Decision, ("skip", "run", "repeat"), strict=True):
        values = [100 * layer[decision] for layer in routes]
        look: dict[str, Any] = {"color": colours[colour], "label": NAMES[decision]}
        axes.bar(layers, values, bottom=bottom, width=0.85, **look)
        bottom = list(map(operator.add, bottom, values))
    if targets is not None:
        skips = [100 * layer[Decision.SKIP] for layer in targets]
        look = {"color": colours["ink"], "linewidth": 1.6, "label": "skipped by targets"}
        left, right = ([layer + by for layer in layers] for by in (-0.42, 0.42))
        axes.hlines(skips, left, right, **look)
    ends = (-0.8, len(routes) - 0.2)
    axes.set(xlabel="layer", ylabel="questions, %", xlim=ends, ylim=(0, 101))
    whole_numbers(axes)
    legend(axes, columns=4 if width > 5 else 2)
    return figure


def changes_by_layers_saved(
    found: StaticPaths, task: str, colours: Colours, width: float
) -> Figure:
    """Draw paths' changes from the full one's objective, by part; on test with intervals."""
    figure, (axes,) = panels(1, 1, width, 2.6)
    for part, colour, dash in ((FIT, "faint", ":"), (SELECT, "s2", "--"), (TEST, "s1", "-")):
        known = [(found.num_layers - p.executions, p.on(task, part)) for p in found.paths]
        drawn = [(saved, *(on.change or (0.0, 0.0, 0.0))) for saved, on in known if on]
        saved, means, lows, highs = zip(*drawn, strict=True) if drawn else ((), (), (), ())
        axes.plot(saved, means, f"o{dash}", color=colours[colour], markersize=4, label=part)
    axes.vlines(saved, lows, highs, color=colours[colour], linewidth=1.2)
    axes.set(xlabel="layers saved", ylabel="objective minus full's, nats")
    whole_numbers(axes)
    legend(axes, columns=3)
    return figure


def kl_by_tokens(curve: Sequence[Checked], colours: Colours, width: float) -> Figure:
    """Draw the KL of training and of held-out texts over the tokens that were trained on."""
    figure, (axes,) = panels(1, 1, width, 2.6)
    tokens = [check.tokens / 1000 for check in curve]
    trained: list[Any] = [check.train_kl for check in curve]  # None, a gap, before the first step
    held_out = [check.held_out_kl for check in curve]
    axes.plot(tokens, trained, "o:", label="training", color=colours["faint"], markersize=4)
    axes.plot(tokens, held_out, "o-", label="held out", color=colours["s1"], markersize=4)
    axes.set(xlabel="tokens, thousands", ylabel="KL, nats a token")
    axes.set_ylim(bottom=0)
    legend(axes, columns=2)
    return figure


def router_metrics(
    epochs: Sequence[Epoch], baselines: Mapping[str, Scores], colours: Colours, width: float
) -> Figure:
    """Draw macro-F1, labels hit and loss by epoch.

    Of the baselines, decisions that ignore the question, each metric's best is a dashed line.
    """
    splits = [name for name in (TRAIN, VALIDATION) if any(e.split == name for e in epochs)]
    figure, found = panels(3, 1, width, 4.6, sharex=True)
    judged = (("macro_f1", "macro-F1"), ("accuracy", "labels hit"), ("routers_loss", "loss"))
    for axes, (key, title) in zip(found, judged, strict=True):
        for split in splits:
            of_split = [(each.epoch, getattr(each, key)) for each in epochs if each.split == split]
            points = [(epoch, value) for epoch, value in of_split if value is not None]
            marker = "o" if len(points) == 1 else None
            look: dict[str, Any] = {"marker": marker, "color": colours["s1"], "label": split}
            if points:
                dashes = "-" if split == splits[-1] else ":"
                axes.plot(*zip(*points, strict=True), dashes, linewidth=1.6, **look)
        known = {name: v for name, each in baselines.items() if (v := each.get(key)) is not None}
        if known and key != "routers_loss":
            best = max(known, key=lambda name: known[name])
            look = {"color": colours["ink"], "linewidth": 1, "linestyle": "--"}
            axes.axhline(known[best], label=best.replace("_", " "), **look)
        axes.set_ylabel(title)
        whole_numbers(axes)
        legend(axes, columns=3)
    found[-1].set_ylim(bottom=0)
    found[-1].set_xlabel("epoch")
    return figure
