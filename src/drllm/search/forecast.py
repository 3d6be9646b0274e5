"""The forecast of `drllm search --dry-run`: search a few questions, and extrapolate to all."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.config import SearchConfig
from drllm.models.routing.routed_model import RoutedModel
from drllm.records.manifest import to_lines
from drllm.records.search import SearchRecord
from drllm.search.batch import search_in_step
from drllm.search.questions import SearchQuestion, split_into_batches

SAMPLE_QUESTIONS = 8
"""Maximum questions of a task that a forecast searches; never more than one batch."""
SAMPLE_SIMULATIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """What the search of one task takes at most; a stop rule may end questions early."""

    task: str
    questions: int
    paths: int  # full paths included
    executions: float  # of paths and re-tests; shared ones are run once, but counted for each
    seconds: float  # on the device that was measured
    size_bytes: float  # of the records
    sample_questions: int  # searched for the forecast
    sample_paths: int  # tried for the forecast
    prompt: str  # one prompt, as the model reads it


def forecast_search(
    routed: RoutedModel, questions: Sequence[SearchQuestion], config: SearchConfig
) -> list[TaskForecast]:
    """Search a few questions of each task, and extrapolate to what all of them will take.

    Nothing is written. Time, executions and disk space per path are taken from the sample. A
    longer search usually takes less per path: its paths share more of their work, and larger
    batches generate answers faster.
    """
    by_task: dict[str, list[SearchQuestion]] = {}  # each task's questions by length
    for batch in split_into_batches(questions, config.block_size):
        by_task.setdefault(batch.task, []).extend(batch.questions)
    return [
        _forecast_task(routed, task, questions_of_task, config)
        for task, questions_of_task in by_task.items()
    ]


def _forecast_task(
    routed: RoutedModel, task: str, questions: Sequence[SearchQuestion], config: SearchConfig
) -> TaskForecast:
    sample = _sample(questions, min(SAMPLE_QUESTIONS, config.block_size))
    warm_up = dataclasses.replace(config, num_simulations=1)
    search_in_step(routed, sample[:1], warm_up)
    num_simulations = min(SAMPLE_SIMULATIONS, config.num_simulations)
    short = dataclasses.replace(config, num_simulations=num_simulations)
    started = time.perf_counter()
    records = search_in_step(routed, sample, short)
    seconds = time.perf_counter() - started

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
        sample_questions=len(sample),
        sample_paths=sample_paths,
        prompt=records[0].prompt,
    )


def _sample(questions: Sequence[SearchQuestion], maximum: int) -> list[SearchQuestion]:
    """Return questions evenly spread over the list, which is sorted by length."""
    size = min(maximum, len(questions))
    sample: list[SearchQuestion] = []
    for number in range(size):
        # The middle of one of `size` equal parts.
        place = (2 * number + 1) * len(questions) // (2 * size)
        sample.append(questions[place])
    return sample


def _count_executions(records: Sequence[SearchRecord]) -> float:
    """Count the executions of all paths, once for each way of asking that they were run with."""
    executions = 0.0
    for record in records:
        for path in record.paths:
            num_retests = path.retest.asked if path.retest is not None else 0
            executions += path.executions * (1 + num_retests)
    return executions
