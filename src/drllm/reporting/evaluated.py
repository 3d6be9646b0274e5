"""The part of a report about one task's results: tiles, plot, table of systems, depths, choice.

What is claimed are the evaluation's own findings and the labels of its verdicts; nothing is judged
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from drllm.cost import share_saved
from drllm.records.results import BASE, ROUTED, Evaluation, Latency, Point, System
from drllm.reporting import cost, figures
from drllm.reporting.blocks import Figure, Listing, Section, Tile, Tiles
from drllm.reporting.numbers import percent, plain
from drllm.statistics.verdicts import Verdict


def first_line(evaluation: Evaluation) -> str:
    """Return what the evaluation says first."""
    alone = f"Base answers {percent(evaluation.base.accuracy)} right; nothing is compared with it."
    return evaluation.findings[0] if evaluation.findings else alone


def tiles(evaluation: Evaluation, measured: Latency | None) -> Tiles:
    """Return the four numbers that count: layers saved, both differences, measured time."""
    routed = evaluation.routed
    if routed is None or (found := routed.against_base) is None:
        return Tiles([cost.tile(measured)])
    saved = share_saved(routed.executions, evaluation.num_layers)
    run = f"{plain(routed.executions, 2)} of {evaluation.num_layers} run a forward pass"
    title = "Layers saved" if saved >= 0 else "More layers run"
    score = evaluation.score if evaluation.is_graded else "Accuracy"
    before = f"base {percent(evaluation.base.accuracy)}, routed {percent(routed.accuracy)}"
    each = [Tile(title, percent(abs(saved)), run), _tile(score, found.accuracy, "points", before)]
    if found.text_loss is not None:
        less_is_better = "nats a token; less is better"
        each.append(_tile("Next-token loss", found.text_loss, "nats", less_is_better))
    return Tiles([*each, cost.tile(measured)])


def _tile(title: str, verdict: Verdict, unit: str, note: str) -> Tile:
    low, high = map(verdict.write, verdict.interval)
    size, said = verdict.write(verdict.mean), f"95 % interval {low} to {high}; {note}"
    return Tile(f"{title}, routed less base", f"{size} {unit}", said, verdict.label)


def sections(evaluation: Evaluation) -> list[Section]:
    """Return the plot, the table of systems, and the certified choice, if one was asked for."""
    found = [Section("Accuracy over layers run", [_plot(evaluation)])]
    values = {"evaluation": evaluation}
    found.append(Section("Systems", template="table.j2", values=values))
    if choice := evaluation.choice:
        *sentences, verdict = choice.sentences()
        found.append(
            Section("Certified choice", [verdict, Listing(sentences)] if sentences else [verdict])
        )
    return found


def _plot(evaluation: Evaluation) -> Figure:
    shown = ", ".join(
        f"{each.name} {percent(each.accuracy)} at {plain(each.executions, 2)}"
        for each in evaluation.systems
    )
    depths = "; lines join a system's depths" if evaluation.curve else ""
    return Figure(
        draw=partial(figures.accuracy_by_executions, evaluation),
        name=f"{evaluation.task} systems",
        alt=f"{evaluation.score.capitalize()} over layers run a forward pass: {shown}.",
        caption=f"Higher is better, further left is cheaper. Bars are 95 % intervals of base and "
        f"routed{depths}.",
        is_large=True,
    )


def details(evaluation: Evaluation) -> list[Section]:
    """Return what is shown on request: what the systems are, and all depths in numbers."""
    values = {"evaluation": evaluation}
    found = [Section("What the systems are", (), 2, True, "systems.j2", values)]
    if evaluation.curve:
        found.append(Section("All depths in numbers", (), 2, True, "depths.j2", values))
    return found


def side_by_side(what: str, named: Sequence[tuple[str, Evaluation]], caption: str) -> Section:
    """Return base and routed model, at all depths, of several runs or tasks (`what` says which)."""
    placed: list[tuple[str, Evaluation, System | Point]] = []
    for name, each in named:
        placed += [(name, each, one) for one in each.systems if one.name in (BASE, ROUTED)]
        placed += [(name, each, one) for one in each.curve if one.system == ROUTED]
    values = {"what": what, "named": placed, "caption": caption}
    return Section(f"{what.capitalize()}s compared", template="compared.j2", values=values)
