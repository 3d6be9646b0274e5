"""What an evaluation runs: every system on every task, at every depth; and the certified choice."""

import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec.structs import replace

from drllm.config import TIMING, EvaluateConfig
from drllm.errors import ArchitectureError, ConfigError
from drllm.evaluation.baselines.base import BASELINES, BaselineRun, Material, Measure, depths, named
from drllm.evaluation.flops import ModelShape
from drllm.evaluation.lm_eval.folders import task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import RenderedTask, draw_stock_task
from drllm.evaluation.questions import chosen_on, is_fitted, sources_of, worked_task
from drllm.evaluation.systems import Answered, Keep, SystemRun, TaskRun
from drllm.evaluation.tables import TaskRuns
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
from drllm.statistics.non_inferiority import MAX_LOSS_INCREASE, Choice, Limits, choose, confirm
from drllm.statistics.paired import Outcomes
from drllm.tasks.base import Task
from drllm.tasks.harness import LmEvalTask
from drllm.tasks.registry import TASKS

TASKS_FOLDER, PARTIAL_FOLDER = "tasks", "partial"
WORKED = "worked-"  # beginning of the names of task folders with worked answers
NUM_CALIBRATION = 64
"""Questions that depths are found and baselines fitted on, unless another number is given."""
PROBES = 12  # times that all of these are routed, about, until the depth is found
NUM_RANDOM_DRAWS = 10  # draws of the baselines that are drawn, unless another number is given


class Shared:
    """What all tasks of one evaluation share; without routers there is no routed model.

    `tuned_on` names tasks that some of the paths were chosen for, on `select`. `prompts` are the
    tokens of those asked so far, and `chunks` keeps finished systems and blocks.
    """

    on_progress: OnProgress

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
        self.lm, self.routers, self.config, self.output = lm, routers, config, output
        self.paths, self.tuned_on = paths, tuned_on
        self.prompts: list[list[int]] = []
        self.sources = sources_of(tasks, config)
        self.worked = worked_task(config, tasks)
        self.baselines = named(config.baselines)
        self.shares = {"": 0.0}  # as they were trained, which isn't looked for
        self.shares |= {f"{100 * share:g} % saved": share for share in depths(config.curve)}
        self._fitted_on = {source.name: source for source in self.sources.values()}
        self.material = functools.cache(self._material)
        self.baseline = functools.cache(
            lambda name, source: BASELINES.get(name)(lm.routed, lambda: self.material(source))
        )
        targets = [] if config.supervision is None else [Path(config.supervision)]
        self._targets = [record for file in targets for record in read_supervision(file)]
        files = [folder / WEIGHTS_FILE for folder in routers] + targets
        self.chunks = Chunks(
            output / PARTIAL_FOLDER,
            {
                "config": config.to_dict() | dict.fromkeys(TIMING),
                "tasks": [task.name for task in tasks],
                "paths": dict(paths),
                "files": {f"{path}_sha256": sha256(path) for path in files},
                "model": lm.base.identity,
                "runtime": lm.base.runtime,
            },
            stage="evaluation",
        )
        self._total = self._done = 0

    def asked(self, task: Task, split: str, limit: int | None, use: str = "") -> RenderedTask:
        """Return the questions of a task, by way of a task folder; one for each use of a split.

        The harness' own tasks need no folder. An evaluation of other questions isn't resumed.
        """
        config, source = self.config, self.output / TASKS_FOLDER / f"{use}{split}"
        if isinstance(task, LmEvalTask):
            trained = [each.config.training.get("tasks", ()) for each in self.routers.values()]
            made_on = {*self.tuned_on}.union(*trained)
            # Of names that aren't ours it isn't known whether they hold the same questions.
            is_fresh = made_on <= {*TASKS} and config.supervision is None and not is_fitted(config)
            is_whole = split == "test" and is_fresh
            written = draw_stock_task(
                task, None if is_whole else split, limit, config.seed, config.num_fewshot
            )
            asked = RenderedTask(written, task.tasks, self.lm, chat=config.chat)
        else:
            [written], files = task_folder(
                [task],
                split=split,
                limit=limit,
                seed=config.seed,
                data_dir=config.data_dir,
                num_fewshot=config.num_fewshot,
            )
            files.write(source)
            asked = RenderedTask(written, source, self.lm, chat=config.chat)
        questions = f"{written.name}, {limit or 'all'} of {split}"
        self.chunks.expect(questions, {"questions_sha256": asked.digest()})
        return asked

    def plan(self, cost: int) -> None:
        """Count on so many more tokens."""
        self._total += cost

    @contextmanager
    def planned(self, cost: int) -> Iterator[None]:
        """Do what so much was planned for, of which some may turn out not to be done."""
        others = self._total - self._done - cost
        yield
        self._total = self._done + others

    def once(self, name: str, run: Callable[[Keep], SystemRun], cost: int) -> SystemRun:
        """Run a system, or return what an earlier start of this evaluation has kept of it."""
        parts = self.chunks.within(name)

        def keep(asks: Mapping[str, Callable[[], Answered]]) -> list[Answered]:
            found: list[Answered] = []
            for answered in parts.each_once(asks, Answered):
                found.append(answered)
                self.tell(name, cost * len(found) / len(asks))
            return found

        with self.doing(name, cost):
            return self.chunks.once(name, SystemRun, lambda: run(keep))

    @contextmanager
    def doing(self, name: str, cost: int) -> Iterator[None]:
        """Say what is done in a block, and afterwards that so much work is."""
        self.tell(name)
        yield
        self._done += cost
        self.tell(name)

    def tell(self, name: str, more: float = 0.0) -> None:
        """Say what is being done, and how much of it."""
        self.on_progress(self._done + more, self._total, name)

    def _material(self, name: str) -> Material:
        source, num = self._fitted_on[name], self.config.num_calibration or NUM_CALIBRATION
        asked = self.asked(source, chosen_on(source, self.config), num)
        questions: dict[int, Request] = {}  # by place
        for place, requests in enumerate(asked.requests() if asked.has_options else ()):
            context = requests[0].context
            # Else the options stand in the context, and there is no one prompt.
            if all(request.context == context for request in requests):
                questions[place] = Request(context, [each.continuation for each in requests])

        def remember(kind: str, candidates: Sequence[LayerPath], measure: Measure) -> list[float]:
            key = f"{kind} {json.dumps(candidates)}"
            cost = len(candidates) * sum(map(len, asked.prompt_tokens))
            self.plan(cost)
            with self.doing(f"fitting on {kind}", cost):
                return self.chunks.once(key, list[float], lambda: measure(candidates))

        return Material(
            routed=self.lm.routed,
            prompts=asked.prompt_tokens,
            questions=[*questions.values()],
            golds=[asked.golds(place)[0] for place in questions],
            supervision=self._targets,
            name=name,
            remember=remember,
        )


class Decided(NamedTuple):
    """A system that isn't a baseline, and what decides in it: base, routed, or a path."""

    name: str
    drawn: BaselineRun
    setting: str = ""

    @property
    def at(self) -> str:
        """Its depth, as a part of a sentence."""
        return f" at {self.setting}" if self.setting else ""

    @property
    def title(self) -> str:
        """System and setting, as its run has them."""
        return f"{self.name}, {self.setting}" if self.setting else self.name


BASE_MODEL = Decided(BASE, BaselineRun(FullPolicy()))


class Comparison:
    """Every system on one task."""

    def __init__(self, shared: Shared, task: Task) -> None:
        config = shared.config
        self.shared, self.config, self.task = shared, config, task
        self.asked = shared.asked(task, config.split_of(task.name), config.limit_of(task.name))
        self.questions = TaskRun(shared.lm, self.asked, config.num_texts, config.seed)
        self.source = shared.sources[task.name]
        self.notes = list(self.asked.written.notes)
        if self.source.name != task.name:
            self.notes.append(
                f"Depths and baselines are fitted and chosen on questions of {self.source.name}, "
                f"not of {task.name}"
            )
        self.folders = [*shared.routers]  # of the first seed, and of others
        num_tokens, num_depths = self.questions.num_tokens, len(shared.shares)
        a_question = num_tokens // len(self.asked.keys)
        self._depth_cost = PROBES * (config.num_calibration or NUM_CALIBRATION) * a_question
        draws = {name: self._num_draws(name) for name in shared.baselines}
        of_others = (len(self.folders) - 1) * (1 + draws.get(PERMUTED, 0))
        at_depth = 1 + sum(draws.values()) + of_others if self.folders else 0
        num_systems = 1 + len(shared.paths) + num_depths * at_depth
        if config.epsilon is not None:  # asked on other questions, about as many
            num_systems += len(shared.paths) + num_depths
        self.cost = num_systems * num_tokens  # in tokens, about
        self.cost += len(self.folders) * (num_depths - 1) * self._depth_cost
        shared.plan(self.cost)

    def _num_draws(self, name: str) -> int:
        num = self.config.num_random_draws or NUM_RANDOM_DRAWS
        return num if BASELINES.get(name).is_drawn else 1

    def run(self) -> TaskRuns:
        """Run base, at each depth the routed model and its baselines, other seeds' routers, paths.

        Baselines run at the first routers' executions; of other seeds only the permuted routes do,
        at their own.
        """
        config, lm = self.config, self.shared.lm
        base = self._decided(self.questions, BASE_MODEL)
        at_depths = [
            self._at_depth(folder, setting, f"Not evaluated at {setting}")
            for folder in self.folders[:1]
            for setting in self.shared.shares
        ]
        first = [decided for decided in at_depths if decided is not None]
        systems, seeds = [base], []
        for decided in first:
            routed = [self._decided(self.questions, decided, decided.at)]
            baselines = self._baselines(decided.at, routed[0])
            permuted = [each for each in baselines if each.name == PERMUTED]
            systems += [*routed, *baselines]
            for folder in self.folders[1:]:
                otherwise = f"{folder} isn't evaluated{decided.at}"
                if own := self._at_depth(folder, decided.setting, otherwise):
                    which = f" of {folder}{decided.at}"
                    routed.append(self._decided(self.questions, own, which))
                    if permuted:
                        permuted.append(self._baseline(PERMUTED, which, routed[-1]))
            if self.folders[1:]:
                seeds.append((routed, permuted))
        paths = [Decided(name, BaselineRun(path)) for name, path in self.shared.paths.items()]
        systems += [self._decided(self.questions, path) for path in paths]
        choice = None
        if config.epsilon is not None:
            tried = [BASE_MODEL, *(each for each in first if each.setting), *paths]
            choice = self._choice(config.epsilon, systems, tried)
        self.shared.prompts += self.asked.prompt_tokens
        try:
            adapters = lm.routed.injection.lora.all_weights()
            shape: ModelShape | str = ModelShape.of(lm.routed.model, adapters)
        except ArchitectureError as error:
            shape = str(error)
        return TaskRuns(
            asked=self.asked,
            systems=systems,
            notes=self.notes,
            choice=choice,
            config=config,
            num_layers=lm.routed.num_layers,
            shape=shape,
            seeds=seeds,
        )

    def _at_depth(self, folder: Path, setting: str, otherwise: str) -> Decided | None:
        """Return the routed model that saves so much; where there is none, it is noted."""
        routers, lm, bias = self.shared.routers[folder], self.shared.lm, 0.0
        if setting:
            wanted = (1 - self.shared.shares[setting]) * lm.routed.num_layers
            prompts = self.shared.material(self.source.name).prompts
            key = f"{self.task.name}: depth for {setting} of {folder}"

            def find() -> float:
                return find_depth_bias(lm.routed, prompts, wanted, routers=routers).depth_bias

            with self.shared.doing(key, self._depth_cost):
                try:
                    bias = self.shared.chunks.once(key, float, functools.partial(from_first, find))
                except ConfigError as error:
                    self.notes.append(f"{otherwise}: {error}")
                    return None
        return Decided(ROUTED, BaselineRun(RouterPolicy(routers, depth_bias=bias)), setting)

    def _decided(self, questions: TaskRun, system: Decided, which: str = "") -> SystemRun:
        name, drawn, setting = system
        return self.shared.once(
            f"{questions.asked.written.name}: {name}{which}",
            lambda keep: questions.run(name, [drawn], setting, keep),
            questions.num_tokens,
        )

    def _baselines(self, which: str, routed: SystemRun) -> list[SystemRun]:
        systems = []
        for name in self.shared.baselines:
            baseline = self.shared.baseline(name, self.source.name)
            if obstacle := baseline.obstacle(routed.executions):
                self.notes.append(f"{name.capitalize()} isn't compared: {obstacle}.")
            else:
                systems.append(self._baseline(name, which, routed))
        return systems

    def _baseline(self, name: str, which: str, routed: SystemRun) -> SystemRun:
        num_draws = self._num_draws(name)

        def run(keep: Keep) -> SystemRun:
            routes = torch.tensor(routed.routes[0])
            generator = torch.Generator().manual_seed(self.config.seed)
            baseline = self.shared.baseline(name, self.source.name)
            drawn = [baseline.at(routes, generator) for _ in range(num_draws)]
            return self.questions.run(name, drawn, routed.setting, keep)

        cost = self.questions.num_tokens * num_draws
        return self.shared.once(f"{self.task.name}: {name}{which}", run, cost)

    def _choice(
        self, epsilon: float, systems: Sequence[SystemRun], tried: Sequence[Decided]
    ) -> Choice:
        """Choose a depth or a path on one split, and test it once on the one that is evaluated.

        `systems` ran on the latter; one of those tried is chosen, of which base is the first.
        """
        config, source, worked = self.config, self.source, self.shared.worked
        # A tuning has chosen its paths on `select`: among them is chosen on other questions.
        split = "fit" if source.name in self.shared.tuned_on else chosen_on(source, config)
        asked = self.shared.asked(source, split, config.limit_of(source.name))
        questions = TaskRun(self.shared.lm, asked, config.num_texts, config.seed)
        found = [self._decided(questions, each, f"{each.at} on {split}") for each in tried]
        max_loss = config.max_loss_increase or MAX_LOSS_INCREASE
        base, *others = self._with_worked(found, tried, lambda task: chosen_on(task, config))
        choice = choose(
            base,
            others,
            Limits(epsilon=epsilon, max_loss_increase=max_loss),
            chance=asked.written.chance,
            seed=config.seed,
            worked_answers=None if worked is None else worked.name,
            chosen_on=f"{source.name} ({split})",
        )
        if choice.chosen is None:
            return choice
        ran = {system.title: system for system in systems}
        again = [each for each in tried if each.title in (BASE, choice.chosen.name)]
        tested = self._with_worked(
            [ran[each.title] for each in again], again, lambda task: config.split_of(task.name)
        )
        return confirm(choice, *tested, chance=self.asked.written.chance, seed=config.seed)

    def _with_worked(
        self,
        systems: Sequence[SystemRun],
        decided: Sequence[Decided],
        split_of: Callable[[Task], str],
    ) -> list[Outcomes]:
        """Return the outcomes of systems, base first, with their loss on worked answers."""
        outcomes: list[Outcomes] = [replace(system, name=system.title) for system in systems]
        worked, once = self.shared.worked, self.shared.once
        if worked is None:
            return outcomes
        num_texts, split = self.config.num_texts, split_of(worked)
        asked = self.shared.asked(worked, split, num_texts, WORKED)
        texts = TaskRun(self.shared.lm, asked, num_texts, self.config.seed)
        self.shared.plan(len(decided) * texts.num_tokens)
        for place, each in enumerate(decided):
            depth = f"{self.source.name}: " if each.setting else ""  # found on its questions
            key = f"{depth}{each.name}{each.at} on worked answers of {worked.name}, {split}"
            read = once(key, functools.partial(texts.texts, *each), texts.num_tokens)
            outcomes[place].worked_loss = read.text_loss
        return outcomes
