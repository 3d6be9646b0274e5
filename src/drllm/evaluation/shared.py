"""What all tasks of one evaluation share: model, routers, what is fitted on, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from drllm.config import EvaluateConfig
from drllm.evaluation.baselines.base import BASELINES, FittedBaselines, Material
from drllm.evaluation.baselines.registry import depths, named
from drllm.evaluation.blocks import Answered
from drllm.evaluation.lm_eval.folders import task_folder
from drllm.evaluation.lm_eval.model import RoutedLM
from drllm.evaluation.lm_eval.task import AskedTask
from drllm.evaluation.questions import chosen_on, sources_of, worked_task
from drllm.evaluation.systems import Keep, SystemRun
from drllm.listener import OnProgress
from drllm.models.routers.checkpoint import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.scoring.packing import Question
from drllm.paths import Path as LayerPath
from drllm.records import Chunks, read_search, read_supervision, sha256
from drllm.records.results import PERMUTED
from drllm.tasks.base import Task

TASKS_FOLDER, PARTIAL_FOLDER = "tasks", "partial"
NUM_CALIBRATION = 64
"""Questions that depths are found and baselines fitted on, unless another number is given."""

Run: TypeAlias = Callable[[Keep], SystemRun]
"""Runs a system, its blocks by way of `Keep`."""


class Shared:
    """What all tasks of one evaluation share.

    Args:
        lm: The routed model in the harness.
        routers: By folder; the first ones are those that baselines are compared with.
        tasks: All that are evaluated.
        config: The settings.
        output: Folder of the results.

    Attributes:
        on_progress: Hears what is run.
        prompts: Tokens of the prompts asked so far.
        chunks: What is kept of finished systems and blocks.
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
        self._search = [] if config.search is None else read_search(Path(config.search))
        self._targets = (
            [] if config.supervision is None else read_supervision(Path(config.supervision))
        )
        self._fitted: dict[str, FittedBaselines] = {}
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
        a_task = 2 + len(self.baselines) + (1 + len(at_depths)) * len(self.shares)
        of_a_seed = 1 + (PERMUTED in self.baselines)
        a_task += (len(routers) - 1) * of_a_seed * (1 + len(self.shares))
        if config.epsilon is not None:
            a_task += 1 + len(self.shares)
            a_task += 3 + len(self.shares) if self.worked is not None else 0
        self._num_systems = a_task * len(tasks) + 1  # time, at last
        self._num_done = 0

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

        def keep(key: str, share: float, ask: Callable[[], Answered]) -> Answered:
            answered = parts.once(key, Answered, ask)
            self.tell(name, share)
            return answered

        self.tell(name)
        system = self.chunks.once(name, SystemRun, lambda: run(keep))
        self.tell_done(name)
        return system

    def tell(self, name: str, share: float = 0.0) -> None:
        """Say what is being run, and how much of it is done."""
        self.on_progress(self._num_done + share, self._num_systems, name)

    def tell_done(self, name: str) -> None:
        """Say that all of it is done."""
        self._num_done += 1
        self.tell(name)

    def fitted(self, source: Task) -> FittedBaselines:
        """Return the baselines that are fitted on questions of a task; fitted when first needed."""
        if source.name not in self._fitted:
            self._fitted[source.name] = FittedBaselines(
                source.name, lambda: self._material(source), self.lm.routed, self._measured
            )
        return self._fitted[source.name]

    def _material(self, source: Task) -> Material:
        """Return what baselines are fitted on, and depths are looked for on."""
        num = self.config.num_calibration or NUM_CALIBRATION
        asked = self.asked(source, chosen_on(source, self.config), num)
        questions: list[Question] = []
        golds: list[int] = []
        for place, requests in enumerate(asked.requests() if asked.has_options else ()):
            context = requests[0].context
            if all(request.context == context for request in requests):
                questions.append(Question(context, [each.continuation for each in requests]))
                golds.append(asked.gold(place))
            # Else the options stand in the context, and there is no one prompt.
        return Material(
            self.lm.routed,
            [self.lm.tok_encode(prompt) for prompt in asked.prompts()],
            questions,
            golds,
            self._search,
            self._targets,
            self.config.seed,
        )

    def _measured(
        self,
        name: str,
        candidates: Sequence[LayerPath],
        measure: Callable[[Sequence[LayerPath]], list[float]],
    ) -> list[float]:
        """Return what a measure gives for candidates, once for all starts of the evaluation."""
        key = f"{name} {json.dumps(candidates)}"
        return self.chunks.once(key, list[float], lambda: measure(candidates))
