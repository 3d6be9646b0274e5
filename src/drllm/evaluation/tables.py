"""Turns the systems' outcomes on a task into the records of an evaluation.

The records are the table of systems, the curve over depths, the results of seeds, the findings in
words, and the samples. Every difference between two systems is judged by `statistics.verdicts`, and
most findings are sentences on these verdicts.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

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
FIELDS_FROM_TASK = ("kind", "metric", "num_fewshot", "num_questions", "not_asked", "chance")
"""Fields of an evaluation's record that are copied from the task."""
MENTIONED_SHARE = 0.01
"""If permuting left more than this share of the routes unchanged, a finding says so."""


@dataclass(frozen=True)
class TaskRuns:
    """The outcomes of every system on one task.

    Attributes:
        harness_task: The task's questions.
        systems: Base, then the routed model and its baselines at each depth, then the paths.
            Without routers there are only base and paths.
        notes: Notes on the task and on systems that didn't run, for the findings.
        config: The settings.
        num_layers: The number of layers of the model.
        shape: The model's shape, or the reason why its cost can't be derived.
        seeds: For each depth a list of the routed models of several seeds, and a list of their
            permuted routes, which is empty if permuted routes didn't run. With a single seed,
            `seeds` is empty.
    """

    harness_task: RenderedTask
    systems: Sequence[SystemRun]
    notes: Sequence[str]
    config: EvaluateConfig
    num_layers: int
    shape: ModelShape | str
    seeds: Sequence[tuple[Sequence[SystemRun], Sequence[SystemRun]]] = ()

    @property
    def base(self) -> SystemRun:
        """The base model, with which all systems are compared."""
        return self.systems[0]

    @property
    def systems_as_trained(self) -> list[SystemRun]:
        """The systems at the depth that the routers were trained for, base and routed first."""
        return [system for system in self.systems if not system.setting]

    @property
    def routed(self) -> SystemRun:
        """The routed model at the depth that it was trained for, in an evaluation with routers."""
        return self.systems_as_trained[1]

    @cached_property
    def above_chance(self) -> bool:
        """Whether base is shown to be better than guessing; otherwise nothing is claimed."""
        lowest, _ = accuracy_interval(self.base.correct, self.config.seed)
        return lowest > self.harness_task.task.chance

    def build_table(self) -> tuple[results.System, ...]:
        """Return a row for each system, at the depth that the routers were trained for."""
        return tuple(self._build_row(system) for system in self.systems_as_trained)

    def _build_row(self, system: SystemRun) -> results.System:
        """Return a system's row of the table."""
        flops, kv_bytes_per_token = self._derive_cost(system)
        return results.System(
            name=system.name,
            **self._describe(system),
            **self._compute_scores(system),
            metrics={name: fmean(values) for name, values in system.metrics.items()},
            decode_executions=system.decode_executions,
            seconds=system.seconds,
            draws=max(1, len(system.routes)),  # a path has no routes
            prompt_flops=flops,
            kv_bytes_per_token=kv_bytes_per_token,
            unchanged_routes=self._compute_unchanged_routes(system),
        )

    def _describe(self, system: SystemRun) -> dict[str, Any]:
        """Return the fields of a system's row that describe the system."""
        if system.name in BASELINES:
            baseline = BASELINES.get(system.name)
            names = ("description", "source", "fitted_on", "reads_question")
            return {name: getattr(baseline, name) for name in names}
        if system.path is not None:
            return {"description": system.path.edits(self.num_layers), "reads_question": False}
        return {"description": DESCRIPTIONS.get(system.name)}

    def _compute_unchanged_routes(self, system: SystemRun) -> float | None:
        """Return the share of questions whose route the permutation left unchanged.

        The share is a mean over draws. It is None for other systems than permuted routes.
        """
        if system.name != results.PERMUTED:
            return None
        shares = []
        for permuted_routes in system.routes:
            pairs = zip(self.routed.routes[0], permuted_routes, strict=True)
            unchanged = [route == permuted_route for route, permuted_route in pairs]
            shares.append(fmean(unchanged))
        return fmean(shares)

    def _derive_cost(self, system: SystemRun) -> tuple[results.Flops | None, float | None]:
        """Return the mean FLOPs of a prompt and one predicted token, and the K/V bytes a token.

        Both are None if they can't be derived.
        """
        shape = self.shape
        if isinstance(shape, str) or not (system.routes or system.path):
            return None, None
        prompts = self.harness_task.prompt_tokens
        draws: Sequence[Sequence[Plan]] = system.routes
        if system.path is not None:
            draws = [[system.path] * len(prompts)]
        flops_of_prompts = []
        kv_bytes_per_token = []
        for plans in draws:
            for plan, tokens in zip(plans, prompts, strict=True):
                flops_of_prompts.append(prompt_flops(shape, plan, len(tokens)))
                kv_bytes_per_token.append(kv_bytes(shape, plan))
        mean_flops = results.Flops(
            weights=fmean(flops.weights for flops in flops_of_prompts),
            attention=fmean(flops.attention for flops in flops_of_prompts),
        )
        return mean_flops, fmean(kv_bytes_per_token)

    def build_curve(self, table: Sequence[results.System]) -> tuple[results.Point, ...]:
        """Return the points of a curve: base, then each system at its depths, then paths.

        The depths of a system, and the paths, are sorted from the most executions to the fewest.
        Base and paths have the same numbers as in the table. The curve is empty if it would have
        only base.

        Args:
            table: The task's systems, with tests corrected by `correct_tables`.
        """
        systems = [self.base]
        for name in dict.fromkeys(system.name for system in self.systems):  # each name once
            at_depths = [run for run in self.systems if run.name == name and run.setting]
            systems += _sort_by_executions(at_depths)
        paths = [system for system in self.systems if system.path is not None]
        systems += _sort_by_executions(paths)
        if len(systems) == 1:
            return ()
        rows = {row.name: row for row in table}
        points = []
        for system in systems:
            if system.setting:
                scores = self._compute_scores(system)
            else:
                row = asdict(rows[system.name])
                scores = {name: row[name] for name in results.Scores.__struct_fields__}
            points.append(results.Point(system=system.name, setting=system.setting, **scores))
        return tuple(points)

    def _compute_scores(self, system: SystemRun) -> dict[str, Any]:
        """Return the fields of `results.Scores`, which rows of the table and points share."""
        against_base = None
        if system is not self.base:
            against_base = self._compare(system, self.base)
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
        """Compare two systems on the questions of the task; differences are ours minus theirs."""
        return compare(ours, theirs, self.config.seed, above_chance=self.above_chance)

    def compare_seeds(
        self, routed: Sequence[SystemRun], permuted: Sequence[SystemRun]
    ) -> results.Seeds:
        """Return the results of routers of several seeds at one depth.

        The spread and the intervals measure different things. The spread shows how much a result
        varies with the training's randomness, on the same questions. The intervals show how much
        the mean over these seeds may vary with other questions. They resample questions, each
        together with its answers under all seeds.

        Args:
            routed: The routed model of each seed.
            permuted: The permuted routes of each seed; empty if they didn't run.
        """
        mean = average_runs(routed, "mean over seeds")
        against_permuted = None
        if permuted:
            against_permuted = self._compare(mean, average_runs(permuted, ""))
        return results.Seeds(
            setting=routed[0].setting,
            num_seeds=len(routed),
            accuracy=results.Spread.of([fmean(seed.correct) for seed in routed]),
            executions=results.Spread.of([seed.executions for seed in routed]),
            gold_logprob=_summarise_means([seed.gold_logprob for seed in routed]),
            text_loss=_summarise_means([seed.text_loss for seed in routed]),
            against_base=self._compare(mean, self.base),
            against_permuted=against_permuted,
        )

    def build_evaluation(
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
            drop_test: The test of `--max-drop`, over all tasks; None without `--max-drop`.
        """
        task = self.harness_task.task
        evaluation = results.Evaluation(
            **header,
            task=task.name,
            split=self.config.get_split(task.name),
            **{name: getattr(task, name) for name in FIELDS_FROM_TASK},
            num_layers=self.num_layers,
            systems=tuple(table),
            curve=tuple(curve),
            seeds=tuple(self.compare_seeds(routed, permuted) for routed, permuted in self.seeds),
            drop_test=drop_test,
        )
        return replace(evaluation, findings=tuple(self._write_findings(evaluation)))

    def _write_findings(self, evaluation: results.Evaluation) -> list[str]:
        """Return the findings for the reader; what to do with the main systems comes first."""
        systems = _list_main_systems(evaluation)
        findings = [self._write_headline(system, evaluation) for system in systems]
        if evaluation.drop_test is not None:
            findings.append(evaluation.drop_test.sentence())
        if not self.above_chance:
            findings.append(self._warn_of_guessing())
        findings += _write_test_sentences(systems, evaluation)
        permuted = evaluation.system(results.PERMUTED)
        if permuted is not None:
            findings.append(self._describe_permuted(permuted))
        findings += [describe_seeds(seeds) for seeds in evaluation.seeds]
        return findings + self._write_notes()

    def _warn_of_guessing(self) -> str:
        """Say that base may be guessing, so that nothing can be claimed."""
        task = self.harness_task.task
        return (
            f"On {task.name} the base model is not shown to be above chance "
            f'({100 * task.chance:.1f} %), so no gain and no "no loss" can be claimed here.'
        )

    def _write_notes(self) -> list[str]:
        """Return the notes on the task, its cost and its systems as sentences."""
        notes = dict.fromkeys(self.notes)  # without repeats
        sentences = [f"{capitalize(note.removesuffix('.'))}." for note in notes]
        if isinstance(self.shape, str):
            sentences.append(f"FLOPs and K/V bytes are not derived: {self.shape}.")
        for system in self.systems_as_trained:
            sentences += [f"{system.name.capitalize()}: {note}." for note in system.notes]
        return sentences

    def _write_headline(self, system: results.System, evaluation: results.Evaluation) -> str:
        """Return at most three sentences: what to do with a system, and how it differs.

        A path is compared with the routed model too, if there is a routed model.
        """
        against_base = system.against_base
        assert against_base is not None
        saves_layers = system.executions < self.num_layers
        cost = self._describe_cost(system)
        name = evaluation.name_in_sentence(system)
        full_name = name + _explain_choice(system, evaluation)
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

    def _describe_permuted(self, permuted: results.System) -> str:
        """Say how the routed model differs from its own routes permuted over the questions."""
        if len(set(self.routed.routes[0])) == 1:
            return "All questions took one route, so permuting says nothing."
        differences = permuted.routed_against
        assert differences is not None
        sentence = differences.accuracy.sentence(
            results.ROUTED, "its own routes permuted over the questions"
        )
        unchanged = permuted.unchanged_routes or 0.0
        if unchanged > MENTIONED_SHARE:
            sentence += f" {100 * unchanged:.1f} % of the questions kept their route by chance."
        return sentence

    def build_samples(self) -> list[results.Sample]:
        """Return the sample of each question, with the outcome of every system."""
        examples = {example.id: example for example in self.harness_task.task.examples}
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
                    systems={system.title: _read_outcome(system, place) for system in self.systems},
                )
            )
        return samples


def _sort_by_executions(systems: Sequence[SystemRun]) -> list[SystemRun]:
    """Sort systems from the most executions to the fewest."""
    return sorted(systems, key=lambda system: -system.executions)


def _list_main_systems(evaluation: results.Evaluation) -> list[results.System]:
    """Return the systems that the findings begin with.

    They are the routed model and the best path, or the one of them that was evaluated.
    """
    compared = evaluation.compared_system
    if compared is None or compared.against_base is None:
        raise ValueError("nothing is compared with base")
    best_path = evaluation.best_path
    if best_path is None or best_path is compared:
        return [compared]
    return [compared, best_path]


def _write_test_sentences(
    systems: Sequence[results.System], evaluation: results.Evaluation
) -> Iterator[str]:
    """Yield sentences on how the main systems differ from base, with the exact tests' numbers.

    The gold answers' log-probability is given for the first system only.
    """
    for system in systems:
        assert system.against_base is not None
        yield system.against_base.accuracy.sentence(evaluation.name_in_sentence(system))
    first = systems[0]
    assert first.against_base is not None
    gold_logprob = first.against_base.gold_logprob
    if gold_logprob is not None:
        yield gold_logprob.sentence(evaluation.name_in_sentence(first))


def _explain_choice(system: results.System, evaluation: results.Evaluation) -> str:
    """Say in brackets why the findings name this path.

    Return an empty text if the system isn't a path, or is the only path.
    """
    num_paths = len(evaluation.paths)
    if system.name not in evaluation.paths or num_paths < 2:
        return ""
    if evaluation.drop_test is not None and evaluation.drop_test.chosen == system.name:
        return " (chosen in order by --max-drop)"
    if evaluation.routed is None:
        return f" (the most accurate of {num_paths} on these questions)"
    return f" (of {num_paths} paths the closest in cost)"


def _read_outcome(system: SystemRun, place: int) -> results.SampleOutcome:
    """Return a system's outcome on the question at a place."""
    gold_logprob = None
    if system.gold_logprob:
        gold_logprob = system.gold_logprob[place]
    decisions = None
    if len(system.routes) == 1:  # several draws have no common decisions
        decisions = tuple(system.routes[0][place])
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
    """Return the mean of some values; None if there are no values."""
    if not values:
        return None
    return fmean(values)


def _summarise_means(values_by_seed: Sequence[Sequence[float]]) -> results.Spread | None:
    """Return the spread of the seeds' means; None if a seed has no values."""
    if not all(values_by_seed):
        return None
    return results.Spread.of([fmean(values) for values in values_by_seed])


class _ComparedRow(NamedTuple):
    """The index of a row in a table, and how the row's system differs from base."""

    table: list[results.System]
    row: int
    differences: Differences


def correct_tables(
    tables: Sequence[Sequence[results.System]], rivals: Collection[str] = ()
) -> list[list[results.System]]:
    """Correct the exact tests against base, since several tests are made.

    The tests of a system on all tasks are corrected together.

    Args:
        tables: The systems of each task.
        rivals: Names of the systems from which the best is picked. The tests of all these systems
            are corrected together.

    Returns:
        The tables with corrected tests.
    """
    corrected = [list(table) for table in tables]
    groups: defaultdict[str, list[_ComparedRow]] = defaultdict(list)
    for table in corrected:
        for row, system in enumerate(table):
            if system.against_base is None:
                continue
            group = system.name
            if system.name in rivals:
                group = ""  # the name of the group of all rivals
            groups[group].append(_ComparedRow(table, row, system.against_base))
    for rows in groups.values():
        verdicts = correct_together([compared.differences.accuracy for compared in rows])
        for (table, row, differences), verdict in zip(rows, verdicts, strict=True):
            against_base = replace(differences, accuracy=verdict)
            table[row] = replace(table[row], against_base=against_base)
    return corrected


def name_depth(share: float) -> str:
    """Return the name of the depth that saves a share of the executions.

    Example:
        >>> name_depth(0.1)
        '10 % saved'
    """
    return f"{100 * share:g} % saved"


def list_drop_candidates(
    tables: Mapping[str, Sequence[results.System]],
    curves: Mapping[str, Sequence[results.Point]],
    depths: Sequence[str] = (),
) -> dict[str, dict[str, Differences | None]]:
    """List the candidates of `--max-drop` in the order in which they are tested.

    The settings alone fix the order. The routed model comes first, at the depths of `--curve`, or
    at the depth of training without `--curve`. The paths follow in their own order.

    Args:
        tables: Name of a task → its systems.
        curves: Name of a task → the points of its curve.
        depths: The names of the depths of `--curve`, the fewest layers left out first.

    Returns:
        Name of a candidate → task → how the candidate differs from base. The difference is None if
        the candidate wasn't evaluated on the task, since the routers couldn't reach the depth.
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


def describe_seeds(seeds: results.Seeds) -> str:
    """Describe the results of routers of several seeds at one depth, in two or three sentences."""
    at_depth = ""
    if seeds.setting:
        at_depth = f" at {seeds.setting}"
    accuracy = seeds.accuracy
    executions = seeds.executions
    spread = f"{100 * accuracy.lowest:.1f} to {100 * accuracy.highest:.1f}"
    if accuracy.deviation is not None:
        spread += f", standard deviation {100 * accuracy.deviation:.1f} points"
    sentences = [
        f"Routers of {seeds.num_seeds} seeds{at_depth}: accuracy {100 * accuracy.mean:.1f} % "
        f"({spread}) at {executions.mean:.2f} executions ({executions.lowest:.2f} to "
        f"{executions.highest:.2f}).",
        seeds.against_base.accuracy.sentence("their mean", "base"),
    ]
    if seeds.against_permuted is not None:
        permuted = seeds.against_permuted.accuracy
        sentences.append(permuted.sentence("their mean", "their own routes permuted"))
    return " ".join(sentences)
