"""From what systems did to the records of an evaluation: table, curve, seeds, findings, samples.

Every difference is a `Verdict`, and the findings are their sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec.structs import replace

from drllm.config import EvaluateConfig
from drllm.cost import share_saved
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.baselines.registry import NOT_COMPARED
from drllm.evaluation.flops import PromptCost
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.systems import SystemRun
from drllm.records.results import (
    BASE,
    PERMUTED,
    ROUTED,
    Evaluation,
    Outcome,
    Point,
    Sample,
    Seeds,
    Spread,
    System,
)
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.non_inferiority import Choice
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import Differences, compare, correct_together
from drllm.tasks.base import Task

DESCRIPTIONS = {
    BASE: "the untouched model: every layer once",
    ROUTED: "the routers decide, reading the question alone",
}
MENTIONED = 0.01
"""Share of routes unchanged by the permutation above which it is said."""


@dataclass(frozen=True)
class TaskRuns:
    """All that was run on one task.

    Attributes:
        task: The task.
        asked: Its questions.
        systems: Base, then at each depth routed and its baselines.
        notes: What a reader must know.
        choice: The certified choice, if one was asked for.
        config: As the evaluation's.
        num_layers: L.
        cost: Of the questions' prompts.
        seeds: Depth by depth, where there are routers of several seeds.
    """

    task: Task
    asked: AskedTask
    systems: Sequence[SystemRun]
    notes: Sequence[str]
    choice: Choice | None
    config: EvaluateConfig
    num_layers: int
    cost: PromptCost
    seeds: Sequence[Seeds] = ()

    @property
    def trained(self) -> list[SystemRun]:
        """The systems at the depth that the routers were trained for: base and routed first."""
        return [system for system in self.systems if not system.setting]

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.asked.written.chance or 0.0

    @cached_property
    def above_chance(self) -> bool:
        """Whether base is shown to be better than guessing."""
        return is_above_chance(self.systems[0], self.chance, self.config.seed)

    def table(self) -> tuple[System, ...]:
        """Return the systems at the depth that the routers were trained for."""
        return tuple(map(self._row, self.trained))

    def _row(self, system: SystemRun) -> System:
        baseline = BASELINES.get(system.name) if system.name in BASELINES else None
        base, routed = self.trained[:2]
        return System(
            name=system.name,
            description=DESCRIPTIONS[system.name] if baseline is None else baseline.description,
            **self._measured(system, base, None if baseline is None else routed),
            source=None if baseline is None else baseline.source,
            fitted_on=None if baseline is None else baseline.fitted_on,
            reads_question=None if baseline is None else baseline.reads_question,
            metrics={name: fmean(e[name] for e in system.metrics) for name in system.metrics[0]},
            decode_executions=system.decode_executions,
            seconds=system.seconds,
            draws=system.num_draws,
            prompt_flops=self.cost.flops(system.routes),
            kv_bytes_per_token=self.cost.kv_bytes(system.routes),
            unchanged_routes=_mean(system.unchanged),
        )

    def curve(self) -> tuple[Point, ...]:
        """Return base, then each system's depths from the most executions to the fewest."""
        base, *others = [each for each in self.systems if each.setting or each.name == BASE]
        if not others:
            return ()
        names = list(dict.fromkeys(each.name for each in others))
        routed = {each.setting: each for each in others if each.name == ROUTED}
        others.sort(key=lambda each: (names.index(each.name), -each.executions))
        return tuple(
            Point(
                system=each.name,
                setting=each.setting,
                **self._measured(
                    each, base, routed.get(each.setting) if each.name != ROUTED else None
                ),
            )
            for each in (base, *others)
        )

    def _measured(
        self, system: SystemRun, base: SystemRun, routed: SystemRun | None
    ) -> dict[str, Any]:
        """Return what a row of the table and a point of the curve have in common."""
        return {
            "accuracy": fmean(system.correct),
            "interval": accuracy_interval(system.correct, self.config.seed),
            "executions": system.executions,
            "gold_logprob": _mean(system.gold_logprob),
            "text_loss": _mean(system.text_loss),
            "against_base": None if system is base else self.compare(system, base),
            "routed_against": None if routed is None else self.compare(routed, system),
        }

    def compare(self, ours: SystemRun, theirs: SystemRun) -> Differences:
        """Compare two systems on this task."""
        return compare(
            ours.outcomes, theirs.outcomes, self.config.seed, above_chance=self.above_chance
        )

    def evaluation(self, table: Sequence[System], header: Mapping[str, Any]) -> Evaluation:
        """Return the record of the task.

        Args:
            table: From `table`, corrected for all tasks by `correct`.
            header: What the records of all tasks have in common.
        """
        written = self.asked.written
        return Evaluation(
            **header,
            task=self.task.name,
            split=self.config.split_of(self.task.name),
            kind=written.kind,
            metric=written.metric,
            num_fewshot=written.num_fewshot,
            num_questions=written.num_questions,
            num_layers=self.num_layers,
            chance=self.chance,
            systems=tuple(table),
            curve=self.curve(),
            seeds=tuple(self.seeds),
            choice=self.choice,
            not_compared=dict(NOT_COMPARED),
            findings=tuple(self._findings(table)),
        )

    def _findings(self, table: Sequence[System]) -> list[str]:
        """Return what a reader may conclude, one sentence per question asked."""
        rows = {system.name: system for system in table}
        said = []
        if not self.above_chance:
            said.append(
                f"On {self.task.name} the base model is not shown to be above chance "
                f'({100 * self.chance:.1f} %), so no gain and no "no loss" can be claimed here.'
            )
        said += self._against_base(rows[BASE], rows[ROUTED])
        if PERMUTED in rows:
            num_routes = len(set(self.trained[1].routes[0]))
            said.append(_against_permuted(rows[PERMUTED], num_routes))
        said += map(seeds_sentence, self.seeds)
        said += [] if self.choice is None else self.choice.sentences()
        said += dict.fromkeys(self.notes)
        if self.cost.note:
            said.append(f"FLOPs and K/V bytes are not derived: {self.cost.note}.")
        for system in self.trained:
            said += [f"{system.name.capitalize()}: {note}." for note in system.notes]
        return said

    def _against_base(self, base: System, routed: System) -> list[str]:
        saved = 100 * share_saved(routed.executions, self.num_layers)
        cost = f"{saved:.1f} % saved" if saved >= 0 else f"{-saved:.1f} % more than the base"
        against = routed.against_base
        assert against is not None
        verdicts = (against.accuracy, against.gold_logprob, against.text_loss)
        return [
            f"The routed model runs {routed.executions:.2f} of {self.num_layers} layers a forward "
            f"pass ({cost}) and answers {100 * routed.accuracy:.1f} % of {len(self.asked.ids)} "
            f"questions right, the base model {100 * base.accuracy:.1f} %.",
            *(verdict.sentence() for verdict in verdicts if verdict is not None),
        ]

    def samples(self) -> list[Sample]:
        """Return one line a question."""
        data_dir = None if self.config.data_dir is None else Path(self.config.data_dir)
        split = self.config.split_of(self.task.name)
        examples = {example.id: example for example in self.task.examples(split, data_dir)}
        found = []
        for place, own_id in enumerate(self.asked.ids):
            example = examples[own_id]
            found.append(
                Sample(
                    id=example.id,
                    task=example.task,
                    question=example.question,
                    choices=tuple(example.choices),
                    gold=example.gold,
                    systems={each.title: _outcome(each, place) for each in self.systems},
                )
            )
        return found


def is_above_chance(base: SystemRun, chance: float, seed: int) -> bool:
    """Tell whether base is shown to be better than guessing; only then is anything claimed."""
    return accuracy_interval(base.correct, seed)[0] > chance


def _against_permuted(permuted: System, num_routes: int) -> str:
    if num_routes == 1:
        return "All questions took one route, so permuting says nothing."
    found = permuted.routed_against
    assert found is not None
    sentence = found.accuracy.sentence(ROUTED, "its own routes permuted over the questions")
    said = f"Whether it matters which question a route is for: {sentence}"
    unchanged = permuted.unchanged_routes or 0.0
    if unchanged > MENTIONED:
        said += f" {100 * unchanged:.1f} % of the questions kept their route by chance."
    return said


def _outcome(system: SystemRun, place: int) -> Outcome:
    return Outcome(
        correct=system.correct[place],
        gold_logprob=system.gold_logprob[place] if system.gold_logprob else None,
        decisions=tuple(system.routes[0][place]) if len(system.routes) == 1 else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def correct(tables: Sequence[Sequence[System]]) -> list[list[System]]:
    """Correct each system's tests against base for being done on several tasks.

    Args:
        tables: Each task's; a single one stays as it is.
    """
    corrected = [list(table) for table in tables]
    for name in {system.name: None for table in tables for system in table}:
        places = [
            (table, place)
            for table in corrected
            for place, system in enumerate(table)
            if system.name == name and system.against_base is not None
        ]
        known = [table[place].against_base for table, place in places]
        verdicts = correct_together([each.accuracy for each in known if each is not None])
        for (table, place), verdict in zip(places, verdicts, strict=True):
            differences = table[place].against_base
            assert differences is not None
            table[place] = replace(
                table[place], against_base=replace(differences, accuracy=verdict)
            )
    return corrected


# --- several seeds -----------------------------------------------------------------------------


def seeds_of(
    base: SystemRun,
    routed: Sequence[SystemRun],
    permuted: Sequence[SystemRun],
    seed: int,
    *,
    above_chance: bool = True,
) -> Seeds:
    """Return what routers of several seeds did at one depth.

    Two numbers must not be mixed. The spread says how much the training's randomness moves a result
    on the same questions; the intervals say how far the mean over these seeds may move with other
    questions, each resampled with its answers under all seeds.

    Args:
        base: The untouched model on the same questions and texts.
        routed: One run a seed.
        permuted: The same seeds' own routes permuted over the questions; empty if that wasn't run.
        seed: Of the resampling.
        above_chance: Whether base is shown to be above chance.
    """
    mean = _mean_outcomes(routed)
    gold = [each.gold_logprob for each in routed]
    loss = [each.text_loss for each in routed]

    def against(other: Outcomes) -> Differences:
        return compare(mean, other, seed, above_chance=above_chance)

    return Seeds(
        setting=routed[0].setting,
        num_seeds=len(routed),
        accuracy=Spread.of([fmean(each.correct) for each in routed]),
        executions=Spread.of([each.executions for each in routed]),
        gold_logprob=Spread.of(list(map(fmean, gold))) if all(gold) else None,
        text_loss=Spread.of(list(map(fmean, loss))) if all(loss) else None,
        against_base=against(base.outcomes),
        against_permuted=against(_mean_outcomes(permuted)) if permuted else None,
    )


def _mean_outcomes(systems: Sequence[SystemRun]) -> Outcomes:
    """Return each question's and text's mean over the seeds."""

    def over(values: Sequence[Sequence[float]]) -> list[float]:
        return [fmean(each) for each in zip(*values, strict=True)]

    return Outcomes(
        name="mean over seeds",
        executions=fmean(each.executions for each in systems),
        correct=over([each.correct for each in systems]),
        gold_logprob=over([each.gold_logprob for each in systems]),
        text_loss=over([each.text_loss for each in systems]),
    )


def seeds_sentence(seeds: Seeds) -> str:
    """Say what routers of several seeds did at one depth."""
    at = f" at {seeds.setting}" if seeds.setting else ""
    accuracy, executions = seeds.accuracy, seeds.executions
    apart = f"{100 * accuracy.lowest:.1f} to {100 * accuracy.highest:.1f}"
    if accuracy.deviation is not None:
        apart += f", standard deviation {100 * accuracy.deviation:.1f} points"
    said = (
        f"Routers of {seeds.num_seeds} seeds{at}: accuracy {100 * accuracy.mean:.1f} % ({apart}) "
        f"at {executions.mean:.2f} executions ({executions.lowest:.2f} to "
        f"{executions.highest:.2f}). "
    ) + seeds.against_base.accuracy.sentence("their mean", "base")
    if seeds.against_permuted is not None:
        permuted = seeds.against_permuted.accuracy
        said += " " + permuted.sentence("their mean", "their own routes permuted")
    return said
