"""Makes the tables of an evaluation from outcomes: a task's systems, its curve, and its seeds.

Every difference between two systems is judged by `statistics.verdicts`.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from msgspec.structs import asdict

from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.flops import kv_bytes, prompt_flops
from drllm.evaluation.outcomes import SeedRuns, SystemRun, TaskRuns, average_runs
from drllm.paths import Plan
from drllm.records import results
from drllm.statistics.differences import Differences
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import compare

DESCRIPTIONS = {
    results.BASE: "the untouched model: every layer once",
    results.ROUTED: "the routers decide, reading the question alone",
}


def build_table(runs: TaskRuns) -> tuple[results.System, ...]:
    """Return a row for each system, at the depth that the routers were trained for."""
    return tuple(_build_row(runs, system) for system in runs.systems_as_trained)


def _build_row(runs: TaskRuns, system: SystemRun) -> results.System:
    """Return a system's row of the table."""
    flops, kv_bytes_per_token = _derive_cost(runs, system)
    return results.System(
        name=system.name,
        **_describe(runs, system),
        **_compute_scores(runs, system),
        metrics={name: fmean(values) for name, values in system.metrics.items()},
        decode_executions=system.decode_executions,
        seconds=system.seconds,
        draws=max(1, len(system.routes)),  # a path has no routes
        prompt_flops=flops,
        kv_bytes_per_token=kv_bytes_per_token,
        unchanged_routes=_compute_unchanged_routes(runs, system),
    )


def _describe(runs: TaskRuns, system: SystemRun) -> dict[str, Any]:
    """Return the fields of a system's row that describe the system."""
    if system.name in BASELINES:
        baseline = BASELINES.get(system.name)
        names = ("description", "source", "fitted_on", "reads_question")
        return {name: getattr(baseline, name) for name in names}
    if system.path is not None:
        return {"description": system.path.edits(runs.num_layers), "reads_question": False}
    return {"description": DESCRIPTIONS.get(system.name)}


def _compute_unchanged_routes(runs: TaskRuns, system: SystemRun) -> float | None:
    """Return the share of questions whose route the permutation left unchanged.

    The share is a mean over draws. It is None for other systems than permuted routes.
    """
    if system.name != results.PERMUTED:
        return None
    shares = []
    for permuted_routes in system.routes:
        pairs = zip(runs.routed.routes[0], permuted_routes, strict=True)
        unchanged = [route == permuted_route for route, permuted_route in pairs]
        shares.append(fmean(unchanged))
    return fmean(shares)


def _derive_cost(runs: TaskRuns, system: SystemRun) -> tuple[results.Flops | None, float | None]:
    """Return the mean FLOPs of a prompt and one predicted token, and the K/V bytes a token.

    Both are None if they can't be derived.
    """
    shape = runs.shape
    if isinstance(shape, str) or not (system.routes or system.path):
        return None, None
    prompts = runs.rendered.prompt_tokens
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


def build_curve(runs: TaskRuns, table: Sequence[results.System]) -> tuple[results.Point, ...]:
    """Return the points of a curve: base, then each system at its depths, then paths.

    The depths of a system, and the paths, are sorted from the most executions to the fewest.
    Base and paths have the same numbers as in the table. The curve is empty if it would have
    only base.

    Args:
        runs: The outcomes on the task.
        table: The task's systems, with tests corrected by `judge.correct_tables`.
    """
    systems = [runs.base]
    for name in dict.fromkeys(system.name for system in runs.systems):  # each name once
        at_depths = [run for run in runs.systems if run.name == name and run.setting]
        systems += _sort_by_executions(at_depths)
    paths = [system for system in runs.systems if system.path is not None]
    systems += _sort_by_executions(paths)
    if len(systems) == 1:
        return ()
    rows = {row.name: row for row in table}
    points = []
    for system in systems:
        if system.setting:
            scores = _compute_scores(runs, system)
        else:
            row = asdict(rows[system.name])
            scores = {name: row[name] for name in results.Scores.__struct_fields__}
        points.append(results.Point(system=system.name, setting=system.setting, **scores))
    return tuple(points)


def _compute_scores(runs: TaskRuns, system: SystemRun) -> dict[str, Any]:
    """Return the fields of `results.Scores`, which rows of the table and points share."""
    against_base = None
    if system is not runs.base:
        against_base = _compare(runs, system, runs.base)
    routed_against = None
    if system.name not in (results.BASE, results.ROUTED):
        for routed in runs.systems:
            if routed.name == results.ROUTED and routed.setting == system.setting:
                routed_against = _compare(runs, routed, system)
    return {
        "accuracy": fmean(system.correct),
        "interval": accuracy_interval(system.correct, runs.config.seed),
        "executions": system.executions,
        "gold_logprob": _mean(system.gold_logprob),
        "text_loss": _mean(system.text_loss),
        "against_base": against_base,
        "routed_against": routed_against,
    }


def _compare(runs: TaskRuns, ours: Outcomes, theirs: Outcomes) -> Differences:
    """Compare two systems on the questions of the task; differences are ours minus theirs."""
    return compare(ours, theirs, runs.config.seed, above_chance=runs.above_chance)


def compare_seeds(runs: TaskRuns, seeds: SeedRuns) -> results.Seeds:
    """Return the results of routers of several seeds at one depth.

    The spread and the intervals measure different things. The spread shows how much a result
    varies with the training's randomness, on the same questions. The intervals show how much
    the mean over these seeds may vary with other questions. They resample questions, each
    together with its answers under all seeds.

    Args:
        runs: The outcomes on the task.
        seeds: The outcomes of the seeds at this depth.
    """
    routed = seeds.routed
    mean = average_runs(routed, "mean over seeds")
    against_permuted = None
    if seeds.permuted:
        against_permuted = _compare(runs, mean, average_runs(seeds.permuted, ""))
    return results.Seeds(
        setting=routed[0].setting,
        num_seeds=len(routed),
        accuracy=results.Spread.of([fmean(seed.correct) for seed in routed]),
        executions=results.Spread.of([seed.executions for seed in routed]),
        gold_logprob=_summarise_means([seed.gold_logprob for seed in routed]),
        text_loss=_summarise_means([seed.text_loss for seed in routed]),
        against_base=_compare(runs, mean, runs.base),
        against_permuted=against_permuted,
    )


def _sort_by_executions(systems: Sequence[SystemRun]) -> list[SystemRun]:
    """Sort systems from the most executions to the fewest."""
    return sorted(systems, key=lambda system: -system.executions)


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
