"""The evaluation as a stage: tasks in, `eval/TASK.json` and samples out.

Owns which systems run at which depths, and on which questions depths are looked for. Leaves
running a system to `systems`, who the baselines are to `lineup`, keeping what is done to `partial`,
what is written of a task to `results`, the certified choice to `choosing`, and measured time to
`measured_cost`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError
from drllm.evaluation.baselines.lineup import Lineup, Material
from drllm.evaluation.baselines.random_routes import share_unchanged
from drllm.evaluation.baselines.registry import BASELINES, DRAWN, PERMUTED, check, depths, named
from drllm.evaluation.blocks import Keep
from drllm.evaluation.choosing import Choosing
from drllm.evaluation.lm_eval.folders import task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.measured_cost import check_name, write_measured
from drllm.evaluation.partial import Partial, Run
from drllm.evaluation.prompt_cost import PromptCost
from drllm.evaluation.results import Evaluated, correct_p_values, point_of
from drllm.evaluation.seeds import seeds_row
from drllm.evaluation.sources import chosen_on, sources_of
from drllm.evaluation.systems import System, TaskRun
from drllm.evaluation.texts import worked_task
from drllm.models.base.load import BaseModel
from drllm.models.routers.checkpoint import WEIGHTS_FILE, check_routers, load_routers
from drllm.models.routers.depth_control import find_depth_bias
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import RouterPolicy
from drllm.models.scoring.packing import Question
from drllm.records import (
    new_manifest,
    read_search,
    read_supervision,
    sha256,
    write_atomically,
    write_records,
)
from drllm.tasks.base import Task

SAMPLES_FILE = "samples.jsonl"
TASKS_FOLDER = "tasks"
CACHE = "cache"
NUM_CALIBRATION = 64
"""Questions that depths are found and baselines fitted on, unless another number is given."""
NUM_RANDOM_DRAWS = 10
"""Draws of the baselines in `DRAWN`, unless another number is given."""

OnProgress: TypeAlias = Callable[[float, int, str], None]
"""Called with systems done (the blocks of one under way are parts of it), systems in all, and what
is being run."""


def run_evaluation(
    base: BaseModel,
    routers_dir: Path,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    output_dir: Path,
    on_progress: OnProgress | None = None,
    *,
    other_seeds: Sequence[Path] = (),
) -> list[Path]:
    """Evaluate base, routed model and baselines on each task, and write the results.

    Questions are asked in blocks. What a system did on a block is kept as soon as it is done, in
    `partial/`, and not done again when the same evaluation is started anew; the folder goes when
    all is written.

    Args:
        base: The frozen model.
        routers_dir: A folder of routers that belong to it; baselines are compared with these.
        tasks: What is evaluated.
        config: Split, sample, baselines, depths.
        output_dir: Receives `TASK.json` for each task, `samples.jsonl`, `latency.json`, and the
            task folder.
        on_progress: See `OnProgress`.
        other_seeds: Folders of routers that were trained alike with other seeds. They run at every
            depth too, with their own routes permuted if that baseline is asked for, and say how
            far seeds lie apart.

    Returns:
        The paths of the `TASK.json` files, in the order of the tasks. They are written when all
        tasks are done, since p-values are corrected for how many there are.

    Raises:
        ConfigError: An baseline that lacks what it is fitted on, a depth that makes no sense, or a
            task that is called after a file of ours.
        TaskError: A task without questions in the split.
        CheckpointError: Routers of another model.
        RecordError: `partial/` of another evaluation, or a broken file in it.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    lm = RoutedLM(base, routers=str(routers_dir), batch_size=config.batch_size)
    try:
        evaluation = _Evaluation(
            lm, [routers_dir, *other_seeds], tasks, config, Path(output_dir), on_progress
        )
        done = [evaluation.of_task(task) for task in tasks]
    finally:
        lm.routed.detach()
    evaluation.tell("measured time")
    write_measured(base, routers_dir, done, lm.tok_encode, config, Path(output_dir))
    evaluation.tell("measured time", 1.0)
    correct_p_values([each.rows for each in done])
    outputs, samples = [], []
    for each in done:
        path = Path(output_dir) / f"{each.task.name}.json"
        result = each.summary(base, [routers_dir, *other_seeds], num_tasks=len(done))
        write_atomically(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        outputs.append(path)
        samples += each.samples()
    manifest = new_manifest("samples", model=base.identity, config=config.to_dict())
    write_records(Path(output_dir) / SAMPLES_FILE, samples, manifest)
    evaluation.partial.remove()
    for cache in (Path(output_dir) / TASKS_FOLDER).glob(f"*/{CACHE}"):
        shutil.rmtree(cache)  # what the harness made of the rows, to read them
    return outputs


class _Evaluation:
    """What all tasks of one evaluation share."""

    def __init__(
        self,
        lm: RoutedLM,
        routers: Sequence[Path],
        tasks: Sequence[Task],
        config: EvaluateConfig,
        output_dir: Path,
        on_progress: OnProgress | None,
    ) -> None:
        self.lm = lm
        self.other_seeds = {folder: _load(folder, lm) for folder in routers[1:]}
        self.config = config
        self.output_dir = output_dir
        self.on_progress = on_progress
        self.sources = sources_of(tasks, config)
        self.lineups: dict[str, Lineup] = {}
        self.baselines = named(config.baselines)
        self.shares = {in_words(share): share for share in depths(config.curve)}
        check(config)
        self.choosing = None
        if config.epsilon is not None:
            worked = worked_task(config, tasks)
            self.choosing = Choosing(lm, config, worked, self.asked, self.once)
        check_name(tasks)
        self.search = [] if config.search is None else read_search(Path(config.search))
        self.targets = (
            [] if config.supervision is None else read_supervision(Path(config.supervision))
        )
        files = [folder / WEIGHTS_FILE for folder in routers]
        files += [Path(name) for name in (config.search, config.supervision) if name is not None]
        self.partial = Partial(
            output_dir / "partial",
            {
                "config": {**config.to_dict(), "latency_rounds": None},  # measured anew each time
                "tasks": [task.name for task in tasks],
                "model": lm.base.identity,
                "runtime": lm.base.runtime,
                "inputs": {str(path): sha256(path) for path in files},
            },
        )
        at_depths = [name for name in self.baselines if not BASELINES[name].has_own_depth]
        points = 2 + len(self.baselines) + (1 + len(at_depths)) * len(self.shares)
        of_a_seed = 1 + (PERMUTED in self.baselines)
        points += len(self.other_seeds) * of_a_seed * (1 + len(self.shares))
        for_choice = 0 if self.choosing is None else self.choosing.num_systems(len(self.shares))
        self.num_systems = (points + for_choice) * len(tasks) + 1  # time, at last
        self.num_done = 0

    def asked(self, task: Task, split: str, limit: int | None, use: str = "") -> AskedTask:
        """Return the questions of a task, by way of a task folder; one for each use of a split."""
        folder = self.output_dir / TASKS_FOLDER / f"{use}{split}"
        [written], files = task_folder(
            [task],
            split=split,
            limit=limit,
            seed=self.config.seed,
            data_dir=None if self.config.data_dir is None else Path(self.config.data_dir),
            num_fewshot=self.config.num_fewshot,
            max_length=self.lm.max_length,
        )
        files.write(folder)
        asked = AskedTask(written, folder, self.lm, chat=self.config.chat)
        self.partial.check_questions(f"{task.name}, {limit or 'all'} of {split}", asked.digest())
        return asked

    def once(self, name: str, run: Run) -> System:
        """Run a system, or what an earlier start of this evaluation has left of it."""
        self.tell(name)
        system = self.partial.once(name, run, lambda share: self.tell(name, share))
        self.num_done += 1
        self.tell(name)
        return system

    def tell(self, name: str, share: float = 0.0) -> None:
        """Say what is being run, and how much of it is done."""
        if self.on_progress is not None:
            self.on_progress(self.num_done + share, self.num_systems, name)

    def of_task(self, task: Task) -> Evaluated:
        """Run every system on a task, at every depth."""
        config = self.config
        asked = self.asked(task, config.split_of(task.name), config.limit_of(task.name))
        run = TaskRun(self.lm, asked, config.num_texts)
        base = self.once(f"{task.name}: base", run.base)
        notes = list(asked.written.notes)
        source = self.sources[task.name]
        if source.name not in self.lineups:
            self.lineups[source.name] = Lineup(
                source.name, lambda: self._material(source), self.lm.routed, self.partial.values
            )
        lineup = self.lineups[source.name]
        if source.name != task.name:
            notes.append(
                f"Depths and baselines are fitted and chosen on questions of {source.name}, not "
                f"of {task.name}"
            )
        biases = dict(self._biases(lineup, notes))
        systems, seeds = [base], []
        for setting, bias in {"": 0.0, **biases}.items():
            at_depth = self._at_depth(task, run, lineup, setting, bias, notes)
            if self.other_seeds:
                seeds.append(self._seeds(task, run, lineup, [base, *at_depth], notes))
            systems += at_depth
        choice = None
        if self.choosing is not None:
            choice = self.choosing.of_task(source, systems, biases, asked.written.chance or 0.0)
        num_tokens = [len(self.lm.tok_encode(prompt)) for prompt in asked.prompts()]
        cost = PromptCost.of(self.lm.routed.model, num_tokens)
        num_layers = self.lm.routed.num_layers
        return Evaluated(task, asked, systems, notes, choice, config, num_layers, cost, seeds)

    def _material(self, source: Task) -> Material:
        """Return what baselines are fitted on, and depths are looked for on."""
        num = self.config.num_calibration or NUM_CALIBRATION
        asked = self.asked(source, chosen_on(source, self.config), num)
        questions: list[Question] = []
        golds: list[int] = []
        if asked.has_options:
            for place, requests in enumerate(asked.requests()):
                same = all(request.context == requests[0].context for request in requests)
                if same:  # else the options stand in the context, and there is no one prompt
                    options = [request.continuation for request in requests]
                    questions.append(Question(requests[0].context, options))
                    golds.append(asked.gold(place))
        return Material(
            self.lm.routed,
            [self.lm.tok_encode(prompt) for prompt in asked.prompts()],
            questions,
            golds,
            self.search,
            self.targets,
            self.config.seed,
        )

    def _biases(self, lineup: Lineup, notes: list[str]) -> Iterator[tuple[str, float]]:
        """Yield each depth of the curve in words, and the bias that gives it."""
        for setting, share in self.shares.items():
            bias = self._bias(lineup, share, f"Not evaluated at {setting}", notes)
            if bias is not None:
                yield setting, bias

    def _bias(
        self,
        lineup: Lineup,
        share: float,
        otherwise: str,
        notes: list[str],
        routers: RouterStack | None = None,
    ) -> float | None:
        """Return the bias under which routers save a share of the executions.

        Where none does, which is the routers' own, this is noted, and there is none to return.
        """
        wanted = (1 - share) * self.lm.routed.num_layers
        prompts = lineup.material.prompts
        try:
            return find_depth_bias(self.lm.routed, prompts, wanted, routers=routers).depth_bias
        except ConfigError as error:
            notes.append(f"{otherwise}: {error}")
            return None

    def _at_depth(
        self,
        task: Task,
        run: TaskRun,
        lineup: Lineup,
        setting: str,
        bias: float,
        notes: list[str],
    ) -> list[System]:
        """Run the routed model at one depth, and the baselines at its executions."""
        at = f" at {setting}" if setting else ""
        routers = self.lm.routed.routers
        assert routers is not None
        policy = RouterPolicy(routers, depth_bias=bias)
        routed = self.once(
            f"{task.name}: routed{at}", partial(run.by_policy, "routed", policy, setting)
        )
        systems = [routed]
        for name in self.baselines:
            if setting and BASELINES[name].has_own_depth:
                continue  # it would be the same system again
            if obstacle := lineup.obstacle(name, routed.executions):
                notes.append(f"{name.capitalize()} isn't compared: {obstacle}.")
                continue
            baseline = partial(self._baseline, run, lineup, name, routed)
            systems.append(self.once(f"{task.name}: {name}{at}", baseline))
        return systems

    def _baseline(
        self, run: TaskRun, lineup: Lineup, name: str, routed: System, *, keep: Keep
    ) -> System:
        """Run an baseline at the executions of a routed model."""
        routes = torch.tensor(routed.routes[0])
        generator = torch.Generator().manual_seed(self.config.seed)
        draws = self.config.num_random_draws or NUM_RANDOM_DRAWS
        num = draws if name in DRAWN else 1
        drawn = [lineup.at(name, routes, generator) for _ in range(num)]
        system = run.baseline(name, drawn, routed.setting, keep=keep)
        if name == PERMUTED:
            plans = [draw.plan for draw in drawn if draw.plan is not None]
            system.unchanged = [share_unchanged(routes, plan) for plan in plans]
        return system

    def _seeds(
        self,
        task: Task,
        run: TaskRun,
        lineup: Lineup,
        first: Sequence[System],
        notes: list[str],
    ) -> dict[str, Any]:
        """Run the other seeds' routers at one depth; return what all seeds' routers did there.

        Args:
            task: The task.
            run: Its questions.
            lineup: For the prompts that a depth is looked for on.
            first: Base, the first seed's routed model, and its baselines at this depth.
            notes: Receives which seeds can't be had at this depth.
        """
        base, routed, *baselines = first
        setting = routed.setting
        routed_points = [point_of(routed)]
        permuted_points = [point_of(each) for each in baselines if each.name == PERMUTED]
        share = self.shares.get(setting)  # none at the depth of training
        for folder, routers in self.other_seeds.items():
            bias: float | None = 0.0
            if share is not None:
                otherwise = f"{folder} isn't evaluated at {setting}"
                bias = self._bias(lineup, share, otherwise, notes, routers)
            if bias is None:
                continue
            policy = RouterPolicy(routers, depth_bias=bias)
            of_seed = f"of {folder}" + (f" at {setting}" if setting else "")
            own = self.once(
                f"{task.name}: routed {of_seed}",
                partial(run.by_policy, "routed", policy, setting),
            )
            routed_points.append(point_of(own))
            if not permuted_points:
                continue

            control = self.once(
                f"{task.name}: {PERMUTED} {of_seed}",
                partial(self._baseline, run, lineup, PERMUTED, own),
            )
            permuted_points.append(point_of(control))
        return seeds_row(routed_points, point_of(base), permuted_points, self.config.seed)


def in_words(share: float) -> str:
    """Return a depth of the curve as tables name it."""
    return f"{100 * share:g} % saved"


def _load(folder: Path, lm: RoutedLM) -> RouterStack:
    """Read routers for the model."""
    routers = load_routers(folder)
    check_routers(lm.routed.model, routers)
    return routers.to(lm.device)
