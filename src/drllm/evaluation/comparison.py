"""Runs every system of an evaluation on every task, at every depth.

`EvaluationContext` holds what all tasks share. `TaskComparison` runs the systems on one task.
"""

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from drllm.config import TIMING, EvaluateConfig
from drllm.errors import ArchitectureError, ConfigError
from drllm.evaluation.baselines.base import (
    BASELINES,
    Baseline,
    BaselineRun,
    Material,
    Measure,
    read_curve,
    select_baselines,
)
from drllm.evaluation.flops import ModelShape
from drllm.evaluation.lm_eval.folders import make_task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import RenderedTask, draw_stock_task
from drllm.evaluation.questions import find_sources, fitting_split, needs_fitting
from drllm.evaluation.systems import BatchResult, KeepBlocks, SystemRun, TaskRunner
from drllm.evaluation.tables import TaskRuns, depth_name
from drllm.listener import OnProgress
from drllm.models.routers.depth_control import find_depth_bias
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FullPolicy, RouterPolicy
from drllm.models.scoring.packing import Request
from drllm.paths import Path as LayerPath
from drllm.paths import StaticPath
from drllm.processes import from_first
from drllm.records.codec import sha256
from drllm.records.results import BASE, PERMUTED, ROUTED
from drllm.records.resume import Chunks
from drllm.records.supervision import read_supervision
from drllm.tasks.base import Task
from drllm.tasks.harness import LmEvalTask
from drllm.tasks.registry import TASKS

TASKS_FOLDER, PARTIAL_FOLDER = "tasks", "partial"
NUM_CALIBRATION = 64
"""Default number of questions that depths are found and baselines fitted on."""
NUM_PROBES = 12  # about how often all calibration questions are routed until a depth is found
NUM_RANDOM_DRAWS = 10  # default number of draws of a random baseline


class PlannedWork:
    """The progress of an evaluation: how many of the planned tokens are done.

    `report` is called with both numbers and the name of the current work.
    """

    report: OnProgress

    def __init__(self) -> None:
        self._total = 0
        self._done = 0

    def plan(self, cost: int) -> None:
        """Add the tokens of some work to the planned tokens."""
        self._total += cost

    @contextmanager
    def replanned(self, cost: int) -> Iterator[None]:
        """Correct the planned tokens at the end of a block that needed more or less than `cost`."""
        planned_afterwards = self._total - self._done - cost
        yield
        self._total = self._done + planned_afterwards

    @contextmanager
    def during(self, name: str, cost: int) -> Iterator[None]:
        """Report a block's work by name, and count its tokens as done when the block ends."""
        self.report_current(name)
        yield
        self._done += cost
        self.report_current(name)

    def report_current(self, name: str, partly_done: float = 0.0) -> None:
        """Report the current work by name, and how many of its tokens are done."""
        self.report(self._done + partly_done, self._total, name)


class EvaluationContext:
    """What all tasks of one evaluation share: the model, its routers and paths, and the settings.

    Without routers there is no routed model. `prompts` has the tokens of all prompts of the tasks
    that are done. `chunks` stores the results of finished systems and blocks.

    Args:
        lm: The model, with the interface of the harness' models.
        routers: Routers by folder, the first seed's routers first.
        paths: Static paths by name.
        tuned_on: Names of the tasks on whose `select` questions some of the paths were chosen.
        tasks: The tasks to evaluate.
        config: The settings.
        output: The folder of the evaluation.
    """

    def __init__(
        self,
        lm: RoutedLM,
        routers: Mapping[Path, RouterStack],
        paths: Mapping[str, StaticPath],
        tuned_on: Collection[str],
        tasks: Sequence[Task],
        config: EvaluateConfig,
        output: Path,
    ) -> None:
        self.lm = lm
        self.routers = routers
        self.paths = paths
        self.tuned_on = tuned_on
        self.config = config
        self.output = output
        self.progress = PlannedWork()
        self.prompts: list[list[int]] = []
        self.baselines = select_baselines(config.baselines)
        self.depths = {"": 0.0}  # name → share of executions saved; "" is the depth of training
        for share in read_curve(config.curve):
            self.depths[depth_name(share)] = share
        self.sources = find_sources(tasks, config)
        self._sources_by_name = {source.name: source for source in self.sources.values()}
        self._targets = []
        if config.supervision is not None:
            self._targets = list(read_supervision(Path(config.supervision)))
        self.chunks = Chunks(output / PARTIAL_FOLDER, self._identity(tasks), stage="evaluation")
        # Both are cached: each material and each baseline is made once, when it is first needed.
        self.material = functools.cache(self._material)
        self.baseline = functools.cache(self._baseline)

    def _identity(self, tasks: Sequence[Task]) -> dict[str, object]:
        """Return the values that must be equal to resume an interrupted evaluation."""
        files = [folder / WEIGHTS_FILE for folder in self.routers]
        if self.config.supervision is not None:
            files.append(Path(self.config.supervision))
        return {
            "config": self.config.to_dict() | dict.fromkeys(TIMING),
            "tasks": [task.name for task in tasks],
            "paths": dict(self.paths),
            "files": {f"{path}_sha256": sha256(path) for path in files},
            "model": self.lm.base.identity,
            "runtime": self.lm.base.runtime,
        }

    def num_draws(self, baseline: str) -> int:
        """Return how many random draws of a baseline to run."""
        if not BASELINES.get(baseline).is_drawn:
            return 1
        return self.config.num_random_draws or NUM_RANDOM_DRAWS

    def harness_task(self, task: Task, split: str, limit: int | None) -> RenderedTask:
        """Return the questions of a task as the harness asks them.

        drllm's tasks are written to a task folder first; the harness' own tasks don't need a
        folder. If an interrupted evaluation asked other questions, it can't be resumed and is
        refused.
        """
        if isinstance(task, LmEvalTask):
            harness_task = self._stock_task(task, split, limit)
        else:
            harness_task = self._written_task(task, split, limit)
        questions = f"{harness_task.written.name}, {limit or 'all'} of {split}"
        self.chunks.expect(questions, {"questions_sha256": harness_task.digest()})
        return harness_task

    def _stock_task(self, task: LmEvalTask, split: str, limit: int | None) -> RenderedTask:
        """Return one of the harness' own tasks.

        All questions that the harness reports may be asked, unless routers, paths or baselines may
        have been trained or fitted on some of them. Then only the questions of the split are asked.
        """
        config = self.config
        made_on = set(self.tuned_on)
        for routers in self.routers.values():
            made_on.update(routers.config.training.get("tasks", ()))
        # A task of the user may hold the same questions under another name.
        has_known_names = made_on <= {*TASKS}
        is_fresh = has_known_names and config.supervision is None and not needs_fitting(config)
        part = None if split == "test" and is_fresh else split
        written = draw_stock_task(task, part, limit, config.seed, config.num_fewshot)
        return RenderedTask(written, task.tasks, self.lm, chat=config.chat)

    def _written_task(self, task: Task, split: str, limit: int | None) -> RenderedTask:
        """Write one of drllm's tasks to its task folder, and return it."""
        config = self.config
        folder = self.output / TASKS_FOLDER / split
        [written], files = make_task_folder(
            [task],
            split=split,
            limit=limit,
            seed=config.seed,
            data_dir=config.data_dir,
            num_fewshot=config.num_fewshot,
        )
        files.write(folder)
        return RenderedTask(written, folder, self.lm, chat=config.chat)

    def run_once(self, name: str, run: Callable[[KeepBlocks], SystemRun], cost: int) -> SystemRun:
        """Run a system, or return its result if it was stored before an interruption.

        Args:
            name: The key of the result.
            run: Runs the system. Its argument is a function that runs blocks and stores results.
            cost: The system's work, in tokens.
        """
        parts = self.chunks.within(name)

        def keep_blocks(calls: Mapping[str, Callable[[], BatchResult]]) -> list[BatchResult]:
            results: list[BatchResult] = []
            for result in parts.get_or_make_all(calls, BatchResult):
                results.append(result)
                self.progress.report_current(name, cost * len(results) / len(calls))
            return results

        with self.progress.during(name, cost):
            return self.chunks.get_or_make(name, SystemRun, lambda: run(keep_blocks))

    def _baseline(self, name: str, source: str) -> Baseline:
        """Return a baseline, which is fitted on a source's questions when it is first used."""
        return BASELINES.get(name)(self.lm.routed, lambda: self.material(source))

    def _material(self, name: str) -> Material:
        """Return the material that baselines are fitted on: questions of a source, and targets."""
        source = self._sources_by_name[name]
        limit = self.config.num_calibration or NUM_CALIBRATION
        harness_task = self.harness_task(source, fitting_split(source, self.config), limit)
        questions = _questions_with_one_prompt(harness_task)

        def measure_once(
            kind: str, candidates: Sequence[LayerPath], measure: Measure
        ) -> list[float]:
            cost = len(candidates) * sum(map(len, harness_task.prompt_tokens))
            self.progress.plan(cost)
            with self.progress.during(f"fitting on {kind}", cost):
                key = f"{kind} {json.dumps(candidates)}"
                return self.chunks.get_or_make(key, list[float], lambda: measure(candidates))

        return Material(
            routed=self.lm.routed,
            prompts=harness_task.prompt_tokens,
            questions=list(questions.values()),
            golds=[harness_task.golds(place)[0] for place in questions],
            supervision=self._targets,
            name=name,
            remember=measure_once,
        )


def _questions_with_one_prompt(harness_task: RenderedTask) -> dict[int, Request]:
    """Return the questions whose options all follow the same prompt, by place.

    If a prompt contains the options, each option may have a prompt of its own.
    """
    questions: dict[int, Request] = {}
    if not harness_task.has_options:
        return questions
    for place, requests in enumerate(harness_task.requests()):
        context = requests[0].context
        if all(request.context == context for request in requests):
            questions[place] = Request(context, [request.continuation for request in requests])
    return questions


@dataclass(frozen=True)
class SystemPlan:
    """Base, the routed model or a path, with its decisions.

    `depth` names the depth of the routed model; empty for the depth of training.
    """

    name: str
    run: BaselineRun
    depth: str = ""

    @property
    def at_depth(self) -> str:
        """The depth as part of a sentence."""
        return f" at {self.depth}" if self.depth else ""


BASE_MODEL = SystemPlan(BASE, BaselineRun(FullPolicy()))


class TaskComparison:
    """Runs every system on one task. `cost` is about how many tokens the systems read and write."""

    def __init__(self, context: EvaluationContext, task: Task) -> None:
        config = context.config
        self.context = context
        self.config = config
        self.task = task
        self.harness_task = context.harness_task(
            task, config.get_split(task.name), config.get_limit(task.name)
        )
        self.runner = TaskRunner(context.lm, self.harness_task, config.num_texts, config.seed)
        self.source = context.sources[task.name]
        self.notes = list(self.harness_task.written.notes)
        if self.source.name != task.name:
            self.notes.append(
                f"Depths and baselines are fitted and chosen on questions of {self.source.name}, "
                f"not of {task.name}"
            )
        self.folders = list(context.routers)  # the routers' folders, the first seed's first
        tokens_a_question = self.runner.num_tokens // len(self.harness_task.keys)
        num_calibration = config.num_calibration or NUM_CALIBRATION
        self._depth_cost = NUM_PROBES * num_calibration * tokens_a_question
        self.cost = self._planned_cost()
        context.progress.plan(self.cost)

    def _planned_cost(self) -> int:
        """Return how many tokens all systems and the search for depths read and write."""
        context = self.context
        num_systems = 1 + len(context.paths)
        if self.folders:
            draws = {name: context.num_draws(name) for name in context.baselines}
            num_other_seeds = len(self.folders) - 1
            runs_a_depth = 1 + sum(draws.values())
            runs_a_depth += num_other_seeds * (1 + draws.get(PERMUTED, 0))
            num_systems += len(context.depths) * runs_a_depth
        num_searches = len(self.folders) * (len(context.depths) - 1)
        return num_systems * self.runner.num_tokens + num_searches * self._depth_cost

    def run(self) -> TaskRuns:
        """Run all systems: base, the routed model and its baselines at each depth, and paths.

        Baselines run at the executions of the first seed's routers. The only baseline of another
        seed is its permuted routes, at the executions of its own routers.
        """
        systems = [self._run_plan(BASE_MODEL)]
        seeds = []
        for plan in self._routed_plans():
            routed = self._run_plan(plan, plan.at_depth)
            baselines = self._run_baselines(plan.at_depth, routed)
            systems += [routed, *baselines]
            if len(self.folders) > 1:
                permuted = [baseline for baseline in baselines if baseline.name == PERMUTED]
                seeds.append(self._run_other_seeds(plan, routed, permuted))
        for name, path in self.context.paths.items():
            systems.append(self._run_plan(SystemPlan(name, BaselineRun(path))))
        self.context.prompts += self.harness_task.prompt_tokens
        return TaskRuns(
            harness_task=self.harness_task,
            systems=systems,
            notes=self.notes,
            config=self.config,
            num_layers=self.context.lm.routed.num_layers,
            shape=self._shape(),
            seeds=seeds,
        )

    def _routed_plans(self) -> list[SystemPlan]:
        """Return the first seed's routed model at each depth that it can reach."""
        if not self.folders:
            return []
        plans = []
        for depth in self.context.depths:
            plan = self._at_depth(self.folders[0], depth, f"Not evaluated at {depth}")
            if plan is not None:
                plans.append(plan)
        return plans

    def _run_other_seeds(
        self, first: SystemPlan, routed: SystemRun, permuted: Sequence[SystemRun]
    ) -> tuple[list[SystemRun], list[SystemRun]]:
        """Run the other seeds at one depth; return the runs of all seeds, and of permuted routes.

        The second list is empty if permuted routes aren't among the baselines.
        """
        all_routed = [routed]
        all_permuted = list(permuted)
        for folder in self.folders[1:]:
            plan = self._at_depth(folder, first.depth, f"{folder} isn't evaluated{first.at_depth}")
            if plan is None:
                continue
            name = f" of {folder}{first.at_depth}"
            all_routed.append(self._run_plan(plan, name))
            if permuted:
                all_permuted.append(self._run_baseline(PERMUTED, name, all_routed[-1]))
        return all_routed, all_permuted

    def _shape(self) -> ModelShape | str:
        """Return the model's shape, or the reason why its cost can't be derived."""
        routed = self.context.lm.routed
        try:
            return ModelShape.of(routed.model, routed.injection.lora.all_weights())
        except ArchitectureError as error:
            return str(error)

    def _at_depth(self, folder: Path, depth: str, obstacle: str) -> SystemPlan | None:
        """Return the routed model at a depth; None, with a note, if it can't reach the depth."""
        routers = self.context.routers[folder]
        if not depth:
            return SystemPlan(ROUTED, BaselineRun(RouterPolicy(routers)))
        routed = self.context.lm.routed
        executions = (1 - self.context.depths[depth]) * routed.num_layers
        prompts = self.context.material(self.source.name).prompts
        key = f"{self.task.name}: depth for {depth} of {folder}"

        def find() -> float:
            return find_depth_bias(routed, prompts, executions, routers=routers).depth_bias

        with self.context.progress.during(key, self._depth_cost):
            try:
                bias = self.context.chunks.get_or_make(
                    key, float, functools.partial(from_first, find)
                )
            except ConfigError as error:
                self.notes.append(f"{obstacle}: {error}")
                return None
        return SystemPlan(ROUTED, BaselineRun(RouterPolicy(routers, depth_bias=bias)), depth)

    def _run_plan(self, plan: SystemPlan, label: str = "") -> SystemRun:
        """Run a system; the label distinguishes it from other systems of its name."""
        runner = self.runner
        return self.context.run_once(
            f"{self.harness_task.written.name}: {plan.name}{label}",
            lambda keep: runner.run(plan.name, [plan.run], plan.depth, keep),
            runner.num_tokens,
        )

    def _run_baselines(self, label: str, routed: SystemRun) -> list[SystemRun]:
        """Run the baselines that can match the routed model's executions; add notes on others."""
        systems = []
        for name in self.context.baselines:
            baseline = self.context.baseline(name, self.source.name)
            obstacle = baseline.find_obstacle(routed.executions)
            if obstacle:
                self.notes.append(f"{name.capitalize()} isn't compared: {obstacle}.")
            else:
                systems.append(self._run_baseline(name, label, routed))
        return systems

    def _run_baseline(self, name: str, label: str, routed: SystemRun) -> SystemRun:
        """Run a baseline at the routed model's executions, with all of its draws."""
        num_draws = self.context.num_draws(name)

        def run(keep: KeepBlocks) -> SystemRun:
            routes = torch.tensor(routed.routes[0])  # [Q, L]
            generator = torch.Generator().manual_seed(self.config.seed)
            baseline = self.context.baseline(name, self.source.name)
            draws = [baseline.make_run(routes, generator) for _ in range(num_draws)]
            return self.runner.run(name, draws, routed.setting, keep)

        cost = self.runner.num_tokens * num_draws
        return self.context.run_once(f"{self.task.name}: {name}{label}", run, cost)
