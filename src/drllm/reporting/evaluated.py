"""The part of a report that is about the test: the result, the systems of each task.

Owns the tables of one task and what stands beside them. Leaves tables over tasks to `tasks`, what
may be claimed to `verdicts`, depths to `depth`, single questions to `changes`, and the drawing to
`curves`.
"""

from __future__ import annotations

from functools import partial

from drllm.cost import share_saved
from drllm.reporting import curves, tasks
from drllm.reporting.blocks import Block, Columns, Figure, Listing, Section, Table, Text
from drllm.reporting.depths import Difference, Differences
from drllm.reporting.numbers import NONE, count, interval, p_value, percent, plain, signed
from drllm.reporting.results import Evaluation, System
from drllm.reporting.run import Run
from drllm.reporting.samples import BASE, ROUTED
from drllm.reporting.verdicts import (
    Verdict,
    against,
    headline,
    of_difference,
    of_text_loss,
    others,
)

SYSTEM_COLUMNS = (
    "system",
    "accuracy",
    "95 % interval",
    "executions a forward",
    "saved",
    "gold log-probability, nats",
    "next-token loss, nats",
    "won",
    "lost",
    "McNemar p",
    "draws",
)

DASH = "A dash means: not measured, or not defined."


# --- the result --------------------------------------------------------------------------------


def result(run: Run) -> list[Block]:
    """Return the headline and what it rests on: one task's findings, or tables over several."""
    model = model_words(run)
    blocks: list[Block] = [Text(note) for note in run.notes]
    if not run.evaluations:
        return [Text(f"{model}; nothing was evaluated yet.", strong=True), *blocks]
    blocks.insert(0, Text(headline(run.evaluations), strong=True))
    if len(run.evaluations) > 1:
        return [*blocks, *tasks.tables(run.evaluations)]
    return [*blocks, *_found(run, run.evaluations[0])]


def of_task(run: Run, evaluation: Evaluation) -> list[Block]:
    """Return what a report of several tasks says first of one of them."""
    return [Text(headline([evaluation]), strong=True), *_found(run, evaluation)]


def _found(run: Run, evaluation: Evaluation) -> list[Block]:
    blocks: list[Block] = [Text(f"Measured: {model_words(run)} on {_asked(evaluation)}.")]
    said = others(evaluation)
    if said:
        blocks.append(Listing(said))
    written = _findings(evaluation)
    if written:
        blocks.append(Text("Findings that the evaluation wrote down:"))
        blocks.append(Listing(written))
    return blocks


def model_words(run: Run) -> str:
    """Name the base model in a few words."""
    name = str(run.model.get("id") or "a base model that no file names")
    return f"{name} ({run.num_layers} layers)" if run.num_layers else name


def _asked(evaluation: Evaluation) -> str:
    kinds = {"choices": "options are scored", "generated": "answers are generated"}
    parts = [
        evaluation.task,
        f"{evaluation.split} split",
        f"{count(evaluation.num_questions)} questions",
    ]
    if evaluation.kind is not None:
        parts.append(kinds.get(evaluation.kind, evaluation.kind))
    if evaluation.metric is not None:
        parts.append(f"metric {evaluation.metric}")
    if evaluation.num_fewshot is not None:
        shown = count(evaluation.num_fewshot) if evaluation.num_fewshot else "no"
        parts.append(f"{shown} worked examples")
    return ", ".join(parts)


def _findings(evaluation: Evaluation) -> list[str]:
    """Return the findings without what the section on the choice says."""
    choice = () if evaluation.choice is None else evaluation.choice.sentences
    return [finding for finding in evaluation.findings if finding not in choice]


# --- one task ----------------------------------------------------------------------------------


def systems(evaluation: Evaluation) -> Section:
    """Return the section on a task's systems."""
    return Section(
        "Systems compared",
        [
            *_table(evaluation),
            *_baselines(evaluation),
            _what_they_are(evaluation),
            *_metrics(evaluation),
            *_not_compared(evaluation),
        ],
    )


def system_row(system: System, num_layers: int) -> list[str]:
    """Return a system's cells in the order of `SYSTEM_COLUMNS`."""
    return [
        system.name,
        percent(system.accuracy),
        interval(system.interval),
        plain(system.executions, 2),
        percent(share_saved(system.executions, num_layers)),
        plain(system.gold_logprob, 3),
        plain(system.text_loss, 3),
        count(system.won),
        count(system.lost),
        p_value(system.mcnemar_p),
        count(system.draws),
    ]


def _table(evaluation: Evaluation) -> list[Block]:
    header = [evaluation.score if name == "accuracy" else name for name in SYSTEM_COLUMNS]
    counted = (
        f"Answers are graded by {evaluation.metric}, so that none is simply won or lost. "
        if evaluation.is_graded
        else "Won and lost count questions against base. Where several draws are averaged there "
        "is no such count. "
    )
    blocks: list[Block] = [
        Table(
            caption=f"{evaluation.task}, {count(evaluation.num_questions)} questions, chance "
            f"{percent(evaluation.chance)}",
            header=header,
            rows=[system_row(system, evaluation.num_layers) for system in evaluation.systems],
        ),
        Text(counted + DASH),
    ]
    corrected = [
        f"{system.name} p = {p_value(system.mcnemar_p_holm)}".replace("= <", "<")
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
    return blocks


def _systems_figure(evaluation: Evaluation) -> Figure:
    shown = ", ".join(f"{each.name} {percent(each.accuracy)}" for each in evaluation.systems)
    return Figure(
        draw=partial(curves.accuracy_of_systems, evaluation),
        name=f"{evaluation.task} systems",
        alt=f"{evaluation.score.capitalize()} of the systems: {shown}.",
        caption=f"{evaluation.score.capitalize()} with its 95 % interval. The line is base, the "
        f"dotted line is chance.",
    )


def _baselines(evaluation: Evaluation) -> list[Block]:
    """Return what shows at a glance whether routing beats its baselines."""
    compared = [s for s in evaluation.baselines if s.routed_against is not None]
    if not compared:
        return [_systems_figure(evaluation)]
    verdicts = ", ".join(f"{each.name} {against(evaluation, each).value[2:]}" for each in compared)
    return [
        Columns(
            [
                [_systems_figure(evaluation)],
                [
                    Figure(
                        draw=partial(curves.routed_against, evaluation),
                        name=f"{evaluation.task} baselines",
                        alt=f"The routed model less each baseline, with 95 % intervals. On "
                        f"accuracy it is: {verdicts}.",
                        caption="The routed model less each baseline, on the same questions, with "
                        "95 % intervals; full dots where it is shown to differ. Right of the line "
                        "the routed model has more; more next-token loss is worse.",
                    )
                ],
            ]
        ),
        Table(
            caption="The routed model less each baseline, with 95 % intervals, and what is shown "
            "of the routed model at the 5 % level, each comparison by itself; no verdict where "
            "base isn't shown to be above chance",
            header=(
                "baseline",
                *against_columns(evaluation),
                "baseline's executions",
                "reads the question",
            ),
            rows=[_against_row(evaluation, system) for system in compared],
            texts=(0, 1, 3, 5, 8),
        ),
    ]


def _against_row(evaluation: Evaluation, system: System) -> list[str]:
    found = system.routed_against
    assert found is not None  # the caller leaves the others out
    return [
        system.name,
        *against_cells(evaluation, found),
        plain(system.executions, 2),
        _yes(system.reads_question),
    ]


def against_columns(evaluation: Evaluation) -> tuple[str, ...]:
    """Return what the cells of `against_cells` are called; every other one holds words."""
    return (
        f"routed, by {evaluation.score}",
        "points",
        "by gold log-probability",
        "nats a question",
        "by next-token loss",
        "nats a token",
    )


def against_cells(evaluation: Evaluation, found: Differences) -> list[str]:
    """Return what is shown of the routed model against an baseline, with the differences."""
    return [
        _so(evaluation, found.accuracy),
        difference(found.accuracy, 100, 1),
        _so(evaluation, found.gold_logprob),
        difference(found.gold_logprob),
        NONE if found.text_loss is None else of_text_loss(found.text_loss).value,
        difference(found.text_loss),
    ]


def _so(evaluation: Evaluation, found: Difference | None) -> str:
    if found is None:
        return NONE
    if not evaluation.above_chance:
        return Verdict.NO_VERDICT.value
    return of_difference(found).value


def difference(found: Difference | None, scale: float = 1, digits: int = 3) -> str:
    """Write a difference with its interval."""
    if found is None:
        return NONE
    low, high = (signed(scale * end, digits) for end in found.interval)
    return f"{signed(scale * found.mean, digits)} ({low} to {high})"


def _yes(value: bool | None) -> str:
    return NONE if value is None else "yes" if value else "no"


def _what_they_are(evaluation: Evaluation) -> Block:
    return Table(
        caption="What the systems are",
        header=("system", "what it does", "source", "fitted on", "routes unchanged"),
        rows=[
            [
                system.name,
                system.description or NONE,
                system.source or NONE,
                system.fitted_on or NONE,
                percent(system.unchanged_routes),
            ]
            for system in evaluation.systems
        ],
        texts=(0, 1, 2, 3),
    )


def _metrics(evaluation: Evaluation) -> list[Block]:
    names = list(dict.fromkeys(name for each in evaluation.systems for name in each.metrics))
    if len(names) < 2:
        return []
    return [
        Table(
            caption="All that lm-evaluation-harness says of the answers, as means over the "
            f"questions; {evaluation.metric} counts",
            header=("system", *names),
            rows=[
                [each.name, *(plain(each.metrics.get(name), 4) for name in names)]
                for each in evaluation.systems
            ],
            folded=True,
        )
    ]


def _not_compared(evaluation: Evaluation) -> list[Block]:
    if not evaluation.not_compared:
        return []
    return [
        Table(
            caption="Not compared",
            header=("method", "why not"),
            rows=[[name, reason] for name, reason in evaluation.not_compared.items()],
            texts=(0, 1),
        )
    ]


def routed_and_base(evaluation: Evaluation) -> list[System]:
    """Return the two systems that a comparison of runs shows."""
    return [system for system in evaluation.systems if system.name in (BASE, ROUTED)]
