"""Describe drllm's tasks to lm-evaluation-harness ("the harness"), and grade their answers.

`make_entry` makes the description. The harness calls the functions `graded`, `shown`, `squad` and
`squad_shown`, which task files name after `!function`; so they can't be renamed. `squad` computes
SQuAD's two metrics, which the harness would otherwise download. This module doesn't import torch.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from drllm.errors import TaskError
from drllm.tasks.base import Function, Harness, Task
from drllm.tasks.examples import OPTIONS_REWARD, Example, Prompt, Row
from drllm.tasks.rewards import get_reward, grade

NO_ANSWER = "unanswerable"
"""The answer, shown or generated, that means "the passage doesn't say"."""

RULE = ("reward", "answer", "other_answers", "letters")
"""The fields of a prompt that grading needs. They are stored in the column `grading` of a row."""


def make_entry(task: Task) -> Harness:
    """Return how the harness evaluates a task.

    This is the task's own description. If the task has none, it is made for its first reward.
    """
    if task.harness is not None:
        return task.harness
    task.check_answers()
    if task.rewards[0] == OPTIONS_REWARD:
        return _make_choices_entry(task)
    return _make_generated_entry(task)


def _make_choices_entry(task: Task) -> Harness:
    """Describe a task whose options are scored."""

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, OPTIONS_REWARD)
        # The options are one text, a Python literal, because `datasets` would turn a column of
        # lists that hold only dates into dates.
        options = [text.removeprefix(" ") for text in prompt.continuations]
        return {"prompt": prompt.text, "options": repr(options), "gold": prompt.gold}

    return Harness(
        columns=columns,
        settings={
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            **_report_means("acc", "acc_norm"),
        },
    )


def _make_generated_entry(task: Task) -> Harness:
    """Describe a task whose answers are generated."""

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, task.rewards[0])
        if prompt.messages:
            raise TaskError("a conversation can't be evaluated; give each prompt as one text")
        return {
            "prompt": prompt.text,
            "grading": write_grading(prompt),
            "max_new_tokens": prompt.max_new_tokens,
        }

    return Harness(
        columns=columns,
        settings={
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": Function(f"{__name__}.shown"),
            "target_delimiter": "\n",
            "process_results": Function(f"{__name__}.graded"),
            "generation_kwargs": {"until": [], "do_sample": False},
            **_report_means("exact_match"),
        },
        generated=True,
        metric="exact_match",
        chat=True,
        notes=(
            "prompted as in a search, through the model's chat template if it has one; the harness "
            "alone uses the template only with --apply_chat_template",
        ),
    )


def _report_means(*metrics: str) -> dict[str, Any]:
    """Return settings that make the harness report the mean of each metric."""
    metric_list = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]
    return {"metric_list": metric_list, "metadata": {"version": 1}}


def graded(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade a generated answer by the rule in its row (see `write_grading`), 1 if it is right."""
    return {"exact_match": grade(_read_prompt(doc), results[0])}


def shown(doc: Mapping[str, Any]) -> str:
    """Return a row's right answer in the form that the question asks for."""
    prompt = _read_prompt(doc)
    return get_reward(prompt).gold_text(prompt)


def write_grading(prompt: Prompt) -> str:
    """Write the fields of a prompt that grading needs as one JSON text.

    The fields aren't columns of their own, since `datasets` doesn't read a column as text if it
    holds only dates, or nothing.
    """
    rule = {name: getattr(prompt, name) for name in RULE}
    if prompt.question:
        rule["question"] = prompt.question
    return json.dumps(rule, ensure_ascii=False)


def _read_prompt(doc: Mapping[str, Any]) -> Prompt:
    """Read the prompt that `write_grading` wrote into a row."""
    rule = json.loads(doc["grading"])
    rule["other_answers"] = tuple(rule["other_answers"])
    return Prompt(text="", **rule)


def squad(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade an answer as SQuAD 2.0 does. The answers `unanswerable` and "" mean "no answer".

    The row's `grading` is a JSON list of the right answers, empty if there is no answer. If a
    question has no answer, both metrics are 1 for "no answer", else 0.

    Returns:
        `exact` is 1 if the normalised text equals a right answer, else 0. `f1` is the best overlap
        in words with a right answer, in [0, 1].

    Source: Rajpurkar et al. 2016, section 6.1, and Rajpurkar et al. 2018 for questions without an
        answer. The word `unanswerable` is from the harness' prompt.
    """
    answer = _normalise_words(results[0])
    if answer == [NO_ANSWER]:
        answer = []
    right_answers = [_normalise_words(text) for text in json.loads(doc["grading"])]
    # Right answers that have only articles and punctuation are left out. If none remains, the
    # question has no answer.
    right_answers = [words for words in right_answers if words] or [[]]
    overlaps = [_overlap(answer, words) for words in right_answers]
    return {"exact": float(answer in right_answers), "f1": max(overlaps)}


def squad_shown(doc: Mapping[str, Any]) -> str:
    """Return the first right answer of a row, or `NO_ANSWER`."""
    answers = json.loads(doc["grading"])
    return str(answers[0]) if answers else NO_ANSWER


def _normalise_words(text: str) -> list[str]:
    """Split a text into lower-case words, without punctuation and articles."""
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(answer: Sequence[str], right_answer: Sequence[str]) -> float:
    """Return the F1 score of an answer's words against the words of a right answer."""
    if not answer or not right_answer:
        return float(answer == right_answer)
    num_common = sum((Counter(answer) & Counter(right_answer)).values())
    return 2 * num_common / (len(answer) + len(right_answer))
