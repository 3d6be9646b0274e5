"""Turns systems' outcomes into an evaluation's records: table, curve, seeds, findings, samples.

Every difference between two systems is a `Verdict`. The findings are sentences on these verdicts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
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
from drllm.evaluation.systems import SystemRun, average_runs
from drllm.paths import Plan
from drllm.records import results
from drllm.statistics.exclusion import DropTest
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import Differences, capitalize, compare, correct_together

DESCRIPTIONS = {
    results.BASE: "the untouched model: every layer once",
    results.ROUTED: "the routers decide, reading the question alone",
}
SYSTEMS_WITH_ANSWERS = (results.BASE, results.ROUTED)
"""Systems whose answers are in the samples. The answers of all systems would be many texts."""
FROM_TASK = ("kind", "metric", "num_fewshot", "num_questions", "not_asked", "chance")
"""Fields of a record that are copied from the task."""
MENTIONED_SHARE = 0.01  # findings mention a larger share of routes that permuting left unchanged


@dataclass(frozen=True)
class TaskRuns:
    """The outcomes of every system on one task.

    `systems` begins with base. If there are routers, the routed model and its baselines at each
    depth follow. Paths come last. `shape` is the model's shape, or the reason why its cost can't be
    derived. `seeds` has two lists for each depth: the routed models of several seeds, and their
    permuted routes. The second list is empty if permuted routes didn't run.
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
        """The systems at the depth that the routers were trained for, base and routed first."""
        return [system for system in self.systems if not system.setting]

    @cached_property
    def above_chance(self) -> bool:
        """Whether base is shown to be better than guessing; otherwise nothing is claimed."""
        lowest, _ = accuracy_interval(self.systems[0].correct, self.config.seed)
        return lowest > self.harness_task.written.chance

    def table(self) -> tuple[results.System, ...]:
        """Return the systems at the depth that the routers were trained for."""
        return tuple(self._row(system) for system in self.trained)

    def _row(self, system: SystemRun) -> results.System:
        """Return a system's row of the table."""
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
        """Return the fields of a system's row that describe the system."""
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
        """Return the mean FLOPs of a prompt and one predicted token, and the K/V bytes a token."""
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
        """Return the points of a curve: base, then each system at its depths, then paths.

        The depths of a system, and the paths, are sorted from the most executions to the fewest.
        Base and paths have the same numbers as in the table.
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
        """Return the fields that a row of the table and a point of the curve share."""
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

    def compare_seeds(
        self, routed: Sequence[SystemRun], permuted: Sequence[SystemRun]
    ) -> results.Seeds:
        """Return the results of routers of several seeds at one depth.

        The spread and the intervals measure different things. The spread shows how much a result
        varies with the training's randomness, on the same questions. The intervals show how much
        the mean over these seeds may vary with other questions; a question is resampled with its
        answers under all seeds.
        """
        mean = average_runs(routed, "mean over seeds")
        against_permuted = None
        if permuted:
            against_permuted = self._compare(mean, average_runs(permuted, ""))
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
            table: The task's systems, with tests corrected by `correct_tables`.
            curve: The points of the task's curve.
            header: The fields that the records of all tasks share.
            drop_test: The test of `--max-drop`, over all tasks.
        """
        written = self.harness_task.written
        evaluation = results.Evaluation(
            **header,
            task=written.name,
            split=self.config.get_split(written.name),
            **{name: getattr(written, name) for name in FROM_TASK},
            num_layers=self.num_layers,
            systems=tuple(table),
            curve=tuple(curve),
            seeds=tuple(self.compare_seeds(routed, permuted) for routed, permuted in self.seeds),
            drop_test=drop_test,
        )
        return replace(evaluation, findings=tuple(self._findings(evaluation)))

    def _findings(self, evaluation: results.Evaluation) -> list[str]:
        """Return the findings for the reader; what to do with the main systems comes first."""
        systems = _main_systems(evaluation)
        findings = [self._headline(system, evaluation) for system in systems]
        if evaluation.drop_test is not None:
            findings.append(evaluation.drop_test.sentence())
        if not self.above_chance:
            findings.append(self._chance_warning())
        findings += _test_sentences(systems, evaluation)
        permuted = evaluation.system(results.PERMUTED)
        if permuted is not None:
            findings.append(self._against_permuted(permuted))
        findings += [seeds_sentence(seeds) for seeds in evaluation.seeds]
        return findings + self._notes()

    def _chance_warning(self) -> str:
        written = self.harness_task.written
        return (
            f"On {written.name} the base model is not shown to be above chance "
            f'({100 * written.chance:.1f} %), so no gain and no "no loss" can be claimed here.'
        )

    def _notes(self) -> list[str]:
        """Return the notes on the task, its cost and its systems as sentences, without repeats."""
        sentences = [f"{capitalize(note.removesuffix('.'))}." for note in dict.fromkeys(self.notes)]
        if isinstance(self.shape, str):
            sentences.append(f"FLOPs and K/V bytes are not derived: {self.shape}.")
        for system in self.trained:
            sentences += [f"{system.name.capitalize()}: {note}." for note in system.notes]
        return sentences

    def _headline(self, system: results.System, evaluation: results.Evaluation) -> str:
        """Return at most three sentences: what to do with a system, and how it differs."""
        against_base = system.against_base
        assert against_base is not None
        saves_layers = system.executions < self.num_layers
        cost = self._describe_cost(system)
        name = evaluation.name_in_sentence(system)
        full_name = name + _why_named(system, evaluation)
        if system.routed_against is None:
            return against_base.headline(full_name, saves_layers=saves_layers, cost=cost)
        advice = against_base.advice(full_name, saves_layers=saves_layers)
        return (
            f"{advice} ({cost}). {capitalize(name)} minus base: {against_base.details}. "
            f"Routed minus {name}: {system.routed_against.details}."
        )

    def _describe_cost(self, system: results.System) -> str:
        """Say how many layers a system saves and runs."""
        saved = 100 * share_saved(system.executions, self.num_layers)
        change = f"{saved:.1f} % of the layers saved"
        if saved < 0:
            change = f"{-saved:.1f} % more layers"
        return f"{change}, {system.executions:.2f} of {self.num_layers} run"

    def _against_permuted(self, permuted: results.System) -> str:
        """Say how the routed model differs from its own routes permuted over the questions."""
        if len(set(self.trained[1].routes[0])) == 1:
            return "All questions took one route, so permuting says nothing."
        against = permuted.routed_against
        assert against is not None
        sentence = against.accuracy.sentence(
            results.ROUTED, "its own routes permuted over the questions"
        )
        unchanged = permuted.unchanged_routes or 0.0
        if unchanged > MENTIONED_SHARE:
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


def _main_systems(evaluation: results.Evaluation) -> list[results.System]:
    """Return the systems that the findings begin with: the compared system, then the best path."""
    compared = evaluation.compared_system
    if compared is None or compared.against_base is None:
        raise ValueError("nothing is compared with base")
    best_path = evaluation.best_path
    if best_path is None or best_path is compared:
        return [compared]
    return [compared, best_path]


def _test_sentences(
    systems: Sequence[results.System], evaluation: results.Evaluation
) -> Iterator[str]:
    """Yield sentences on how the main systems differ from base, with the exact tests' numbers."""
    for system in systems:
        assert system.against_base is not None
        yield system.against_base.accuracy.sentence(evaluation.name_in_sentence(system))
    first = systems[0]
    assert first.against_base is not None
    gold_logprob = first.against_base.gold_logprob
    if gold_logprob is not None:
        yield gold_logprob.sentence(evaluation.name_in_sentence(first))


def _why_named(system: results.System, evaluation: results.Evaluation) -> str:
    """Say in brackets why the findings name this one of several paths; "" for other systems."""
    num_paths = len(evaluation.paths)
    if system.name not in evaluation.paths or num_paths < 2:
        return ""
    if evaluation.drop_test is not None and evaluation.drop_test.chosen == system.name:
        return " (chosen in order by --max-drop)"
    if evaluation.routed is None:
        return f" (the most accurate of {num_paths} on these questions)"
    return f" (of {num_paths} paths the closest in cost)"


def _outcome(system: SystemRun, place: int) -> results.SampleOutcome:
    """Return a system's outcome on the question at a place."""
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
    """Return the mean of some values; None if there are none."""
    return fmean(values) if values else None


def _spread(values: Sequence[Sequence[float]]) -> results.Spread | None:
    """Return the spread of the seeds' means; None if a seed has no values."""
    if not all(values):
        return None
    return results.Spread.of([fmean(each) for each in values])


def correct_tables(
    tables: Sequence[Sequence[results.System]], rivals: Collection[str] = ()
) -> list[list[results.System]]:
    """Correct each system's tests against base for the number of tasks.

    Args:
        tables: The systems of each task.
        rivals: Names of the systems from which the best is picked. All of their tests are corrected
            together.
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


def depth_name(share: float) -> str:
    """Return the name of the depth that saves a share of the executions.

    Example:
        >>> depth_name(0.1)
        '10 % saved'
    """
    return f"{100 * share:g} % saved"


def drop_candidates(
    tables: Mapping[str, Sequence[results.System]],
    curves: Mapping[str, Sequence[results.Point]],
    depths: Sequence[str] = (),
) -> dict[str, dict[str, Differences | None]]:
    """Return the candidates of `--max-drop` in order, with their differences from base by task.

    The settings fix the order. The routed model comes first, at the depths of `--curve`, or at the
    depth of training without `--curve`. The paths follow in their own order. If the routers
    couldn't reach a depth on a task, the difference is None there, so the depth isn't shown to lose
    less.

    Args:
        tables: The systems of each task.
        curves: The points of each task's curve.
        depths: The names of the depths of `--curve`, the fewest layers left out first.
    """
    candidates: dict[str, dict[str, Differences | None]] = {}
    for depth in depths:
        candidates[f"{results.ROUTED}, {depth}"] = dict.fromkeys(tables)
    for task, curve in curves.items():
        for point in curve:
            if point.name in candidates:
                candidates[point.name][task] = point.against_base
    for task, table in tables.items():
        for system in table:
            is_path = system.name not in DESCRIPTIONS and system.name not in BASELINES
            is_candidate = is_path or (system.name == results.ROUTED and not depths)
            if is_candidate and system.against_base is not None:
                by_task = candidates.setdefault(system.name, dict.fromkeys(tables))
                by_task[task] = system.against_base
    return candidates


def seeds_sentence(seeds: results.Seeds) -> str:
    """Describe the results of routers of several seeds at one depth."""
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
