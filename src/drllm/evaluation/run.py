"""Runs the plan of a task: first depths, then systems, then baselines, which copy their routes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from drllm.evaluation.answers import RoutersDecide
from drllm.evaluation.fitting import (
    BaselineBlock,
    BaselineFitter,
    DepthFinder,
    DepthResult,
    DepthSearch,
)
from drllm.evaluation.flops import ModelShape
from drllm.evaluation.outcomes import SeedRuns, SystemRun, TaskRuns
from drllm.evaluation.plan import BaselineSystem, RoutedSystem, SeedPlan, System, TaskPlan
from drllm.evaluation.systems import ReadySystem, Runner, run_systems
from drllm.records.results import PERMUTED
from drllm.work.run import Block
from drllm.work.store import ResultStore

R = TypeVar("R")


def run_task(plan: TaskPlan, runner: Runner, shape: ModelShape | str) -> TaskRuns:
    """Run all systems of a task.

    Args:
        plan: The plan of the task.
        runner: Runs the blocks.
        shape: The model's shape, or the reason why its cost can't be derived.
    """
    runs = read_kept(plan, runner)
    # Base alone comes first, so that a task that can't be graded is refused soon.
    runs |= run_systems(plan, [ReadySystem(plan.base, [plan.base.routing])], runs, runner)
    depths = find_depths(plan, runner)
    seeds = list_reachable(plan, depths)
    ready = [decide_by_routers(seed.routed, depths) for seed in seeds]
    ready += [ReadySystem(path, [path.routing]) for path in plan.paths]
    runs |= run_systems(plan, ready, runs, runner)
    obstacles = find_obstacles(plan, seeds, runs, runner)
    runs |= run_systems(plan, draw_baselines(plan, seeds, runs, obstacles, runner), runs, runner)
    return TaskRuns(
        rendered=plan.questions.rendered,
        systems=[runs[system.key] for system in list_compared(plan) if system.key in runs],
        notes=collect_notes(plan, depths, obstacles),
        config=runner.config,
        num_layers=runner.lm.routed.num_layers,
        shape=shape,
        seeds=collect_seeds(plan, runs),
    )


def read_kept(plan: TaskPlan, runner: Runner) -> dict[str, SystemRun]:
    """Return the results of systems that an interrupted evaluation kept, by the system's key."""
    runs = {}
    for system in plan.systems():
        result = runner.store.get(system.key, SystemRun)
        if result is not None:
            runs[system.key] = result
            runner.progress.finish(system.key, plan.questions.cost(system.num_draws))
    return runs


def find_depths(plan: TaskPlan, runner: Runner) -> dict[str, DepthResult]:
    """Find the depth bias of the routed models, by the system's key.

    Routers of other seeds are searched only at the depths that the first seed's routers reach.
    """
    results = search_depths(plan, [depth.seeds[0].routed for depth in plan.depths], runner)
    other_seeds: list[RoutedSystem] = []
    for depth in plan.depths:
        first, *others = depth.seeds
        if results[first.routed.key].depth_bias is not None:
            other_seeds += [seed.routed for seed in others]
    return results | search_depths(plan, other_seeds, runner)


def search_depths(
    plan: TaskPlan, systems: Sequence[RoutedSystem], runner: Runner
) -> dict[str, DepthResult]:
    """Return the depth bias of each routed model; it is 0 at the depth of training."""
    results = {system.key: DepthResult(depth_bias=0.0) for system in systems}
    systems_to_search = [system for system in systems if system.search_key]
    blocks = []
    for system in systems_to_search:
        search = DepthSearch(
            system=system.search_key,
            routers=system.routers,
            executions=system.executions,
            prompts=plan.material.prompts,
        )
        blocks.append(Block(system.search_key, search, plan.search_cost))
    search_results = runner.run(blocks, DepthFinder(runner.settings), runner.store.of(DepthResult))
    for system, result in zip(systems_to_search, search_results, strict=True):
        results[system.key] = result
    return results


def list_reachable(plan: TaskPlan, depths: Mapping[str, DepthResult]) -> list[SeedPlan]:
    """Return the routed models that reach their depth, with their baselines."""
    seeds = []
    for depth in plan.depths:
        for seed in depth.seeds:
            result = depths.get(seed.routed.key)
            if result is not None and result.depth_bias is not None:
                seeds.append(seed)
    return seeds


def decide_by_routers(system: RoutedSystem, depths: Mapping[str, DepthResult]) -> ReadySystem:
    """Return a routed model whose depth bias is known."""
    depth_bias = depths[system.key].depth_bias
    assert depth_bias is not None
    return ReadySystem(system, [RoutersDecide(system.routers, depth_bias)])


def find_obstacles(
    plan: TaskPlan, seeds: Sequence[SeedPlan], runs: Mapping[str, SystemRun], runner: Runner
) -> dict[str, str]:
    """Return why baselines can't be compared, by the system's key."""
    obstacles = {}
    for seed in seeds:
        executions = runs[seed.routed.key].executions
        for system in seed.baselines:
            baseline = system.baseline(runner.lm.routed, plan.material)
            obstacle = baseline.find_obstacle(executions)
            if obstacle:
                obstacles[system.key] = obstacle
    return obstacles


def draw_baselines(
    plan: TaskPlan,
    seeds: Sequence[SeedPlan],
    runs: Mapping[str, SystemRun],
    obstacles: Mapping[str, str],
    runner: Runner,
) -> list[ReadySystem]:
    """Fit baselines, and let them decide at the executions of the routed models.

    Baselines with an obstacle are left out, and so are those whose result is there already. A
    baseline is fitted once for all depths and seeds.
    """
    systems: dict[type[Any], list[BaselineSystem]] = {}
    routes: dict[type[Any], list[Any]] = {}
    for seed in seeds:
        for system in seed.baselines:
            if system.key in obstacles or system.key in runs:
                continue
            systems.setdefault(system.baseline, []).append(system)
            routes.setdefault(system.baseline, []).append(runs[seed.routed.key].routes[0])
    blocks = []
    for baseline, baseline_systems in systems.items():
        first = baseline_systems[0]
        block = BaselineBlock(
            system=first.key,
            baseline=baseline,
            material=plan.material,
            routes=routes[baseline],
            num_draws=first.num_draws,
            seed=runner.config.seed,
        )
        key = f"{first.name} fitted on {plan.material.name}"
        blocks.append(Block(key, block, size=0.0))
    results = runner.run(blocks, BaselineFitter(runner.settings), StepStore(runner.store))
    ready = []
    for baseline_systems, draws_by_system in zip(systems.values(), results, strict=True):
        for system, draws in zip(baseline_systems, draws_by_system, strict=True):
            routings = [draw.routing for draw in draws]
            ready.append(ReadySystem(system, routings, draws[0].note))
    return ready


@dataclass(frozen=True)
class StepStore(Generic[R]):
    """Keeps the steps of blocks, and not their results, which are made of the steps quickly."""

    store: ResultStore

    def get(self, key: str) -> R | None:
        """Return None: no results are kept."""
        return None

    def put(self, key: str, result: R) -> R:
        """Return the result."""
        return result

    def steps_of(self, key: str) -> ResultStore:
        """Return the store for the steps of a block."""
        return self.store.within(key)


def list_compared(plan: TaskPlan) -> Iterator[System]:
    """Yield the systems of the table and the curve: all but those of other seeds."""
    yield plan.base
    for depth in plan.depths:
        first = depth.seeds[0]
        yield first.routed
        yield from first.baselines
    yield from plan.paths


def collect_notes(
    plan: TaskPlan, depths: Mapping[str, DepthResult], obstacles: Mapping[str, str]
) -> list[str]:
    """Return the notes on a task: its own, then depths and baselines that can't be compared."""
    notes = list(plan.notes)
    for depth in plan.depths:
        notes += describe_missed_depth(depth.seeds[0].routed, depths)
    for depth in plan.depths:
        first, *others = depth.seeds
        for system in first.baselines:
            if system.key in obstacles:
                notes.append(f"{system.name.capitalize()} isn't compared: {obstacles[system.key]}.")
        for seed in others:
            notes += describe_missed_depth(seed.routed, depths)
    return notes


def describe_missed_depth(system: RoutedSystem, depths: Mapping[str, DepthResult]) -> list[str]:
    """Return a note if a routed model can't reach its depth; no note if it can."""
    result = depths.get(system.key)
    if result is None or result.depth_bias is not None:
        return []
    return [f"{system.obstacle}: {result.obstacle}"]


def collect_seeds(plan: TaskPlan, runs: Mapping[str, SystemRun]) -> list[SeedRuns]:
    """Return the outcomes of several seeds at each depth; none with a single seed."""
    by_depth = []
    for depth in plan.depths:
        systems = [runs[seed.routed.key] for seed in depth.seeds if seed.routed.key in runs]
        if len(depth.seeds) == 1 or not systems:
            continue
        permuted = []
        for seed in depth.seeds:
            keys = [system.key for system in seed.baselines if system.name == PERMUTED]
            permuted += [runs[key] for key in keys if key in runs]
        by_depth.append(SeedRuns(systems, permuted))
    return by_depth
