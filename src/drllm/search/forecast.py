"""Forecast what a search will take, for `drllm search --dry-run`.

A few questions of each task are searched with a few simulations. The time, the executions and the
disk space of this sample are then scaled to the whole search.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.config import SearchConfig
from drllm.errors import TaskError
from drllm.models.routed_model import RoutedModel
from drllm.records.manifest import to_lines
from drllm.records.search import SearchRecord
from drllm.search.batch import BatchRecords, search_batch
from drllm.search.questions import Batch, SearchQuestion, split_into_batches
from drllm.work.run import BlockSteps

SAMPLE_QUESTIONS = 8  # maximum number of questions in a task's sample, which is one batch
SAMPLE_SIMULATIONS = 10  # maximum number of simulations of a question in the sample


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """What the search of one task takes at most; a stop rule may take less."""

    task: str
    questions: int  # number of questions
    paths: int  # number of paths, full paths included
    # Number of layer executions of all paths, in the search and in re-tests. An execution that
    # several paths share is counted for each path, though it runs once.
    executions: float
    seconds: float  # time on this device
    size_bytes: float  # size of the records on disk
    sample_questions: int  # number of questions in the sample, without those that failed
    sample_paths: int  # number of paths in the sample
    prompt: str  # one prompt, as the model reads it


def forecast_search(
    routed: RoutedModel, questions: Sequence[SearchQuestion], config: SearchConfig
) -> list[TaskForecast]:
    """Search a few questions of each task, and scale the result to all questions.

    Nothing is written. The whole search usually takes less per path than the sample: its paths
    share more of their work, and larger batches generate answers faster. Questions that fail are
    left out of the sample, but their time counts.

    Raises TaskError if all questions in the sample of a task fail.
    """
    by_task: dict[str, list[SearchQuestion]] = {}
    for batch in split_into_batches(questions, config.block_size):
        by_task.setdefault(batch.task, []).extend(batch.questions)  # batches are sorted by length
    return [
        _forecast_task(routed, task, task_questions, config)
        for task, task_questions in by_task.items()
    ]


def _forecast_task(
    routed: RoutedModel, task: str, questions: Sequence[SearchQuestion], config: SearchConfig
) -> TaskForecast:
    sample = _draw_sample(questions, min(SAMPLE_QUESTIONS, config.block_size))
    # A first search that isn't timed, since the first passes of a model are slow.
    warm_up_config = dataclasses.replace(config, num_simulations=1)
    _search_sample(routed, sample[:1], warm_up_config)
    num_simulations = min(SAMPLE_SIMULATIONS, config.num_simulations)
    sample_config = dataclasses.replace(config, num_simulations=num_simulations)
    started = time.perf_counter()
    result = _search_sample(routed, sample, sample_config)
    seconds = time.perf_counter() - started

    records = result.records
    if not records:
        raise TaskError(
            f"none of the {len(sample)} questions of {task} in the sample could be searched; the "
            f"last one failed with: {result.failed[-1].error}"
        )
    sample_paths = sum(len(record.paths) for record in records)
    num_paths = len(questions) * (config.num_simulations + 1)
    factor = num_paths / sample_paths
    return TaskForecast(
        task=task,
        questions=len(questions),
        paths=num_paths,
        executions=_count_executions(records) * factor,
        seconds=seconds * factor,
        size_bytes=len(to_lines(records).encode()) * factor,
        sample_questions=len(records),
        sample_paths=sample_paths,
        prompt=records[0].prompt,
    )


def _search_sample(
    routed: RoutedModel, questions: Sequence[SearchQuestion], config: SearchConfig
) -> BatchRecords:
    """Search a sample, and set aside questions that fail, as the search will do."""
    return search_batch(routed, Batch(0, tuple(questions)), config, BlockSteps())


def _draw_sample(questions: Sequence[SearchQuestion], maximum: int) -> list[SearchQuestion]:
    """Return at most `maximum` questions, evenly spaced in a list that is sorted by length."""
    size = min(maximum, len(questions))
    sample: list[SearchQuestion] = []
    for number in range(size):
        # The list is divided into `size` equal parts. Take the middle question of each part.
        place = (2 * number + 1) * len(questions) // (2 * size)
        sample.append(questions[place])
    return sample


def _count_executions(records: Sequence[SearchRecord]) -> float:
    """Count the executions of all paths, in the search and in each re-test."""
    executions = 0.0
    for record in records:
        for path in record.paths:
            num_retests = path.retest.asked if path.retest is not None else 0
            executions += path.executions * (1 + num_retests)
    return executions
