"""The part of a report about one task's results: tiles, plot, table of systems, depths, choice.

What is claimed are the evaluation's own findings and the labels of its verdicts; nothing is judged
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from drllm.cost import share_saved
from drllm.records.results import BASE, PERMUTED, ROUTED, Evaluation, Latency, Point, System
from drllm.reporting import cost, figures
from drllm.reporting.blocks import Block, Figure, Listing, Section, Table, Text, Tile, Tiles
from drllm.reporting.numbers import NONE, against, count, difference, label, percent, plain
from drllm.statistics.verdicts import Differences, Quantity, Verdict

Named: TypeAlias = tuple[str, Evaluation, System | Point]
"""What is shown in a row of several runs or tasks: its name, the evaluation, a system in it."""


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
    size, _, ends = difference(verdict).partition(" ")
    said = f"95 % interval {ends.strip('()')}; {note}"
    return Tile(f"{title}, routed less base", f"{size} {unit}", said, verdict.label)


def sections(evaluation: Evaluation) -> list[Section]:
    """Return the plot, the table of systems, and the certified choice, if one was asked for."""
    found = [Section("Accuracy over layers run", [_plot(evaluation)])]
    found.append(Section("Systems", _systems(evaluation)))
    if choice := evaluation.choice:
        *sentences, verdict = choice.sentences()
        found.append(Section("Certified choice", [Text(verdict), Listing(sentences)]))
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


def _verdict(found: Differences | None, quantity: Quantity) -> Verdict | None:
    return getattr(found, quantity, None)


def _systems(evaluation: Evaluation) -> list[Block]:
    """Return the table of systems, the best first, and what the evaluation found besides.

    In each row the routed model is compared with the row's system.
    """
    routed = evaluation.routed

    def compared(system: System, quantity: Quantity) -> Verdict | None:
        is_base = system.name == BASE and routed is not None
        found = routed.against_base if is_base and routed else system.routed_against
        return _verdict(found, quantity)

    guessing = f", guessing gives {percent(evaluation.chance)}" if evaluation.chance else ""
    drawn = any(system.draws > 1 for system in evaluation.systems)
    table = Table.of(
        f"{count(evaluation.num_questions)} questions{guessing}; the best first. On the right: "
        "what the routed model has more than each system, with 95 % intervals, and what is shown "
        f"of it.{' ×N: the mean over N draws.' if drawn else ''}",
        sorted(evaluation.systems, key=lambda s: (-s.accuracy, s.executions)),
        {
            "system": lambda s: s.name + (f" ×{s.draws}" if s.draws > 1 else ""),
            "layers run": lambda s: plain(s.executions, 2),
            f"{evaluation.score}, %": lambda s: plain(100 * s.accuracy),
            "next-token loss": lambda s: plain(s.text_loss, 3),
            "routed less it, points": lambda s: difference(compared(s, "accuracy")),
            "routed is": lambda s: label(compared(s, "accuracy")),
            "loss, routed less it, nats": lambda s: difference(compared(s, "text_loss")),
            "routed is, by loss": lambda s: label(compared(s, "text_loss")),
        },
        words=("routed is", "routed is, by loss"),
        bold=ROUTED,
    )
    blocks: list[Block] = [table]
    aside = set(evaluation.choice.sentences()) if evaluation.choice else set()
    if also := [each for each in evaluation.findings[1:] if each not in aside]:
        blocks.append(Listing(also))
    return blocks


def details(evaluation: Evaluation) -> list[Section]:
    """Return what is shown on request: what the systems are, and all depths in numbers."""
    reads = {None: NONE, True: "yes", False: "no"}
    blocks: list[Block] = [
        Table.of(
            "What each system does, and where it comes from.",
            evaluation.systems,
            {
                "system": lambda s: s.name,
                "what it does": lambda s: s.description or NONE,
                "source": lambda s: s.source or NONE,
                "fitted on": lambda s: s.fitted_on or NONE,
                "reads the question": lambda s: reads[s.reads_question],
                "gold log-probability": lambda s: plain(s.gold_logprob, 3),
            },
            words=("what it does", "source", "fitted on", "reads the question"),
        )
    ]
    if evaluation.not_compared:
        missing = (f"{name}: {why}" for name, why in evaluation.not_compared.items())
        blocks.append(Text(f"Not compared: {'; '.join(missing)}."))
    found = [Section("What the systems are", blocks, folded=True)]
    if evaluation.curve:
        found.append(Section("All depths in numbers", [_depths(evaluation)], folded=True))
    return found


def _depths(evaluation: Evaluation) -> Table:
    return Table.of(
        "Every system at every depth, less base, and the routed model less it, with 95 % "
        "intervals; each comparison by itself.",
        evaluation.curve,
        {
            "system": lambda p: p.system,
            "depth": lambda p: p.setting or NONE,
            "layers run": lambda p: plain(p.executions, 2),
            f"{evaluation.score}, %": lambda p: plain(100 * p.accuracy),
            "less base's, points": lambda p: difference(_verdict(p.against_base, "accuracy")),
            "loss less base's, nats": lambda p: difference(_verdict(p.against_base, "text_loss")),
            "routed less it, points": lambda p: difference(_verdict(p.routed_against, "accuracy")),
            "routed is": lambda p: label(_verdict(p.routed_against, "accuracy")),
        },
        words=("depth", "routed is"),
        bold=ROUTED,
    )


def side_by_side(caption: str, rows: Sequence[Named]) -> Table:
    """Return systems of several runs or tasks, each less the base model of its own evaluation."""

    def less(row: Named, quantity: Quantity) -> Verdict | None:
        return _verdict(row[2].against_base, quantity)

    several = any(name != evaluation.task for name, evaluation, _ in rows)

    def certified(row: Named) -> str:
        choice = row[1].choice
        if choice is None or row[2].name != ROUTED:
            return NONE
        return choice.certified.name if choice.certified else "none"

    return Table.of(
        caption,
        rows,
        {
            "run" if several else "task": lambda r: r[0],
            **({"of task": lambda r: r[1].task} if several else {}),
            "questions": lambda r: count(r[1].num_questions),
            "system": lambda r: r[2].name,
            "layers run": lambda r: plain(r[2].executions, 2),
            "accuracy, %": lambda r: plain(100 * r[2].accuracy),
            "less base's, points": lambda r: difference(less(r, "accuracy")),
            "it is": lambda r: label(less(r, "accuracy")),
            "loss less base's, nats": lambda r: difference(less(r, "text_loss")),
            "it is, by loss": lambda r: label(less(r, "text_loss")),
            "routed, by its routes permuted, is": lambda r: (
                label(against(r[1].system(PERMUTED))) if r[2].name == ROUTED else NONE
            ),
            "certified": certified,
        },
        words=("of task", "system", "it is", "it is, by loss", "certified"),
    )


def in_rows(name: str, evaluation: Evaluation, *, depths: bool) -> list[Named]:
    """Return the rows of base and routed model for `side_by_side`, at other depths too."""
    found: list[Named] = [
        (name, evaluation, each) for each in evaluation.systems if each.name in (BASE, ROUTED)
    ]
    points = evaluation.curve if depths else ()
    return found + [(name, evaluation, each) for each in points if each.system == ROUTED]
