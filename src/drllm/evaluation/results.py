"""What an evaluation writes of a task: the table, the curve, the findings, a line a question.

Owns `TASK.json` and `samples.jsonl`, their intervals and tests. Leaves the formulas to
`statistics`, the curve's rows to `curve` and the sentences to `findings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drllm.config import EvaluateConfig
from drllm.evaluation.baselines.registry import BASELINES, NOT_COMPARED
from drllm.evaluation.curve import Outcomes, Point, curve_rows, differences
from drllm.evaluation.findings import findings
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.non_inferiority import Choice
from drllm.evaluation.prompt_cost import PromptCost
from drllm.evaluation.seeds import sentence
from drllm.evaluation.systems import System
from drllm.models.base.load import BaseModel
from drllm.models.routers.checkpoint import WEIGHTS_FILE
from drllm.records import new_manifest, sha256
from drllm.statistics.intervals import mean_interval, wilson_interval
from drllm.statistics.paired import holm, mcnemar_exact
from drllm.tasks.base import Example, Task

DESCRIPTIONS = {
    "base": "the untouched model: every layer once",
    "routed": "the routers decide, reading the question alone",
}


def point_of(system: System) -> Point:
    """Return a system as a point of the depth curve."""
    return Point(
        system.name,
        system.setting,
        system.executions,
        Outcomes(system.correct, system.gold_logprob, system.text_loss),
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """One question's outcomes under every system; one line of `samples.jsonl`."""

    id: str
    task: str
    question: str
    choices: tuple[str, ...]
    gold: int | None
    systems: dict[str, dict[str, Any]]


class Evaluated:
    """One task's systems, and what is written of them.

    Args:
        task: The task.
        asked: Its questions.
        systems: Base, then at each depth routed and its baselines.
        notes: What a reader must know.
        choice: The certified choice, if one was asked for.
        config: As the evaluation's.
        num_layers: L.
        cost: Of the questions' prompts.
        seeds: Rows of `seeds_row`, one a depth, where there are routers of several seeds.

    Attributes:
        rows: The table of the systems at the depth that the routers were trained for.
    """

    def __init__(
        self,
        task: Task,
        asked: AskedTask,
        systems: Sequence[System],
        notes: Sequence[str],
        choice: Choice | None,
        config: EvaluateConfig,
        num_layers: int,
        cost: PromptCost,
        seeds: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.task = task
        self.asked = asked
        self.systems = systems
        self.notes = list(dict.fromkeys(notes))
        self.choice = choice
        self.config = config
        self.num_layers = num_layers
        self.cost = cost
        self.seeds = list(seeds)
        trained = [each for each in systems if not each.setting]
        self.rows = [
            {**_row(each, trained[0], trained[1], config.seed), **cost.row(each.routes)}
            for each in trained
        ]

    def summary(self, base: BaseModel, routers: Sequence[Path], num_tasks: int) -> dict[str, Any]:
        """Return what `TASK.json` holds.

        Args:
            base: The base model.
            routers: Their folders, the first seed's first.
            num_tasks: That were evaluated, for which p-values are corrected.
        """
        weights = [folder / WEIGHTS_FILE for folder in routers]
        written, config = self.asked.written, self.config
        trained = [system for system in self.systems if not system.setting]
        manifest = new_manifest(
            "evaluation",
            model=base.identity,
            config=config.to_dict(),
            inputs=weights,
        )
        routed = trained[1]
        underived = f"FLOPs and K/V bytes are not derived: {self.cost.note}."
        return {
            **manifest,
            "runtime": base.runtime,
            "task": self.task.name,
            "split": config.split_of(self.task.name),
            "kind": written.kind,
            "metric": written.metric,
            "num_fewshot": written.num_fewshot,
            "num_questions": written.num_questions,
            "num_layers": self.num_layers,
            "chance": written.chance or 0.0,
            "routers": str(routers[0]),
            "routers_sha256": sha256(weights[0]),
            "other_seeds": {
                str(folder): sha256(path)
                for folder, path in zip(routers[1:], weights[1:], strict=True)
            },
            "systems": self.rows,
            "curve": self._curve(),
            "seeds": self.seeds,
            "choice": None if self.choice is None else _choice(self.choice),
            "not_compared": dict(NOT_COMPARED),
            "findings": [
                *findings(
                    task=self.task.name,
                    rows={row["name"]: row for row in self.rows},
                    correct={system.name: system.correct for system in trained},
                    gold_logprob={s.name: s.gold_logprob for s in trained if s.gold_logprob},
                    num_routes=len(set(routed.routes[0])),
                    chance=written.chance or 0.0,
                    num_layers=self.num_layers,
                    seed=config.seed,
                    num_tasks=num_tasks,
                ),
                *map(sentence, self.seeds),
                *([] if self.choice is None else self.choice.sentences()),
                *self.notes,
                *([underived] if self.cost.note else []),
                *(f"{s.name.capitalize()}: {note}." for s in trained for note in s.notes),
            ],
        }

    def _curve(self) -> list[dict[str, Any]]:
        points = [point_of(system) for system in self.systems if system.setting]
        if not points:
            return []
        base = point_of(self.systems[0])
        return curve_rows(base, points, self.num_layers, self.config.seed)

    def samples(self) -> list[Sample]:
        """Return one line a question."""
        data_dir = None if self.config.data_dir is None else Path(self.config.data_dir)
        examples: dict[str, Example] = {
            example.id: example
            for example in self.task.examples(self.config.split_of(self.task.name), data_dir)
        }
        return [
            self._sample(place, examples[own_id]) for place, own_id in enumerate(self.asked.ids)
        ]

    def _sample(self, place: int, example: Example) -> Sample:
        outcomes: dict[str, dict[str, Any]] = {}
        for system in self.systems:
            outcome: dict[str, Any] = {
                "correct": system.correct[place],
                "gold_logprob": system.gold_logprob[place] if system.gold_logprob else None,
            }
            if len(system.routes) == 1:
                outcome["decisions"] = list(system.routes[0][place])
            outcomes[point_of(system).name] = outcome
        return Sample(
            id=example.id,
            task=example.task,
            question=example.question,
            choices=example.choices,
            gold=example.gold,
            systems=outcomes,
        )


def _choice(choice: Choice) -> dict[str, Any]:
    """Return the certified choice with the sentences that say it."""
    return {**asdict(choice), "sentences": choice.sentences()}


def _row(system: System, base: System, routed: System, seed: int) -> dict[str, Any]:
    """Return one system's line of the table."""
    n, draws = len(system.correct), system.num_draws
    accuracy = sum(system.correct) / n
    single = draws == 1 and all(value in (0, 1) for value in system.correct)
    won = lost = p = None
    if single and system is not base:
        won = sum(s > b for s, b in zip(system.correct, base.correct, strict=True))
        lost = sum(s < b for s, b in zip(system.correct, base.correct, strict=True))
        p = mcnemar_exact(won, lost)
    baseline = BASELINES.get(system.name)

    def against(first: System, second: System) -> dict[str, Any]:
        return differences(point_of(first).outcomes, point_of(second).outcomes, seed)

    interval = (
        wilson_interval(round(sum(system.correct)), n)
        if single
        else mean_interval(system.correct, seed)
    )
    return {
        "name": system.name,
        "description": DESCRIPTIONS[system.name] if baseline is None else baseline.description,
        "source": None if baseline is None else baseline.source,
        "fitted_on": None if baseline is None else baseline.fitted_on,
        "reads_question": None if baseline is None else baseline.reads_question,
        "accuracy": accuracy,
        "interval": list(interval),
        "metrics": _means(system.metrics),
        "executions": system.executions,
        "decode_executions": system.decode_executions,
        "gold_logprob": _mean(system.gold_logprob),
        "text_loss": _mean(system.text_loss),
        "seconds": system.seconds,
        "draws": draws,
        "mcnemar_p": p,
        "mcnemar_p_holm": None,
        "won": won,
        "lost": lost,
        "unchanged_routes": _mean(system.unchanged),
        "against_base": None if system is base else against(system, base),
        "routed_against": None if baseline is None else against(routed, system),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _means(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}


def correct_p_values(tables: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Fill in what each system's p-values are when it is tested on several tasks at once.

    Args:
        tables: Each task's rows; a single task leaves them as they are.
    """
    if len(tables) < 2:
        return
    by_name: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        for row in table:
            by_name.setdefault(row["name"], []).append(row)
    for rows in by_name.values():
        tested = [row for row in rows if row["mcnemar_p"] is not None]
        for row, value in zip(tested, holm([row["mcnemar_p"] for row in tested]), strict=True):
            row["mcnemar_p_holm"] = value
