"""What an evaluation runs: every system on every task, at every depth; and the certified choice."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from drllm.config import EvaluateConfig
from drllm.errors import ArchitectureError, ConfigError
from drllm.evaluation.baselines.base import BASELINES, Drawn, FittedBaselines, Material, Measure
from drllm.evaluation.baselines.random_routes import share_unchanged
from drllm.evaluation.baselines.registry import depths, named
from drllm.evaluation.flops import ModelShape
from drllm.evaluation.lm_eval.folders import task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask, StockTask
from drllm.evaluation.questions import chosen_on, sources_of, worked_task
from drllm.evaluation.systems import Answered, Keep, SystemRun, TaskRun
from drllm.evaluation.tables import TaskRuns
from drllm.listener import OnProgress
from drllm.models.routers.checkpoint import WEIGHTS_FILE
from drllm.models.routers.depth_control import find_depth_bias
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.policies import FullPolicy, Policy, RouterPolicy
from drllm.models.scoring.packing import Question
from drllm.paths import Path as LayerPath
from drllm.records import Chunks, read_search, read_supervision, sha256
from drllm.records.results import BASE, PERMUTED, ROUTED
from drllm.statistics.non_inferiority import Choice, Limits, choose, confirm
from drllm.statistics.paired import Outcomes
from drllm.tasks.base import Task

TASKS_FOLDER, PARTIAL_FOLDER = "tasks", "partial"
WORKED = "worked-"
"""Beginning of the names of task folders with worked answers."""
NUM_CALIBRATION = 64
"""Questions that depths are found and baselines fitted on, unless another number is given."""
PROBES = 12
"""Times that all of these are routed, about, until the depth is found."""
NUM_RANDOM_DRAWS = 10
"""Draws of the baselines that are drawn, unless another number is given."""
MAX_LOSS_INCREASE = 0.05
"""Nats a token that the next-token loss may rise, unless another limit is given."""


class Shared:
    """What all tasks of one evaluation share.

    `prompts` are the tokens of those asked so far, and `chunks` keeps finished systems and blocks.
    """

    on_progress: OnProgress

    def __init__(
        self,
        lm: RoutedLM,
        routers: Mapping[Path, RouterStack],
        tasks: Sequence[Task],
        config: EvaluateConfig,
        output: Path,
    ) -> None:
        self.lm, self.routers, self.config, self.output = lm, routers, config, output
        self.prompts: list[list[int]] = []
        self.sources = sources_of(tasks, config)
        self.worked = worked_task(config, tasks)
        self.baselines = named(config.baselines)
        self.shares = {f"{100 * share:g} % saved": share for share in depths(config.curve)}
        self._fitted: dict[str, FittedBaselines] = {}
        search, targets = config.search, config.supervision
        self._search = [] if search is None else read_search(Path(search))
        self._targets = [] if targets is None else read_supervision(Path(targets))
        logs = [Path(name) for name in (search, targets) if name is not None]
        files = [folder / WEIGHTS_FILE for folder in routers] + logs
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
        self._total = self._done = 0

    def asked(self, task: Task, split: str, limit: int | None, use: str = "") -> AskedTask:
        """Return the questions of a task, by way of a task folder; one for each use of a split.

        The harness' own tasks need no folder. An evaluation of other questions isn't resumed.
        """
        config, folder, places = self.config, self.output / TASKS_FOLDER / f"{use}{split}", None
        if isinstance(task, StockTask):
            written, places = task.asked(limit, config.seed, config.num_fewshot)
        else:
            [written], files = task_folder(
                [task],
                split=split,
                limit=limit,
                seed=config.seed,
                data_dir=config.data_dir,
                num_fewshot=config.num_fewshot,
                max_length=self.lm.max_length,
            )
            files.write(folder)
        source = task.tasks if isinstance(task, StockTask) else folder
        asked = AskedTask(written, source, self.lm, chat=config.chat, places=places)
        questions = f"{written.name}, {limit or 'all'} of {split}"
        self.chunks.expect(questions, {"questions_sha256": asked.digest()})
        return asked

    def plan(self, cost: int) -> None:
        """Count on so much more work; less, if something planned isn't done after all.

        Work is in token executions: tokens times the share of the layers that they pass.
        """
        self._total += cost

    def once(self, name: str, run: Callable[[Keep], SystemRun], cost: int) -> SystemRun:
        """Run a system, or return what an earlier start of this evaluation has kept of it."""
        parts = self.chunks.within(name)

        def keep(key: str, share: float, ask: Callable[[], Answered]) -> Answered:
            answered = parts.once(key, Answered, ask)
            self.tell(name, share * cost)
            return answered

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

    def fitted(self, source: Task) -> FittedBaselines:
        """Return the baselines that are fitted on questions of a task; fitted when first needed."""

        def remember(name: str, candidates: Sequence[LayerPath], measure: Measure) -> list[float]:
            key = f"{name} {json.dumps(candidates)}"
            cost = len(candidates) * sum(map(len, self.fitted(source).material.prompts))
            self.plan(cost)
            with self.doing(f"fitting on {name}", cost):
                return self.chunks.once(key, list[float], lambda: measure(candidates))

        if source.name not in self._fitted:
            self._fitted[source.name] = FittedBaselines(
                source.name, lambda: self._material(source), self.lm.routed, remember
            )
        return self._fitted[source.name]

    def _material(self, source: Task) -> Material:
        """Return what baselines are fitted on, and depths are looked for on."""
        num = self.config.num_calibration or NUM_CALIBRATION
        asked = self.asked(source, chosen_on(source, self.config), num)
        questions: dict[int, Question] = {}  # by place
        for place, requests in enumerate(asked.requests() if asked.has_options else ()):
            context = requests[0].context
            # Else the options stand in the context, and there is no one prompt.
            if all(request.context == context for request in requests):
                questions[place] = Question(context, [each.continuation for each in requests])
        asked_with_options = [*questions.values()], [*map(asked.gold, questions)]
        logs, prompts = (self._search, self._targets), asked.prompt_tokens
        return Material(self.lm.routed, prompts, *asked_with_options, *logs)


class Comparison:
    """Every system on one task."""

    def __init__(self, shared: Shared, task: Task) -> None:
        config = shared.config
        self.shared, self.config, self.task = shared, config, task
        self.asked = shared.asked(task, config.split_of(task.name), config.limit_of(task.name))
        self.questions = TaskRun(shared.lm, self.asked, config.num_texts)
        self.source = shared.sources[task.name]
        self.fitted = shared.fitted(self.source)
        self.notes = list(self.asked.written.notes)
        if self.source.name != task.name:
            self.notes.append(
                f"Depths and baselines are fitted and chosen on questions of {self.source.name}, "
                f"not of {task.name}"
            )
        depths = ["", *shared.shares]
        a_question = self.questions.num_tokens // len(self.asked.keys)
        self._depth_cost = PROBES * (config.num_calibration or NUM_CALIBRATION) * a_question
        self._choice_cost = sum(map(self._cost, depths))
        self.first, *self.other_seeds = shared.routers
        costs = [self._costs(folder, setting) for folder in shared.routers for setting in depths]
        shared.plan(self._cost("") + sum(sum(each.values()) for each in costs))
        shared.plan(self._choice_cost if config.epsilon is not None else 0)

    def _cost(self, setting: str, questions: TaskRun | None = None) -> int:
        """Return what one run over questions costs at a depth, as `Shared.plan` counts."""
        share = 1 - self.shared.shares.get(setting, 0.0)
        return round((questions or self.questions).num_tokens * share)

    def _num_draws(self, name: str) -> int:
        num = self.config.num_random_draws or NUM_RANDOM_DRAWS
        return num if BASELINES.get(name).is_drawn else 1

    def _costs(self, folder: Path, setting: str) -> dict[str, int]:
        """Return what is run with some routers at a depth, by name, and what it costs."""
        costs = {"depth": self._depth_cost if setting else 0, ROUTED: self._cost(setting)}
        for name in self.shared.baselines:
            is_the_same = setting and BASELINES.get(name).has_own_depth
            if name == PERMUTED or (folder == self.first and not is_the_same):
                costs[name] = costs[ROUTED] * self._num_draws(name)
        return costs

    def run(self) -> TaskRuns:
        """Run base, then at each depth the routed model, its baselines, and other seeds' routers.

        Baselines run at the first routers' executions; of other seeds only the permuted routes do,
        at their own.
        """
        config, lm = self.config, self.shared.lm
        base = self._by_policy(f"{self.task.name}: {BASE}", self.questions, BASE, FullPolicy())
        policies = {"": RouterPolicy(self.shared.routers[self.first])}
        for setting in self.shared.shares:
            if policy := self._at_depth(self.first, setting, f"Not evaluated at {setting}"):
                policies[setting] = policy
        systems, seeds = [base], []
        for setting, policy in policies.items():
            at = f" at {setting}" if setting else ""
            routed = [self._routed(at, policy, setting)]
            baselines = self._baselines(at, routed[0])
            permuted = [each for each in baselines if each.name == PERMUTED]
            systems += [*routed, *baselines]
            for folder in self.other_seeds:
                own = self._at_depth(folder, setting, f"{folder} isn't evaluated{at}")
                if own is None:
                    continue
                routed.append(self._routed(f" of {folder}{at}", own, setting))
                if permuted:
                    permuted.append(self._baseline(PERMUTED, f" of {folder}{at}", routed[-1]))
            if self.other_seeds:
                seeds.append((routed, permuted))
        choice = None
        if config.epsilon is not None:
            del policies[""]
            choice = self._choice(config.epsilon, systems, policies)
        self.shared.prompts += self.asked.prompt_tokens
        try:
            shape: ModelShape | str = ModelShape.of(lm.routed.model)
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

    def _at_depth(self, folder: Path, setting: str, otherwise: str) -> RouterPolicy | None:
        """Return the policy under which routers save so much; where none does, it is noted."""
        routers, lm = self.shared.routers[folder], self.shared.lm
        if not setting:
            return RouterPolicy(routers)
        wanted = (1 - self.shared.shares[setting]) * lm.routed.num_layers
        prompts = self.fitted.material.prompts
        key = f"{self.task.name}: depth for {setting} of {folder}"

        def find() -> float:
            return find_depth_bias(lm.routed, prompts, wanted, routers=routers).depth_bias

        with self.shared.doing(key, self._depth_cost):
            try:
                found = self.shared.chunks.once(key, float, find)
            except ConfigError as error:
                self.notes.append(f"{otherwise}: {error}")
                self.shared.plan(self._depth_cost - sum(self._costs(folder, setting).values()))
                return None
        return RouterPolicy(routers, depth_bias=found)

    def _by_policy(
        self, key: str, questions: TaskRun, name: str, policy: Policy, setting: str = ""
    ) -> SystemRun:
        drawn, cost = [Drawn(policy=policy)], self._cost(setting, questions)
        return self.shared.once(key, lambda keep: questions.run(name, drawn, setting, keep), cost)

    def _routed(self, which: str, policy: Policy, setting: str) -> SystemRun:
        key = f"{self.task.name}: {ROUTED}{which}"
        return self._by_policy(key, self.questions, ROUTED, policy, setting)

    def _baselines(self, which: str, routed: SystemRun) -> list[SystemRun]:
        systems = []
        for name, cost in self._costs(self.first, routed.setting).items():
            if name not in BASELINES:
                continue
            if obstacle := self.fitted.obstacle(name, routed.executions):
                self.notes.append(f"{name.capitalize()} isn't compared: {obstacle}.")
                self.shared.plan(-cost)
            else:
                systems.append(self._baseline(name, which, routed))
        return systems

    def _baseline(self, name: str, which: str, routed: SystemRun) -> SystemRun:
        """Run a baseline at the executions of a routed model."""

        def run(keep: Keep) -> SystemRun:
            routes = torch.tensor(routed.routes[0])
            generator = torch.Generator().manual_seed(self.config.seed)
            num = self._num_draws(name)
            drawn = [self.fitted.at(name, routes, generator) for _ in range(num)]
            system = self.questions.run(name, drawn, routed.setting, keep)
            if name == PERMUTED:
                plans = [draw.plan for draw in drawn if draw.plan is not None]
                system.unchanged = [share_unchanged(routes, plan) for plan in plans]
            return system

        cost = self._cost(routed.setting) * self._num_draws(name)
        return self.shared.once(f"{self.task.name}: {name}{which}", run, cost)

    # --- the certified choice; the rule is `statistics.non_inferiority`'s ---

    def _choice(
        self,
        epsilon: float,
        systems: Sequence[SystemRun],
        policies: Mapping[str, Policy],
    ) -> Choice:
        """Choose a depth on one split, and test it once on the one that is evaluated.

        `systems` ran on the latter, base first; `policies` are the routed model's at each depth.
        """
        config, source, worked = self.config, self.source, self.shared.worked
        split = chosen_on(source, config)
        asked = self.shared.asked(source, split, config.limit_of(source.name))
        questions = TaskRun(self.shared.lm, asked, config.num_texts)
        actual = sum(self._cost(setting, questions) for setting in ("", *policies))
        self.shared.plan(actual - self._choice_cost)
        found = [self._by_policy(f"{source.name}: base on {split}", questions, BASE, FullPolicy())]
        for setting, policy in policies.items():
            key = f"{source.name}: routed at {setting} on {split}"
            found.append(self._by_policy(key, questions, ROUTED, policy, setting))
        base, *settings = self._with_worked(found, policies, lambda task: chosen_on(task, config))
        choice = choose(
            base,
            settings,
            Limits(
                epsilon=epsilon, max_loss_increase=config.max_loss_increase or MAX_LOSS_INCREASE
            ),
            chance=asked.written.chance,
            seed=config.seed,
            worked_answers=None if worked is None else worked.name,
            chosen_on=f"{source.name} ({split})",
        )
        if choice.chosen is None:
            return choice
        [ours] = (each for each in systems if each.title == choice.chosen.name)
        chosen = {ours.setting: policies[ours.setting]}
        tested = self._with_worked(
            [systems[0], ours], chosen, lambda task: config.split_of(task.name)
        )
        return confirm(choice, *tested, chance=self.asked.written.chance, seed=config.seed)

    def _with_worked(
        self,
        systems: Sequence[SystemRun],
        policies: Mapping[str, Policy],
        split_of: Callable[[Task], str],
    ) -> list[Outcomes]:
        """Return outcomes of base, then of each policy, with their loss on worked answers."""
        outcomes = [system.outcomes for system in systems]
        worked, once = self.shared.worked, self.shared.once
        if worked is None:
            return outcomes
        num_texts, split = self.config.num_texts, split_of(worked)
        asked = self.shared.asked(worked, split, num_texts, WORKED)
        texts = TaskRun(self.shared.lm, asked, num_texts)
        cost = texts.num_tokens
        self.shared.plan((1 + len(policies)) * cost)
        where = f"on worked answers of {worked.name}, {split}"
        read = [once(f"base {where}", partial(texts.texts, BASE, FullPolicy(), ""), cost)]
        for setting, policy in policies.items():
            key = f"{self.source.name}: routed at {setting} {where}"
            read.append(once(key, partial(texts.texts, ROUTED, policy, setting), cost))
        return [
            dataclasses.replace(outcome, worked_loss=each.text_loss)
            for outcome, each in zip(outcomes, read, strict=True)
        ]
