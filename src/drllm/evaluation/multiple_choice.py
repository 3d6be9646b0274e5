"""Base, routed model and opponents on the same multiple-choice questions, with intervals.

Owns running the systems and writing `eval/TASK.json` and `eval/samples.jsonl`. Leaves how an
opponent's decisions are drawn to `opponents`, the formulas to `statistics`, the sentences to
`findings`, and the forward passes to `models.scoring`. The routers read the question alone: one
route per question holds for all of its options.

Axes: Q questions, L layers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from drllm.config import EvaluateConfig
from drllm.cost import mean_executions
from drllm.errors import TaskError
from drllm.evaluation.findings import findings
from drllm.evaluation.opponents import label_frequency, permuted, random_like
from drllm.evaluation.statistics import mcnemar_exact, mean_interval, wilson_interval
from drllm.models.loading import BaseModel
from drllm.models.policies import FixedPolicy, Policy, RouterPolicy
from drllm.models.prompts import render
from drllm.models.routed import RoutedModel
from drllm.models.routers import RouterStack
from drllm.models.scoring import ChoiceBatch, tokenised
from drllm.paths import Decisions
from drllm.records import new_manifest, sha256, write_atomically, write_records
from drllm.tasks.base import Example, Prompt, Task, choose
from drllm.tasks.grading import score_choices

Decide: TypeAlias = Callable[[list[int]], Policy]
"""Gives the policy that decides for the questions at some places."""

OnProgress: TypeAlias = Callable[[float, int, str], None]
"""Called with passes done, passes in all, and what is being run."""

REWARD = "loglikelihood"
PAIRS_PER_PASS = 32
STATE_CACHE_GB = 2.0
SAMPLES_FILE = "samples.jsonl"

DESCRIPTIONS = {
    "base": "the untouched model: every layer once",
    "routed": "the routers decide, reading the question alone",
    "permuted routes": "each question runs the route of another question",
    "random decisions": "each question's skips and repeats at random layers",
    "label frequency": "each layer's decision drawn as often as it was the target in training",
}


@dataclass(slots=True)
class System:
    """One system's outcomes, by question.

    Attributes:
        name: As in `DESCRIPTIONS`.
        decisions: For each draw, every question's decisions.
        correct: For each question, the share of draws that answered right.
        gold_logprob: For each question, the gold option's log-probability among the options, in
            nats, averaged over the draws.
        seconds: Wall time of one draw over all questions, prompt and options, measured.
    """

    name: str
    decisions: list[list[Decisions]] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)
    gold_logprob: list[float] = field(default_factory=list)
    seconds: float = 0.0


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
        The paths of the `TASK.json` files, in the order of the tasks.

    Raises:
        TaskError: A task without options, or without questions in the split.
        CheckpointError: Routers of another model.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    routers = RouterStack.load(routers_dir)
    questions = {task.name: load_examples(task, config) for task in tasks}
    routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
    outputs, samples = [], []
    try:
        for task in tasks:
            examples = questions[task.name]
            systems = _run_systems(routed, task, examples, config, on_progress)
            result = _summary(systems, task, examples, base, routers_dir, config)
            path = Path(output_dir) / f"{task.name}.json"
            write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            outputs.append(path)
            samples += [_sample(systems, place, example) for place, example in enumerate(examples)]
    finally:
        routed.detach()
    manifest = new_manifest("samples", model=base.identity, config=config.to_dict())
    write_records(Path(output_dir) / SAMPLES_FILE, samples, manifest)
    return outputs


def load_examples(task: Task, config: EvaluateConfig) -> list[Example]:
    """Return the questions to evaluate a task on.

    Raises:
        TaskError: A task without options, or without questions in the split.
    """
    if REWARD not in task.rewards:
        raise TaskError(
            f"task {task.name!r} has no options to choose from; evaluate takes multiple-choice "
            f"tasks, 'drllm ls tasks' shows which have {REWARD}"
        )
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    examples = choose(task.examples(config.split, data_dir), config.limit, config.seed)
    if not examples:
        raise TaskError(f"task {task.name!r} has no questions in split {config.split!r}")
    return examples


# --- running -----------------------------------------------------------------------------------


class _Run:
    """All questions of a task, in batches of like length, under one system after another."""

    def __init__(self, routed: RoutedModel, prompts: Sequence[Prompt], batch_size: int) -> None:
        self.routed = routed
        self.prompts = list(prompts)
        tokens = [
            tokenised(
                routed.tokenizer, render(routed.tokenizer, p.text, chat=p.chat), p.continuations
            )
            for p in prompts
        ]
        lengths = [len(q.context) + sum(len(c) - 1 for c in q.continuations) for q in tokens]
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        self.places = [
            order[start : start + batch_size] for start in range(0, len(order), batch_size)
        ]
        self.batches = [
            ChoiceBatch(routed, [tokens[place] for place in places], STATE_CACHE_GB)
            for places in self.places
        ]

    def alone(self, system: System, decide: Decide | None) -> Tensor:
        """Run one draw of a system by itself, measured, and return its routes `[Q, L]`.

        Args:
            system: Gets the draw's outcomes and seconds.
            decide: Gives the policy for the questions at some places; None runs the base model.
        """
        L = self.routed.num_layers
        scores: dict[int, tuple[float, ...]] = {}
        routes = torch.ones(len(self.prompts), L, dtype=torch.long)
        started = time.perf_counter()
        for places, batch in zip(self.places, self.batches, strict=True):
            if decide is None:
                sums = batch.base_logprobs()
            else:
                sums, route = batch.routed_logprobs(decide(places))
                routes[places] = route
            scores.update(zip(places, sums, strict=True))
        system.seconds = time.perf_counter() - started
        self.add_draw(system, routes, [scores[place] for place in range(len(self.prompts))])
        return routes

    def shared_scores(self, plans: Sequence[Tensor]) -> list[list[tuple[float, ...]]]:
        """Score several draws at once, prefixes shared; one list of sums per draw."""
        draws: list[list[tuple[float, ...]]] = [[()] * len(self.prompts) for _ in plans]
        for places, batch in zip(self.places, self.batches, strict=True):
            wanted = [
                (draw, place, (row, tuple(plan[place].tolist())))
                for draw, plan in enumerate(plans)
                for row, place in enumerate(places)
            ]
            for start in range(0, len(wanted), PAIRS_PER_PASS):
                part = wanted[start : start + PAIRS_PER_PASS]
                sums = batch.logprobs([pair for _, _, pair in part])
                for (draw, place, _), value in zip(part, sums, strict=True):
                    draws[draw][place] = value
            batch.forget()
        return draws

    def add_draw(self, system: System, routes: Tensor, scores: Sequence[tuple[float, ...]]) -> None:
        """Add one draw's outcomes to a system, keeping the mean over its draws."""
        before = len(system.decisions)
        correct = [score_choices(s, p)[0] for s, p in zip(scores, self.prompts, strict=True)]
        gold = [_gold_logprob(s, p) for s, p in zip(scores, self.prompts, strict=True)]
        if not before:
            system.correct, system.gold_logprob = correct, gold
        else:
            for values, new in ((system.correct, correct), (system.gold_logprob, gold)):
                for place, value in enumerate(new):
                    values[place] = (values[place] * before + value) / (before + 1)
        system.decisions.append([tuple(row) for row in routes.tolist()])


def _follow(plan: Tensor, num_layers: int) -> Decide:
    return lambda places: FixedPolicy(plan[places], num_layers)


def _gold_logprob(sums: Sequence[float], prompt: Prompt) -> float:
    assert prompt.gold is not None
    highest = max(sums)
    total = highest + math.log(sum(math.exp(value - highest) for value in sums))
    return sums[prompt.gold] - total


def _run_systems(
    routed: RoutedModel,
    task: Task,
    examples: Sequence[Example],
    config: EvaluateConfig,
    on_progress: OnProgress | None,
) -> list[System]:
    run = _Run(routed, [task.prompt(example, REWARD) for example in examples], config.batch_size)
    passes = len(DESCRIPTIONS) + 3 * (config.num_random_draws - 1)
    done = 0

    def report(name: str, finished: int) -> None:
        nonlocal done
        done += finished
        if on_progress is not None:
            on_progress(done, passes, f"{task.name}: {name}")

    report("base", 0)
    base = System("base")
    run.alone(base, None)
    report("routed", 1)
    system = System("routed")
    assert routed.routers is not None
    policy = RouterPolicy(routed.routers)
    routes = run.alone(system, lambda _places: policy)
    report("opponents", 1)
    systems = [base, system]
    counts = routed.routers.config.label_counts
    draws: dict[str, Callable[[torch.Generator], Tensor]] = {
        "permuted routes": lambda g: permuted(routes, g),
        "random decisions": lambda g: random_like(routes, g),
        "label frequency": lambda g: label_frequency(counts, len(examples), g),
    }
    for name, draw in draws.items():
        opponent = System(name)
        generator = torch.Generator().manual_seed(config.seed)
        plans = [draw(generator) for _ in range(config.num_random_draws)]
        run.alone(opponent, _follow(plans[0], routed.num_layers))
        report(name, 1)
        for plan, scores in zip(plans[1:], run.shared_scores(plans[1:]), strict=True):
            run.add_draw(opponent, plan, scores)
        report(name, len(plans) - 1)
        systems.append(opponent)
    return systems


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
        "description": DESCRIPTIONS[system.name],
        "accuracy": accuracy,
        "interval": list(interval),
        "executions": mean_executions([row for draw in system.decisions for row in draw]),
        "gold_logprob": sum(system.gold_logprob) / num_questions,
        "seconds": system.seconds,
        "draws": draws,
        "mcnemar_p": p,
        "won": won,
        "lost": lost,
    }


def _summary(
    systems: Sequence[System],
    task: Task,
    examples: Sequence[Example],
    base: BaseModel,
    routers_dir: Path,
    config: EvaluateConfig,
) -> dict[str, Any]:
    n = len(examples)
    chance = sum(1 / len(example.choices) for example in examples) / n
    L = len(systems[0].decisions[0][0])
    rows = [_row(system, systems[0], n, config.seed) for system in systems]
    weights = Path(routers_dir) / "routers.safetensors"
    manifest = new_manifest(
        "evaluation", model=base.identity, config=config.to_dict(), inputs=[weights]
    )
    return {
        **manifest,
        "task": task.name,
        "split": config.split,
        "num_questions": n,
        "num_layers": L,
        "chance": chance,
        "routers": str(routers_dir),
        "routers_sha256": sha256(weights),
        "systems": rows,
        "findings": findings(
            task=task.name,
            rows={row["name"]: row for row in rows},
            correct={system.name: system.correct for system in systems},
            gold_logprob={system.name: system.gold_logprob for system in systems},
            chance=chance,
            num_layers=L,
            seed=config.seed,
        ),
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
