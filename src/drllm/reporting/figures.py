"""The drawings of a report that are about routes, search and training.

Owns what is drawn. Leaves how it is drawn to `drawing`, what is about the test to `curves`, and the
numbers to `summary`. Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    epochs: Sequence[Epoch], baseline: Mapping[str, float | None], colours: Colours
) -> Figure:
    """Draw macro-F1, the F1 of each decision and the loss by epoch.

    Args:
        epochs: Lines of `metrics.jsonl`.
        baseline: What "always execute" scores, drawn as a dashed line where it is defined.
        colours: To draw with.
    """
    splits = [name for name in ("train", "validation") if any(e.split == name for e in epochs)]
    shown = splits[-1]
    figure, panels = stacked([1.6, 1.6, 1.6])
    for split in splits:
        dashed = "-" if split == shown else ":"
        for axes, key in ((panels[0], "macro_f1"), (panels[2], "routers_loss")):
            _line(axes, epochs, split, key, colours["s1"], dashed, split)
    if baseline.get("macro_f1") is not None:
        panels[0].axhline(
            float(baseline["macro_f1"] or 0),
            color=colours["ink"],
            linewidth=1,
            linestyle="--",
            label="always execute",
        )
    for key, colour in (("f1_skip", "skip"), ("f1_execute", "faint"), ("f1_repeat", "repeat")):
        _line(panels[1], epochs, shown, key, colours[colour], "-", key.removeprefix("f1_"))
    panels[0].set_ylabel("macro-F1")
    panels[1].set_ylabel(f"F1, {shown}")
    panels[2].set_ylabel("loss")
    panels[1].set_ylim(-0.03, 1.03)
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("epoch")
    for axes in panels:
        whole_numbers(axes)
        legend(axes, columns=3, below=False)
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
