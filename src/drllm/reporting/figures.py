"""The drawings of a report that are about routes, search and training.

Owns what is drawn. Leaves how it is drawn to `drawing`, what is about the test to `curves`, and the
numbers to `summary`. Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drllm.reporting.drawing import Colours, legend, stacked, whole_numbers
from drllm.reporting.run import Epoch
from drllm.reporting.summary import EditEffect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def labels_against_routes(
    skips: Mapping[str, Sequence[float]],
    repeats: Mapping[str, Sequence[float]],
    colours: Colours,
) -> Figure:
    """Draw the share of skips and of repeats by layer, each panel on a scale of its own.

    Args:
        skips: `[L]` shares by what they are shares of (targets, routes).
        repeats: The same for repeats.
        colours: To draw with.
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
        legend(axes, columns=2, below=False)
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
    legend(axes, columns=1, below=False)
    return figure


def router_metrics(
    epochs: Sequence[Epoch],
    baselines: Mapping[str, Mapping[str, float | None]],
    colours: Colours,
) -> Figure:
    """Draw macro-F1, labels hit (where they were kept), the F1 of each decision and loss by epoch.

    Args:
        epochs: Lines of `metrics.jsonl`.
        baselines: Metrics of decisions that ignore the question, by name; of each metric the best
            is drawn as a dashed line.
        colours: To draw with.
    """
    splits = [name for name in ("train", "validation") if any(e.split == name for e in epochs)]
    shown = splits[-1]
    judged = [("macro_f1", "macro-F1"), ("accuracy", "labels hit")]
    if not any("accuracy" in epoch.values for epoch in epochs):
        del judged[1]  # older routers
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
        legend(axes, columns=3, below=False)
    return figure


def router_layers(
    shares: Sequence[Sequence[float]],
    routers: Sequence[Mapping[str, float | None]],
    majority: Sequence[Mapping[str, float | None]],
    colours: Colours,
) -> Figure:
    """Draw each layer's labels, the share of them that is hit, and the F1 of skip.

    Args:
        shares: `[L][3]`: of each layer's labels, how many are skip, execute and repeat.
        routers: `[L]`: the routers' metrics at each layer.
        majority: `[L]`: those of the layer's commonest label.
        colours: To draw with.
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
        legend(axes, columns=2, below=False)
    panels[-1].set_xlabel("layer")
    return figure


def router_reliability(
    series: Mapping[str, Sequence[tuple[float, float]]], colours: Colours
) -> Figure:
    """Draw the share of hits over the probability of what was decided.

    Args:
        series: Points (probability, share of hits) by name, at most two.
        colours: To draw with.
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
