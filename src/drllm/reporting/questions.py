"""The part of a report about single questions: those that change, the routes, examples.

Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from drllm.paths import Decision, Decisions, num_executions, sketch
from drllm.records.results import BASE, ROUTED, Result, Sample
from drllm.reporting import figures
from drllm.reporting.blocks import (
    Block,
    Figure,
    HeatMap,
    Listing,
    PathKey,
    Route,
    Section,
    Table,
    Text,
)
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
    able = [sample for sample in evaluation.samples if has_route(sample)]
    if able:
        found.append(Section("Questions that change", _changed(evaluation, able)))
    routes = evaluation.routes()
    if routes:
        found.append(Section("Routes", _routes(run, routes)))
    return found


# --- what is known of a question ----------------------------------------------------------------


def shares(rows: Sequence[Decisions], decision: Decision) -> list[float]:
    """Return each layer's share of rows that take a decision.

    Example:
        >>> shares([(1, 0), (1, 2)], Decision.SKIP)
        [0.0, 0.5]
    """
    return [layer[int(decision)] / len(rows) for layer in class_counts(rows)]


def has_route(sample: Sample) -> bool:
    """Say whether base's outcome, the routed model's and its route are all known."""
    routed = sample.systems.get(ROUTED)
    return BASE in sample.systems and routed is not None and routed.decisions is not None


def route(sample: Sample) -> Decisions:
    """Return the routed model's decisions on a question for which `has_route` holds."""
    decisions = sample.systems[ROUTED].decisions
    assert decisions is not None
    return decisions


def change(sample: Sample) -> float:
    """Return what routing makes of a question: above 0 it is won, below 0 lost."""
    return sample.systems[ROUTED].correct - sample.systems[BASE].correct


def mean_length(rows: Sequence[Decisions]) -> float | None:
    """Return the mean executions of decision vectors; None without any."""
    return sum(map(num_executions, rows)) / len(rows) if rows else None


# --- questions that change ---------------------------------------------------------------------


def _changed(evaluation: Result, able: Sequence[Sample]) -> list[Block]:
    won = [sample for sample in able if change(sample) > 0]
    lost = [sample for sample in able if change(sample) < 0]
    same = [sample for sample in able if change(sample) == 0]
    if evaluation.is_graded:
        kept = f"{count(len(same))} keep their grade"
        words = ("with a better grade", "with a worse grade")
    else:
        right = sum(sample.systems[BASE].correct >= 1 for sample in same)
        kept = f"{count(right)} stay right and {count(len(same) - right)} stay wrong"
        words = ("won (right under routing alone)", "lost (right under base alone)")
    start = f"Of {count(len(able))} questions, {kept} under routing"
    blocks: list[Block] = [
        Text(f"{start}; {count(len(won))} are won and {count(len(lost))} lost against base.")
    ]
    if won or lost:
        blocks.append(PathKey())
    for name, samples in zip(words, (won, lost), strict=True):
        if samples:
            blocks.append(_questions(f"Questions {name}", samples))
    return blocks


def _questions(caption: str, samples: Sequence[Sample]) -> Table:
    graded = any(sample.gold is None for sample in samples)
    return Table(
        caption=f"{caption}: {count(len(samples))}",
        header=("id", "question", "route", "executions", *(() if graded else ("right option",))),
        rows=[
            [
                sample.id,
                _short(sample.question),
                sketch(route(sample)),
                str(num_executions(route(sample))),
                *(() if graded else (_short(sample.choices[sample.gold or 0]),)),
            ]
            for sample in samples
        ],
        texts=(0, 1, 2, 4),
        routes=(2,),
        folded=len(samples) > MOST_ROWS,
    )


def _short(text: str) -> str:
    """Write a text on one line, cut between words where it is long."""
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    return line[: LONGEST - 1].rsplit(" ", 1)[0] + " …"


# --- routes ------------------------------------------------------------------------------------


def routes_by_task(evaluations: Sequence[Result]) -> Section | None:
    """Return what the routes of several tasks have in common by layer; None without any."""
    taken = {each.task: each.routes() for each in evaluations}
    taken = {task: routes for task, routes in taken.items() if routes}
    if len(taken) < 2:
        return None
    spent = Table(
        caption="Routes by task",
        header=("task", "questions", "distinct routes", "executions a forward"),
        rows=[
            [
                task,
                count(len(routes)),
                count(len(set(routes))),
                plain(mean_length(routes), 2),
            ]
            for task, routes in taken.items()
        ],
    )
    maps = [
        HeatMap(
            caption=f"Share of the questions whose route {name}s each layer, in percent, by task. "
            f"Each row has a colour scale of its own.",
            rows=[(task, shares(routes, value)) for task, routes in taken.items()],
            decision=name,
        )
        for name, value in (("skip", Decision.SKIP), ("repeat", Decision.REPEAT))
    ]
    return Section("Routes by task", [spent, *maps])


def _routes(run: Run, routes: Sequence[Decisions]) -> list[Block]:
    names = {Decision.SKIP: "skip", Decision.EXECUTE: "execute", Decision.REPEAT: "repeat"}
    distinct = len(set(routes))
    blocks: list[Block] = [
        Text(
            f"The routed model took {count(distinct)} distinct "
            f"{'route' if distinct == 1 else 'routes'} on {count(len(routes))} questions, "
            f"{plain(mean_length(routes), 2)} executions on average."
        ),
        HeatMap(
            caption="Share of the test questions whose route skips, executes or repeats each "
            "layer, in percent. Each row has a colour scale of its own, so that rare decisions "
            "can be seen.",
            rows=[(name, shares(routes, value)) for value, name in names.items()],
        ),
    ]
    if run.supervision:
        blocks += _labels(run, routes)
    return blocks


def _labels(run: Run, routes: Sequence[Decisions]) -> list[Block]:
    targets = [record.optimal_layer_config for record in run.supervision]
    skips, repeats = (
        {"targets": shares(targets, value), "routes": shares(routes, value)}
        for value in (Decision.SKIP, Decision.REPEAT)
    )
    return [
        Figure(
            draw=partial(figures.labels_against_routes, skips, repeats),
            name="labels and routes",
            alt=f"By layer: targets skip {_mean(skips['targets'])} of layers on average, routes "
            f"{_mean(skips['routes'])}; targets repeat {_mean(repeats['targets'])}, routes "
            f"{_mean(repeats['routes'])}.",
            caption="Labels against routes: share of the targets (bars) and of the routes on the "
            "test questions (dots) that skip and that repeat each layer. The panels have scales "
            "of their own.",
        ),
    ]


def _mean(values: Sequence[float]) -> str:
    return percent(sum(values) / len(values))


# --- examples ----------------------------------------------------------------------------------


def examples(evaluation: Result) -> Section | None:
    """Return three questions with their routes, chosen by a fixed rule; None without routes."""
    chosen = choose_examples(evaluation)
    if not chosen:
        return None
    rule = Text(
        "Chosen by rule: the first question won, the first lost, the unchanged one of fewest "
        "executions; where there is no such question, the first of the others."
    )
    return Section(
        "Example questions",
        [
            rule,
            PathKey(),
            *(block for kind, sample in chosen for block in _example(kind, sample)),
        ],
    )


def _example(kind: str, sample: Sample) -> list[Block]:
    taken = route(sample)
    options = [
        f"{choice} (right)" if number == sample.gold else choice
        for number, choice in enumerate(sample.choices)
    ]
    return [
        Text(f"{kind} ({sample.id}): {sample.question}", strong=True),
        Listing(options),
        Route(taken),
        Text(
            f"{num_executions(taken)} of {len(taken)} executions. Base is {_right(sample, BASE)}, "
            f"routed is {_right(sample, ROUTED)}."
        ),
    ]


def _right(sample: Sample, system: str) -> str:
    score = sample.systems[system].correct
    if 0 < score < 1:
        return f"graded {plain(score, 2)}"
    return "right" if score >= 1 else "wrong"


def choose_examples(evaluation: Result) -> list[tuple[str, Sample]]:
    """Pick three questions by a fixed rule, so that nobody picks the pretty ones.

    Returns:
        The first question that routing won, the first that it lost, and the unchanged one of
        fewest executions; then the first others, until there are three. Each with its kind.
    """
    able = [sample for sample in evaluation.samples if has_route(sample)]
    chosen: list[tuple[str, Sample]] = []

    def add(kind: str, candidates: Sequence[Sample]) -> None:
        taken = [sample for _, sample in chosen]
        left = [sample for sample in candidates if sample not in taken]
        if left and len(chosen) < 3:
            chosen.append((kind, left[0]))

    add("First question won", [sample for sample in able if change(sample) > 0])
    add("First question lost", [sample for sample in able if change(sample) < 0])
    unchanged = [sample for sample in able if change(sample) == 0]
    add("Unchanged, fewest executions", sorted(unchanged, key=lambda s: num_executions(route(s))))
    while len(chosen) < min(3, len(able)):
        add("First of the others", able)
    return chosen
