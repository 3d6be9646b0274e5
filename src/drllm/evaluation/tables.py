"""From what systems did to the records of an evaluation: table, curve, seeds, findings, samples.

Every difference is a `Verdict`, and the findings are their sentences.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from statistics import fmean
from typing import Any

from msgspec.structs import asdict, replace

from drllm.config import EvaluateConfig
from drllm.cost import share_saved
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.flops import ModelShape, kv_bytes, prompt_flops
from drllm.evaluation.lm_eval.task import RenderedTask
from drllm.evaluation.systems import SystemRun, mean_of
from drllm.paths import Plan
from drllm.records import results
from drllm.statistics.exclusion import DropTest
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import Differences, compare, correct_together, upper

DESCRIPTIONS = {
    results.BASE: "the untouched model: every layer once",
    results.ROUTED: "the routers decide, reading the question alone",
}
SYSTEMS_WITH_ANSWERS = (results.BASE, results.ROUTED)
"""Systems whose answers are kept in the samples; the texts of all would be many."""
FROM_TASK = ("kind", "metric", "num_fewshot", "num_questions", "not_asked", "chance")
MENTIONED = 0.01  # share of routes unchanged by the permutation above which it is mentioned


@dataclass(frozen=True)
class TaskRuns:
    """All that was run on one task.

    Systems are base, then at each depth routed and its baselines, if there are routers, and paths
    last. The shape is the model's, or why its cost can't be derived. `seeds` are, depth by depth,
    routers of several seeds on the same questions, and their own routes permuted, if any.
    """

    harness_task: RenderedTask
    systems: Sequence[SystemRun]
    notes: Sequence[str]
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
        return lowest > self.harness_task.written.chance

    def table(self) -> tuple[results.System, ...]:
        """Return the systems at the depth that the routers were trained for."""
        return tuple(self._row(system) for system in self.trained)

    def _row(self, system: SystemRun) -> results.System:
        flops, kv_bytes_per_token = self._cost(system)
        return results.System(
            name=system.name,
            **self._description(system),
            **self._measured(system),
            metrics={name: fmean(values) for name, values in system.metrics.items()},
            decode_executions=system.decode_executions,
            seconds=system.seconds,
            draws=max(1, len(system.routes)),
            prompt_flops=flops,
            kv_bytes_per_token=kv_bytes_per_token,
            unchanged_routes=self._unchanged_routes(system),
        )

    def _description(self, system: SystemRun) -> dict[str, Any]:
        """Return what a system is, as fields of its row."""
        if system.name in BASELINES:
            baseline = BASELINES.get(system.name)
            names = ("description", "source", "fitted_on", "reads_question")
            return {name: getattr(baseline, name) for name in names}
        if system.path is not None:
            return {"description": system.path.edits(self.num_layers), "reads_question": False}
        return {"description": DESCRIPTIONS.get(system.name)}

    def _unchanged_routes(self, system: SystemRun) -> float | None:
        """Return the share of questions whose route the permutation left as it was."""
        if system.name != results.PERMUTED:
            return None
        routes = self.trained[1].routes[0]
        return fmean(fmean(map(eq, routes, permuted)) for permuted in system.routes)

    def _cost(self, system: SystemRun) -> tuple[results.Flops | None, float | None]:
        """Return the mean FLOPs of a prompt with one token predicted, and K/V bytes a token."""
        shape = self.shape
        if isinstance(shape, str) or not (system.routes or system.path):
            return None, None
        prompts = self.harness_task.prompt_tokens
        draws: Sequence[Sequence[Plan]] = system.routes
        if system.path is not None:
            draws = [[system.path] * len(prompts)]
        flops = []
        kv = []
        for plans in draws:
            for plan, tokens in zip(plans, prompts, strict=True):
                flops.append(prompt_flops(shape, plan, len(tokens)))
                kv.append(kv_bytes(shape, plan))
        mean_flops = results.Flops(
            weights=fmean(each.weights for each in flops),
            attention=fmean(each.attention for each in flops),
        )
        return mean_flops, fmean(kv)

    def curve(self, table: Sequence[results.System]) -> tuple[results.Point, ...]:
        """Return base, then each system's depths from the most executions to the fewest.

        Paths come last, in the same order. What stands in the table too has the same numbers here.
        """
        base = self.systems[0]
        deeper = [system for system in self.systems if system.setting]
        deeper.sort(key=lambda system: -system.executions)
        by_name: dict[str, list[SystemRun]] = {system.name: [] for system in self.systems}
        for system in deeper:
            by_name[system.name].append(system)
        paths = [system for system in self.systems if system.path is not None]
        paths.sort(key=lambda system: -system.executions)
        others = [system for systems in by_name.values() for system in systems] + paths
        if not others:
            return ()
        rows = {row.name: row for row in table}
        points = []
        for system in (base, *others):
            if system.setting:
                measured = self._measured(system)
            else:
                row = asdict(rows[system.name])
                measured = {name: row[name] for name in results.Scores.__struct_fields__}
            points.append(results.Point(system=system.name, setting=system.setting, **measured))
        return tuple(points)

    def _measured(self, system: SystemRun) -> dict[str, Any]:
        """Return what a row of the table and a point of the curve have in common."""
        base = self.systems[0]
        against_base = None
        if system is not base:
            against_base = self._compare(system, base)
        routed_against = None
        if system.name not in (results.BASE, results.ROUTED):
            for routed in self.systems:
                if routed.name == results.ROUTED and routed.setting == system.setting:
                    routed_against = self._compare(routed, system)
        return {
            "accuracy": fmean(system.correct),
            "interval": accuracy_interval(system.correct, self.config.seed),
            "executions": system.executions,
            "gold_logprob": _mean(system.gold_logprob),
            "text_loss": _mean(system.text_loss),
            "against_base": against_base,
            "routed_against": routed_against,
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
        against_permuted = None
        if permuted:
            against_permuted = self._compare(mean, mean_of(permuted, ""))
        return results.Seeds(
            setting=routed[0].setting,
            num_seeds=len(routed),
            accuracy=results.Spread.of([fmean(each.correct) for each in routed]),
            executions=results.Spread.of([each.executions for each in routed]),
            gold_logprob=_spread([each.gold_logprob for each in routed]),
            text_loss=_spread([each.text_loss for each in routed]),
            against_base=self._compare(mean, self.systems[0]),
            against_permuted=against_permuted,
        )

    def evaluation(
        self,
        table: Sequence[results.System],
        curve: Sequence[results.Point],
        header: Mapping[str, Any],
        drop_test: DropTest | None = None,
    ) -> results.Evaluation:
        """Return the record of the task.

        Args:
            table: Its systems, corrected for all tasks by `correct`.
            curve: Its depths.
            header: What the records of all tasks have in common.
            drop_test: The test of `--max-drop`, over all tasks.
        """
        written = self.harness_task.written
        evaluation = results.Evaluation(
            **header,
            task=written.name,
            split=self.config.split_of(written.name),
            **{name: getattr(written, name) for name in FROM_TASK},
            num_layers=self.num_layers,
            systems=tuple(table),
            curve=tuple(curve),
            seeds=tuple(self.of_seeds(routed, permuted) for routed, permuted in self.seeds),
            drop_test=drop_test,
        )
        return replace(evaluation, findings=tuple(self._findings(evaluation)))

    def _findings(self, evaluation: results.Evaluation) -> list[str]:
        """Return what a reader may conclude, what is shown of the routed model or a path first."""
        written = self.harness_task.written
        compared = evaluation.compared_system
        if compared is None or compared.against_base is None:
            raise ValueError("nothing is compared with base")
        findings = [self._headline(compared, evaluation)]
        best_path = evaluation.best_path
        if best_path is not None and best_path is not compared:
            findings.append(self._headline(best_path, evaluation))
        if evaluation.drop_test is not None:
            findings.append(evaluation.drop_test.sentence())
        if not self.above_chance:
            findings.append(
                f"On {written.name} the base model is not shown to be above chance "
                f'({100 * written.chance:.1f} %), so no gain and no "no loss" can be claimed here.'
            )
        gold_logprob = compared.against_base.gold_logprob
        if gold_logprob is not None:
            findings.append(gold_logprob.sentence(evaluation.name_in_sentence(compared)))
        permuted = evaluation.system(results.PERMUTED)
        if permuted is not None:
            findings.append(self._against_permuted(permuted))
        findings += [seeds_sentence(seeds) for seeds in evaluation.seeds]
        return findings + self._notes()

    def _notes(self) -> list[str]:
        """Return the notes on the task, on its cost and on its systems, each once, as sentences."""
        sentences = [f"{upper(note.removesuffix('.'))}." for note in dict.fromkeys(self.notes)]
        if isinstance(self.shape, str):
            sentences.append(f"FLOPs and K/V bytes are not derived: {self.shape}.")
        for system in self.trained:
            sentences += [f"{system.name.capitalize()}: {note}." for note in system.notes]
        return sentences

    def _headline(self, system: results.System, evaluation: results.Evaluation) -> str:
        """Return what to do with a system, then how it differs from base, and routers from it."""
        against_base = system.against_base
        assert against_base is not None
        saved = 100 * share_saved(system.executions, self.num_layers)
        cost = f"{saved:.1f} % of the layers saved" if saved >= 0 else f"{-saved:.1f} % more layers"
        cost += f", {system.executions:.2f} of {self.num_layers} run"
        name = evaluation.name_in_sentence(system) + _why_named(system, evaluation)
        if system.routed_against is None:
            return against_base.headline(name, saves_layers=saved > 0, cost=cost)
        advice = against_base.advice(name, saves_layers=saved > 0)
        return (
            f"{advice} ({cost}). Minus base: {against_base.details}. Routed minus "
            f"{evaluation.name_in_sentence(system)}: {system.routed_against.details}."
        )

    def _against_permuted(self, permuted: results.System) -> str:
        if len(set(self.trained[1].routes[0])) == 1:
            return "All questions took one route, so permuting says nothing."
        against = permuted.routed_against
        assert against is not None
        sentence = against.accuracy.sentence(
            results.ROUTED, "its own routes permuted over the questions"
        )
        unchanged = permuted.unchanged_routes or 0.0
        if unchanged > MENTIONED:
            sentence += f" {100 * unchanged:.1f} % of the questions kept their route by chance."
        return sentence

    def samples(self) -> list[results.Sample]:
        """Return one line a question."""
        examples = {example.id: example for example in self.harness_task.written.examples}
        samples = []
        for place, example_id in enumerate(self.harness_task.ids):
            example = examples[example_id]
            samples.append(
                results.Sample(
                    id=example_id,
                    task=example.task,
                    question=example.question,
                    choices=tuple(example.choices),
                    gold=example.gold,
                    systems={system.title: _outcome(system, place) for system in self.systems},
                )
            )
        return samples


def _why_named(system: results.System, evaluation: results.Evaluation) -> str:
    """Return why a path is named among several, in brackets; empty where it needs no reason."""
    num_paths = len(evaluation.paths)
    if system.name not in evaluation.paths or num_paths < 2:
        return ""
    if evaluation.drop_test is not None and evaluation.drop_test.chosen == system.name:
        return " (chosen in order by --max-drop)"
    if evaluation.routed is None:
        return f" (the most accurate of {num_paths} on these questions)"
    return f" (of {num_paths} paths the closest in cost)"


def _outcome(system: SystemRun, place: int) -> results.SampleOutcome:
    """Return what a system did on the question at a place."""
    gold_logprob = system.gold_logprob[place] if system.gold_logprob else None
    decisions = tuple(system.routes[0][place]) if len(system.routes) == 1 else None
    answer = None
    if system.answers and system.title in SYSTEMS_WITH_ANSWERS:
        answer = system.answers[place]
    return results.SampleOutcome(
        correct=system.correct[place],
        gold_logprob=gold_logprob,
        decisions=decisions,
        answer=answer,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _spread(values: Sequence[Sequence[float]]) -> results.Spread | None:
    """Return the spread of means, one a seed; None where one of them isn't known."""
    if not all(values):
        return None
    return results.Spread.of([fmean(each) for each in values])


def correct(
    tables: Sequence[Sequence[results.System]], rivals: Collection[str] = ()
) -> list[list[results.System]]:
    """Correct each system's tests against base for several tasks.

    Rivals are systems of which the best is picked: their tests are corrected together.
    """
    corrected = [list(table) for table in tables]
    groups: dict[str, list[tuple[list[results.System], int, Differences]]] = {}
    for table in corrected:
        for row, system in enumerate(table):
            if system.against_base is not None:
                group = "" if system.name in rivals else system.name
                groups.setdefault(group, []).append((table, row, system.against_base))
    for places in groups.values():
        verdicts = correct_together([against.accuracy for _, _, against in places])
        for (table, row, against), verdict in zip(places, verdicts, strict=True):
            table[row] = replace(table[row], against_base=replace(against, accuracy=verdict))
    return corrected


def drop_candidates(
    tables: Mapping[str, Sequence[results.System]], curves: Mapping[str, Sequence[results.Point]]
) -> dict[str, dict[str, Differences | None]]:
    """Return what `--max-drop` tests, in order: how it differs from base on each task.

    The order is fixed by the settings: the routed model at the depths of `--curve`, or without them
    as it was trained; then the paths in their own order. A depth that the routers couldn't be
    brought to on some task has None there.
    """
    candidates: dict[str, dict[str, Differences | None]] = {}
    for task, curve in curves.items():
        for point in curve:
            if point.system == results.ROUTED and point.against_base is not None:
                by_task = candidates.setdefault(point.name, dict.fromkeys(tables))
                by_task[task] = point.against_base
    has_depths = bool(candidates)
    for task, table in tables.items():
        for system in table:
            is_path = system.name not in DESCRIPTIONS and system.name not in BASELINES
            is_candidate = is_path or (system.name == results.ROUTED and not has_depths)
            if is_candidate and system.against_base is not None:
                by_task = candidates.setdefault(system.name, dict.fromkeys(tables))
                by_task[task] = system.against_base
    return candidates


def seeds_sentence(seeds: results.Seeds) -> str:
    """Say what routers of several seeds did at one depth."""
    depth = f" at {seeds.setting}" if seeds.setting else ""
    accuracy = seeds.accuracy
    executions = seeds.executions
    spread = f"{100 * accuracy.lowest:.1f} to {100 * accuracy.highest:.1f}"
    if accuracy.deviation is not None:
        spread += f", standard deviation {100 * accuracy.deviation:.1f} points"
    sentences = [
        f"Routers of {seeds.num_seeds} seeds{depth}: accuracy {100 * accuracy.mean:.1f} % "
        f"({spread}) at {executions.mean:.2f} executions ({executions.lowest:.2f} to "
        f"{executions.highest:.2f}).",
        seeds.against_base.accuracy.sentence("their mean", "base"),
    ]
    if seeds.against_permuted is not None:
        permuted = seeds.against_permuted.accuracy
        sentences.append(permuted.sentence("their mean", "their own routes permuted"))
    return " ".join(sentences)
