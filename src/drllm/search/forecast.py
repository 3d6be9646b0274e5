"""What a search will take, before it is begun: paths, executions, time and disk.

Owns the sample that is measured and what is concluded from it. Nothing is written. Leaves the
search of the sample to `block`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from drllm.config import SearchConfig
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import to_lines
from drllm.search.block import search_block
from drllm.search.questions import Block
from drllm.tasks.base import Example, Task

SAMPLE_QUESTIONS = 8
"""Most questions of a task that are searched to measure; never more than a block holds."""
SAMPLE_SIMULATIONS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """What one task will take, at most: a stop rule may end questions early.

    Attributes:
        task: The task's name.
        questions: To be searched.
        paths: To be tried, full paths included.
        executions: That these paths and their re-tests ask for; those that paths share are run
            once.
        seconds: On the device that was measured.
        size_bytes: Of the records.
        sample_questions: Questions that were searched to measure.
        sample_paths: Paths that were tried to measure.
        prompt: One prompt as the model reads it.
    """

    task: str
    questions: int
    paths: int
    executions: float
    seconds: float
    size_bytes: float
    sample_questions: int
    sample_paths: int
    prompt: str


def forecast(
    routed: RoutedModel, blocks: Sequence[Block], config: SearchConfig
) -> list[TaskForecast]:
    """Search a few questions of each task, and conclude what all of them will take.

    Time, executions and disk are those of the sample by path. Later paths share more with earlier
    ones, so a search of more simulations than the sample's is quicker than this by path.

    Args:
        routed: The model, made with its tokenizer.
        blocks: All questions of the search.
        config: Settings of the search.

    Returns:
        One forecast per task, in order.

    Raises:
        DrllmError: A question of the sample that can't be searched.
    """
    by_name = {block.task.name: block.task for block in blocks}
    return [
        _forecast(
            routed,
            task,
            [e for block in blocks if block.task.name == name for e in block.examples],
            config,
        )
        for name, task in by_name.items()
    ]


def _forecast(
    routed: RoutedModel, task: Task, examples: Sequence[Example], config: SearchConfig
) -> TaskForecast:
    size = min(SAMPLE_QUESTIONS, config.block_size, len(examples))
    # The questions come by length: a sample from end to end is neither short nor long.
    sample = [examples[(2 * i + 1) * len(examples) // (2 * size)] for i in range(size)]
    simulations = min(SAMPLE_SIMULATIONS, config.num_simulations)
    short = dataclasses.replace(config, num_simulations=simulations)
    search_block(routed, sample[:1], task, dataclasses.replace(config, num_simulations=1))  # warm
    started = time.perf_counter()
    records = search_block(routed, sample, task, short)
    seconds = time.perf_counter() - started
    tried = [path for record in records for path in record.paths]
    executions = sum(
        path.executions * (1 + (path.retest.asked if path.retest else 0)) for path in tried
    )
    paths = len(examples) * (config.num_simulations + 1)
    by_path = paths / len(tried)
    return TaskForecast(
        task=task.name,
        questions=len(examples),
        paths=paths,
        executions=executions * by_path,
        seconds=seconds * by_path,
        size_bytes=len(to_lines(records).encode()) * by_path,
        sample_questions=len(sample),
        sample_paths=len(tried),
        prompt=records[0].prompt,
    )
