"""The demo: five of 30 layers are left out of a small model, refitted, and taught for a minute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

from drllm.config import LearnConfig
from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.model.submodel import shorten
from drllm.prune.choose import measure_costs
from drllm.prune.export import export
from drllm.prune.learn import learn
from drllm.prune.loss import make_text_item
from drllm.prune.measure import TaskMeasurement, measure_model
from drllm.prune.repairs.base import Lessons
from drllm.prune.shrink import compare_accuracy
from drllm.records.codec import write_json
from drllm.records.places import create_folder
from drllm.records.shortened import DEMO_FILE, DemoResult, DemoRow
from drllm.tasks.builtin import BuiltinFacts
from drllm.tasks.parts import read_questions
from drllm.tasks.texts import BUILTIN_TEXTS, read_texts
from drllm.work.listener import Listener

SHARE_OUT = 1 / 6  # of the layers
REFIT_TOKENS = 15_000
NUM_TEXTS = 50  # of the model's own, whose loss is measured
MAX_TOKENS = 256


def run_demo(
    base: BaseModel, output: Path, minutes: float = 1.0, listener: Listener | None = None
) -> list[DemoRow]:
    """Leave a sixth of a model's layers out, refit it, teach it built-in questions, and write it.

    Args:
        base: The model.
        output: The folder for the checkpoint `smaller` and for `demo.json`.
        minutes: How long it learns.
        listener: Receives progress and notes.

    Returns:
        What was measured after each step.
    """
    listener = listener or Listener()
    questions = read_questions(LearnConfig(tasks=BuiltinFacts.name))
    lessons = Lessons.read(base, questions, MAX_TOKENS, listener)
    texts = read_texts(BUILTIN_TEXTS, NUM_TEXTS, 0)[BUILTIN_TEXTS]
    tokens = [tuple(encode(base.tokenizer, text))[:MAX_TOKENS] for text in texts]
    other = {"other text": [make_text_item(text) for text in tokens]}
    rows: list[DemoRow] = []
    answers: list[TaskMeasurement] = []

    def measure(name: str, model: Any) -> None:
        """Measure a model after a step."""
        short = dataclasses.replace(base, model=model)
        measured = measure_model(short, questions.tasks, other, None, 0, listener)
        [of_task] = measured.tasks.values()
        answers.append(of_task)
        against_full = compare_accuracy([of_task], answers[:1], 0) if rows else None
        row = DemoRow(
            name=name,
            num_layers=model.config.get_text_config().num_hidden_layers,
            accuracy=fmean(of_task.scores[of_task.measure]),
            against_full=against_full,
            text_loss=fmean(measured.losses["other text"]),
        )
        rows.append(row)

    measure("full model", base.model)
    costs, _ = measure_costs(base, lessons.choose_texts(REFIT_TOKENS, 0), [], listener)
    skip = costs.best(round(SHARE_OUT * base.num_layers))
    short = shorten(base.model, skip)
    measure("layers left out", short)
    learn(
        short,
        questions,
        teacher=base,
        repairs="refit",
        refit_tokens=REFIT_TOKENS,
        listener=listener,
    )
    measure("refitted", short)
    report = learn(
        short, questions, teacher=base, repairs="lora", minutes=minutes, listener=listener
    )
    measure("taught", short)
    with create_folder(output) as folder:
        export(short, base, folder / "smaller", report=report)
        write_json(folder / DEMO_FILE, DemoResult(skip=tuple(skip), rows=tuple(rows)))
    return rows
