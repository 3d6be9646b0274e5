"""The part of a report about single questions: the routes taken, and the answers that change.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from drllm.paths import Decision, Decisions, num_executions
from drllm.records.results import BASE, ROUTED, Result, Sample
from drllm.reporting import figures
from drllm.reporting.blocks import Block, Figure, Section, Table
from drllm.reporting.numbers import NONE, count, percent, plain
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts

LONGEST = 120
"""Characters of a question or an answer; the samples hold the whole."""
ROWS = 5
"""Questions that are shown of each kind, the first ones, so that nobody picks the pretty ones."""


def sections(run: Run, evaluation: Result) -> list[Section]:
    """Return the sections on a task's routes and on the questions won and lost."""
    found = []
    if routes := evaluation.routes():
        found.append(Section("Routes by layer", [_routes(run, routes)]))
    able = [each for each in evaluation.samples if {BASE, ROUTED} <= each.systems.keys()]
    if able:
        found.append(Section("Questions won and lost", _changed(evaluation, able)))
    return found


def _shares(rows: Sequence[Decisions]) -> list[list[float]]:
    """Return how often each layer is skipped, executed and repeated: `[L][3]`."""
    return [[number / len(rows) for number in layer] for layer in class_counts(rows)]


def _routes(run: Run, routes: Sequence[Decisions]) -> Figure:
    distinct, shares = len(set(routes)), _shares(routes)
    targets = [record.optimal_layer_config for record in run.supervision]
    mean = plain(sum(map(num_executions, routes)) / len(routes), 2)
    skipped = sorted(range(len(shares)), key=lambda layer: -shares[layer][Decision.SKIP])[:3]
    told = ", ".join(f"{layer} ({percent(shares[layer][Decision.SKIP], 0)})" for layer in skipped)
    strokes = " Strokes are what the routers were trained for." if targets else ""
    return Figure(
        draw=partial(figures.routes_by_layer, shares, _shares(targets) if targets else None),
        name="routes by layer",
        alt=f"How often each layer is skipped, executed and repeated. Skipped most: {told}.",
        caption=f"{count(distinct)} distinct {'route' if distinct == 1 else 'routes'} on "
        f"{count(len(routes))} questions, {mean} layers run on average.{strokes}",
        is_large=True,
    )


def _change(sample: Sample) -> float:
    """Return what routing makes of a question: above 0 it is won, below 0 lost."""
    return sample.systems[ROUTED].correct - sample.systems[BASE].correct


def _changed(evaluation: Result, able: Sequence[Sample]) -> list[Block]:
    won = [sample for sample in able if _change(sample) > 0]
    lost = [sample for sample in able if _change(sample) < 0]
    same = [sample for sample in able if _change(sample) == 0]
    if evaluation.is_graded:
        kept = f"{count(len(same))} keep their grade"
    else:
        right = sum(sample.systems[BASE].correct >= 1 for sample in same)
        kept = f"{count(right)} stay right, {count(len(same) - right)} stay wrong"
    said = (
        f"Of {count(len(able))} questions {count(len(won))} are won (better with routing) and "
        f"{count(len(lost))} lost; {kept}."
    )
    shown = [*won[:ROWS], *lost[:ROWS]]
    if not shown:
        return [said]
    left = len(won) + len(lost) - len(shown)
    more = f" The others ({count(left)}) are in eval/samples.jsonl." if left else ""
    rows = [
        [
            _short(sample.question),
            "won" if _change(sample) > 0 else "lost",
            NONE if sample.gold is None else _short(sample.choices[sample.gold]),
            *(_answer(sample, system) for system in (BASE, ROUTED)),
        ]
        for sample in shown
    ]
    header, caption = "|right answer|base|routed", f"The first {ROWS} of each at most.{more}"
    table = Table.made(caption, f"question|with routing{header}", rows, f"with routing{header}")
    return [said, table]


def _answer(sample: Sample, system: str) -> str:
    """Return what a system answered, and its grade where it is neither right nor wrong."""
    found = sample.systems[system]
    grade = f" (graded {plain(found.correct, 2)})" if 0 < found.correct < 1 else ""
    if found.answer is None:
        return grade.strip(" ()") or ("right" if found.correct >= 1 else "wrong")
    text = found.answer if isinstance(found.answer, str) else sample.choices[found.answer]
    return (_short(text) or "nothing") + grade


def _short(text: str) -> str:
    """Write a text on one line, cut between words where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rsplit(" ", 1)[0] + " …"
