"""The evaluation as a stage: tasks in, `eval/TASK.json` and samples out.

Questions are asked in blocks. What a system did on a block is kept as soon as it is done, in
`partial/`, and not done again when the same evaluation is started anew.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError
from drllm.evaluation.baselines.base import BASELINES, FittedBaselines, Material
from drllm.evaluation.baselines.own_routes import share_unchanged
from drllm.evaluation.baselines.registry import depths, named
from drllm.evaluation.blocks import Answered, Block, Keep
from drllm.evaluation.choosing import Choosing
from drllm.evaluation.flops import PromptCost
from drllm.evaluation.latency import write_latency
from drllm.evaluation.lm_eval.folders import task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.questions import check_output, check_tasks, chosen_on, sources_of, worked_task
from drllm.evaluation.systems import Run, SystemRun, TaskRun
from drllm.evaluation.tables import TaskRuns, correct, is_above_chance, seeds_of
from drllm.listener import Listener, OnProgress
from drllm.models.base.load import BaseModel, as_base_model
from drllm.models.routers.checkpoint import (
    WEIGHTS_FILE,
    check_routers,
    load_routers,
    read_config,
    save_routers,
)
from drllm.models.routers.depth_control import find_depth_bias
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import Policy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.packing import Question
from drllm.paths import Path as LayerPath
from drllm.records import (
    Chunks,
    new_manifest,
    only_writer,
    read_search,
    read_supervision,
    refuse_other_run,
    sha256,
    write_json,
    write_records,
)
from drllm.records.results import (
    PERMUTED,
    ROUTED,
    SAMPLES_FILE,
    Evaluation,
    read_evaluation,
    results_in,
)
from drllm.tasks.base import OPTIONS_REWARD, Task
from drllm.tasks.registry import get_task, get_tasks

Routers: TypeAlias = "Path | str | RouterStack"

TASKS_FOLDER, PARTIAL_FOLDER, ROUTERS_FOLDER = "tasks", "partial", "routers"
CACHE = "cache"
NUM_CALIBRATION = 64
"""Questions that depths are found and baselines fitted on, unless another number is given."""
NUM_RANDOM_DRAWS = 10
"""Draws of the baselines that are drawn, unless another number is given."""


def evaluate(
    model: Any,
    tasks: Sequence[Task | str] | None = None,
    config: EvaluateConfig | None = None,
    output: Path | str | None = None,
    *,
    routers: Routers | Sequence[Routers] = (),
    tokenizer: Any = None,
    listener: Listener | None = None,
) -> tuple[Evaluation, ...]:
    """Evaluate base, routed model and baselines on tasks.

    Args:
        model: A `RoutedModel`, whose own routers are evaluated; or the base model (`BaseModel`, or
            one of transformers with `tokenizer`), with `routers`.
        tasks: Tasks or their names; None for those of the config.
        config: Splits, samples, baselines, depths.
        output: Folder for `TASK.json` of each task, `samples.jsonl`, `latency.json` and the task
            folder; an evaluation that was interrupted there is resumed. None writes nothing that
            stays.
        routers: Folders of routers, or routers. Further ones are of the same training with other
            seeds: they run at every depth too, with their own routes permuted if that baseline is
            asked for, and say how far seeds lie apart. Baselines are compared with the first.
        tokenizer: Of a model of transformers.
        listener: Hears how far it is.

    Returns:
        The results in the order of the tasks. They are written when all tasks are done, since
        p-values are corrected for how many there are.

    Raises:
        ConfigError: A baseline that lacks what it is fitted on, a depth that makes no sense, no
            routers, or an `output` that holds another evaluation.
        TaskError: An unknown task, or one without questions in the split.
        CheckpointError: Routers of another model.
        RecordError: An `output` with other files that would be taken for results.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    config, listener = config or EvaluateConfig(), listener or Listener()
    wanted = get_tasks(config.tasks) if tasks is None else tasks
    found = [get_task(task) if isinstance(task, str) else task for task in wanted]
    check_tasks(found, config)
    given = [routers] if isinstance(routers, (str, Path, RouterStack)) else list(routers)
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing if output is None else output)
        check_output(folder)
        if not isinstance(model, RoutedModel):
            base = as_base_model(model, tokenizer)
            return _evaluate(base, found, config, folder, given, listener)
        if given or model.routers is None:
            what = "other routers are given" if given else "it has none"
            raise ConfigError(
                f"a RoutedModel is evaluated with its own routers, but {what}; give its base model "
                f"and the routers"
            )
        with model.detached() as plain:
            base = as_base_model(plain, tokenizer or model.tokenizer)
            return _evaluate(base, found, config, folder, [model.routers], listener)


def _evaluate(
    base: BaseModel,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    output: Path,
    routers: Sequence[Routers],
    listener: Listener,
) -> tuple[Evaluation, ...]:
    if not routers:
        raise ConfigError("no routers are given; name their folder, or evaluate a RoutedModel")
    folders = [
        _saved(each, output, number) if isinstance(each, RouterStack) else Path(each)
        for number, each in enumerate(routers)
    ]
    _tell_of_rewards(folders[0], listener)
    weights = [folder / WEIGHTS_FILE for folder in folders]
    header = {
        **new_manifest("evaluation", model=base.identity, config=config.to_dict(), inputs=weights),
        "runtime": base.runtime,
        "routers": str(folders[0]),
        "routers_sha256": sha256(weights[0]),
        "other_seeds": {str(file.parent): sha256(file) for file in weights[1:]},
    }
    _refuse_replacing(output, header)
    lm = RoutedLM(base, routers=str(folders[0]), batch_size=config.batch_size)
    with ExitStack() as attached:
        attached.callback(lm.routed.detach)
        stage = _Stage(lm, folders, tasks, config, output)
        with (
            only_writer(output, "evaluation", "--output-dir"),
            listener.progress("evaluating", "systems") as stage.on_progress,
        ):
            stage.chunks.open()
            done = [stage.of_task(task) for task in tasks]
            attached.close()
            stage.tell("measured time")
            write_latency(base, folders[0], stage.prompts, config, output)
            stage.tell("measured time", 1.0)
            results = _write(done, header, output)
            stage.chunks.remove()
    return results


def _write(
    done: Sequence[TaskRuns], header: Mapping[str, Any], output: Path
) -> tuple[Evaluation, ...]:
    tables = correct([each.table() for each in done])
    results = tuple(
        each.evaluation(table, header) for each, table in zip(done, tables, strict=True)
    )
    for result in results:
        write_json(output / f"{result.task}.json", result)
    manifest = new_manifest("samples", model=header["model"], config=header["config"])
    samples = [sample for each in done for sample in each.samples()]
    write_records(output / SAMPLES_FILE, samples, manifest)
    for cache in (output / TASKS_FOLDER).glob(f"*/{CACHE}"):
        shutil.rmtree(cache)  # what the harness made of the rows, to read them
    return results


def _refuse_replacing(output: Path, header: Mapping[str, Any]) -> None:
    """Refuse to replace the results of another evaluation."""
    for path in results_in(output):
        old = read_evaluation(path)
        refuse_other_run(
            f"the evaluation in {path}",
            _identity({name: getattr(old, name) for name in header}),
            _identity(header),
            "choose another --output-dir, or delete the old results",
        )


def _identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two evaluations the same one; how often time is measured doesn't."""
    config = {**header["config"], "latency_rounds": None}
    hashes = {"routers_sha256": header["routers_sha256"], "other_seeds": header["other_seeds"]}
    return {"config": config, **hashes, "model": header["model"], "runtime": header["runtime"]}


def _saved(routers: RouterStack, output: Path, number: int) -> Path:
    """Save routers from memory with the results, and return where."""
    folder = output / ROUTERS_FOLDER / str(number)
    save_routers(routers, folder)
    return folder


def _tell_of_rewards(folder: Path, listener: Listener) -> None:
    """Say so where the routers were trained on prompts of another form than those asked here."""
    trained = read_config(folder).training.get("rewards")
    if isinstance(trained, list) and trained and OPTIONS_REWARD not in trained:
        listener.note(
            f"drllm: the routers were trained on prompts for {', '.join(map(str, trained))}, the "
            f"evaluation asks by {OPTIONS_REWARD}; to have both alike, search with --reward "
            f"{OPTIONS_REWARD}"
        )


class _Stage:
    """What all tasks of one evaluation share.

    Attributes:
        prompts: Tokens of the prompts asked so far.
        chunks: What is kept of finished systems and blocks.
    """

    def __init__(
        self,
        lm: RoutedLM,
        routers: Sequence[Path],
        tasks: Sequence[Task],
        config: EvaluateConfig,
        output: Path,
    ) -> None:
        self.lm = lm
        self.other_seeds = {folder: _load(folder, lm) for folder in routers[1:]}
        self.config = config
        self.output = output
        self.on_progress: OnProgress
        self.prompts: list[list[int]] = []
        self.sources = sources_of(tasks, config)
        self.fitted_by_source: dict[str, FittedBaselines] = {}
        self.baselines = named(config.baselines)
        self.shares = {in_words(share): share for share in depths(config.curve)}
        self.choosing = None
        if config.epsilon is not None:
            worked = worked_task(config, tasks)
            self.choosing = Choosing(lm, config, worked, self.asked, self.once)
        self.search = [] if config.search is None else read_search(Path(config.search))
        self.targets = (
            [] if config.supervision is None else read_supervision(Path(config.supervision))
        )
        files = [folder / WEIGHTS_FILE for folder in routers]
        files += [Path(name) for name in (config.search, config.supervision) if name is not None]
        self.chunks = Chunks(
            output / PARTIAL_FOLDER,
            {
                "config": {**config.to_dict(), "latency_rounds": None},  # measured anew each time
                "tasks": [task.name for task in tasks],
                "files": {f"{path}_sha256": sha256(path) for path in files},
                "model": lm.base.identity,
                "runtime": lm.base.runtime,
            },
            stage="evaluation",
        )
        at_depths = [name for name in self.baselines if not BASELINES.get(name).has_own_depth]
        points = 2 + len(self.baselines) + (1 + len(at_depths)) * len(self.shares)
        of_a_seed = 1 + (PERMUTED in self.baselines)
        points += len(self.other_seeds) * of_a_seed * (1 + len(self.shares))
        for_choice = 0 if self.choosing is None else self.choosing.num_systems(len(self.shares))
        self.num_systems = (points + for_choice) * len(tasks) + 1  # time, at last
        self.num_done = 0

    def asked(self, task: Task, split: str, limit: int | None, use: str = "") -> AskedTask:
        """Return the questions of a task, by way of a task folder; one for each use of a split."""
        folder = self.output / TASKS_FOLDER / f"{use}{split}"
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
        questions = f"{task.name}, {limit or 'all'} of {split}"
        self.chunks.expect(questions, {"questions_sha256": asked.digest()})
        return asked

    def once(self, name: str, run: Run) -> SystemRun:
        """Run a system, or return what an earlier start of this evaluation has kept of it.

        Decisions are part of a block's key: were they others after an interruption (what is trained
        is trained again then), the block would be asked again.
        """
        parts = self.chunks.within(name)

        def keep(block: Block, decided: Any, ask: Callable[[], Answered]) -> Answered:
            key = f"block {block.number} {json.dumps(decided)}"
            answered = parts.once(key, Answered, ask)
            self.tell(name, (block.number + 1) / block.num_blocks)
            return answered

        self.tell(name)
        system = self.chunks.once(name, SystemRun, lambda: run(keep=keep))
        self.num_done += 1
        self.tell(name)
        return system

    def values(
        self,
        name: str,
        candidates: Sequence[LayerPath],
        measure: Callable[[Sequence[LayerPath]], list[float]],
    ) -> list[float]:
        """Return what a measure gives for candidates, once for all starts of the evaluation."""
        key = f"{name} {json.dumps(candidates)}"
        return self.chunks.once(key, list[float], lambda: measure(candidates))

    def tell(self, name: str, share: float = 0.0) -> None:
        """Say what is being run, and how much of it is done."""
        self.on_progress(self.num_done + share, self.num_systems, name)

    def of_task(self, task: Task) -> TaskRuns:
        """Run every system on a task, at every depth."""
        config = self.config
        asked = self.asked(task, config.split_of(task.name), config.limit_of(task.name))
        run = TaskRun(self.lm, asked, config.num_texts)
        base = self.once(f"{task.name}: base", run.base)
        notes = list(asked.written.notes)
        source = self.sources[task.name]
        if source.name not in self.fitted_by_source:
            self.fitted_by_source[source.name] = FittedBaselines(
                source.name, lambda: self._material(source), self.lm.routed, self.values
            )
        fitted = self.fitted_by_source[source.name]
        if source.name != task.name:
            notes.append(
                f"Depths and baselines are fitted and chosen on questions of {source.name}, not "
                f"of {task.name}"
            )
        biases = dict(self._biases(fitted, notes))
        chance = asked.written.chance or 0.0
        systems, seeds = [base], []
        for setting, bias in {"": 0.0, **biases}.items():
            policy = self._policy(bias)
            at_depth = self._at_depth(task, run, fitted, setting, policy, notes)
            if self.other_seeds:
                routed, permuted = self._seeds(task, run, fitted, at_depth, notes)
                above_chance = is_above_chance(base, chance, config.seed)
                seeds.append(
                    seeds_of(base, routed, permuted, config.seed, above_chance=above_chance)
                )
            systems += at_depth
        choice = None
        if self.choosing is not None:
            policies = {setting: self._policy(bias) for setting, bias in biases.items()}
            choice = self.choosing.of_task(source, systems, policies, chance)
        prompts = [self.lm.tok_encode(prompt) for prompt in asked.prompts()]
        self.prompts += prompts
        return TaskRuns(
            task=task,
            asked=asked,
            systems=systems,
            notes=notes,
            choice=choice,
            config=config,
            num_layers=self.lm.routed.num_layers,
            cost=PromptCost.of(self.lm.routed.model, [len(ids) for ids in prompts]),
            seeds=seeds,
        )

    def _policy(self, bias: float) -> Policy:
        routers = self.lm.routed.routers
        assert routers is not None
        return RouterPolicy(routers, depth_bias=bias)

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

    def _biases(self, fitted: FittedBaselines, notes: list[str]) -> Iterator[tuple[str, float]]:
        """Yield each depth of the curve in words, and the bias that gives it."""
        for setting, share in self.shares.items():
            bias = self._bias(fitted, share, f"Not evaluated at {setting}", notes)
            if bias is not None:
                yield setting, bias

    def _bias(
        self,
        fitted: FittedBaselines,
        share: float,
        otherwise: str,
        notes: list[str],
        routers: RouterStack | None = None,
    ) -> float | None:
        """Return the bias under which routers save a share of the executions.

        Where none does, which is the routers' own, this is noted, and there is none to return.
        """
        wanted = (1 - share) * self.lm.routed.num_layers
        prompts = fitted.material.prompts
        try:
            return find_depth_bias(self.lm.routed, prompts, wanted, routers=routers).depth_bias
        except ConfigError as error:
            notes.append(f"{otherwise}: {error}")
            return None

    def _at_depth(
        self,
        task: Task,
        run: TaskRun,
        fitted: FittedBaselines,
        setting: str,
        policy: Policy,
        notes: list[str],
    ) -> list[SystemRun]:
        """Run the routed model at one depth, and the baselines at its executions."""
        at = f" at {setting}" if setting else ""
        routed = self.once(
            f"{task.name}: routed{at}", partial(run.by_policy, ROUTED, policy, setting)
        )
        systems = [routed]
        for name in self.baselines:
            if setting and BASELINES.get(name).has_own_depth:
                continue  # it would be the same system again
            if obstacle := fitted.obstacle(name, routed.executions):
                notes.append(f"{name.capitalize()} isn't compared: {obstacle}.")
                continue
            baseline = partial(self._baseline, run, fitted, name, routed)
            systems.append(self.once(f"{task.name}: {name}{at}", baseline))
        return systems

    def _baseline(
        self, run: TaskRun, fitted: FittedBaselines, name: str, routed: SystemRun, *, keep: Keep
    ) -> SystemRun:
        """Run a baseline at the executions of a routed model."""
        routes = torch.tensor(routed.routes[0])
        generator = torch.Generator().manual_seed(self.config.seed)
        draws = self.config.num_random_draws or NUM_RANDOM_DRAWS
        num = draws if BASELINES.get(name).is_drawn else 1
        drawn = [fitted.at(name, routes, generator) for _ in range(num)]
        system = run.baseline(name, drawn, routed.setting, keep=keep)
        if name == PERMUTED:
            plans = [draw.plan for draw in drawn if draw.plan is not None]
            system.unchanged = [share_unchanged(routes, plan) for plan in plans]
        return system

    def _seeds(
        self,
        task: Task,
        run: TaskRun,
        fitted: FittedBaselines,
        first: Sequence[SystemRun],
        notes: list[str],
    ) -> tuple[list[SystemRun], list[SystemRun]]:
        """Run the other seeds' routers at one depth.

        Args:
            task: The task.
            run: Its questions.
            fitted: For the prompts that a depth is looked for on.
            first: The first seed's routed model, and its baselines at this depth.
            notes: Receives which seeds can't be had at this depth.

        Returns:
            The routed models of all seeds, and their own routes permuted if that was asked for.
        """
        setting = first[0].setting
        routed = [first[0]]
        permuted = [each for each in first if each.name == PERMUTED]
        share = self.shares.get(setting)  # none at the depth of training
        for folder, routers in self.other_seeds.items():
            bias: float | None = 0.0
            if share is not None:
                otherwise = f"{folder} isn't evaluated at {setting}"
                bias = self._bias(fitted, share, otherwise, notes, routers)
            if bias is None:
                continue
            policy = RouterPolicy(routers, depth_bias=bias)
            of_seed = f"of {folder}" + (f" at {setting}" if setting else "")
            own = self.once(
                f"{task.name}: routed {of_seed}", partial(run.by_policy, ROUTED, policy, setting)
            )
            routed.append(own)
            if permuted:
                name = f"{task.name}: {PERMUTED} {of_seed}"
                permuted.append(
                    self.once(name, partial(self._baseline, run, fitted, PERMUTED, own))
                )
        return routed, permuted


def in_words(share: float) -> str:
    """Return a depth of the curve as tables name it."""
    return f"{100 * share:g} % saved"


def _load(folder: Path, lm: RoutedLM) -> RouterStack:
    """Read routers for the model."""
    routers = load_routers(folder)
    check_routers(lm.routed.model, routers)
    return routers.to(lm.device)
