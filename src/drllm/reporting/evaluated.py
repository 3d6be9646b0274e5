"""The part of a report that is about the test: sentence, systems, routes, example questions.

Owns what is said of an evaluation, and how far the numbers allow saying it. Leaves the numbers to
`results` and `summary`, the drawing to `figures`. Axes: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.cost import share_saved
from drllm.paths import Decision, Decisions
from drllm.reporting import figures, summary
from drllm.reporting.blocks import (
    Block,
    Columns,
    Figure,
    HeatMap,
    Listing,
    PathKey,
    Question,
    Section,
    Table,
    Text,
)
from drllm.reporting.numbers import NBSP, count, interval, p_value, percent, plain, signed
from drllm.reporting.results import BASE, ROUTED, Evaluation, Sample, System
from drllm.reporting.run import Run

SIGNIFICANT = 0.05

SYSTEM_COLUMNS = (
    "system",
    "accuracy",
    "95 % interval",
    "executions a forward",
    "saved",
    "gold log-probability, nats",
    "won",
    "lost",
    "McNemar p",
    "seconds",
    "draws",
)


# --- what the numbers allow saying -------------------------------------------------------------


def verdict(evaluation: Evaluation) -> list[str]:
    """Say in a few sentences what was found, and no more than the tests carry.

    Returns:
        The routed model against base, then its cost. What else may be concluded is in the
        evaluation's own findings, which had every question's outcomes to test on.
    """
    base, routed = evaluation.system(BASE), evaluation.system(ROUTED)
    assert base is not None  # results.py refuses a file without it
    if routed is None:
        return [
            f"The base model answers {_accuracy(base)} right; no routed model was evaluated, "
            f"so nothing can be said about routing."
        ]
    return [_against_base(evaluation, base, routed), _cost(routed, evaluation.num_layers)]


def _accuracy(system: System) -> str:
    return f"{percent(system.accuracy)} (95{NBSP}% interval {interval(system.interval)})"


def _above_chance(evaluation: Evaluation, base: System) -> bool:
    return base.interval[0] > evaluation.chance


def _against_base(evaluation: Evaluation, base: System, routed: System) -> str:
    change = 100 * (routed.accuracy - base.accuracy)
    points = plain(abs(change))
    if not _above_chance(evaluation, base):
        lead = f"The routed model's accuracy less base's is {signed(change, 1)} points"
    elif routed.accuracy < base.accuracy:
        lead = f"The routed model is worse than base by {points} points"
    elif routed.accuracy > base.accuracy:
        lead = f"The routed model is better than base by {points} points"
    else:
        lead = "The routed model and base answer equally many questions right"
    counted = ""
    if routed.won is not None and routed.lost is not None:
        counted = f"; it wins {count(routed.won)} questions and loses {count(routed.lost)}"
    sentence = f"{lead}: {_accuracy(routed)} against {_accuracy(base)}{counted}."
    return f"{sentence} {_allowed(evaluation, base, routed)}"


def _allowed(evaluation: Evaluation, base: System, routed: System) -> str:
    """Say what follows from the difference: a claim only where the set and the test carry it."""
    if not _above_chance(evaluation, base):
        return (
            f"Base isn't shown to be above chance ({percent(evaluation.chance)}), so this set can "
            f"show neither a gain nor the absence of a loss."
        )
    if routed.mcnemar_p is None:
        return "No paired test was recorded, so no difference is claimed."
    test = f"McNemar p {_p(routed.mcnemar_p)}"
    decides = routed.mcnemar_p
    if routed.mcnemar_p_holm is not None:
        decides = routed.mcnemar_p_holm
        test += f", corrected for several tasks {_p(decides)}"
    if decides >= SIGNIFICANT:
        return (
            f"The paired test doesn't show a difference in either direction ({test}); that is no "
            f"evidence that there is none."
        )
    direction = "loss" if routed.accuracy < base.accuracy else "gain"
    return f"The paired test shows a {direction} at the {SIGNIFICANT} level ({test})."


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _cost(routed: System, num_layers: int) -> str:
    saved = share_saved(routed.executions, num_layers)
    difference = f"{percent(saved)} fewer" if saved >= 0 else f"{percent(-saved)} more"
    return (
        f"It runs {plain(routed.executions, 2)} layer executions a forward pass instead of "
        f"{num_layers} ({difference})."
    )


# --- sections ----------------------------------------------------------------------------------


def headline(run: Run) -> list[Block]:
    """Return what was measured and the sentences about it, one pair per task."""
    blocks: list[Block] = []
    model = model_words(run)
    for evaluation in run.evaluations:
        blocks.append(
            Text(
                f"Measured: {model} on {evaluation.task}, {evaluation.split} split, "
                f"{count(evaluation.num_questions)} questions."
            )
        )
        first, *others = verdict(evaluation)
        blocks.append(Text(first, strong=True))
        if others:
            blocks.append(Text(" ".join(others)))
        if evaluation.findings:
            blocks.append(Text("Findings that the evaluation wrote down:"))
            blocks.append(Listing(evaluation.findings))
    blocks += [Text(note) for note in run.notes]
    if not run.evaluations:
        blocks.append(Text(f"{model}; nothing was evaluated yet.", strong=True))
    return blocks


def model_words(run: Run) -> str:
    """Name the base model in a few words."""
    name = str(run.model.get("id") or "a base model that no file names")
    return f"{name} ({run.num_layers} layers)" if run.num_layers else name


def sections(run: Run, evaluation: Evaluation) -> list[Section]:
    """Return the sections of one task: systems, routes, examples."""
    suffix = f": {evaluation.task}" if len(run.evaluations) > 1 else ""
    found = [Section("Systems compared" + suffix, _systems(evaluation))]
    routes = evaluation.routes()
    if routes:
        found.append(Section("Routes" + suffix, _routes(run, routes)))
    examples = summary.choose_examples(evaluation)
    if examples:
        found.append(Section("Example questions" + suffix, _examples(examples)))
    return found


def system_row(system: System, num_layers: int) -> list[str]:
    """Return a system's cells in the order of `SYSTEM_COLUMNS`."""
    return [
        system.name,
        percent(system.accuracy),
        interval(system.interval),
        plain(system.executions, 2),
        percent(share_saved(system.executions, num_layers)),
        plain(system.gold_logprob, 3),
        count(system.won),
        count(system.lost),
        p_value(system.mcnemar_p),
        plain(system.seconds),
        count(system.draws),
    ]


def _systems(evaluation: Evaluation) -> list[Block]:
    rows = [system_row(system, evaluation.num_layers) for system in evaluation.systems]
    shown = ", ".join(
        f"{system.name} {percent(system.accuracy)} at {plain(system.executions, 2)} executions"
        for system in evaluation.systems
    )
    described = [
        f"{system.name}: {system.description}"
        for system in evaluation.systems
        if system.description
    ]
    blocks: list[Block] = [
        Table(
            caption=f"{evaluation.task}, {count(evaluation.num_questions)} questions",
            header=SYSTEM_COLUMNS,
            rows=rows,
        ),
        Text(
            "Won and lost count questions against base. Where several draws are averaged there is "
            "no such count, and seconds are those of one draw. A dash means: not measured, or not "
            "defined."
        ),
    ]
    corrected = [
        f"{system.name} p {_p(system.mcnemar_p_holm)}"
        for system in evaluation.systems
        if system.mcnemar_p_holm is not None and system.mcnemar_p_holm != system.mcnemar_p
    ]
    if corrected:
        listed = ", ".join(corrected)
        blocks.append(Text(f"Corrected for the tests on several tasks (Holm): {listed}."))
    if any(system.interval[0] == system.interval[1] for system in evaluation.systems):
        blocks.append(
            Text(
                "An interval without width comes from resampling questions that all gave the same "
                "mean over draws; it is no sign of certainty."
            )
        )
    drawn = Figure(
        svg=figures.accuracy_against_executions(evaluation),
        alt=f"Accuracy against executions a forward pass: {shown}.",
        caption="Accuracy with its 95 % interval against executions a forward pass. The line is "
        "base's accuracy, the dots are chance. Systems of equal executions are drawn side by side.",
    )
    words: list[Block] = [Text("What the systems are:"), Listing(described)] if described else []
    return [*blocks, Columns([[drawn], words])]


def _routes(run: Run, routes: Sequence[Decisions]) -> list[Block]:
    names = {Decision.SKIP: "skip", Decision.EXECUTE: "execute", Decision.REPEAT: "repeat"}
    distinct = len(set(routes))
    blocks: list[Block] = [
        Text(
            f"The routed model took {count(distinct)} distinct "
            f"{'route' if distinct == 1 else 'routes'} on {count(len(routes))} questions, "
            f"{plain(summary.mean_length(routes), 2)} executions on average."
        ),
        HeatMap(
            caption="Share of the test questions whose route skips, executes or repeats each "
            "layer, in percent. Each row has a colour scale of its own, so that rare decisions "
            "can be seen.",
            rows=[(name, summary.shares(routes, value)) for value, name in names.items()],
        ),
    ]
    if not run.supervision:
        return blocks
    targets = [record.optimal_layer_config for record in run.supervision]
    skips = {
        "targets": summary.shares(targets, Decision.SKIP),
        "routes": summary.shares(routes, Decision.SKIP),
    }
    repeats = {
        "targets": summary.shares(targets, Decision.REPEAT),
        "routes": summary.shares(routes, Decision.REPEAT),
    }
    blocks.append(
        Figure(
            svg=figures.labels_against_routes(skips, repeats),
            alt=f"By layer: targets skip {_mean(skips['targets'])} of layers on average, routes "
            f"{_mean(skips['routes'])}; targets repeat {_mean(repeats['targets'])}, routes "
            f"{_mean(repeats['routes'])}.",
            caption="Labels against routes: share of the targets (bars) and of the routes on the "
            "test questions (dots) that skip and that repeat each layer. The panels have scales "
            "of their own.",
        )
    )
    blocks.append(
        Table(
            caption="Labels against routes by layer",
            header=("layer", "targets skip", "routes skip", "targets repeat", "routes repeat"),
            rows=[
                [str(layer), *(percent(value) for value in values)]
                for layer, values in enumerate(
                    zip(
                        skips["targets"],
                        skips["routes"],
                        repeats["targets"],
                        repeats["routes"],
                        strict=True,
                    )
                )
            ],
            texts=(),
            folded=True,
        )
    )
    return blocks


def _mean(values: Sequence[float]) -> str:
    return percent(sum(values) / len(values))


def _examples(examples: Sequence[tuple[str, Sample]]) -> list[Block]:
    rule = Text(
        "Chosen by rule: the first question won, the first lost, the unchanged one of fewest "
        "executions; where there is no such question, the first of the others."
    )
    return [
        rule,
        PathKey(),
        *(
            Question(
                kind=kind,
                id=sample.id,
                question=sample.question,
                choices=sample.choices,
                gold=sample.gold,
                verdicts=f"Base is {_right(sample, BASE)}, routed is {_right(sample, ROUTED)}.",
                route=summary.route(sample),
            )
            for kind, sample in examples
        ),
    ]


def _right(sample: Sample, system: str) -> str:
    return "right" if sample.outcomes[system].correct >= 1 else "wrong"
