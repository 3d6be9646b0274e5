"""Measure a model on what is held out: its answers, and the losses of answers and texts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import msgspec
import torch

from drllm.config import EvaluateConfig
from drllm.evaluation.latency import device_clock, time_in_turns
from drllm.evaluation.stage import answer_questions
from drllm.model.layers import one_token
from drllm.model.load import BaseModel
from drllm.prune.loss import Item, lay_out, run_layout
from drllm.statistics.ranges import Share
from drllm.tasks.base import Task
from drllm.work.listener import Listener

BY_CHARACTERS = "acc_norm"
"""The measure of accuracy of questions with options: what the training raises."""
NUM_READ = 128  # tokens of the prompt whose time is measured
NUM_WRITTEN = 16  # tokens decoded after it
MAX_ROUNDS = 15
MAX_SECONDS = 20.0  # after so many seconds no further round begins; one always takes place


class TaskMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answers to the held-out questions of a task.

    Attributes:
        measure: The name of the measure of accuracy that decides.
        chance: The accuracy of guessing.
        scores: Name of a measure → each question's score.
    """

    measure: str
    chance: Share
    scores: dict[str, list[float]]


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A model on what is held out.

    Attributes:
        tasks: Task → its answers.
        losses: Task or source → the loss of each right answer in text, or of each text, in nats a
            token.
    """

    tasks: dict[str, TaskMeasurement] = {}
    losses: dict[str, list[float]] = {}


def measure_model(
    model: BaseModel,
    tasks: Sequence[Task],
    items: Mapping[str, Sequence[Item]],
    data_dir: str | None,
    seed: int,
    listener: Listener,
) -> Measurement:
    """Measure a model.

    Args:
        model: The model.
        tasks: The tasks whose held-out questions are answered.
        items: Name of a task or source → the questions and texts whose losses are measured.
        data_dir: The folder of published data sets.
        seed: The seed of the evaluation.
        listener: Receives the progress.
    """
    by_task = {}
    if tasks:
        config = EvaluateConfig(data_dir=data_dir, num_texts=1, seed=seed)
        for name, runs in answer_questions(model, tasks, config, listener).items():
            scores = {measure: list(values) for measure, values in runs.base.metrics.items()}
            measure = BY_CHARACTERS if BY_CHARACTERS in scores else runs.rendered.task.metric
            by_task[name] = TaskMeasurement(
                measure=measure, chance=runs.rendered.task.chance, scores=scores
            )
    losses: dict[str, list[float]] = {}
    for name, of_source in items.items():
        with listener.progress(f"the loss of {name}", "texts") as on_progress:
            losses[name] = []
            for number, item in enumerate(of_source, start=1):
                losses[name].append(measure_answer(model.model, item))
                on_progress(number, len(of_source))
    return Measurement(tasks=by_task, losses=losses)


@torch.no_grad()
def measure_answer(model: Any, item: Item) -> float:
    """Return the next-token loss of a right answer or of a text, in nats a token."""
    layout = lay_out([item], model, gold_only=True)
    logprobs = run_layout(model, layout, layout.targets[0][0])  # [K, V]
    tokens = torch.tensor(item.answers[item.gold], device=logprobs.device)
    return -float(logprobs.gather(1, tokens[:, None]).mean())


@torch.no_grad()
def measure_speeds(models: Mapping[str, Any]) -> dict[str, float]:
    """Return how many times as fast as the first model each model is.

    Each reads a prompt of 128 tokens and writes 16, in turns with the others; the result is the
    median over rounds.

    Args:
        models: The models by name.
    """
    first = next(iter(models))
    ids = one_token(models[first]).expand(1, NUM_READ).contiguous()
    calls = {name: partial(_prepare, model, ids) for name, model in models.items()}
    clock = device_clock(models[first].device)
    time_in_turns(calls, 1, clock)  # not counted
    rounds = time_in_turns(calls, MAX_ROUNDS, clock, time.monotonic() + MAX_SECONDS)
    return {name: median(seconds[first] / seconds[name] for seconds in rounds) for name in models}


def _prepare(model: Any, ids: torch.Tensor) -> partial[Any]:
    """Return a call that reads and writes."""
    return partial(
        model.generate,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_WRITTEN,
        min_new_tokens=NUM_WRITTEN,
        do_sample=False,
        pad_token_id=0,
    )
