"""The paths of `paths.json` with their scores, from the scores of a tuning."""

from collections.abc import Sequence
from statistics import fmean

from msgspec.structs import replace

from drllm.config.heal import REFIT
from drllm.cost import path_executions
from drllm.paths import StaticPath
from drllm.records.static_paths import (
    FIT,
    FULL,
    PARTS,
    NamedPath,
    PathScore,
    steps_to_write,
)
from drllm.statistics.intervals import accuracy_interval, mean_interval
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import compare
from drllm.tuning.gains import Gains
from drllm.tuning.objectives import GOLD
from drllm.tuning.score_blocks import PLAIN
from drllm.tuning.task_questions import TEXTS_OF, TaskQuestions


def make_named_paths(paths: Sequence[StaticPath], gains: Gains) -> list[NamedPath]:
    """Return paths with their names and scores.

    Args:
        paths: The paths, from the longest to the shortest, the full path first. They are scored on
            all parts.
        gains: Compares them with the full path. If they are repaired by their refits, the paths
            are scored plain too.
    """
    named_paths = []
    for path, is_dominated in zip(paths, gains.find_dominated(paths), strict=True):
        repaired: list[PathScore] = []
        if gains.mark_repair(path).adapter == REFIT:
            repaired = _make_scores(gains, path)
        named_path = NamedPath(
            name=_name_path(path, gains.full),
            steps=steps_to_write(path),
            executions=path_executions(path),
            dominated=is_dominated,
            measured=tuple(_make_scores(gains.with_repair(PLAIN), path)),
            repaired=tuple(repaired),
        )
        named_paths.append(named_path)
    return named_paths


def _make_scores(gains: Gains, path: StaticPath) -> list[PathScore]:
    """Return the scores of a path on all parts of all tasks."""
    scores = []
    for part in PARTS:
        scores += [_make_score(gains, task, part, path) for task in gains.tasks]
    return scores


def _name_path(path: StaticPath, full: StaticPath) -> str:
    """Return the name of a path, such as `skip3`."""
    if path == full:
        return FULL
    return f"skip{len(full.layers) - path_executions(path):.3g}"


def _make_score(gains: Gains, task: TaskQuestions, part: str, path: StaticPath) -> PathScore:
    """Return the scores of a path on a part of a task's questions."""
    seed = gains.seed
    scored_path = gains.mark_repair(path)
    values = gains.table.objective(task, part, scored_path)
    score = PathScore(task=task.name, part=part, num_questions=len(values), objective=fmean(values))
    if path != gains.full:
        differences = gains.table.compare(task, part, scored_path, gains.full)
        low, high = mean_interval(differences, seed)
        score = replace(score, change=(fmean(differences), low, high))
    if part == FIT:  # the path was fitted on this part, so no accuracy is reported
        return score
    outcomes = _collect_outcomes(gains, task, part, path)
    score = replace(score, text_loss=fmean(outcomes.text_loss))
    if not outcomes.correct:
        return score
    score = replace(score, accuracy=fmean(outcomes.correct))
    if path == gains.full:
        return score
    full_outcomes = _collect_outcomes(gains, task, part, gains.full)
    low, _ = accuracy_interval(full_outcomes.correct, seed)
    verdicts = compare(outcomes, full_outcomes, seed, above_chance=low > task.chance)
    return replace(score, against_full=verdicts)


def _collect_outcomes(gains: Gains, task: TaskQuestions, part: str, path: StaticPath) -> Outcomes:
    """Return what a path gives for each question of a part of a task."""
    scored_path = gains.mark_repair(path)
    objective = gains.table.objective(task, part, scored_path)
    texts = gains.table.objective(task, TEXTS_OF + part, scored_path)
    return Outcomes(
        name=_name_path(path, gains.full),
        executions=path_executions(path),
        correct=gains.table.grades(task, part, scored_path),
        gold_logprob=objective if task.objective == GOLD else [],
        text_loss=[-value for value in texts],
    )
