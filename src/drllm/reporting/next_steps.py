"""What to do next, by what was found: concrete commands and settings, the most urgent first."""

from __future__ import annotations

from collections.abc import Iterator

from drllm.cost import share_saved
from drllm.records.results import PERMUTED, Evaluation, System
from drllm.reporting.blocks import Step
from drllm.reporting.numbers import against, count, label
from drllm.reporting.run import Run

MOST = 5
SMALL = 0.01
"""Share of the layers by which executions may differ and still be called equal."""


def next_steps(run: Run) -> list[Step]:
    """Return what is worth doing next in a run folder."""
    if not run.evaluations:
        return [_before_evaluation(run)]
    found = dict.fromkeys(step for each in run.evaluations for step in _of_task(run, each))
    return list(found)[:MOST]


def _before_evaluation(run: Run) -> Step:
    name = run.folder
    if run.router_config or run.epochs:
        what = "Evaluate the routers against base and the baselines:"
        return Step(what, f"drllm evaluate --routers {name}/routers --output-dir {name}/eval")
    if run.supervision:
        what = "Train routers on these targets:"
        return Step(what, f"drllm train --supervision {name}/supervision.jsonl --output-dir {name}")
    what = "Make a target path of each searched question:"
    files = f"--search {name}/search.jsonl --output {name}/supervision.jsonl"
    return Step(what, f"drllm supervise {files}")


def _of_task(run: Run, evaluation: Evaluation) -> Iterator[Step]:
    routed, task = evaluation.routed, evaluation.task
    if routed is None or routed.against_base is None:
        yield Step(f"Compare the routed model on {task} too:", "drllm evaluate --routers FOLDER")
        return
    accuracy, loss = routed.against_base.accuracy, routed.against_base.text_loss
    saved = share_saved(routed.executions, evaluation.num_layers)
    if not evaluation.above_chance:
        yield Step(
            f"On {task} the base model may be guessing: evaluate on a task that it can do, or with "
            f"worked examples:",
            "drllm evaluate … --num-fewshot 5",
        )
    if accuracy.needed is not None:
        needed = count(accuracy.needed)
        yield Step(
            f"Ask more questions: about {needed} would tell; {task} was asked "
            f"{count(evaluation.num_questions)}. Where the set has no more, give a larger one:",
            f"drllm evaluate … --limit {accuracy.needed}",
        )
    is_worse = accuracy.is_better is False or (loss is not None and loss.is_better is False)
    if is_worse and saved > 0:
        if len(run.supervision) < 500 and run.supervision:
            yield Step(
                f"The routers learned from {count(len(run.supervision))} targets. Search more "
                f"questions and train again:",
                "drllm search … --limit 1000",
            )
        yield Step(
            "Take other targets, the paths that change the model's answers least:",
            "drllm supervise … --target least_kl --min-saving 0.05",
        )
    if not evaluation.curve:
        yield Step(
            "See what is kept when fewer layers are saved, or more:",
            "drllm evaluate … --curve 0.02,0.05,0.1",
        )
    elif evaluation.choice is None and saved > 0:
        yield Step(
            "Look for the cheapest depth that is shown to lose less than you allow:",
            f"drllm evaluate … --curve {_config(evaluation, 'curve')} --epsilon 2",
        )
    if rival := _unbeaten(evaluation):
        yield Step(
            f"Against {rival.name}, which doesn't read the question, routed is: "
            f"{label(against(rival))}. One path for all questions can be an ordinary checkpoint, "
            f"which any engine runs without routers:",
            "drllm export --decisions FILE --output FOLDER",
        )
    if not is_worse and saved > 0:
        routers = _config(evaluation, "routers") or evaluation.routers
        yield Step("Read a few answers yourself:", f"drllm generate --routers {routers} PROMPT")
    if not len(evaluation.seeds):
        yield Step(
            "Train with other seeds, to see how much is luck:", "drllm train … --num-seeds 3"
        )


def _config(evaluation: Evaluation, name: str) -> str:
    return str(evaluation.config.get(name) or "")


def _unbeaten(evaluation: Evaluation) -> System | None:
    """Return the best baseline that runs as many layers, ignores the question, and isn't beaten."""
    routed = evaluation.routed
    found = [
        system
        for system in evaluation.baselines
        if routed is not None
        and system.reads_question is False
        and system.name != PERMUTED
        and abs(system.executions - routed.executions) <= SMALL * evaluation.num_layers
        and (verdict := against(system)) is not None
        and verdict.is_better is not True
    ]
    return max(found, key=lambda system: system.accuracy, default=None)
