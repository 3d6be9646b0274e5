"""Writes the findings and the notes of an evaluation: sentences for readers of a task's record.

Most findings are sentences of `statistics.differences` on how two systems differ. The headline,
which says what to do, is the record's own.
"""

from collections.abc import Iterator, Sequence

from drllm.evaluation.outcomes import TaskRuns
from drllm.records import results
from drllm.statistics.words import capitalize

MENTIONED_SHARE = 0.01
"""If permuting left more than this share of the routes unchanged, a finding says so."""


def write_findings(runs: TaskRuns, evaluation: results.Evaluation) -> list[str]:
    """Return what the tests show, in sentences with all numbers."""
    systems = _list_main_systems(evaluation)
    findings: list[str] = []
    if evaluation.drop_test is not None:
        findings.append(evaluation.drop_test.sentence())
    if not runs.above_chance:
        findings.append(_warn_of_guessing(runs))
    findings += _write_test_sentences(systems, evaluation)
    permuted = evaluation.system(results.PERMUTED)
    if permuted is not None:
        findings.append(_describe_permuted(runs, permuted))
    return findings


def _warn_of_guessing(runs: TaskRuns) -> str:
    """Say that base may be guessing, so that nothing can be claimed."""
    task = runs.rendered.task
    return (
        f"On {task.name} the base model is not shown to be above chance "
        f'({100 * task.chance:.1f} %), so no gain and no "no loss" can be claimed here.'
    )


def write_notes(runs: TaskRuns, evaluation: results.Evaluation) -> list[str]:
    """Return the notes on seeds, the task, its cost and its systems as sentences."""
    sentences = [describe_seeds(seeds) for seeds in evaluation.seeds]
    notes = dict.fromkeys(runs.notes)  # without repeats
    sentences += [f"{capitalize(note.removesuffix('.'))}." for note in notes]
    if isinstance(runs.shape, str):
        sentences.append(f"FLOPs and K/V bytes are not derived: {runs.shape}.")
    for system in runs.systems_as_trained:
        sentences += [f"{system.name.capitalize()}: {note}." for note in system.notes]
    return sentences


def _describe_permuted(runs: TaskRuns, permuted: results.System) -> str:
    """Say how the routed model differs from its own routes permuted over the questions."""
    if len(set(runs.routed.routes[0])) == 1:
        return "All questions took one route, so permuting says nothing."
    differences = permuted.routed_against
    assert differences is not None
    sentence = differences.accuracy.sentence(
        results.ROUTED, "its own routes permuted over the questions"
    )
    unchanged = permuted.unchanged_routes or 0.0
    if unchanged > MENTIONED_SHARE:
        sentence += f" {100 * unchanged:.1f} % of the questions kept their route by chance."
    return sentence


def _list_main_systems(evaluation: results.Evaluation) -> list[results.System]:
    """Return the systems that the findings are about.

    They are the routed model and the best path, or the one of them that was evaluated.
    """
    compared = evaluation.compared_system
    if compared is None or compared.against_base is None:
        raise ValueError("nothing is compared with base")
    best_path = evaluation.best_path
    if best_path is None or best_path is compared:
        return [compared]
    return [compared, best_path]


def _write_test_sentences(
    systems: Sequence[results.System], evaluation: results.Evaluation
) -> Iterator[str]:
    """Yield sentences on how the main systems differ from base, and the first from the others.

    The gold answers' log-probability is given for the first system only.
    """
    for system in systems:
        assert system.against_base is not None
        name = evaluation.name_in_sentence(system)
        for verdict in (system.against_base.accuracy, system.against_base.text_loss):
            if verdict is not None:
                yield verdict.sentence(name)
    for system in systems[1:]:
        assert system.routed_against is not None
        name = evaluation.name_in_sentence(system)
        for verdict in (system.routed_against.accuracy, system.routed_against.text_loss):
            if verdict is not None:
                yield verdict.sentence(results.ROUTED, name)
    first = systems[0]
    assert first.against_base is not None
    gold_logprob = first.against_base.gold_logprob
    if gold_logprob is not None:
        yield gold_logprob.sentence(evaluation.name_in_sentence(first))


def describe_seeds(seeds: results.Seeds) -> str:
    """Describe the results of routers of several seeds at one depth, in two or three sentences."""
    at_depth = ""
    if seeds.setting:
        at_depth = f" at {seeds.setting}"
    accuracy = seeds.accuracy
    executions = seeds.executions
    spread = f"{100 * accuracy.lowest:.1f} to {100 * accuracy.highest:.1f}"
    if accuracy.deviation is not None:
        spread += f", standard deviation {100 * accuracy.deviation:.1f} points"
    sentences = [
        f"Routers of {seeds.num_seeds} seeds{at_depth}: accuracy {100 * accuracy.mean:.1f} % "
        f"({spread}) at {executions.mean:.2f} executions ({executions.lowest:.2f} to "
        f"{executions.highest:.2f}).",
        seeds.against_base.accuracy.sentence("their mean", "base"),
    ]
    if seeds.against_permuted is not None:
        permuted = seeds.against_permuted.accuracy
        sentences.append(permuted.sentence("their mean", "their own routes permuted"))
    return " ".join(sentences)
