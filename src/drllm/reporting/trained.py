"""The part of a report about how well the routers learned their labels.

Always compared with decisions that ignore the question. Axes: L layers, C = 3 decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from drllm.metrics import (
    ALWAYS_EXECUTE,
    LAYER_MAJORITY,
    ROUTERS,
    TRAIN,
    VALIDATION,
    Counts,
    by_layer,
    hit_ratios,
    ratios,
    shown,
    verdict,
)
from drllm.records.layers import Calibration, Layers
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Columns, Figure, Table, Text
from drllm.reporting.figures import Scores
from drllm.reporting.numbers import percent, plain
from drllm.reporting.run import Run

METRICS = (
    ("macro_f1", "macro-F1", 3),
    ("accuracy", "labels hit", 3),
    ("f1_skip", "F1 skip", 3),
    ("f1_execute", "F1 execute", 3),
    ("f1_repeat", "F1 repeat", 3),
    ("acc_skip", "skip labels hit", 3),
    ("acc_repeat", "repeat labels hit", 3),
    ("avg_layers", "executions", 2),
    ("routers_loss", "loss", 4),
)


def blocks(run: Run) -> list[Block]:
    """Return what is said of a run that has router metrics."""
    by_split = {
        split: {epoch.epoch: epoch.values for epoch in run.epochs if epoch.split == split}
        for split in (TRAIN, VALIDATION)
    }
    known = run.layers.parts[run.layers.judged] if run.layers else {}
    found = _judged(run.layers, known) if run.layers else []
    scores = {name: ratios(counts) for name, counts in known.items() if name != ROUTERS}
    if not by_split[VALIDATION]:
        found.append(Text("No targets were held out, so there are no validation metrics."))
    found.append(_curves(run, by_split, scores))
    if run.layers:
        found.append(_by_layer(run.layers, known))
    if run.calibration:
        settings = run.router_config["training"].get("settings") or {}
        found += _reliability(run.calibration, is_folded=settings.get("calibrate") is True)
    return found


# --- against baselines -------------------------------------------------------------------------


def _judged(layers: Layers, systems: Mapping[str, Counts]) -> list[Block]:
    """Say how the saved routers stand on each part, and whether they beat the best baseline."""
    execute, frequent = (ratios(systems[name]) for name in (ALWAYS_EXECUTE, LAYER_MAJORITY))
    guessed = (
        f"Executing every layer agrees with {percent(execute['accuracy'])} of the labels, and each "
        f"layer's most frequent label with {percent(frequent['accuracy'])}: what routers are worth "
        f"shows in the F1 of skip and repeat, not in accuracy."
    )
    tables = []
    for part in sorted(layers.parts, key=lambda part: part != layers.judged):
        columns = {shown(name): ratios(counts) for name, counts in layers.parts[part].items()}
        caption = (
            f"On {layers.title(part)}: routers after epoch {layers.epoch}, and decisions that "
            f"ignore the question"
        )
        rows = [
            [name, *(plain(scores.get(key), digits) for scores in columns.values())]
            for key, name, digits in METRICS
        ]
        tables.append([Table(caption=caption, header=("metric", *columns), rows=rows)])
    said = [Text(verdict(layers.parts)), Text(f"{guessed} {by_layer(systems)}")]
    return [*said, Columns(tables)]


# --- by epoch ----------------------------------------------------------------------------------


def _curves(
    run: Run, by_split: Mapping[str, Mapping[int, Scores]], scores: Mapping[str, Scores]
) -> Figure:
    told = [
        f"{split}, last epoch: macro-F1 {plain(values[max(values)].get('macro_f1'), 3)}"
        for split, values in by_split.items()
        if values
    ]
    told += [f"{shown(name)}: {plain(each['macro_f1'], 3)}" for name, each in scores.items()]
    return Figure(
        draw=partial(figures.router_metrics, run.epochs, scores),
        name="router metrics",
        alt=f"Macro-F1, labels hit, F1 by decision and loss by epoch. {'; '.join(told)}.",
        caption="Router metrics by epoch. Where targets are held out, full lines are "
        "validation and dotted lines training; the dashed line is the best of the decisions that "
        "ignore the question.",
    )


# --- by layer ----------------------------------------------------------------------------------


def _by_layer(layers: Layers, systems: Mapping[str, Counts]) -> Figure:
    """Draw each layer's labels, and how routers and the layer's majority hit them."""
    labels = systems[ROUTERS].labels
    shares = [[n / sum(layer) for n in layer] for layer in labels]
    ours, theirs = (
        [hit_ratios(layer) for layer in systems[name].confusion]
        for name in (ROUTERS, LAYER_MAJORITY)
    )
    title = layers.title(layers.judged)
    most = max(range(len(shares)), key=lambda layer: shares[layer][0])
    return Figure(
        draw=partial(figures.router_layers, shares, ours, theirs),
        name="router layers",
        alt=f"Labels, share of labels hit and F1 of skip by layer, on {title}. "
        f"{by_layer(systems)} Most often to be skipped: layer {most}, "
        f"{percent(shares[most][0])} of its labels; the routers' F1 of skip there is "
        f"{plain(ours[most]['f1_skip'], 3)}.",
        caption=f"By layer, on {title}: how often its label is skip or repeat, what share of "
        f"its labels the routers hit (dots) and its commonest label in training hits "
        f"(line), and the F1 of skip of both. No dot: skip is neither label nor decision.",
    )


# --- probabilities -----------------------------------------------------------------------------


def _reliability(found: Calibration, *, is_folded: bool) -> list[Block]:
    """Say and draw how probabilities and held-out targets agree."""
    verdict = "too sure" if found.temperature > 1 else "not sure enough"
    if found.temperature == 1:
        verdict = "as sure as they may be"
    temperature = plain(found.temperature, 2)
    said = Text(
        f"Of what they decide the routers are {verdict}: on {found.num_decisions} held-out "
        f"decisions their probabilities are off by {percent(found.ece_before)} on average "
        f"(expected calibration error), and fit best at a temperature of {temperature}, where it "
        f"is {percent(found.ece_after)}. That temperature was fitted on the same decisions and "
        f"is {'in' if is_folded else 'not in'} the weights."
    )
    if not found.reliability_before:
        return [said]
    bins = {
        "temperature 1": found.reliability_before,
        f"temperature {temperature}": found.reliability_after,
    }
    series = {name: [(each.confidence, each.hits) for each in part] for name, part in bins.items()}
    ends = " ".join(
        f"At {name} the least sure decisions are given {percent(points[0][0])} and hit "
        f"{percent(points[0][1])}, the surest {percent(points[-1][0])} and "
        f"{percent(points[-1][1])}."
        for name, points in series.items()
    )
    drawn = Figure(
        draw=partial(figures.router_reliability, series),
        name="router reliability",
        alt="Share of decisions that held-out targets agree with, by the probability that the "
        f"routers gave them. {ends}",
        caption=f"How far the routers' probabilities can be believed: {found.num_decisions} "
        f"held-out decisions in bins of as many each, by the probability of what was decided. "
        f"On the dashed line as many hit as the probability says; below it the routers are too "
        f"sure.",
    )
    return [said, drawn]
