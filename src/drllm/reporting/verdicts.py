"""What the numbers of a test allow saying: verdicts, the sentences made of them, the headline.

Owns the rules by which a report claims a gain, a loss or neither. A claim needs a test that shows
it and a base that is shown to be above chance; tests over several tasks count as corrected.
Whatever is picked after looking (the best of several baselines) is never the ground of a claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from drllm.cost import share_saved
from drllm.reporting.depths import Difference
from drllm.reporting.numbers import NBSP, count, interval, p_value, percent, plain, signed
from drllm.reporting.results import PERMUTED, Evaluation, System

SIGNIFICANT = 0.05
EQUAL = 0.01
"""Share of the layers by which executions may differ and still be called equal."""


class Verdict(Enum):
    """What is shown of the routed model against another system; the value is how tables say it."""

    BETTER = "▲ better"
    WORSE = "▼ worse"
    NOT_SHOWN = "○ not shown"
    UNTESTED = "– not tested"
    NO_VERDICT = "– no verdict"


# --- verdicts ----------------------------------------------------------------------------------


def against_base(evaluation: Evaluation) -> Verdict:
    """Return what is shown of the routed model's accuracy against base."""
    routed, base = evaluation.routed, evaluation.base
    if not evaluation.above_chance:
        return Verdict.NO_VERDICT
    if routed is None:
        return Verdict.UNTESTED
    p = routed.mcnemar_p if routed.mcnemar_p_holm is None else routed.mcnemar_p_holm
    if p is not None:
        if p >= SIGNIFICANT or routed.accuracy == base.accuracy:
            return Verdict.NOT_SHOWN
        return Verdict.BETTER if routed.accuracy > base.accuracy else Verdict.WORSE
    return of_difference(None if routed.against_base is None else routed.against_base.accuracy)


def against(evaluation: Evaluation, baseline: System | None) -> Verdict:
    """Return what is shown of the routed model's accuracy against an baseline."""
    if baseline is None or baseline.routed_against is None:
        return Verdict.UNTESTED
    if not evaluation.above_chance:
        return Verdict.NO_VERDICT
    return of_difference(baseline.routed_against.accuracy)


def of_difference(found: Difference | None) -> Verdict:
    """Return what a difference of something shows of which more is better."""
    if found is None:
        return Verdict.UNTESTED
    if found.shown is None:
        return Verdict.NOT_SHOWN
    return Verdict.BETTER if found.shown == "higher" else Verdict.WORSE


def of_text_loss(found: Difference | None) -> Verdict:
    """Return what a difference of next-token losses shows: less is better, and nobody guesses."""
    opposite = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER}
    verdict = of_difference(found)
    return opposite.get(verdict, verdict)


def rivals(evaluation: Evaluation, *, read_question: bool = False) -> list[System]:
    """Return the baselines of equal executions that don't read the question (or do), best first.

    The permuted routes aren't among them: they are a control of their own.
    """
    routed = evaluation.routed
    if routed is None:
        return []
    near = EQUAL * evaluation.num_layers
    found = [
        system
        for system in evaluation.baselines
        if system.reads_question is read_question
        and system.name != PERMUTED
        and abs(system.executions - routed.executions) <= near
    ]
    return sorted(found, key=_merit, reverse=True)


def _merit(system: System) -> tuple[float, float]:
    return system.accuracy, system.gold_logprob or 0.0


def outstanding(evaluation: Evaluation) -> list[str]:
    """Return the systems that a drawing shows in colour: routed, its control, the best rivals."""
    best = [rivals(evaluation, read_question=reads)[:1] for reads in (False, True)]
    names = [system.name for found in best for system in found]
    control = [PERMUTED] if evaluation.system(PERMUTED) is not None else []
    return ["routed", *control, *names]


# --- sentences ---------------------------------------------------------------------------------


def headline(evaluations: Sequence[Evaluation]) -> str:
    """Return what a report says first, over one task or several."""
    if len(evaluations) == 1:
        [one] = evaluations
        if one.routed is None:
            return versus_base(one)
        parts = [versus_base(one), _despite(one), _versus_permuted(one)]
        return " ".join(part for part in parts if part)
    parts = [_over_tasks(evaluations), _loss_over_tasks(evaluations)]
    return " ".join(part for part in [*parts, _matters_over_tasks(evaluations)] if part)


def versus_base(evaluation: Evaluation) -> str:
    """Say how the routed model stands against base, and no more than the test carries."""
    routed, base = evaluation.routed, evaluation.base
    if routed is None:
        return (
            f"On {evaluation.task} the base model scores {_score(base)}; no routed model was "
            f"evaluated, so nothing can be said about routing."
        )
    saved = share_saved(routed.executions, evaluation.num_layers)
    cost = f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'} layer executions"
    numbers = _numbers(evaluation, base, routed)
    start = f"On {evaluation.task}, with {cost},"
    match against_base(evaluation):
        case Verdict.NO_VERDICT:
            return (
                f"{start} neither a gain nor the absence of a loss can be shown, since base isn't "
                f"shown to be above chance ({percent(evaluation.chance)}): {numbers}."
            )
        case Verdict.BETTER:
            return f"{start} routing gains {evaluation.score}: {numbers}."
        case Verdict.WORSE:
            return f"{start} routing loses {evaluation.score}: {numbers}."
        case Verdict.UNTESTED:
            return (
                f"{start} no paired test was recorded, so no difference of {evaluation.score} is "
                f"claimed: {numbers}."
            )
    return (
        f"{start} no difference of {evaluation.score} between the routed model and base is shown, "
        f"which is no evidence that there is none: {numbers}."
    )


def _score(system: System) -> str:
    return f"{percent(system.accuracy)} (95{NBSP}% interval {interval(system.interval)})"


def _numbers(evaluation: Evaluation, base: System, routed: System) -> str:
    found = None if routed.against_base is None else routed.against_base.accuracy
    change = points(found) if found else f"{signed(100 * (routed.accuracy - base.accuracy), 1)}"
    parts = [change if found else f"{change} points"]
    if routed.won is not None and routed.lost is not None:
        n = count(evaluation.num_questions)
        parts.append(f"won {count(routed.won)}, lost {count(routed.lost)} of {n} questions")
    if routed.mcnemar_p is not None:
        test = f"McNemar p {_p(routed.mcnemar_p)}"
        if routed.mcnemar_p_holm is not None:
            test += f", corrected for several tasks {_p(routed.mcnemar_p_holm)}"
        parts.append(test)
    scores = f"{percent(routed.accuracy)} against {percent(base.accuracy)}"
    return f"{scores} ({'; '.join(parts)})"


def _p(value: float) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def points(found: Difference) -> str:
    """Write a difference of accuracies in points with its interval."""
    low, high = (signed(100 * end, 1) for end in found.interval)
    return f"{signed(100 * found.mean, 1)} points, 95{NBSP}% interval {low} to {high}"


def _despite(evaluation: Evaluation) -> str:
    """Say what is shown to be worse where the score doesn't show it."""
    routed = evaluation.routed
    found = None if routed is None else routed.against_base
    if found is None or against_base(evaluation) is Verdict.WORSE:
        return ""
    worse = []
    gold, loss = found.gold_logprob, found.text_loss
    if gold is not None and gold.shown == "lower" and evaluation.above_chance:
        worse.append(f"the gold options' log-probability is shown to be lower ({_nats(gold)})")
    if loss is not None and loss.shown == "higher":
        worse.append(f"the next-token loss is shown to be higher ({_nats(loss)})")
    return f"But {' and '.join(worse)}." if worse else ""


def _nats(found: Difference) -> str:
    low, high = (signed(end, 3) for end in found.interval)
    return f"{signed(found.mean, 3)} nats, 95{NBSP}% interval {low} to {high}"


def _versus_permuted(evaluation: Evaluation) -> str:
    permuted = evaluation.system(PERMUTED)
    routes = evaluation.routes()
    if permuted is None or permuted.routed_against is None:
        return ""
    if routes and len(set(routes)) == 1:
        return "It took one route for all questions, so it is a fixed choice of layers."
    found = permuted.routed_against.accuracy
    if found is None:
        return ""
    numbers = f"against its own routes permuted over the questions, {points(found)}"
    match against(evaluation, permuted):
        case Verdict.BETTER:
            return f"That each question has its own route is shown to matter: {numbers}."
        case Verdict.WORSE:
            return f"Its routes do better on other questions than on their own: {numbers}."
        case Verdict.NOT_SHOWN:
            return f"It isn't shown that reading the question matters: {numbers}."
    return ""


def others(evaluation: Evaluation) -> list[str]:
    """Say how the routed model stands against its other baselines, and what is certified."""
    said = []
    fixed = rivals(evaluation)
    if fixed and evaluation.above_chance:
        said.append(_versus_fixed(evaluation, fixed))
    choice = evaluation.choice
    if choice is not None:
        kept = choice.certified
        limit = f"losing less than {choice.epsilon:g} points of accuracy"
        unseen = "" if choice.worked_answers else "; worked answers weren't looked at"
        said.append(
            f"No depth is certified as {limit}."
            if kept is None
            else f"Certified as {limit}: {kept.name}, {plain(kept.executions, 2)} executions a "
            f"forward pass{unseen}."
        )
    return said


def _versus_fixed(evaluation: Evaluation, fixed: Sequence[System]) -> str:
    verdicts = [against(evaluation, system) for system in fixed]
    better, worse = verdicts.count(Verdict.BETTER), verdicts.count(Verdict.WORSE)
    what = "baselines of equal executions that don't read the question"
    if better == len(fixed):
        return f"The routed model is shown to be better than each of the {len(fixed)} {what}."
    best = fixed[0]
    found = best.routed_against.accuracy if best.routed_against is not None else None
    beside = "" if found is None else f" (routed less it: {points(found)})"
    shown = f"Of the {len(fixed)} {what}, the routed model is shown to be better than {better}"
    shown += f" and worse than {worse}" if worse else ""
    shown += ", each tested by itself"
    return f"{shown}; the best of them is {best.name} with {percent(best.accuracy)}{beside}."


def _over_tasks(evaluations: Sequence[Evaluation]) -> str:
    kinds = (
        (Verdict.WORSE, "routing is shown to lose on"),
        (Verdict.BETTER, "to gain on"),
        (Verdict.NOT_SHOWN, "no difference is shown on"),
        (Verdict.NO_VERDICT, "base isn't shown to be above chance, so nothing can be said, on"),
        (Verdict.UNTESTED, "there is no test on"),
    )
    found = {
        verdict: [each.task for each in evaluations if against_base(each) is verdict]
        for verdict, _ in kinds
    }
    parts = [
        f"{words} {len(found[verdict])}" + (f" ({', '.join(found[verdict])})" if tasks else "")
        for verdict, words in kinds
        if (tasks := found[verdict]) or verdict in (Verdict.WORSE, Verdict.BETTER)
    ]
    return f"Of {len(evaluations)} tasks, {'; '.join(parts)}."


def _loss_over_tasks(evaluations: Sequence[Evaluation]) -> str:
    found = [
        of_text_loss(routed.against_base.text_loss)
        for each in evaluations
        if (routed := each.routed) is not None and routed.against_base is not None
    ]
    tested = [verdict for verdict in found if verdict in TESTED]
    if Verdict.WORSE not in tested:
        return ""
    return (
        f"The next-token loss is shown to be higher on {tested.count(Verdict.WORSE)} of the "
        f"{len(tested)} where it was read."
    )


def _matters_over_tasks(evaluations: Sequence[Evaluation]) -> str:
    verdicts = {each.task: against(each, each.system(PERMUTED)) for each in evaluations}
    tested = {t: v for t, v in verdicts.items() if v in TESTED}
    if not tested:
        return ""
    where = [task for task, verdict in tested.items() if verdict is Verdict.BETTER]
    named = f" ({', '.join(where)})" if where else ""
    return (
        f"That each question has its own route is shown to matter on {len(where)}{named} of the "
        f"{len(tested)} where permuted routes could be compared, each tested by itself."
    )


TESTED = (Verdict.BETTER, Verdict.WORSE, Verdict.NOT_SHOWN)
"""Verdicts of a test, whatever came out."""
