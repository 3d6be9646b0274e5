"""The one table of how an evaluation asks each task: as what task of lm-evaluation-harness.

Owns, by our name of a task, the harness' own task file, the columns that it reads, the metric that
counts, and what a reader must know; and the two forms of tasks that are ours alone. Leaves which
questions are asked to `tasks` and writing them down to `folders`. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from drllm.evaluation.lm_eval.graders import grading_of
from drllm.tasks.agieval import golds_of
from drllm.tasks.base import OPTIONS_REWARD, Example, Task
from drllm.tasks.rows import text_of, texts_of

Row: TypeAlias = Mapping[str, Any]
"""One object of a task's file, in the schema of the hub or of a data folder."""

Columns: TypeAlias = Callable[[Example, Row], dict[str, Any]]
"""Makes the columns that a task file reads of a question and the row that it was read from."""

GRADERS = "drllm.evaluation.lm_eval.graders"


class Function(str):
    """A function that a task file names by `!function`, as `module.name`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How a task is asked.

    Attributes:
        file: The harness' task file below its `tasks`, with `{part}` where there is one for each
            part of the set; empty where `settings` are all there is.
        columns: Makes the columns that the task file reads.
        settings: What the harness' file is changed or, without one, the task is made of.
        generated: Answers are generated; else options are scored.
        metric: The metric that counts, of those that the harness reports.
        filter: Which of the harness' filters of a generated text it is taken from.
        shots: Worked examples before a question unless another number is asked for.
        only_zero_shot: Why no number can be asked for; empty where one can.
        max_new_tokens: Most tokens that an answer may have; 0 where options are scored.
        part_of: The column with the part that a row belongs to; empty for sets of one part.
        notes: What a reader of results must know.
    """

    file: str = ""
    columns: Columns
    settings: Mapping[str, Any] = field(default_factory=dict)
    generated: bool = False
    metric: str = "acc"
    filter: str = "none"
    shots: int = 0
    only_zero_shot: str = ""
    max_new_tokens: int = 0
    part_of: str = ""
    notes: tuple[str, ...] = ()


def entry_of(task: Task) -> Entry:
    """Return how a task is asked: by its entry, or in the form that a search gives it.

    A task that isn't in the table has its options scored, else its answers graded, as the first
    of its rewards says.
    """
    if task.name in TABLE:
        return TABLE[task.name]
    return own_options(task) if task.rewards[0] == OPTIONS_REWARD else own_answers(task)


# --- tasks that are ours alone -----------------------------------------------------------------


def own_options(task: Task) -> Entry:
    """Return the entry of a task whose prompt and continuations are those of a search."""

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, OPTIONS_REWARD)
        # The options as one text, written in Python: of a column of lists that hold nothing but
        # dates, datasets makes dates.
        options = [text.removeprefix(" ") for text in prompt.continuations]
        return {"prompt": prompt.text, "options": repr(options), "gold": prompt.gold}

    return Entry(
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


def own_answers(task: Task) -> Entry:
    """Return the entry of a task whose generated answers are graded by our own rules."""
    reward = task.rewards[0]

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, reward)
        return {
            "prompt": prompt.text,
            "grading": grading_of(prompt),
            "max_new_tokens": prompt.max_new_tokens,
        }

    return Entry(
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


# --- tasks of the harness ----------------------------------------------------------------------


def _as_they_are(*names: str) -> Columns:
    def columns(_example: Example, row: Row) -> dict[str, Any]:
        return {name: row[name] for name in names}

    return columns


def _labelled(_example: Example, row: Row) -> dict[str, Any]:
    choices = {"text": row["choices"]["text"], "label": row["choices"]["label"]}
    kept = {name: row[name] for name in ("id", "question", "answerKey")}
    return {**kept, "choices": choices}


def _truthful(example: Example, _row: Row) -> dict[str, Any]:
    labels = [int(index == example.gold) for index in range(len(example.choices))]
    targets = {"choices": list(example.choices), "labels": labels}
    return {"question": example.question, "mc1_targets": targets}


def _gpqa(example: Example, _row: Row) -> dict[str, Any]:
    assert example.gold is not None
    options = {f"choice{place}": text for place, text in enumerate(example.choices, start=1)}
    return {"Question": example.question, **options, "answer": f"({'ABCD'[example.gold]})"}


def _agieval(example: Example, row: Row) -> dict[str, Any]:
    return {
        "query": example.question,
        "choices": list(example.choices),
        "gold": golds_of(row),
    }


def _hellaswag(example: Example, _row: Row) -> dict[str, Any]:
    return {"query": example.question, "choices": list(example.choices), "label": example.gold}


def _aime(example: Example, _row: Row) -> dict[str, Any]:
    return {"Problem": example.question, "Answer": example.answer}


def _squad(_example: Example, row: Row) -> dict[str, Any]:
    texts = {name: text_of(row, name) for name in ("title", "context", "question")}
    # Answers as one text: the lists may all be empty, of which datasets makes another column.
    answers = texts_of(row["answers"], "text", minimum=0)
    return {**texts, "grading": json.dumps(answers, ensure_ascii=False)}


TABLE: dict[str, Entry] = {
    "agieval": Entry(
        file="agieval/aqua-rat.yaml",
        columns=_agieval,
        only_zero_shot="the harness can't show examples of it",
        notes=("the English parts that have options, together; a part counts by its size",),
    ),
    "aime24": Entry(
        file="aime/aime24.yaml",
        columns=_aime,
        generated=True,
        metric="exact_match",
        max_new_tokens=32768,
    ),
    "arc_easy": Entry(file="arc/arc_easy.yaml", columns=_labelled),
    "arc_challenge": Entry(file="arc/arc_challenge.yaml", columns=_labelled),
    "commonsense_qa": Entry(
        file="commonsense_qa/default.yaml",
        columns=_labelled,
        notes=("letters are scored; small models are near chance on them",),
    ),
    "commonsense_qa_cloze": Entry(
        file="arc/arc_easy.yaml",
        columns=_labelled,
        notes=("asked as ARC is, which the harness has no task for",),
    ),
    "gpqa_diamond": Entry(
        file="gpqa/zeroshot/gpqa_diamond_zeroshot.yaml",
        columns=_gpqa,
        settings={"process_docs": None},
        notes=(
            "the options' order is drawn from the question's text; the harness draws another in "
            "every run",
        ),
    ),
    "gsm8k": Entry(
        file="gsm8k/gsm8k.yaml",
        columns=_as_they_are("question", "answer"),
        generated=True,
        metric="exact_match",
        filter="flexible-extract",
        shots=5,
        max_new_tokens=256,
        notes=("worked solutions are shown and reasoning is allowed; a search allows none",),
    ),
    "hellaswag": Entry(
        file="hellaswag/hellaswag.yaml",
        columns=_hellaswag,
        settings={"process_docs": None},
    ),
    "mmlu": Entry(
        file="mmlu/default/mmlu_{part}.yaml",
        columns=_as_they_are("subject", "question", "choices", "answer"),
        part_of="subject",
        notes=("letters are scored; small models are near chance on them",),
    ),
    "mmlu_cloze": Entry(
        file="mmlu/continuation/mmlu_{part}.yaml",
        columns=_as_they_are("subject", "question", "choices", "answer"),
        part_of="subject",
    ),
    "piqa": Entry(file="piqa/piqa.yaml", columns=_as_they_are("goal", "sol1", "sol2", "label")),
    "squad_v2": Entry(
        columns=_squad,
        settings={
            "output_type": "generate_until",
            "doc_to_text": "Title: {{title}}\n\nBackground: {{context}}\n\n"
            "Question: {{question}}\n\nAnswer:",
            "doc_to_target": Function(f"{GRADERS}.squad_shown"),
            "process_results": Function(f"{GRADERS}.squad"),
            "generation_kwargs": {"until": ["\n"], "do_sample": False},
            "metric_list": [_mean("exact"), _mean("f1")],
            "metadata": {"version": 1},
        },
        generated=True,
        metric="exact",
        max_new_tokens=32,
        notes=(
            "the harness' prompt with SQuAD's exact match and F1, without its metrics over "
            "thresholds; where the passage has no answer, 'unanswerable' or nothing is right, and "
            "an answer ends after a line or 32 tokens",
        ),
    ),
    "truthfulqa": Entry(
        file="truthfulqa/truthfulqa_mc1.yaml",
        columns=_truthful,
        only_zero_shot="six fixed examples are part of its prompt",
    ),
    "winogrande": Entry(
        file="winogrande/default.yaml",
        columns=_as_they_are("sentence", "option1", "option2", "answer"),
        notes=(
            "an option stands in the context and the text behind the gap is scored; what the "
            "options share is the text before the gap",
        ),
    ),
}
"""Our name of a task → how it is asked."""
