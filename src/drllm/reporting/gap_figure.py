"""Draws the costs of a model's gaps as a heat map, with the chosen gaps marked."""

from __future__ import annotations

from pathlib import Path

from drllm.extras import need
from drllm.records.gaps import GapsRecord

MARKS = "ox+^sdv*"  # a mark for each number of layers


def draw_gaps(record: GapsRecord, file: Path) -> None:
    """Write the heat map of a `paths.json`: where a gap begins, how long it is, what it costs.

    Args:
        record: The costs and the chosen sets.
        file: The picture to write, such as `gaps.png`.
    """
    need("report", "drawing the costs of gaps", "matplotlib")
    from matplotlib.figure import Figure

    longest = max(gap.end - gap.first for gap in record.gaps)
    costs = [[float("nan")] * record.num_layers for _ in range(longest)]
    for gap in record.gaps:
        costs[gap.end - gap.first - 1][gap.first] = gap.cheap
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    extent = (-0.5, record.num_layers - 0.5, 0.5, longest + 0.5)
    image = axes.imshow(costs, origin="lower", aspect="auto", extent=extent, cmap="viridis")
    figure.colorbar(image, label="cost: root of the relative error after a linear bridge")
    for mark, path in zip(MARKS, record.paths, strict=False):
        starts = [layer for layer in path.skip if layer - 1 not in path.skip]
        ends = [layer + 1 for layer in path.skip if layer + 1 not in path.skip]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        label = f"{record.num_layers - len(path.skip)} layers stay"
        axes.plot(starts, lengths, mark, color="white", label=label)
    axes.set_xlabel("first layer left out")
    axes.set_ylabel("layers left out in a row")
    axes.legend(facecolor="grey", labelcolor="white")
    figure.savefig(file, dpi=120)
