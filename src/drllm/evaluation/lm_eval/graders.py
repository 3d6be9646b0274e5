"""Describe to the harness the tasks that are ours alone, and grade their answers.

Task files name the functions here by `!function`; among them are SQuAD's two metrics, which the
harness would fetch from the net. Loads no torch.
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
"""What stands for "the passage doesn't say", among the answers shown and those generated."""

RULE = ("reward", "answer", "other_answers", "letters")  # what grading needs to know of a prompt


def entry_of(task: Task) -> Harness:
    """Return how the harness asks a task: as the task says itself, or by its first reward."""
    if task.harness is not None:
        return task.harness
    task.check_answers()
    return _choices_entry(task) if task.rewards[0] == OPTIONS_REWARD else _generated_entry(task)


def _choices_entry(task: Task) -> Harness:
    """Return how the harness asks a task whose options are scored."""

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
            **_averaged("acc", "acc_norm"),
        },
    )


def _generated_entry(task: Task) -> Harness:
    """Return how the harness asks a task whose answers are generated."""

    def columns(example: Example, _row: Row) -> dict[str, Any]:
        prompt = task.prompt(example, task.rewards[0])
        if prompt.messages:
            raise TaskError("conversations can't be evaluated; give prompts, one text each")
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
            "doc_to_target": Function(f"{__name__}.shown"),
            "target_delimiter": "\n",
            "process_results": Function(f"{__name__}.graded"),
            "generation_kwargs": {"until": [], "do_sample": False},
            **_averaged("exact_match"),
        },
        generated=True,
        metric="exact_match",
        notes=(
            "asked as a search asks it; a search sends the question through the model's chat "
            "template, an evaluation does where the harness is told to apply it",
        ),
    )


def _averaged(*metrics: str) -> dict[str, Any]:
    """Return the settings that have the harness report the means of some metrics."""
    metric_list = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]
    return {"metric_list": metric_list, "metadata": {"version": 1}}


def graded(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade a generated answer by the rule of its row (see `grading_of`): 1 if it is right."""
    return {"exact_match": grade(_prompt(doc), results[0])}


def shown(doc: Mapping[str, Any]) -> str:
    """Return the right answer of a row in the form that the question asks for."""
    prompt = _prompt(doc)
    return get_reward(prompt).gold_text(prompt)


def grading_of(prompt: Prompt) -> str:
    r"""Write what grading needs to know of a prompt as one text.

    One text, since columns that happen to hold nothing but dates, or nothing at all, would be
    read back as something else than texts.
    """
    rule = {name: getattr(prompt, name) for name in RULE}
    if prompt.question:
        rule["question"] = prompt.question
    return json.dumps(rule, ensure_ascii=False)


def _prompt(doc: Mapping[str, Any]) -> Prompt:
    rule = json.loads(doc["grading"])
    rule["other_answers"] = tuple(rule["other_answers"])
    return Prompt(text="", **rule)


def squad(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade an answer as SQuAD 2.0 does; `unanswerable` and nothing at all mean "no answer".

    The row's `grading` lists the right answers as JSON; none where there is no answer. `exact` is 1
    if the text equals an answer after normalising, else 0; `f1` the best overlap in words with an
    answer, in [0, 1].

    Source: Rajpurkar et al. 2016, section 6.1, and 2018 (no answer: both metrics are 1 for an
        answer withheld, else 0). That a word stands for the missing answer is
        lm-evaluation-harness' prompt.
    """
    answer = _words(results[0])
    if answer == [NO_ANSWER]:
        answer = []
    right_answers = [_words(text) for text in json.loads(doc["grading"])]
    # Answers that are nothing but articles and marks are left out, unless that leaves none.
    right_answers = [words for words in right_answers if words] or [[]]
    overlaps = [_overlap(answer, words) for words in right_answers]
    return {"exact": float(answer in right_answers), "f1": max(overlaps)}


def squad_shown(doc: Mapping[str, Any]) -> str:
    """Return the first right answer of a row, or the word for none."""
    answers = json.loads(doc["grading"])
    return str(answers[0]) if answers else NO_ANSWER


def _words(text: str) -> list[str]:
    """Return the words that count: lower case, without marks and articles."""
    plain = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _overlap(answer: Sequence[str], right: Sequence[str]) -> float:
    """Return F1 of the words of an answer and a right one."""
    if not answer or not right:
        return float(answer == right)
    num_common = sum((Counter(answer) & Counter(right)).values())
    return 2 * num_common / (len(answer) + len(right))
