"""How an evaluation asks a task: by the harness' own task file, or as a search asks it.

The first stands with the task (`tasks.base.Harness`); the second is for tasks that are ours alone.
Loads no torch.
"""

from __future__ import annotations

from typing import Any

from drllm.evaluation.lm_eval.graders import grading_of
from drllm.tasks.base import OPTIONS_REWARD, Example, Function, Harness, Row, Task

GRADERS = "drllm.evaluation.lm_eval.graders"


def entry_of(task: Task) -> Harness:
    """Return how a task is asked: as it says itself, or in the form that a search gives it.

    In the second case options are scored, else answers graded, as the first of its rewards says.
    """
    if task.harness is not None:
        return task.harness
    return own_options(task) if task.rewards[0] == OPTIONS_REWARD else own_answers(task)


def own_options(task: Task) -> Harness:
    """Return the form of a task whose prompt and continuations are those of a search."""

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, OPTIONS_REWARD)
        # The options as one text, written in Python: of a column of lists that hold nothing but
        # dates, datasets makes dates.
        options = [text.removeprefix(" ") for text in prompt.continuations]
        return {"prompt": prompt.text, "options": repr(options), "gold": prompt.gold}

    return Harness(
        columns=columns,
        settings={
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
            "metadata": {"version": 1},
        },
    )


def own_answers(task: Task) -> Harness:
    """Return the form of a task whose generated answers are graded by our own rules."""
    reward = task.rewards[0]

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, reward)
        return {
            "prompt": prompt.text,
            "grading": grading_of(prompt),
            "max_new_tokens": prompt.max_new_tokens,
        }

    return Harness(
        columns=columns,
        settings={
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": Function(f"{GRADERS}.shown"),
            "target_delimiter": "\n",
            "process_results": Function(f"{GRADERS}.graded"),
            "generation_kwargs": {"until": [], "do_sample": False},
            "metric_list": [_mean("exact_match")],
            "metadata": {"version": 1},
        },
        generated=True,
        metric="exact_match",
        notes=(
            "asked as a search asks it; a search sends the question through the model's chat "
            "template, an evaluation does where the harness is told to apply it",
        ),
    )


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}
