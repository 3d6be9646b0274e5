"""The tables of a report on results: the systems of a task, their depths, and comparisons."""

from collections.abc import Sequence
from typing import TypeAlias

from drllm.records.results import BASE, PERMUTED, ROUTED, Evaluation, Point, System
from drllm.reporting.markdown import Markdown, write_table
from drllm.reporting.numbers import (
    NONE,
    get_routed_verdict,
    write_count,
    write_difference,
    write_excluded,
    write_label,
    write_label_with_needed,
    write_number,
    write_percent,
)
from drllm.statistics.differences import LABEL_MEANINGS, Differences, Verdict

NamedSystem: TypeAlias = tuple[str, Evaluation, System | Point]
"""The name of a run or a task, its evaluation, and one system of the evaluation."""


def comparisons_table(evaluation: Evaluation) -> Markdown:
    """Build the table behind the headline: the best path, the routed model, and their difference.

    Each is compared with base, and the routed model with the best path.
    """
    path = evaluation.best_path
    rows: list[list[str]] = []
    for system in (path, evaluation.routed):
        if system is not None and system.against_base is not None:
            name = evaluation.name_in_sentence(system)
            rows.append(_comparison_row(f"{name} minus base", system.against_base))
    if path is not None and path.routed_against is not None:
        name = f"routed minus {evaluation.name_in_sentence(path)}"
        rows.append(_comparison_row(name, path.routed_against))
    header = (
        f"difference|{evaluation.score}, points|loss excluded above|verdict|"
        f"next-token loss, nats|increase excluded above|verdict on text"
    )
    caption = (
        "Differences with 95 % intervals. Larger losses than the excluded one are ruled out "
        f"(95 %). Not shown: {LABEL_MEANINGS['not shown']}. Too few: {LABEL_MEANINGS['too few']}."
    )
    if len(evaluation.paths) > 1:
        caption += f" {_explain_choice(evaluation)}"
    return write_table(caption, header, rows, "verdict|verdict on text")


def _comparison_row(name: str, differences: Differences) -> list[str]:
    accuracy = differences.accuracy
    loss = differences.text_loss
    return [
        name,
        write_difference(accuracy),
        write_excluded(accuracy),
        write_label_with_needed(accuracy),
        write_difference(loss),
        write_excluded(loss),
        write_label_with_needed(loss),
    ]


def _explain_choice(evaluation: Evaluation) -> str:
    """Say why the table has this path, of several."""
    path = evaluation.best_path
    assert path is not None
    num_paths = len(evaluation.paths)
    if evaluation.drop_test is not None and evaluation.drop_test.chosen == path.name:
        return f"{path.name} is the path that --max-drop chose."
    if evaluation.routed is None:
        return f"{path.name} is the best of {num_paths} paths on these questions."
    return f"{path.name} is the closest of {num_paths} paths in cost to the routed model."


def results_table(evaluation: Evaluation) -> Markdown:
    """Build the table of a task's systems, with the most accurate system first.

    Each system is compared with the routed model, or with base if there is no routed model.
    """
    systems = sorted(evaluation.systems, key=lambda system: (-system.accuracy, system.executions))
    rows = [_result_row(evaluation, system) for system in systems]
    minus = "routed minus system" if evaluation.routed else "minus base's"
    header = (
        f"system|layers run|{evaluation.score}, %|next-token loss|{minus}, points|"
        f"loss excluded above|verdict|loss: {minus}, nats|verdict by loss"
    )
    compared = evaluation.compared_system
    bold = evaluation.name_in_table(compared) if compared else ""
    return write_table(_results_caption(evaluation), header, rows, "verdict|verdict by loss", bold)


def _results_caption(evaluation: Evaluation) -> str:
    questions = f"{write_count(evaluation.num_questions)} questions"
    if evaluation.chance:
        questions += f", guessing gives {write_percent(evaluation.chance)}"
    comparison = "each system minus base"
    subject = "the system"
    if evaluation.routed:
        comparison = "the routed model minus each system"
        subject = "the routed model"
    sentences = [
        f"{questions}; the best system comes first.",
        f"Then {comparison}, with 95 % intervals, and the verdict on {subject}.",
        "A loss above the excluded one is ruled out (95 %).",
    ]
    if evaluation.routed:
        sentences.append("Rows are not corrected for their number.")
    elif len(evaluation.paths) > 1:
        sentences.append("Tests are corrected for the number of paths.")
    if any(system.draws > 1 for system in evaluation.systems):
        sentences.append("×N: the mean over N draws.")
    return " ".join(sentences)


def _result_row(evaluation: Evaluation, system: System) -> list[str]:
    return [
        evaluation.name_in_table(system),
        write_number(system.executions, 2),
        write_number(100 * system.accuracy),
        write_number(system.text_loss, 3),
        *_verdict_cells(_choose_differences(evaluation, system)),
    ]


def _choose_differences(evaluation: Evaluation, system: System) -> Differences | None:
    """Return the routed model minus a system; without a routed model, the system minus base."""
    if evaluation.routed is None:
        return system.against_base
    if system.name == BASE:
        return evaluation.routed.against_base
    return system.routed_against


def _verdict_cells(differences: Differences | None) -> list[str]:
    """Return the cells on accuracy (difference, excluded loss, verdict) and on next-token loss."""
    accuracy, loss = _split_verdicts(differences)
    return [
        write_difference(accuracy),
        write_excluded(accuracy),
        write_label(accuracy),
        write_difference(loss),
        write_label(loss),
    ]


def _split_verdicts(differences: Differences | None) -> tuple[Verdict | None, Verdict | None]:
    """Return the verdicts on accuracy and on next-token loss."""
    if differences is None:
        return None, None
    return differences.accuracy, differences.text_loss


def systems_table(evaluation: Evaluation) -> Markdown:
    """Build the table of what each system does, and where it comes from."""
    reads = {None: NONE, True: "yes", False: "no"}
    rows = [
        [
            system.name,
            system.description or NONE,
            system.source or NONE,
            system.fitted_on or NONE,
            reads[system.reads_question],
            write_number(system.gold_logprob, 3),
        ]
        for system in evaluation.systems
    ]
    words = "what it does|source|fitted on|reads the question"
    header = f"system|{words}|gold log-probability"
    caption = "What each system does, and where it comes from."
    return write_table(caption, header, rows, words)


def depths_table(evaluation: Evaluation) -> Markdown:
    """Build the table of every system at every depth."""
    rows = [_depth_row(point) for point in evaluation.curve]
    caption = (
        "Every system at every depth minus base, and the routed model minus the system, with 95 % "
        "intervals. Rows are not corrected for their number."
    )
    header = (
        f"system|depth|layers run|{evaluation.score}, %|minus base's, points|"
        f"loss minus base's, nats|routed minus system, points|verdict on routed"
    )
    return write_table(caption, header, rows, "depth|verdict on routed", ROUTED)


def _depth_row(point: Point) -> list[str]:
    accuracy, loss = _split_verdicts(point.against_base)
    routed_accuracy, _ = _split_verdicts(point.routed_against)
    return [
        point.system,
        point.setting or NONE,
        write_number(point.executions, 2),
        write_number(100 * point.accuracy),
        write_difference(accuracy),
        write_difference(loss),
        write_difference(routed_accuracy),
        write_label(routed_accuracy),
    ]


def compared_table(what: str, named: Sequence[NamedSystem], caption: str) -> Markdown:
    """Build the table of the systems of several runs or tasks, each compared with its base.

    Args:
        what: The name of the first column: "run" or "task".
        named: The systems, with the names of their runs or tasks.
        caption: The caption.
    """
    words = "of task|system|verdict|verdict by loss|verdict against permuted routes"
    header = (
        f"{what}|of task|questions|system|layers run|accuracy, %|minus base's, points|"
        f"loss excluded above|verdict|loss minus base's, nats|verdict by loss|"
        f"verdict against permuted routes"
    )
    rows = [_compared_row(name, evaluation, system) for name, evaluation, system in named]
    return write_table(caption, header, rows, words)


def _compared_row(name: str, evaluation: Evaluation, system: System | Point) -> list[str]:
    permuted_verdict = None
    if system.name == ROUTED:
        permuted_verdict = get_routed_verdict(evaluation.system(PERMUTED))
    task = evaluation.task
    if name == task:  # the first column has the tasks already
        task = NONE
    return [
        name,
        task,
        write_count(evaluation.num_questions),
        system.name,
        write_number(system.executions, 2),
        write_number(100 * system.accuracy),
        *_verdict_cells(system.against_base),
        write_label(permuted_verdict),
    ]
