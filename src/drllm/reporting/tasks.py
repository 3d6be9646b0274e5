"""The tables of a report that stand over all tasks of a run: verdicts and quantities.

Owns what they hold. Leaves what may be claimed to `verdicts`, and the single tasks to `evaluated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from drllm.cost import share_saved
from drllm.reporting.blocks import Block, Table
from drllm.reporting.numbers import NONE, count, percent, plain
from drllm.reporting.results import PERMUTED, Evaluation, System
from drllm.reporting.verdicts import against, against_base, rivals


def tables(evaluations: Sequence[Evaluation]) -> list[Block]:
    """Return the tables of tasks by systems: verdicts first, then one a quantity."""
    glance = Table(
        caption="The tasks at a glance. Verdicts are on accuracy; those against base are corrected "
        "for several tasks (Holm) where there is an exact test, the others hold each by itself at "
        "the 5 % level. The fixed baseline is the best of equal executions that doesn't read the "
        "question.",
        header=(
            "task",
            "questions",
            "base above chance",
            "base",
            "routed",
            "saved",
            "routed against base",
            "against its permuted routes",
            "best fixed baseline",
            "against it",
        ),
        rows=[_glance(evaluation) for evaluation in evaluations],
        texts=(0, 2, 6, 7, 8, 9),
    )
    return [
        glance,
        _by_task(
            evaluations,
            "Accuracy in percent (where answers are graded, the mean grade) with its 95 % interval",
            lambda s: f"{plain(100 * s.accuracy)} ({_ends(s.interval)})",
        ),
        _by_task(
            evaluations,
            "Gold log-probability, nats a question",
            lambda s: plain(s.gold_logprob, 3),
        ),
        _by_task(
            evaluations, "Next-token loss, nats a token", lambda s: plain(s.text_loss, 3), True
        ),
        _by_task(evaluations, "Executions a forward", lambda s: plain(s.executions, 2), True),
    ]


def _ends(ends: tuple[float, float]) -> str:
    return f"{plain(100 * ends[0])} to {plain(100 * ends[1])}"


def _glance(evaluation: Evaluation) -> list[str]:
    base, routed = evaluation.base, evaluation.routed
    fixed = rivals(evaluation)[:1]
    best = fixed[0] if fixed else None
    return [
        evaluation.task,
        count(evaluation.num_questions),
        f"{'yes' if evaluation.above_chance else 'not shown'} ({percent(evaluation.chance)})",
        percent(base.accuracy),
        percent(routed.accuracy) if routed else NONE,
        percent(share_saved(routed.executions, evaluation.num_layers)) if routed else NONE,
        against_base(evaluation).value,
        against(evaluation, evaluation.system(PERMUTED)).value,
        f"{best.name}, {percent(best.accuracy)}" if best else NONE,
        against(evaluation, best).value,
    ]


def _by_task(
    evaluations: Sequence[Evaluation],
    caption: str,
    cell: Callable[[System], str],
    folded: bool = False,
) -> Table:
    names = list(dict.fromkeys(system.name for each in evaluations for system in each.systems))
    rows = []
    for each in evaluations:
        found = [each.system(name) for name in names]
        rows.append([each.task, *(NONE if system is None else cell(system) for system in found)])
    return Table(caption=caption, header=("task", *names), rows=rows, folded=folded)
