"""The part of a report about single questions: those that change, the routes, examples.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from drllm.metrics import NAMES
from drllm.paths import Decision, Decisions, num_executions, sketch
from drllm.records.results import BASE, ROUTED, Result, Sample
from drllm.reporting import blocks, figures
from drllm.reporting.blocks import Block, Section, Table, Text
from drllm.reporting.numbers import count, percent, plain
from drllm.reporting.run import Run
from drllm.supervision.summary import class_counts

LONGEST = 90
"""Characters of a question in a table; the samples hold the whole."""
MOST_ROWS = 10
"""Questions of a table from which on it is shown on request only."""


def sections(run: Run, evaluation: Result) -> list[Section]:
    """Return the sections on a task's changed questions and routes."""
    found = []
    if able := _with_routes(evaluation):
        found.append(Section("Questions that change", _changed(evaluation, able)))
    if routes := evaluation.routes():
        found.append(Section("Routes", _routes(run, routes)))
    return found


def shares(rows: Sequence[Decisions], decision: Decision) -> list[float]:
    """Return each layer's share of rows that take a decision.

    Example:
        >>> shares([(1, 0), (1, 2)], Decision.SKIP)
        [0.0, 0.5]
    """
    return [layer[int(decision)] / len(rows) for layer in class_counts(rows)]


def _with_routes(evaluation: Result) -> list[Sample]:
    """Return the questions of which base's outcome, the routed model's and its route are known."""
    return [
        sample
        for sample in evaluation.samples
        if BASE in sample.systems and ROUTED in sample.systems and _route(sample)
    ]


def _route(sample: Sample) -> Decisions:
    return sample.systems[ROUTED].decisions or ()


def _change(sample: Sample) -> float:
    """Return what routing makes of a question: above 0 it is won, below 0 lost."""
    return sample.systems[ROUTED].correct - sample.systems[BASE].correct


def _mean_length(rows: Sequence[Decisions]) -> str:
    return plain(sum(map(num_executions, rows)) / len(rows), 2)


def _changed(evaluation: Result, able: Sequence[Sample]) -> list[Block]:
    won = [sample for sample in able if _change(sample) > 0]
    lost = [sample for sample in able if _change(sample) < 0]
    same = [sample for sample in able if _change(sample) == 0]
    if evaluation.is_graded:
        kept = f"{count(len(same))} keep their grade"
        words = ("with a better grade", "with a worse grade")
    else:
        right = sum(sample.systems[BASE].correct >= 1 for sample in same)
        kept = f"{count(right)} stay right and {count(len(same) - right)} stay wrong"
        words = ("won (right under routing alone)", "lost (right under base alone)")
    said = Text(
        f"Of {count(len(able))} questions, {kept} under routing; {count(len(won))} are won and "
        f"{count(len(lost))} lost against base."
    )
    found = [
        _questions(f"Questions {name}", samples)
        for name, samples in zip(words, (won, lost), strict=True)
        if samples
    ]
    return [said, blocks.PathKey(), *found] if found else [said]


def _questions(caption: str, samples: Sequence[Sample]) -> Table:
    columns = {
        "id": lambda s: s.id,
        "question": lambda s: _short(s.question),
        "route": lambda s: sketch(_route(s)),
        "executions": lambda s: str(num_executions(_route(s))),
        "right option": lambda s: _short(s.choices[s.gold or 0]),
    }
    if any(sample.gold is None for sample in samples):
        del columns["right option"]
    return Table.of(
        f"{caption}: {count(len(samples))}",
        samples,
        columns,
        texts=(0, 1, 2, 4),
        routes=(2,),
        folded=len(samples) > MOST_ROWS,
    )


def _short(text: str) -> str:
    """Write a text on one line, cut between words where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1].rsplit(" ", 1)[0] + " …"


def routes_by_task(evaluations: Sequence[Result]) -> list[Section]:
    """Return a section on what the routes of several tasks have in common by layer, if any."""
    taken = [(each.task, routes) for each in evaluations if (routes := each.routes())]
    if len(taken) < 2:
        return []
    spent = Table(
        caption="Routes by task",
        header=("task", "questions", "distinct routes", "executions a forward"),
        rows=[
            [task, count(len(routes)), count(len(set(routes))), _mean_length(routes)]
            for task, routes in taken
        ],
    )
    maps = [
        blocks.HeatMap(
            caption=f"Share of the questions whose route {NAMES[value]}s each layer, in percent, "
            f"by task. Each row has a colour scale of its own.",
            rows=[(task, shares(routes, value)) for task, routes in taken],
            decision=NAMES[value],
        )
        for value in (Decision.SKIP, Decision.REPEAT)
    ]
    return [Section("Routes by task", [spent, *maps])]


def _routes(run: Run, routes: Sequence[Decisions]) -> list[Block]:
    distinct = len(set(routes))
    found: list[Block] = [
        Text(
            f"The routed model took {count(distinct)} distinct "
            f"{'route' if distinct == 1 else 'routes'} on {count(len(routes))} questions, "
            f"{_mean_length(routes)} executions on average."
        ),
        blocks.HeatMap(
            caption="Share of the test questions whose route skips, executes or repeats each "
            "layer, in percent. Each row has a colour scale of its own, so that rare decisions "
            "can be seen.",
            rows=[(NAMES[value], shares(routes, value)) for value in Decision],
        ),
    ]
    if not run.supervision:
        return found
    targets = [record.optimal_layer_config for record in run.supervision]
    both = {"targets": targets, "routes": routes}
    skips, repeats = (
        {name: shares(rows, value) for name, rows in both.items()}
        for value in (Decision.SKIP, Decision.REPEAT)
    )
    skip, repeat = (
        {name: percent(sum(part) / len(part)) for name, part in each.items()}
        for each in (skips, repeats)
    )
    drawn = blocks.Figure(
        draw=partial(figures.labels_against_routes, skips, repeats),
        name="labels and routes",
        alt=f"By layer: targets skip {skip['targets']} of layers on average, routes "
        f"{skip['routes']}; targets repeat {repeat['targets']}, routes {repeat['routes']}.",
        caption="Labels against routes: share of the targets (bars) and of the routes on the "
        "test questions (dots) that skip and that repeat each layer. The panels have scales "
        "of their own.",
    )
    return [*found, drawn]


def examples(evaluation: Result) -> list[Section]:
    """Return a section on three questions chosen by a fixed rule, if any has a route."""
    chosen = choose_examples(evaluation)
    rule = Text(
        "Chosen by rule: the first question won, the first lost, the unchanged one of fewest "
        "executions; where there is no such question, the first of the others."
    )
    shown = [block for kind, sample in chosen for block in _example(kind, sample)]
    return [Section("Example questions", [rule, blocks.PathKey(), *shown])] if shown else []


def _example(kind: str, sample: Sample) -> list[Block]:
    route = _route(sample)
    options = [
        f"{choice} (right)" if number == sample.gold else choice
        for number, choice in enumerate(sample.choices)
    ]
    return [
        Text(f"{kind} ({sample.id}): {sample.question}", strong=True),
        blocks.Listing(options),
        blocks.Route(route),
        Text(
            f"{num_executions(route)} of {len(route)} executions. Base is {_right(sample, BASE)}, "
            f"routed is {_right(sample, ROUTED)}."
        ),
    ]


def _right(sample: Sample, system: str) -> str:
    score = sample.systems[system].correct
    if 0 < score < 1:
        return f"graded {plain(score, 2)}"
    return "right" if score >= 1 else "wrong"


def choose_examples(evaluation: Result) -> list[tuple[str, Sample]]:
    """Pick three questions by a fixed rule, so that nobody picks the pretty ones, with their kinds.

    The first question that routing won, the first that it lost, and the unchanged one of fewest
    executions; then the first others, until there are three.
    """
    able = _with_routes(evaluation)
    unchanged = [sample for sample in able if _change(sample) == 0]
    kinds = {
        "First question won": [sample for sample in able if _change(sample) > 0],
        "First question lost": [sample for sample in able if _change(sample) < 0],
        "Unchanged, fewest executions": sorted(unchanged, key=lambda s: num_executions(_route(s))),
    }
    ranked = [(kind, found[0]) for kind, found in kinds.items() if found]
    taken = [sample for _, sample in ranked]
    others = [("First of the others", sample) for sample in able if sample not in taken]
    return [*ranked, *others][:3]
