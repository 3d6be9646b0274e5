"""From what systems did to the records of an evaluation: table, curve, seeds, findings, samples.

Every difference is a `Verdict`, and the findings are their sentences.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from statistics import fmean
from typing import Any

from msgspec.structs import replace

from drllm.config import EvaluateConfig
from drllm.cost import share_saved
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.flops import ModelShape, kv_bytes, prompt_flops
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.evaluation.systems import SystemRun, mean_of
from drllm.paths import Plan
from drllm.records import results
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.non_inferiority import Choice
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import Differences, compare, correct_together, lower

DESCRIPTIONS = {
    results.BASE: "the untouched model: every layer once",
    results.ROUTED: "the routers decide, reading the question alone",
}
SHOWN = (results.BASE, results.ROUTED)  # systems whose answers are kept; the texts of all are many
FROM_TASK = ("kind", "metric", "num_fewshot", "num_questions", "not_asked", "chance")
MENTIONED = 0.01  # share of routes unchanged by the permutation above which it is said


@dataclass(frozen=True)
class TaskRuns:
    """All that was run on one task.

    Systems are base, then at each depth routed and its baselines, if there are routers, and paths
    last. The shape is the model's, or why its cost can't be derived. `seeds` are, depth by depth,
    routers of several seeds on the same questions, and their own routes permuted, if any.
    """

    asked: RenderedTask
    systems: Sequence[SystemRun]
    notes: Sequence[str]
    choice: Choice | None
    config: EvaluateConfig
    num_layers: int
    shape: ModelShape | str
    seeds: Sequence[tuple[Sequence[SystemRun], Sequence[SystemRun]]] = ()

    @property
    def trained(self) -> list[SystemRun]:
        """The systems at the depth that the routers were trained for: base and routed first."""
        return [system for system in self.systems if not system.setting]

    @cached_property
    def above_chance(self) -> bool:
        """Whether base is shown to be better than guessing; only then is anything claimed."""
        lowest, _ = accuracy_interval(self.systems[0].correct, self.config.seed)
        return lowest > self.asked.written.chance

    def table(self) -> tuple[results.System, ...]:
        """Return the systems at the depth that the routers were trained for."""
        return tuple(map(self._row, self.trained))

    def _row(self, system: SystemRun) -> results.System:
        about: dict[str, Any] = {"description": DESCRIPTIONS.get(system.name)}
        if system.path is not None:
            about = {"description": system.path.edits(self.num_layers), "reads_question": False}
        if system.name in BASELINES:
            baseline = BASELINES.get(system.name)
            names = ("description", "source", "fitted_on", "reads_question")
            about = {name: getattr(baseline, name) for name in names}
        flops, kv = self._cost(system)
        unchanged = None
        if system.name == results.PERMUTED:
            own = self.trained[1].routes[0]
            unchanged = fmean(fmean(map(eq, own, routes)) for routes in system.routes)
        return results.System(
            name=system.name,
            **about,
            **self._measured(system),
            metrics={name: fmean(values) for name, values in system.metrics.items()},
            decode_executions=system.decode_executions,
            seconds=system.seconds,
            draws=max(1, len(system.routes)),
            prompt_flops=flops,
            kv_bytes_per_token=kv,
            unchanged_routes=unchanged,
        )

    def _cost(self, system: SystemRun) -> tuple[results.Flops | None, float | None]:
        """Return the mean FLOPs of a prompt with one token predicted, and K/V bytes a token."""
        if isinstance(self.shape, str) or not (system.routes or system.path):
            return None, None
        prompts = self.asked.prompt_tokens
        draws: list[list[Plan]] = [[*draw] for draw in system.routes]
        if system.path is not None:
            draws = [[system.path] * len(prompts)]
        flops = [
            prompt_flops(self.shape, plan, len(tokens))
            for draw in draws
            for plan, tokens in zip(draw, prompts, strict=True)
        ]
        weights, attention = fmean(f.weights for f in flops), fmean(f.attention for f in flops)
        kv = fmean(kv_bytes(self.shape, plan) for draw in draws for plan in draw)
        return results.Flops(weights=weights, attention=attention), kv

    def curve(self) -> tuple[results.Point, ...]:
        """Return base, then each system's depths from the most executions to the fewest.

        Paths come last, in the same order.
        """
        base, *others = [
            each for each in self.systems if each.setting or each.name == results.BASE or each.path
        ]
        names = list(dict.fromkeys("" if each.path else each.name for each in others))
        others.sort(key=lambda e: (names.index("" if e.path else e.name), -e.executions))
        return tuple(
            results.Point(system=each.name, setting=each.setting, **self._measured(each))
            for each in ((base, *others) if others else ())
        )

    def _measured(self, system: SystemRun) -> dict[str, Any]:
        """Return what a row of the table and a point of the curve have in common."""
        base = self.systems[0]
        routed = {each.setting: each for each in self.systems if each.name == results.ROUTED}
        is_baseline = system.name not in (results.BASE, results.ROUTED)
        return {
            "accuracy": fmean(system.correct),
            "interval": accuracy_interval(system.correct, self.config.seed),
            "executions": system.executions,
            "gold_logprob": _mean(system.gold_logprob),
            "text_loss": _mean(system.text_loss),
            "against_base": None if system is base else self._compare(system, base),
            "routed_against": (
                self._compare(routed[system.setting], system) if is_baseline and routed else None
            ),
        }

    def _compare(self, ours: Outcomes, theirs: Outcomes) -> Differences:
        return compare(ours, theirs, self.config.seed, above_chance=self.above_chance)

    def of_seeds(self, routed: Sequence[SystemRun], permuted: Sequence[SystemRun]) -> results.Seeds:
        """Return what routers of several seeds did at one depth.

        Two numbers must not be mixed. The spread says how much the training's randomness moves a
        result on the same questions; the intervals say how far the mean over these seeds may move
        with other questions, each resampled with its answers under all seeds.
        """
        mean = mean_of(routed, "mean over seeds")

        def spread(values: Sequence[Sequence[float]]) -> results.Spread | None:
            return results.Spread.of(list(map(fmean, values))) if all(values) else None

        return results.Seeds(
            setting=routed[0].setting,
            num_seeds=len(routed),
            accuracy=results.Spread.of([fmean(each.correct) for each in routed]),
            executions=results.Spread.of([each.executions for each in routed]),
            gold_logprob=spread([each.gold_logprob for each in routed]),
            text_loss=spread([each.text_loss for each in routed]),
            against_base=self._compare(mean, self.systems[0]),
            against_permuted=(self._compare(mean, mean_of(permuted, "")) if permuted else None),
        )

    def evaluation(
        self, table: Sequence[results.System], header: Mapping[str, Any]
    ) -> results.Evaluation:
        """Return the record of the task; `correct` has corrected its table for all tasks."""
        written = self.asked.written
        found = results.Evaluation(
            **header,
            task=written.name,
            split=self.config.split_of(written.name),
            **{name: getattr(written, name) for name in FROM_TASK},
            num_layers=self.num_layers,
            systems=tuple(table),
            curve=self.curve(),
            seeds=tuple(self.of_seeds(*runs) for runs in self.seeds),
            choice=self.choice,
        )
        return replace(found, findings=tuple(self._findings(found)))

    def _findings(self, found: results.Evaluation) -> list[str]:
        """Return what a reader may conclude, what is shown of the routed model or a path first."""
        written, ours, permuted = self.asked.written, found.compared, found.system(results.PERMUTED)
        if ours is None or (against := ours.against_base) is None:
            raise ValueError("nothing is compared with base")
        said = [self._headline(ours, found)]
        if found.best_path is not None and found.best_path is not ours:
            said.append(self._headline(found.best_path, found))
        if not self.above_chance:
            said.append(
                f"On {written.name} the base model is not shown to be above chance "
                f'({100 * written.chance:.1f} %), so no gain and no "no loss" can be claimed here.'
            )
        if against.gold_logprob is not None:
            said.append(against.gold_logprob.sentence(found.called(ours)))
        if permuted is not None:
            said.append(self._against_permuted(permuted))
        said += map(seeds_sentence, found.seeds)
        said += [] if self.choice is None else [self.choice.verdict()]
        notes = (note.removesuffix(".") for note in dict.fromkeys(self.notes))
        said += (f"{note[:1].upper()}{note[1:]}." for note in notes)
        if isinstance(self.shape, str):
            said.append(f"FLOPs and K/V bytes are not derived: {self.shape}.")
        for system in self.trained:
            said += [f"{system.name.capitalize()}: {note}." for note in system.notes]
        return said

    def _headline(self, system: results.System, found: results.Evaluation) -> str:
        """Say what is shown of a system against base, at what cost, and of routers against it."""
        against, routed = system.against_base, system.routed_against
        assert against is not None
        saved = 100 * share_saved(system.executions, self.num_layers)
        cost = f"{saved:.1f} % of the layers saved" if saved >= 0 else f"{-saved:.1f} % more layers"
        cost += f" ({system.executions:.2f} of {self.num_layers} run)"
        if system.name == results.ROUTED:
            said = against.headline(cost)
            return f"Routed: {lower(said)}" if found.paths else said
        certified = found.choice and found.choice.certified
        why = f"the most accurate of {len(found.paths)} on these questions"
        if routed is not None:
            why = f"the nearest of {len(found.paths)} to the routers' executions"
        if certified and certified.name == system.name:
            why = "the certified one"
        named = f"{system.name}, {why}" if len(found.paths) > 1 else system.name
        if routed is None:
            return f"Path {named}: {lower(against.headline(cost))}"
        said = f"One path for the whole task, {named}: {against.told(f' with {cost}')}."
        return f"{said} Routed minus {system.name}: {routed.told()}."

    def _against_permuted(self, permuted: results.System) -> str:
        if len(set(self.trained[1].routes[0])) == 1:
            return "All questions took one route, so permuting says nothing."
        against, unchanged = permuted.routed_against, permuted.unchanged_routes or 0.0
        assert against is not None
        said = against.accuracy.sentence(
            results.ROUTED, "its own routes permuted over the questions"
        )
        if unchanged > MENTIONED:
            said += f" {100 * unchanged:.1f} % of the questions kept their route by chance."
        return said

    def samples(self) -> list[results.Sample]:
        """Return one line a question."""
        examples = {example.id: example for example in self.asked.written.examples}
        return [
            results.Sample(
                id=own_id,
                task=examples[own_id].task,
                question=examples[own_id].question,
                choices=tuple(examples[own_id].choices),
                gold=examples[own_id].gold,
                systems={
                    each.title: results.Outcome(
                        correct=each.correct[place],
                        gold_logprob=each.gold_logprob[place] if each.gold_logprob else None,
                        decisions=tuple(each.routes[0][place]) if len(each.routes) == 1 else None,
                        answer=each.answers[place]
                        if each.answers and each.title in SHOWN
                        else None,
                    )
                    for each in self.systems
                },
            )
            for place, own_id in enumerate(self.asked.ids)
        ]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def correct(
    tables: Sequence[Sequence[results.System]], rivals: Collection[str] = ()
) -> list[list[results.System]]:
    """Correct each system's tests against base for several tasks.

    Rivals are systems of which the best is picked: their tests are corrected together.
    """

    def group(system: results.System) -> str:
        return "" if system.name in rivals else system.name

    corrected = [list(table) for table in tables]
    for name in {group(system): None for table in tables for system in table}:
        places = [
            (table, place, system.against_base)
            for table in corrected
            for place, system in enumerate(table)
            if group(system) == name and system.against_base is not None
        ]
        verdicts = correct_together([against.accuracy for _, _, against in places])
        for (table, place, against), verdict in zip(places, verdicts, strict=True):
            against = replace(against, accuracy=verdict)
            table[place] = replace(table[place], against_base=against)
    return corrected


def seeds_sentence(seeds: results.Seeds) -> str:
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
