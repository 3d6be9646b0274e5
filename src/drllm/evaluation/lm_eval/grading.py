"""Let lm-evaluation-harness ("the harness") grade the answers to a task's questions.

An answer to a question with options is the score of each option. Otherwise it is the generated text
alone. Functions take a question's place in the lists of the rendered task.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

from drllm.errors import TaskError
from drllm.evaluation.lm_eval.scoring import OptionScore
from drllm.evaluation.lm_eval.task import RenderedTask

QuestionAnswers: TypeAlias = Sequence[OptionScore | str]
"""The scores of a question's options, or a list with its generated answer alone."""


def grade_answers(
    rendered: RenderedTask, answers: Sequence[QuestionAnswers]
) -> list[dict[str, float]]:
    """Let the harness grade the answers to each question.

    Args:
        rendered: The task.
        answers: The answers to each question.

    Returns:
        For each question, name of a metric → its value.
    """
    for instances, question_answers in zip(rendered.instances, answers, strict=True):
        for instance, answer in zip(instances, question_answers, strict=True):
            instance.resps = [answer]
            instance.filtered_resps = {}
    for leaf in rendered.leaves.values():
        leaf.apply_filters()
    return [_grade_question(rendered, place) for place in range(len(rendered.keys))]


def _grade_question(rendered: RenderedTask, place: int) -> dict[str, float]:
    """Return the metrics of one question, after the harness has filtered the answers."""
    name, _ = rendered.keys[place]
    answers = [
        instance.filtered_resps[rendered.task.filter] for instance in rendered.instances[place]
    ]
    values = rendered.leaves[name].process_results(rendered.docs[place], answers)
    metrics = {}
    for metric, value in values.items():
        if isinstance(value, (bool, int, float)):  # only the harness aggregates other types
            metrics[metric] = float(value)
    reported = rendered.task.metric
    if not 0 <= metrics.get(reported, -1.0) <= 1:
        raise TaskError(
            f"the metric {reported} of task {name!r} is {values.get(reported)} for a question, "
            f"and drllm compares metrics from 0 to 1; evaluate the task with 'drllm lm-eval run'"
        )
    return metrics


def choose_answer(rendered: RenderedTask, place: int, answers: QuestionAnswers) -> int | str:
    """Return the number of the option that the model chose, from 0, or the generated text."""
    logprobs = _read_logprobs(answers)
    if not logprobs:
        return str(answers[0])
    if rendered.task.metric == "acc_norm":  # the harness divides by the number of characters
        name, _ = rendered.keys[place]
        options = rendered.leaves[name].doc_to_choice(rendered.docs[place])
        logprobs = [value / len(text) for value, text in zip(logprobs, options, strict=True)]
    return logprobs.index(max(logprobs))


def compute_gold_logprob(rendered: RenderedTask, place: int, answers: QuestionAnswers) -> float:
    """Return the gold option's log-probability among a question's options, in nats.

    The probabilities of several gold options are added.
    """
    logprobs = _read_logprobs(answers)
    gold_logprobs = [logprobs[gold] for gold in rendered.golds(place)]
    return _add_probabilities(gold_logprobs) - _add_probabilities(logprobs)


def _add_probabilities(logprobs: Sequence[float]) -> float:
    """Return the log of a sum of probabilities, from their logs."""
    highest = max(logprobs)
    return highest + math.log(sum(math.exp(logprob - highest) for logprob in logprobs))


def _read_logprobs(answers: QuestionAnswers) -> list[float]:
    """Return the log-probabilities of scored options; an empty list for a generated answer."""
    return [answer[0] for answer in answers if not isinstance(answer, str)]
