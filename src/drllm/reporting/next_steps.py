"""What to do next, by what was found: concrete commands and settings, the most urgent first."""

import shlex
from collections.abc import Iterator
from typing import TypeAlias

from drllm.cost import share_saved
from drllm.paths import ALL
from drllm.records.results import PERMUTED, Evaluation, System
from drllm.reporting.numbers import against, count, difference, label
from drllm.reporting.run import Run
from drllm.supervision.rules import MIN_SAVING

Step: TypeAlias = tuple[str, str]  # something to do, and what to type for it

MOST = 5
SMALL = 0.01  # share of the layers by which executions may differ and still be called equal


def next_steps(run: Run) -> list[Step]:
    """Return what is worth doing next in a run folder: what to do, and what to type for it."""
    if not run.evaluations:
        return [_before_evaluation(run)]
    found = dict.fromkeys(step for each in run.evaluations for step in _of_task(run, each))
    return list(found)[:MOST]


def _before_evaluation(run: Run) -> Step:
    here = shlex.quote(str(run.folder))
    if (run.paths or run.healed) and not run.has_training:
        given = f"{here}/{run.sources[-1].name}"  # of what is healed before what isn't
        if run.paths and not run.healed:
            given += f":{run.paths.certified or run.paths.paths[-1].name}"
        return "Read a few answers yourself:", f"drllm generate --path {given} PROMPT"
    if run.router_config or run.epochs:
        what = "Evaluate the routers against base and the baselines:"
        return (
            what,
            f"drllm evaluate --routers {here}/routers --tasks TASKS --output-dir {here}/eval",
        )
    if run.supervision:
        what = "Train routers on these targets:"
        return what, f"drllm train --supervision {here}/supervision.jsonl --output {here}/routers"
    files = f"--search {here}/search.jsonl --output {here}/supervision.jsonl"
    return "Make a target path of each searched question:", f"drllm supervise {files}"


def _of_task(run: Run, evaluation: Evaluation) -> Iterator[Step]:
    ours, task = evaluation.compared, evaluation.task
    if ours is None or ours.against_base is None:
        yield (
            f"Compare the routed model on {task} too:",
            f"drllm evaluate --routers FOLDER --tasks {task}",
        )
        return
    accuracy, loss = ours.against_base.accuracy, ours.against_base.text_loss
    saves = share_saved(ours.executions, evaluation.num_layers) > 0
    given = {name: evaluation.config.get(name) for name in ("curve", "paths")}
    is_worse = any(each is not None and each.is_better is False for each in (accuracy, loss))
    if accuracy.shown == "guessing":
        what = f"Take a task that the base model can do; on {task} it may be guessing. Or show it"
        yield f"{what} worked examples:", "drllm evaluate … --num-fewshot 5"
    if accuracy.needed is not None:
        what = f"Ask more than these {count(evaluation.num_questions)} questions of {task}:"
        yield what, f"drllm evaluate … --limit {-(-accuracy.needed // 10) * 10}"
    if is_worse and saves and evaluation.routed:
        yield from _better_targets(run)
    if evaluation.routed and not any(point.setting for point in evaluation.curve):
        what = "See what is kept where fewer or more layers are saved:"
        yield what, "drllm evaluate … --curve 0.02,0.05,0.1"
    elif evaluation.choice is None and saves:
        words = " ".join(f"--{name} {shlex.quote(value)}" for name, value in given.items() if value)
        what = f"Look for the cheapest {'depth' if evaluation.routed else 'path'} that is shown to "
        yield f"{what}lose less than you allow:", f"drllm evaluate … {words} --epsilon 2"
    if rival := _unbeaten(evaluation):
        what = f"Routed minus {rival.name}, which reads no question: "
        what += f"{difference(against(rival))} points, {label(against(rival))}. A path needs no "
        how, command = _use(evaluation, rival)
        yield f"{what}router; {how}", command
    if not is_worse and saves and evaluation.routers:
        routers = shlex.quote(evaluation.routers)
        yield "Read a few answers yourself:", f"drllm generate --routers {routers} PROMPT"
    if not is_worse and saves and not evaluation.routed:
        how, command = _use(evaluation, ours)
        yield f"Use {evaluation.called(ours)}; {how}", command
    if evaluation.routed and not evaluation.seeds:
        yield "Train with other seeds, to see how much is luck:", "drllm train … --num-seeds 3"


def _use(evaluation: Evaluation, system: System) -> Step:
    """Say how a path is used; no checkpoint can leave out parts of layers."""
    if any(step.run != ALL for step in evaluation.paths.get(system.name, ())):
        return "with parts of layers left out it runs in drllm alone:", "drllm generate --path FILE"
    return "it can be an ordinary, smaller checkpoint:", "drllm export --path FILE --output FOLDER"


def _better_targets(run: Run) -> Iterator[Step]:
    if run.search:
        searched = count(len(run.search))
        what = f"Search more questions than these {searched}, and train again:"
        yield what, f"drllm search … --limit {4 * len(run.search)}"
    used = run.supervision_manifest.get("config") or {}
    if used.get("target") == "least_kl":
        saving = MIN_SAVING if used.get("min_saving") is None else used["min_saving"]
        if saving:
            what = "Take targets that save less:"
            yield what, f"drllm supervise … --min-saving {saving / 2:g}"
    elif run.supervision:
        what = "Take other targets, the paths that change the model's answers least:"
        yield what, "drllm supervise … --target least_kl"


def _unbeaten(evaluation: Evaluation) -> System | None:
    """Return a path for all questions that runs no more layers and isn't beaten.

    It is the one that the verdict names, else the most accurate baseline that runs as many.
    """
    routed, named, found = evaluation.routed, evaluation.best_path, list[System]()
    if routed is None:
        return None
    for system in evaluation.systems:
        more = system.executions - routed.executions
        near = (more if system is named else abs(more)) <= SMALL * evaluation.num_layers
        verdict, is_path = against(system), system.reads_question is False and system.draws == 1
        if near and is_path and system.name != PERMUTED and verdict and not verdict.is_better:
            found.append(system)
    return max(found, key=lambda each: (each is named, each.accuracy), default=None)
