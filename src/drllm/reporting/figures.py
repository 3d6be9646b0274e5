"""The drawings of a report, as `<svg>` elements that follow the page's light or dark colours.

Owns what is drawn and how. Drawn by matplotlib without pyplot, so that nothing global is touched;
colours leave here as CSS variables, texts as texts in the page's own font. Leaves the numbers to
`summary` and the colours' values to `page`. Axes: L layers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drllm.reporting.results import BASE, Evaluation
from drllm.reporting.run import Epoch
from drllm.reporting.summary import EditEffect

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.2
"""Inches. Small, so that the 8-point texts can still be read when a phone scales the figure."""

COLOURS = {
    "ink": "#010101",
    "faint": "#020202",
    "grid": "#030303",
    "skip": "#040404",
    "repeat": "#050505",
    "s0": "#060606",
    "s1": "#070707",
    "s2": "#080808",
    "s3": "#090909",
    "s4": "#0a0a0a",
    "s5": "#0b0b0b",
}
"""Name of a CSS variable → the placeholder that matplotlib draws with."""

_MARKERS = "osD^vP"
_SERIES = ("s0", "s1", "s2", "s3", "s4", "s5")


def accuracy_against_executions(evaluation: Evaluation) -> str:
    """Draw each system's accuracy with its interval over its executions a forward pass."""
    with _style():
        figure, (axes,) = _figure([3.0])
        placed = _side_by_side([system.executions for system in evaluation.systems])
        for number, (system, x) in enumerate(zip(evaluation.systems, placed, strict=True)):
            low, high = system.interval
            y = 100 * system.accuracy
            axes.errorbar(
                [x],
                [y],
                yerr=[[max(0.0, y - 100 * low)], [max(0.0, 100 * high - y)]],
                fmt=_MARKERS[number % len(_MARKERS)],
                color=COLOURS[_SERIES[number % len(_SERIES)]],
                markersize=6,
                capsize=3,
                elinewidth=1.4,
                label=system.name,
            )
        base = evaluation.system(BASE)
        if base is not None:
            axes.axhline(100 * base.accuracy, color=COLOURS["faint"], linewidth=0.8, zorder=0)
        axes.axhline(
            100 * evaluation.chance,
            color=COLOURS["faint"],
            linewidth=1,
            linestyle=":",
            label="chance",
        )
        axes.margins(x=0.12)
        axes.set_xlabel(f"executions a forward pass (full path: {evaluation.num_layers})")
        axes.set_ylabel("accuracy, %, with 95 % interval")
        _legend(axes, columns=2)
        return _svg(figure, f"accuracy {evaluation.task}")


def labels_against_routes(
    skips: Mapping[str, Sequence[float]], repeats: Mapping[str, Sequence[float]]
) -> str:
    """Draw the share of skips and of repeats by layer, each panel on a scale of its own.

    Args:
        skips: `[L]` shares by what they are shares of (targets, routes).
        repeats: The same for repeats.
    """
    with _style():
        figure, panels = _figure([1.75, 1.75])
        for axes, name, series in zip(panels, ("skip", "repeat"), (skips, repeats), strict=True):
            for number, (label, values) in enumerate(series.items()):
                layers = range(len(values))
                percents = [100 * value for value in values]
                if number == 0:
                    axes.bar(layers, percents, color=COLOURS[name], alpha=0.4, label=label)
                else:
                    axes.plot(
                        layers,
                        percents,
                        "o-",
                        color=COLOURS["ink"],
                        markersize=3,
                        linewidth=0.9,
                        label=label,
                    )
            axes.set_xlim(-0.8, max(map(len, series.values())) - 0.2)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(f"{name}, %")
            _whole_layers(axes)
            _legend(axes, columns=2, below=False)
        panels[-1].set_xlabel("layer")
        return _svg(figure, "labels and routes")


def single_edits(
    skips: Sequence[EditEffect], repeats: Sequence[EditEffect], num_layers: int
) -> str:
    """Draw the mean change of reward by edited layer, skips above repeats."""
    with _style():
        figure, panels = _figure([1.75, 1.75])
        for axes, name, effects in zip(panels, ("skip", "repeat"), (skips, repeats), strict=True):
            layers = [effect.layer for effect in effects]
            changes = [effect.reward for effect in effects]
            # Stems with dots, so that "no change" and "not tried" look different.
            axes.vlines(layers, 0, changes, color=COLOURS[name], linewidth=1.6)
            axes.plot(layers, changes, "o", color=COLOURS[name], markersize=3.2)
            axes.axhline(0, color=COLOURS["ink"], linewidth=0.8)
            axes.set_xlim(-0.8, num_layers - 0.2)
            axes.set_ylabel(f"one {name}:\nreward change")
            _whole_layers(axes)
        panels[-1].set_xlabel("edited layer")
        return _svg(figure, "single edits")


def target_executions(lengths: Sequence[int], num_layers: int) -> str:
    """Draw how many targets have how many executions, with the full path marked."""
    with _style():
        figure, (axes,) = _figure([2.4])
        values = range(min(lengths), max(lengths) + 1)
        axes.bar(values, [lengths.count(value) for value in values], color=COLOURS["s1"])
        axes.axvline(
            num_layers, color=COLOURS["ink"], linewidth=1, linestyle="--", label="full path"
        )
        axes.set_xlabel("executions of the target path")
        axes.set_ylabel("questions")
        _whole_layers(axes)
        _legend(axes, columns=1, below=False)
        return _svg(figure, "target executions")


def router_metrics(epochs: Sequence[Epoch], baseline: Mapping[str, float | None]) -> str:
    """Draw macro-F1, the F1 of each decision and the loss by epoch.

    Args:
        epochs: Lines of `metrics.jsonl`.
        baseline: What "always execute" scores, drawn as a dashed line where it is defined.
    """
    splits = [name for name in ("train", "validation") if any(e.split == name for e in epochs)]
    shown = splits[-1]
    with _style():
        figure, panels = _figure([1.6, 1.6, 1.6])
        for split in splits:
            dashed = "-" if split == shown else ":"
            for axes, key in ((panels[0], "macro_f1"), (panels[2], "routers_loss")):
                _line(axes, epochs, split, key, "s1", dashed, split)
        if baseline.get("macro_f1") is not None:
            panels[0].axhline(
                float(baseline["macro_f1"] or 0),
                color=COLOURS["ink"],
                linewidth=1,
                linestyle="--",
                label="always execute",
            )
        for key, colour in (("f1_skip", "skip"), ("f1_execute", "faint"), ("f1_repeat", "repeat")):
            _line(panels[1], epochs, shown, key, colour, "-", key.removeprefix("f1_"))
        panels[0].set_ylabel("macro-F1")
        panels[1].set_ylabel(f"F1, {shown}")
        panels[2].set_ylabel("loss")
        panels[1].set_ylim(-0.03, 1.03)
        panels[2].set_ylim(bottom=0)
        panels[2].set_xlabel("epoch")
        for axes in panels:
            _whole_layers(axes)
            _legend(axes, columns=3, below=False)
        return _svg(figure, "router metrics")


# --- how all are drawn -------------------------------------------------------------------------


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,  # a system may be called anything
            "font.size": 8,
            "text.color": COLOURS["ink"],
            "axes.labelcolor": COLOURS["ink"],
            "axes.edgecolor": COLOURS["faint"],
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": COLOURS["grid"],
            "grid.linewidth": 0.6,
            "xtick.color": COLOURS["faint"],
            "ytick.color": COLOURS["faint"],
            "xtick.labelcolor": COLOURS["ink"],
            "ytick.labelcolor": COLOURS["ink"],
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.frameon": False,
            "legend.labelcolor": COLOURS["ink"],
        }
    )


def _figure(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))
    return figure, [row[0] for row in panels]


def _legend(axes: Axes, *, columns: int, below: bool = True) -> None:
    handles, names = axes.get_legend_handles_labels()
    if not names:
        return
    # By default lines come before bars; here the order is that of drawing.
    order = sorted(range(len(names)), key=lambda number: _drawn(axes, handles[number]))
    handles, names = [handles[i] for i in order], [names[i] for i in order]
    if below:
        axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns)
    else:
        axes.legend(
            handles,
            names,
            loc="lower right",
            bbox_to_anchor=(1, 0.97),
            ncols=columns,
            borderaxespad=0,
            borderpad=0.2,
            handlelength=1.4,
        )


def _drawn(axes: Axes, handle: Any) -> int:
    """Return when a legend's entry was drawn: containers (bars, error bars) before lines."""
    containers = list(axes.containers)
    return containers.index(handle) if handle in containers else len(containers)


def _whole_layers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))
    axes.grid(visible=False, axis="x")


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
            color=COLOURS[colour],
            linewidth=1.6,
            marker="o" if len(points) == 1 else None,
            markersize=3,
            label=label,
        )


def _side_by_side(values: Sequence[float]) -> list[float]:
    """Shift values that would be drawn on top of each other apart, evenly around their mean."""
    step = max(0.02 * (max(values) - min(values)), 0.02)
    groups: list[list[int]] = []
    for number in sorted(range(len(values)), key=values.__getitem__):
        if groups and values[number] - values[groups[-1][-1]] < step:
            groups[-1].append(number)
        else:
            groups.append([number])
    placed = list(values)
    for group in groups:
        middle = sum(values[number] for number in group) / len(group)
        for place, number in enumerate(sorted(group)):
            placed[number] = middle + 1.6 * step * (place - (len(group) - 1) / 2)
    return placed


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element that can stand in a page beside others.

    Taken out: the file header, the metadata (foreign addresses), a style that would apply to the
    whole page, the fixed size, names that would be given twice in a page, and fonts.
    """
    import matplotlib

    drawn = io.StringIO()
    # The salt makes names of shapes differ between figures, and equal between runs.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href=", "href=")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = f"<svg {box.group()}" + svg[svg.index(">") :]
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", svg).strip()
