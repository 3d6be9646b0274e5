"""The part of a report about the way to the routers: search, targets, training. Axes: L layers."""

from __future__ import annotations

from functools import partial
from statistics import fmean

from drllm import metrics
from drllm.cost import share_saved
from drllm.metrics import NAMES, ROUTERS, TRAIN, VALIDATION, ratios
from drllm.paths import Decision, num_executions
from drllm.records.layers import Calibration, Layers
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Figure, Section, Table, Text
from drllm.reporting.numbers import NONE, count, of_total, percent, plain, signed
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts, edit_effects, summarise

METRICS = {
    "macro_f1": "macro-F1",
    "accuracy": "labels hit",
    "f1_skip": "F1 skip",
    "f1_execute": "F1 execute",
    "f1_repeat": "F1 repeat",
    "avg_layers": "executions",
    "routers_loss": "loss",
}


def sections(run: Run) -> list[Section]:
    """Return the sections on search and routers, as far as there are files for them."""
    searched = _searched(run) if run.search else []
    searched += _yield(run) if run.search or run.summary else []
    searched += [_targets(run)] if run.supervision else []
    found = [Section("Search and targets", searched, folded=True)] if searched else []
    if run.epochs:
        found.append(Section("Router metrics", _routers(run), folded=True))
    return found


def _searched(run: Run) -> list[Block]:
    counts = summarise(run.search, run.supervision, {})
    tried = sum(len(record.paths) for record in run.search) / len(run.search)
    seconds = sum(record.seconds for record in run.search)
    copies = f" and {count(counts['copies'])} copies of them" if counts["copies"] else ""
    said = (
        f"{count(counts['questions'])} questions{copies} were searched, {plain(tried)} distinct "
        f"paths each on average, in {plain(seconds)} seconds. The full path answers "
        f"{of_total(counts['base_correct'], counts['questions'])} of them."
    )
    for name, edit in (("Skipping", Decision.SKIP), ("Repeating", Decision.REPEAT)):
        effects = edit_effects(run.search, edit)
        effects.sort(key=lambda effect: (-effect.reward, effect.layer))
        if effects:
            ends = (f"{e.layer} ({signed(e.reward, 2)})" for e in (effects[0], effects[-1]))
            best, worst = ends
            said += f" {name} one layer alone, by mean change of reward: best layer {best}"
            said += f", worst {worst}." if len(effects) > 1 else "."
    return [Text(said)]


def _yield(run: Run) -> list[Block]:
    # A supervision file of somebody else's has no summary; the search says all but the rejects.
    counts = dict(run.summary) or summarise(run.search, run.supervision, {}) | {"rejected": {}}
    questions = int(counts.get("questions", 0))

    def share(name: str) -> str:
        number = counts.get(name)
        return of_total(number, questions) if isinstance(number, int) else NONE

    kinds = {
        "valid": "valid (answers right)",
        "saving": "saving (right, and shorter than the full path)",
        "improving": "improving (right where the full path is wrong)",
    }
    table = Table.of(
        f"Of {count(questions)} questions, how many have such a path.",
        kinds.items(),
        {
            "path": lambda kind: kind[1],
            "before the re-test": lambda kind: share(f"{kind[0]}_before_retest"),
            "after": lambda kind: share(f"{kind[0]}_after_retest"),
        },
    )
    rejected = [f"{n} {why}" for why, n in (counts.get("rejected") or {}).items() if n]
    without = Text(f"Questions without a target, by reason: {', '.join(rejected)}.")
    return [table, *([without] if rejected else [])]


def _targets(run: Run) -> Text:
    targets = [record.optimal_layer_config for record in run.supervision]
    totals = [sum(of_one) for of_one in zip(*class_counts(targets), strict=True)]
    improving = sum(record.improving for record in run.supervision)
    lengths = [num_executions(target) for target in targets]
    saved = share_saved(fmean(lengths), len(targets[0]))
    labels = ", ".join(
        f"{name} {of_total(n, sum(totals))}" for name, n in zip(NAMES, totals, strict=True)
    )
    return Text(
        f"{count(len(targets))} targets, {of_total(improving, len(targets))} of them improving, "
        f"run {min(lengths)} to {max(lengths)} layers, {plain(fmean(lengths), 2)} on average, "
        f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'} than the full path's "
        f"{len(targets[0])}. Their labels: {labels}."
    )


def _routers(run: Run) -> list[Block]:
    found: list[Block] = []
    known = run.layers.parts[run.layers.judged] if run.layers else {}
    scores = {name: ratios(counts) for name, counts in known.items()}
    if run.layers:
        found += [
            Text(f"{metrics.verdict(run.layers.parts)} {metrics.by_layer(known)}"),
            _judged(run.layers, scores),
        ]
    last = {epoch.split: epoch.values for epoch in run.epochs}
    if VALIDATION not in last:
        found.append(Text("No targets were held out, so there are no validation metrics."))
    told = [
        f"{split}, last epoch: macro-F1 {plain(last[split].get('macro_f1'), 3)}"
        for split in (TRAIN, VALIDATION)
        if split in last
    ]
    scores.pop(ROUTERS, None)
    curves = Figure(
        draw=partial(figures.router_metrics, run.epochs, scores),
        name="router metrics",
        alt=f"Macro-F1, labels hit and loss by epoch. {'; '.join(told)}.",
        caption="By epoch. Where targets are held out, full lines are validation and dotted lines "
        "training; the dashed line is the best of the decisions that ignore the question.",
    )
    found.append(curves)
    if run.calibration:
        settings = run.router_config["training"].get("settings") or {}
        found.append(_calibrated(run.calibration, is_folded=settings.get("calibrate") is True))
    return found


def _judged(layers: Layers, scores: dict[str, dict[str, float | None]]) -> Table:
    """Return how the saved routers stand beside decisions that ignore the question."""
    return Table.of(
        f"On {layers.title(layers.judged)}, after epoch {layers.epoch}: routers, and decisions "
        f"that ignore the question.",
        METRICS.items(),
        {"metric": lambda metric: metric[1]}
        | {
            metrics.shown(name): lambda metric, own=each: plain(own.get(metric[0]), 3)
            for name, each in scores.items()
        },
    )


def _calibrated(found: Calibration, *, is_folded: bool) -> Text:
    """Say how far the routers' probabilities can be believed."""
    sure = "too sure" if found.temperature > 1 else "not sure enough"
    if found.temperature == 1:
        sure = "as sure as they may be"
    return Text(
        f"The routers are {sure}: on {found.num_decisions} held-out decisions their probabilities "
        f"are off by {percent(found.ece_before)} on average (expected calibration error), and by "
        f"{percent(found.ece_after)} at a temperature of {plain(found.temperature, 2)}, which was "
        f"fitted on the same decisions and is {'in' if is_folded else 'not in'} the weights."
    )
