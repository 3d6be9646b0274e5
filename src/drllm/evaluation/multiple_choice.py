"""The evaluation as a stage: multiple-choice tasks in, `eval/TASK.json` and samples out.

Owns the table with its intervals and tests, and the files. Leaves running the systems to
`systems`, the formulas to `statistics` and the sentences to `findings`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.config import EvaluateConfig
from drllm.cost import mean_executions
from drllm.errors import TaskError
from drllm.evaluation.findings import findings
from drllm.evaluation.statistics import holm, mcnemar_exact, mean_interval, wilson_interval
from drllm.evaluation.systems import DESCRIPTIONS, UNREACHED, OnProgress, System, run_systems
from drllm.models.base.loading import BaseModel
from drllm.models.routed import RoutedModel
from drllm.models.routers import RouterStack
from drllm.records import new_manifest, sha256, write_atomically, write_records
from drllm.tasks.base import Example, Task, choose

SAMPLES_FILE = "samples.jsonl"


def run_evaluation(
    base: BaseModel,
    routers_dir: Path,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    output_dir: Path,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Evaluate base, routed model and opponents on each task, and write the results.

    Args:
        base: The frozen model.
        routers_dir: A folder of routers that belong to it.
        tasks: Multiple-choice tasks.
        config: Split, sample, draws.
        output_dir: Receives `TASK.json` for each task, and `samples.jsonl`.
        on_progress: See `OnProgress`.

    Returns:
        The paths of the `TASK.json` files, in the order of the tasks. They are written when all
        tasks are done, since p-values are corrected for how many there are.

    Raises:
        TaskError: A task without options, or without questions in the split.
        CheckpointError: Routers of another model.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    routers = RouterStack.load(routers_dir)
    questions = {task.name: load_examples(task, config) for task in tasks}
    routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
    try:
        ran = {
            task.name: run_systems(routed, task, questions[task.name], config, on_progress)
            for task in tasks
        }
    finally:
        routed.detach()
    tables = [_table(systems, config.seed) for systems in ran.values()]
    if len(tables) > 1:
        _correct(tables)
    outputs, samples = [], []
    for (name, systems), rows in zip(ran.items(), tables, strict=True):
        result = _summary(
            systems, rows, name, questions[name], base, routers_dir, config, len(tables)
        )
        path = Path(output_dir) / f"{name}.json"
        write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        outputs.append(path)
        samples += [
            _sample(systems, place, example) for place, example in enumerate(questions[name])
        ]
    manifest = new_manifest("samples", model=base.identity, config=config.to_dict())
    write_records(Path(output_dir) / SAMPLES_FILE, samples, manifest)
    return outputs


def load_examples(task: Task, config: EvaluateConfig) -> list[Example]:
    """Return the questions to evaluate a task on.

    Raises:
        TaskError: A task without options, or without questions in the split.
    """
    task.check_options()
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    examples = choose(task.examples(config.split, data_dir), config.limit, config.seed)
    if not examples:
        raise TaskError(f"task {task.name!r} has no questions in split {config.split!r}")
    return examples


# --- writing -----------------------------------------------------------------------------------


def _row(system: System, base: System, num_questions: int, seed: int) -> dict[str, Any]:
    draws = len(system.decisions)
    accuracy = sum(system.correct) / num_questions
    interval = (
        wilson_interval(round(sum(system.correct)), num_questions)
        if draws == 1
        else mean_interval(system.correct, seed)
    )
    won = lost = p = None
    if draws == 1 and system is not base:
        won = sum(s > b for s, b in zip(system.correct, base.correct, strict=True))
        lost = sum(s < b for s, b in zip(system.correct, base.correct, strict=True))
        p = mcnemar_exact(won, lost)
    return {
        "name": system.name,
        "description": DESCRIPTIONS[system.name] + (UNREACHED if system.note else ""),
        "accuracy": accuracy,
        "interval": list(interval),
        "executions": mean_executions([row for draw in system.decisions for row in draw]),
        "gold_logprob": sum(system.gold_logprob) / num_questions,
        "seconds": system.seconds,
        "draws": draws,
        "mcnemar_p": p,
        "mcnemar_p_holm": None,
        "won": won,
        "lost": lost,
        "unchanged_routes": sum(system.unchanged) / draws if system.unchanged else None,
    }


def _table(systems: Sequence[System], seed: int) -> list[dict[str, Any]]:
    return [_row(system, systems[0], len(systems[0].correct), seed) for system in systems]


def _correct(tables: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Fill in what each system's p-values are when it is tested on several tasks at once."""
    for rows in zip(*tables, strict=True):  # one system's row of every task
        if all(row["mcnemar_p"] is not None for row in rows):
            adjusted = holm([row["mcnemar_p"] for row in rows])
            for row, value in zip(rows, adjusted, strict=True):
                row["mcnemar_p_holm"] = value


def _summary(
    systems: Sequence[System],
    rows: Sequence[dict[str, Any]],
    task: str,
    examples: Sequence[Example],
    base: BaseModel,
    routers_dir: Path,
    config: EvaluateConfig,
    num_tasks: int,
) -> dict[str, Any]:
    n = len(examples)
    chance = sum(1 / len(example.choices) for example in examples) / n
    L = len(systems[0].decisions[0][0])
    weights = Path(routers_dir) / "routers.safetensors"
    manifest = new_manifest(
        "evaluation", model=base.identity, config=config.to_dict(), inputs=[weights]
    )
    return {
        **manifest,
        "task": task,
        "split": config.split,
        "num_questions": n,
        "num_layers": L,
        "chance": chance,
        "routers": str(routers_dir),
        "routers_sha256": sha256(weights),
        "systems": rows,
        "findings": [
            *findings(
                task=task,
                rows={row["name"]: row for row in rows},
                correct={system.name: system.correct for system in systems},
                gold_logprob={system.name: system.gold_logprob for system in systems},
                num_routes=len(set(systems[1].decisions[0])),
                chance=chance,
                num_layers=L,
                seed=config.seed,
                num_tasks=num_tasks,
            ),
            *(system.note for system in systems if system.note),
        ],
    }


@dataclass(frozen=True, slots=True)
class Sample:
    """One question's outcomes under every system; one line of `samples.jsonl`."""

    id: str
    task: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    systems: dict[str, dict[str, Any]]


def _sample(systems: Sequence[System], place: int, example: Example) -> Sample:
    outcomes: dict[str, dict[str, Any]] = {}
    for system in systems:
        outcomes[system.name] = {
            "correct": system.correct[place],
            "gold_logprob": system.gold_logprob[place],
        }
        if len(system.decisions) == 1:
            outcomes[system.name]["decisions"] = list(system.decisions[0][place])
    return Sample(
        id=example.id,
        task=example.task,
        question=example.question,
        choices=example.choices,
        gold=example.gold,
        systems=outcomes,
    )
