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
from drllm.evaluation.lm_eval.leaves import describe_task
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.objects import make_task_objects
from drllm.evaluation.lm_eval.task import RenderedTask, draw_stock_task
from drllm.evaluation.questions import choose_fitting_split, find_sources, needs_fitting
from drllm.evaluation.systems import BatchResult, KeepBlocks, SystemRun, TaskRunner
from drllm.evaluation.tables import TaskRuns, name_depth
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.depth_control import find_depth_bias
from drllm.models.routing.policies import FullPolicy, RouterPolicy
from drllm.models.scoring.score import Request
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
from drllm.work.listener import OnProgress

PARTIAL_FOLDER = "partial"
NUM_CALIBRATION = 64
"""Default number of questions that depths and baselines are fitted on."""
NUM_PROBES = 12
"""About how often the routers decide on all calibration prompts until the bias of a depth is found.
Only the progress depends on it."""
NUM_RANDOM_DRAWS = 10  # default number of draws of a random baseline


class PlannedWork:
    """The progress of an evaluation: how many of the planned tokens are done.

    Work is measured by its cost, which is about how many tokens it reads and writes. `report` is
    called with the tokens that are done, the planned tokens and the name of the current work.
    """

    report: OnProgress

    def __init__(self) -> None:
        self._total = 0
        self._done = 0

    def plan(self, cost: int) -> None:
        """Add some work to the planned tokens."""
        self._total += cost

    @contextmanager
    def correcting(self, planned_cost: int) -> Iterator[None]:
        """Correct the planned tokens after the block, which may need more or less than planned."""
        cost_after_block = self._total - self._done - planned_cost
        yield
        self._total = self._done + cost_after_block

    @contextmanager
    def during(self, name: str, cost: int) -> Iterator[None]:
        """Report the work inside the block by name, and count it as done after the block."""
        self.report_current(name)
        yield
        self._done += cost
        self.report_current(name)

    def report_current(self, name: str, num_done: float = 0.0) -> None:
        """Report the current work by name, and how many of its tokens are done."""
        self.report(self._done + num_done, self._total, name)


class EvaluationContext:
    """What all tasks of one evaluation share: the model, its routers and paths, and the settings.

    Args:
        lm: The model, with the interface of the harness' models.
        routers: Routers by folder, the first seed's routers first; empty if there is no routed
            model.
        paths: Static paths by name.
        tuned_on: Names of the tasks on whose `select` questions some of the paths were chosen.
        tasks: The tasks to evaluate.
        config: The settings.
        output: The folder of the evaluation.

    Attributes:
        baselines: The names of the baselines.
        depths: Name of a depth → the share of executions that the routed model saves there. The
            first depth is that of training. It has no name, and its share isn't used.
        sources: Name of a task → the task on whose questions its depths and baselines are fitted.
        prompts: The tokens of all prompts of the tasks that are done.
        chunks: Stores the results of finished systems and blocks.
        get_material: Returns what baselines are fitted on, by the name of the source.
        get_baseline: Returns a baseline, by its name and the name of the source.
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
        self.progress = PlannedWork()
        self.prompts: list[list[int]] = []
        self.baselines = select_baselines(config.baselines)
        self.depths = {"": 0.0}
        for share in read_curve(config.curve):
            self.depths[name_depth(share)] = share
        self.sources = find_sources(tasks, config)
        self._sources_by_name = {source.name: source for source in self.sources.values()}
        self._targets = []
        if config.supervision is not None:
            self._targets = list(read_supervision(Path(config.supervision)))
        identity = self._make_identity(tasks)
        self.chunks = Chunks(output / PARTIAL_FOLDER, identity, stage="evaluation")
        # Each material and each baseline is built once, when it is first needed.
        self.get_material = functools.cache(self._build_material)
        self.get_baseline = functools.cache(self._build_baseline)

    def _make_identity(self, tasks: Sequence[Task]) -> dict[str, object]:
        """Return the values that must be equal to resume an interrupted evaluation.

        Settings of the timing may differ, so they are set to None.
        """
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

    def count_draws(self, baseline: str) -> int:
        """Return how many random draws of a baseline to run."""
        if not BASELINES.get(baseline).is_drawn:
            return 1
        return self.config.num_random_draws or NUM_RANDOM_DRAWS

    def render_task(self, task: Task, split: str, limit: int | None) -> RenderedTask:
        """Return the questions of a task as the harness renders them.

        Args:
            task: The task.
            split: The split of the questions.
            limit: Maximum number of questions; None takes all.

        Raises:
            ConfigError: An interrupted evaluation in the same folder had other questions, so it
                can't be resumed.
        """
        if isinstance(task, LmEvalTask):
            harness_task = self._render_stock_task(task, split, limit)
        else:
            harness_task = self._render_own_task(task, split, limit)
        questions = f"{harness_task.task.name}, {limit or 'all'} of {split}"
        self.chunks.expect(questions, {"questions_sha256": harness_task.digest()})
        return harness_task

    def _render_stock_task(self, task: LmEvalTask, split: str, limit: int | None) -> RenderedTask:
        """Render one of the harness' own tasks.

        The questions are drawn from all that the harness reports if nothing can have been trained,
        tuned or fitted on them. Otherwise they are drawn only from the split.
        """
        config = self.config
        only_split: str | None = split
        if split == "test" and not self._may_know_questions():
            only_split = None
        harness_task = draw_stock_task(task, only_split, limit, config.seed, config.num_fewshot)
        return RenderedTask(harness_task, task.tasks, self.lm, chat=config.chat)

    def _may_know_questions(self) -> bool:
        """Tell whether something may be trained, tuned or fitted on questions of a harness task.

        This is excluded if only drllm's own tasks were used. A task of the user may have the same
        questions under another name.
        """
        if self.config.supervision is not None or needs_fitting(self.config):
            return True
        tasks = set(self.tuned_on)
        for routers in self.routers.values():
            tasks.update(routers.config.training.get("tasks", ()))
        return not tasks <= {*TASKS}

    def _render_own_task(self, task: Task, split: str, limit: int | None) -> RenderedTask:
        """Render one of drllm's tasks."""
        config = self.config
        harness_task, leaves = describe_task(
            task,
            split=split,
            limit=limit,
            seed=config.seed,
            data_dir=config.data_dir,
            num_fewshot=config.num_fewshot,
        )
        return RenderedTask(harness_task, make_task_objects(leaves), self.lm, chat=config.chat)

    def run_once(self, name: str, run: Callable[[KeepBlocks], SystemRun], cost: int) -> SystemRun:
        """Run a system, or return its result if it was stored before an interruption.

        Args:
            name: The key of the result, and the name of the work in the progress.
            run: Runs the system. Its argument is a function that runs blocks and stores results.
            cost: The system's work, in tokens.
        """
        block_chunks = self.chunks.within(name)

        def keep_blocks(calls: Mapping[str, Callable[[], BatchResult]]) -> list[BatchResult]:
            results: list[BatchResult] = []
            for result in block_chunks.get_or_make_all(calls, BatchResult):
                results.append(result)
                self.progress.report_current(name, cost * len(results) / len(calls))
            return results

        with self.progress.during(name, cost):
            return self.chunks.get_or_make(name, SystemRun, lambda: run(keep_blocks))

    def _build_baseline(self, name: str, source_name: str) -> Baseline:
        """Build a baseline, which is fitted on a source's questions when it is first used."""
        baseline_class = BASELINES.get(name)
        return baseline_class(self.lm.routed, lambda: self.get_material(source_name))

    def _build_material(self, source_name: str) -> Material:
        """Collect what baselines are fitted on: questions of a source, and the routers' targets."""
        source = self._sources_by_name[source_name]
        split = choose_fitting_split(source, self.config)
        limit = self.config.num_calibration or NUM_CALIBRATION
        harness_task = self.render_task(source, split, limit)
        questions = _find_questions_with_one_prompt(harness_task)
        num_tokens = sum(map(len, harness_task.prompt_tokens))

        def measure_once(
            kind: str, candidates: Sequence[LayerPath], measure: Measure
        ) -> list[float]:
            cost = len(candidates) * num_tokens
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
            name=source_name,
            remember=measure_once,
        )


def _find_questions_with_one_prompt(harness_task: RenderedTask) -> dict[int, Request]:
    """Find the questions whose options all follow the same prompt; return them by place.

    In some tasks the prompt contains an option, so each option has a prompt of its own.
    """
    questions: dict[int, Request] = {}
    if not harness_task.has_options:
        return questions
    for place, requests in enumerate(harness_task.requests()):
        prompt = requests[0].context
        if all(request.context == prompt for request in requests):
            questions[place] = Request(prompt, [request.continuation for request in requests])
    return questions


@dataclass(frozen=True)
class SystemPlan:
    """Base, the routed model or a path, and how it decides.

    `depth` names the depth of the routed model. It is empty for the depth of training, and for base
    and paths.
    """

    name: str
    run: BaselineRun
    depth: str = ""

    @property
    def at_depth(self) -> str:
        """The depth as part of a sentence, with a space before it; empty without a depth."""
        if not self.depth:
            return ""
        return f" at {self.depth}"


BASE_MODEL = SystemPlan(BASE, BaselineRun(FullPolicy()))


class TaskComparison:
    """Runs every system on one task.

    Args:
        context: What all tasks share.
        task: The task.

    Attributes:
        source: The task on whose questions depths and baselines are fitted.
        notes: Notes on the task and on systems that don't run, as sentences without a full stop.
        folders: The folders of the routers, the first seed's folder first.
        cost: About how many tokens the systems read and write.
    """

    def __init__(self, context: EvaluationContext, task: Task) -> None:
        config = context.config
        self.context = context
        self.config = config
        self.task = task
        self.harness_task = context.render_task(
            task, config.get_split(task.name), config.get_limit(task.name)
        )
        self.runner = TaskRunner(context.lm, self.harness_task, config.num_texts, config.seed)
        self.source = context.sources[task.name]
        self.notes = list(self.harness_task.task.notes)
        if self.source.name != task.name:
            self.notes.append(
                f"Depths and baselines are fitted and chosen on questions of {self.source.name}, "
                f"not of {task.name}"
            )
        self.folders = list(context.routers)
        tokens_a_question = self.runner.num_tokens // len(self.harness_task.keys)
        num_calibration = config.num_calibration or NUM_CALIBRATION
        self._depth_cost = NUM_PROBES * num_calibration * tokens_a_question
        self.cost = self._estimate_cost()
        context.progress.plan(self.cost)

    def _estimate_cost(self) -> int:
        """Estimate how many tokens all systems and the searches for depths read and write."""
        context = self.context
        num_runs = 1 + len(context.paths)  # base and the paths
        num_searches = 0
        if self.folders:
            draws = {name: context.count_draws(name) for name in context.baselines}
            runs_of_first_seed = 1 + sum(draws.values())
            runs_of_other_seed = 1 + draws.get(PERMUTED, 0)
            runs_a_depth = runs_of_first_seed + (len(self.folders) - 1) * runs_of_other_seed
            num_runs += len(context.depths) * runs_a_depth
            # The depth of training needs no search.
            num_searches = len(self.folders) * (len(context.depths) - 1)
        return num_runs * self.runner.num_tokens + num_searches * self._depth_cost

    def run(self) -> TaskRuns:
        """Run all systems: base, the routed model and its baselines at each depth, and paths.

        Baselines run at the executions of the first seed's routers. The only baseline of another
        seed is its permuted routes, at the executions of that seed's routers.
        """
        systems = [self._run_plan(BASE_MODEL)]
        seeds = []
        for plan in self._list_routed_plans():
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
            shape=self._read_shape(),
            seeds=seeds,
        )

    def _list_routed_plans(self) -> list[SystemPlan]:
        """Return the first seed's routed model at each depth that it can reach."""
        if not self.folders:
            return []
        plans = []
        for depth in self.context.depths:
            plan = self._find_plan(self.folders[0], depth, f"Not evaluated at {depth}")
            if plan is not None:
                plans.append(plan)
        return plans

    def _run_other_seeds(
        self, first_plan: SystemPlan, routed: SystemRun, permuted: Sequence[SystemRun]
    ) -> tuple[list[SystemRun], list[SystemRun]]:
        """Run the routers of the other seeds, and their permuted routes, at one depth.

        Args:
            first_plan: The first seed's routed model.
            routed: The run of the first seed's routed model.
            permuted: The run of the first seed's permuted routes; empty if permuted routes aren't
                among the baselines.

        Returns:
            The runs of all seeds' routed models, and the runs of all seeds' permuted routes.
        """
        all_routed = [routed]
        all_permuted = list(permuted)
        at_depth = first_plan.at_depth
        for folder in self.folders[1:]:
            plan = self._find_plan(folder, first_plan.depth, f"{folder} isn't evaluated{at_depth}")
            if plan is None:
                continue
            label = f" of {folder}{at_depth}"
            routed_of_seed = self._run_plan(plan, label)
            all_routed.append(routed_of_seed)
            if permuted:
                all_permuted.append(self._run_baseline(PERMUTED, label, routed_of_seed))
        return all_routed, all_permuted

    def _read_shape(self) -> ModelShape | str:
        """Return the model's shape, or the reason why its cost can't be derived."""
        routed = self.context.lm.routed
        try:
            return ModelShape.from_model(routed.model, routed.injection.lora.all_weights())
        except ArchitectureError as error:
            return str(error)

    def _find_plan(self, folder: Path, depth: str, obstacle: str) -> SystemPlan | None:
        """Return the routed model at a depth; None, with a note, if it can't reach the depth.

        Args:
            folder: The folder of the routers.
            depth: The name of the depth; empty for the depth of training.
            obstacle: The beginning of the note.
        """
        routers = self.context.routers[folder]
        if not depth:
            return SystemPlan(ROUTED, BaselineRun(RouterPolicy(routers)))
        routed = self.context.lm.routed
        executions = (1 - self.context.depths[depth]) * routed.num_layers
        prompts = self.context.get_material(self.source.name).prompts
        key = f"{self.task.name}: depth for {depth} of {folder}"

        def find_bias() -> float:
            return find_depth_bias(routed, prompts, executions, routers=routers).depth_bias

        with self.context.progress.during(key, self._depth_cost):
            try:
                bias = self.context.chunks.get_or_make(
                    key, float, functools.partial(from_first, find_bias)
                )
            except ConfigError as error:
                self.notes.append(f"{obstacle}: {error}")
                return None
        return SystemPlan(ROUTED, BaselineRun(RouterPolicy(routers, depth_bias=bias)), depth)

    def _run_plan(self, plan: SystemPlan, label: str = "") -> SystemRun:
        """Run a system; the label distinguishes it from other systems with the same name."""
        runner = self.runner
        return self.context.run_once(
            f"{self.harness_task.task.name}: {plan.name}{label}",
            lambda keep: runner.run(plan.name, [plan.run], plan.depth, keep),
            runner.num_tokens,
        )

    def _run_baselines(self, label: str, routed: SystemRun) -> list[SystemRun]:
        """Run the baselines that can match the routed model's executions.

        A note says why a baseline can't. The arguments are as for `_run_baseline`.
        """
        systems = []
        for name in self.context.baselines:
            baseline = self.context.get_baseline(name, self.source.name)
            obstacle = baseline.find_obstacle(routed.executions)
            if obstacle:
                self.notes.append(f"{name.capitalize()} isn't compared: {obstacle}.")
            else:
                systems.append(self._run_baseline(name, label, routed))
        return systems

    def _run_baseline(self, name: str, label: str, routed: SystemRun) -> SystemRun:
        """Run a baseline at the routed model's executions, with all of its draws.

        Args:
            name: The name of the baseline.
            label: Distinguishes this run from those at other depths and of other seeds.
            routed: The run of the routed model.
        """
        num_draws = self.context.count_draws(name)

        def run(keep: KeepBlocks) -> SystemRun:
            routes = torch.tensor(routed.routes[0])  # [Q, L]
            generator = torch.Generator().manual_seed(self.config.seed)
            baseline = self.context.get_baseline(name, self.source.name)
            draws = [baseline.make_run(routes, generator) for _ in range(num_draws)]
            return self.runner.run(name, draws, routed.setting, keep)

        cost = self.runner.num_tokens * num_draws
        return self.context.run_once(f"{self.task.name}: {name}{label}", run, cost)
