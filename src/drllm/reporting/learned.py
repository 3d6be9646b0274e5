"""The part of a report about the way to the routers: search, targets, training. Axes: L layers."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

from drllm import metrics
from drllm.metrics import ROUTERS, TRAIN, VALIDATION, ratios
from drllm.paths import Decision, num_executions
from drllm.reporting import figures
from drllm.reporting.blocks import Figure, Section
from drllm.reporting.numbers import plain
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts, edit_effects, summarise

MIN_QUESTIONS = 5
"""Single edits that were tried on fewer questions aren't named as best or worst."""


def sections(run: Run) -> list[Section]:
    """Return the sections on search and routers, as far as there are files for them."""
    found = []
    if run.search or run.supervision or run.summary:
        found.append(Section("Search and targets", (), 2, True, "search.j2", _searched(run)))
    if run.epochs:
        found.append(_routers(run))
    return found


def _searched(run: Run) -> dict[str, Any]:
    counts = summarise(run.search, (), {})
    targets = [record.optimal_layer_config for record in run.supervision]
    lengths = sorted(map(num_executions, targets))

    def edits(decision: Decision) -> Any:
        tried = edit_effects(run.search, decision)
        effects = [effect for effect in tried if effect.questions >= MIN_QUESTIONS]
        return sorted(effects, key=lambda effect: (-effect.reward, effect.layer))

    return {
        "searched": run.search,
        "counts": counts,
        # A supervision file of somebody else's has no summary; the search says all but the rejects.
        "summary": run.summary or counts | {"rejected": {}},
        "paths": fmean(len(record.paths) for record in run.search) if run.search else 0,
        "seconds": sum(record.seconds for record in run.search),
        "edits": {"Skipping": edits(Decision.SKIP), "Repeating": edits(Decision.REPEAT)},
        "targets": targets,
        "improving": sum(record.improving for record in run.supervision),
        "lengths": lengths,
        "mean": fmean(lengths) if lengths else 0,
        "labels": [sum(of_one) for of_one in zip(*class_counts(targets), strict=True)],
        "num_layers": run.num_layers,
    }


def _routers(run: Run) -> Section:
    layers = run.layers
    known = layers.parts[layers.judged] if layers else {}
    scores = {name: ratios(counts) for name, counts in known.items()}
    last = {epoch.split: epoch.values for epoch in run.epochs}
    told = [
        f"{split}, last epoch: macro-F1 {plain(last[split].get('macro_f1'), 3)}"
        for split in (TRAIN, VALIDATION)
        if split in last
    ]
    baselines = {name: each for name, each in scores.items() if name != ROUTERS}
    curves = Figure(
        draw=partial(figures.router_metrics, run.epochs, baselines),
        name="router metrics",
        alt=f"Macro-F1, labels hit and loss by epoch. {'; '.join(told)}.",
        caption="By epoch. Where targets are held out, full lines are validation and dotted lines "
        "training; the dashed line is the best of the decisions that ignore the question.",
    )
    settings = (run.router_config.get("training") or {}).get("settings") or {}
    values = {
        "layers": layers,
        "verdict": f"{metrics.verdict(layers.parts)} {metrics.by_layer(known)}" if layers else "",
        "scores": scores,
        "held_out": VALIDATION in last,
        "calibration": run.calibration,
        "is_folded": settings.get("calibrate") is True,
    }
    return Section("Router metrics", [curves], 2, True, "routers.j2", values)
