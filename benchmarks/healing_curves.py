"""Draw what more tokens give: to solve a refit, and to train from the refit or without one.

The left panel has the increase of the next-token loss over the full path's by the calibration
tokens of a refit, from files of `benchmarks/repair.py --tokens … --json`. The right panel has the
KL from the full path on held-out texts by the tokens that were trained on, a line for each healed
folder, as `drllm heal` keeps it in its `path.json`. Either panel is left out if nothing is given
for it. `--figures` adds the lines of a file that this script has written with `--json`. Nothing is
measured here.

    python benchmarks/healing_curves.py --png FILE [--refits FILE,...] [--healed FOLDER,...]
        [--labels TEXT,...] [--figures FILE] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import common

from drllm.records.healed import HEALED_FILE, HealPoint, read_healed
from drllm.reporting import drawing

COLOURS = ("s1", "s2", "s3", "s4", "s5", "s0")
REFIT = "refit"

Curves = dict[str, list[tuple[int, float]]]
"""The label of a line → its points: tokens, and what they leave."""


def read_refits(file: Path) -> Curves:
    """Return a line for each path that a file of `benchmarks/repair.py` has refits of."""
    curves: Curves = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        if row["way"] == REFIT:
            label, _, _ = row["row"].partition(", refit")
            curves.setdefault(label, []).append((row["num_tokens"], row["seen"]["mean"]))
    return {label: sorted(points) for label, points in curves.items()}


def read_training(folder: Path) -> list[HealPoint]:
    """Return the curve of a healed folder."""
    record = read_healed(folder / HEALED_FILE)
    if not record.curve:
        raise SystemExit(f"{folder} wasn't trained, so it has no curve; leave it out of --healed")
    return list(record.curve)


def draw_curves(refits: Curves, trainings: Curves, colours: drawing.Colours, width: float) -> Any:
    """Draw both panels."""
    panels = {}
    if refits:
        panels["calibration tokens of a refit, thousands"] = ("loss, nats a token more", refits)
    if trainings:
        panels["tokens trained on, thousands"] = ("KL on held-out texts, nats a token", trainings)
    figure, all_axes = drawing.make_panels(1, len(panels), width, 3.4)
    for axes, (title, (quantity, curves)) in zip(all_axes, panels.items(), strict=True):
        for (label, points), colour in zip(curves.items(), itertools.cycle(COLOURS)):
            tokens = [number / 1000 for number, _ in points]
            values = [value for _, value in points]
            axes.plot(tokens, values, "o-", color=colours[colour], label=label, markersize=3)
        axes.set(xlabel=title, ylabel=quantity)
        if curves is refits:
            use_powers(axes, refits)
        axes.axhline(0, color=colours["grid"], linewidth=0.8, zorder=0)
        drawing.add_legend(axes, columns=1)
    return figure


def use_powers(axes: Any, refits: Curves) -> None:
    """Let equal steps of the horizontal axis be equal factors, and name the tokens measured."""
    tokens = sorted({number / 1000 for points in refits.values() for number, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(tokens, [f"{number:g}" for number in tokens])
    axes.set_xticks([], minor=True)


def read_curves(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[Curves, Curves]:
    """Read all files and folders that were named; refuse two curves with one label."""
    refits: Curves = {}
    for name in filter(None, (options.refits or "").split(",")):
        for label, points in read_refits(Path(name)).items():
            refits[label] = sorted({*refits.get(label, []), *points})
    folders = [Path(name) for name in filter(None, (options.healed or "").split(","))]
    labels = options.labels.split(",") if options.labels else [folder.name for folder in folders]
    if len(set(labels)) != len(folders):
        parser.error(f"--labels: give {len(folders)} different ones, one for each healed folder")
    trainings: Curves = {}
    for folder, label in zip(folders, labels, strict=True):
        trainings[label] = [(point.tokens, point.held_out_kl) for point in read_training(folder)]
    if options.figures:
        figures = json.loads(options.figures.read_text(encoding="utf-8"))
        refits = figures["refits"] | refits
        trainings = figures["trainings"] | trainings
    return refits, trainings


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "", "the same")
    parser.add_argument("--refits", help="files of benchmarks/repair.py, separated by commas")
    parser.add_argument("--healed", help="folders of drllm heal, separated by commas")
    parser.add_argument("--labels", help="of the healed folders, separated by commas")
    parser.add_argument("--figures", type=Path, help="a file of this script's --json, to add")
    parser.add_argument("--png", type=Path, required=True, help="the drawing")
    options = parser.parse_args()
    refits, trainings = read_curves(parser, options)
    if not refits and not trainings:
        parser.error("nothing to draw; give --refits, --healed or --figures")
    draw = partial(draw_curves, refits, trainings)
    options.png.write_bytes(drawing.draw_png(draw, drawing.WIDE))
    common.write_figures(options, {"refits": refits, "trainings": trainings})


if __name__ == "__main__":
    main()
