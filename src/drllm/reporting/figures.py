"""The drawings of a report on routes and training.

The style of the drawings is in `drawing`. Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from drllm.agreement import DECISION_NAMES, TRAIN, VALIDATION
from drllm.paths import Decision
from drllm.reporting.drawing import Colours, add_legend, make_panels, use_whole_numbers
from drllm.reporting.run import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scores: TypeAlias = Mapping[str, float | None]  # metric → value
Shares: TypeAlias = Sequence[Sequence[float]]
"""`[L][3]`: how often each layer is skipped, executed and repeated."""


def draw_routes(routes: Shares, targets: Shares | None, colours: Colours, width: float) -> Figure:
    """Draw how often each layer is skipped, executed and repeated, as stacked bars.

    Args:
        routes: `[L][3]` shares of the decisions on questions.
        targets: `[L][3]` shares of the decisions in targets; a stroke marks their share of skips.
        colours: The colours.
        width: The width in inches.
    """
    figure, (axes,) = make_panels(1, 1, width, max(2.2, 0.24 * width))
    layers = range(len(routes))
    bottom = [0.0] * len(routes)
    for decision, colour in zip(Decision, ("skip", "run", "repeat"), strict=True):
        heights = [100 * shares[decision] for shares in routes]
        name = DECISION_NAMES[decision]
        axes.bar(layers, heights, bottom=bottom, width=0.85, color=colours[colour], label=name)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    if targets is not None:
        skips = [100 * shares[Decision.SKIP] for shares in targets]
        left = [layer - 0.42 for layer in layers]
        right = [layer + 0.42 for layer in layers]
        axes.hlines(
            skips, left, right, color=colours["ink"], linewidth=1.6, label="skipped by targets"
        )
    ends = (-0.8, len(routes) - 0.2)
    axes.set(xlabel="layer", ylabel="questions, %", xlim=ends, ylim=(0, 101))
    use_whole_numbers(axes)
    columns = 4 if width > 5 else 2
    add_legend(axes, columns=columns)
    return figure


def draw_router_metrics(
    epochs: Sequence[Epoch], baselines: Mapping[str, Scores], colours: Colours, width: float
) -> Figure:
    """Draw macro-F1, labels hit and loss by epoch.

    A dashed line is the best of the baselines; baselines ignore the question.
    """
    figure, all_axes = make_panels(3, 1, width, 4.6, sharex=True)
    metrics = (("macro_f1", "macro-F1"), ("accuracy", "labels hit"), ("routers_loss", "loss"))
    for axes, (key, title) in zip(all_axes, metrics, strict=True):
        _draw_metric(axes, epochs, key, colours["s1"])
        if key != "routers_loss":
            _draw_best_baseline(axes, baselines, key, colours["ink"])
        axes.set_ylabel(title)
        use_whole_numbers(axes)
        add_legend(axes, columns=3)
    all_axes[-1].set_ylim(bottom=0)
    all_axes[-1].set_xlabel("epoch")
    return figure


def _draw_metric(axes: Axes, epochs: Sequence[Epoch], key: str, colour: str) -> None:
    """Draw a metric of each split by epoch; the last split has a solid line."""
    present = {epoch.split for epoch in epochs}
    splits = [split for split in (TRAIN, VALIDATION) if split in present]
    for split in splits:
        numbers: list[int] = []
        values: list[float] = []
        for epoch in epochs:
            value = getattr(epoch, key)
            if epoch.split == split and value is not None:
                numbers.append(epoch.epoch)
                values.append(value)
        if values:
            dashes = "-" if split == splits[-1] else ":"
            marker = "o" if len(values) == 1 else None
            axes.plot(
                numbers, values, dashes, marker=marker, color=colour, label=split, linewidth=1.6
            )


def _draw_best_baseline(axes: Axes, baselines: Mapping[str, Scores], key: str, colour: str) -> None:
    values: dict[str, float] = {}
    for name, scores in baselines.items():
        value = scores.get(key)
        if value is not None:
            values[name] = value
    if values:
        best = max(values, key=values.__getitem__)
        label = best.replace("_", " ")
        axes.axhline(values[best], color=colour, linewidth=1, linestyle="--", label=label)
