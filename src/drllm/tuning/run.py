"""The stage `tune`: it reads questions of one or more tasks, and writes `paths.json`.

Paths are fitted on one part of the questions, chosen on another and tested on a third (see
`data_splits`). The search proceeds in levels (see `beam`). An interrupted tuning can be resumed.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drllm.config import TuneConfig
from drllm.config.fields import make_settings, replace_settings
from drllm.config.heal import NO_REPAIR, REFIT
from drllm.model.identity import describe_adapters
from drllm.models.workers import Workers, open_workers
from drllm.paths import StaticPath
from drllm.records.codec import hash_values, write_json
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer, stage_folder
from drllm.records.static_paths import (
    FIT,
    PATHS_FILE,
    SELECT,
    TEST,
    NamedPath,
    StaticPaths,
    read_paths,
)
from drllm.statistics.intervals import Floats
from drllm.tuning.beam import Beam, make_beam
from drllm.tuning.calibration import read_calibration
from drllm.tuning.data_splits import TasksArgument, TaskSplits, split_tasks
from drllm.tuning.gains import Gains
from drllm.tuning.heal_texts import TextArgument, TextSource, digest_sources
from drllm.tuning.level_lines import (
    HEAD,
    REPAIRED_HEAD,
    format_level,
)
from drllm.tuning.named_paths import make_named_paths
from drllm.tuning.progress import TuningProgress, estimate_level_pairs, estimate_pairs
from drllm.tuning.repair import Repair, choose_tuning_repair, make_repair
from drllm.tuning.score_blocks import STAND_IN
from drllm.tuning.score_table import PathsOnPart, ScoreTable
from drllm.tuning.task_questions import TaskQuestions, tokenize_task
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener, write_minutes
from drllm.work.store import ResultStore, refuse_other_run

PARTIAL_FOLDER = "paths.partial"


def tune(
    model: Any,
    tasks: TasksArgument = None,
    config: TuneConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    texts: TextArgument = None,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> StaticPaths:
    """Find static paths that save layers on tasks at the least loss, and write `paths.json`.

    Paths are judged as they will be used: with the refit that `heal` solves, if the model's layers
    can be refitted. Candidates are compared with a cheap stand-in for the refit. The best path of
    each level is refitted, and its scores are reported with the refit and plain. The refit itself
    isn't kept: `heal` solves it again.

    Finished work is stored. After an interruption the same call resumes, and finds the same paths.

    Args:
        model: The name of a model or a `ModelConfig`, which is loaded here or in the workers of
            Ray. Without Ray also a `BaseModel`, as `load` returns it; a `RoutedModel`; or a causal
            language model of transformers.
        tasks: Tasks, names of tasks, or files of questions; or the result of `split_tasks`. None
            takes the config's tasks.
        config: The settings; None takes the defaults.
        output_dir: Folder for `paths.json`; None keeps no files.
        texts: Texts to repair paths with, beside the questions that paths are fitted on, as for
            `heal`; None takes the config's texts.
        tokenizer: The model's tokenizer; None loads it by the model's name.
        listener: Receives the progress.
        settings: Settings of `TuneConfig` by name, which replace the config's settings.

    Returns:
        The full path and the best path of each level, from the most executions to the fewest. A
        path is marked as dominated if a shorter path does at least as well.

    Raises:
        ConfigError: Settings have no effect or make no sense, the folder belongs to another run,
            or Ray is to run a model that isn't named.
        TaskError: A task is unknown, has too few questions, or a file of texts can't be read.
        ArchitectureError: Repair is requested, and a layer of the model can't be refitted.

    Source: ours; the objective is TALE's (arXiv 2510.22767), as a log-probability.
    """
    config = replace_settings(TuneConfig, config, settings)
    listener = listener or Listener()
    splits = split_tasks(config, tasks)
    sources: Sequence[TextSource] = []
    if config.repair != NO_REPAIR:
        sources = read_calibration(config, splits, texts)
    with ExitStack() as stack:
        folder = stage_folder(output_dir, stack)
        workers = stack.enter_context(open_workers(model, tokenizer, config, listener))
        workers.base.refuse_bypass("tune repairs paths")
        stack.enter_context(only_writer(folder, "tuning", "--output-dir"))
        repair = choose_tuning_repair(config, workers.executor, listener)
        identity = _make_identity(config, workers, splits, repair, sources)
        beam = make_beam(config, splits, workers.base.num_layers, keeps_ends=repair == REFIT)
        with listener.busy("reading the questions"):
            questions = [
                tokenize_task(workers.base, task_splits, config, number)
                for number, task_splits in enumerate(splits)
            ]
        prompts = {"prompts_sha256": hash_values(task.digest_values() for task in questions)}
        store = ResultStore(folder / PARTIAL_FOLDER, identity, stage="tuning")
        identity.update(prompts)
        finished = _read_finished(folder / PATHS_FILE, identity, config)
        if finished is not None:
            if not finished.is_cut:  # a cut search may go on from its kept results
                store.remove()  # a killed run may have left them
            return finished
        store.open()
        store.expect("tuning", prompts)  # results of earlier versions were kept without it
        run = _TuningRun(workers, questions, beam, store, identity, config, listener)
        result = run.find_paths(sources)
        write_json(folder / PATHS_FILE, result)
        if not result.is_cut:
            store.remove()
        return result


def _make_identity(
    config: TuneConfig,
    workers: Workers,
    splits: Sequence[TaskSplits],
    repair: str,
    sources: Sequence[TextSource],
) -> dict[str, Any]:
    """Return the values by which a run recognises its own files.

    A run without repair has no values of a repair, so that it can go on with the files of earlier
    versions.
    """
    identity = {
        "settings": config.decisive(),
        "model": workers.base.identity,
        "runtime": {**workers.base.runtime, **describe_adapters(workers.base.model)},
        "questions_sha256": hash_values(task.digest_values() for task in splits),
    }
    if repair == REFIT:
        identity["repair"] = repair
        identity["texts_sha256"] = digest_sources(sources)
    return identity


def _read_finished(
    file: Path, identity: Mapping[str, Any], config: TuneConfig
) -> StaticPaths | None:
    """Return the result that a finished run wrote; refuse the result of another run.

    Return None if there is no result, or if a cut search goes on because `--minutes` changed.
    """
    if not file.exists():
        return None
    record = read_paths(file)
    stored = {
        "settings": make_settings(TuneConfig, record.config).decisive(),
        "model": record.model,
        # Older files have no runtime and no digests, so these aren't compared.
        "runtime": record.runtime or identity["runtime"],
        "questions_sha256": record.questions_sha256 or identity["questions_sha256"],
        "prompts_sha256": record.prompts_sha256 or identity["prompts_sha256"],
    }
    if record.repair:
        stored["repair"] = record.repair
        stored["texts_sha256"] = record.texts_sha256
    remedy = "choose another --output-dir, or delete the old one"
    refuse_other_run(f"the tuning in {file}", stored, identity, remedy)
    if record.is_cut and record.config.get("minutes") != config.minutes:
        return None
    return record


@dataclass(frozen=True)
class _SearchResult:
    """The result of the search.

    Attributes:
        paths: The best path of each level.
        is_cut: Whether `--minutes` ended the search early.
    """

    paths: Sequence[StaticPath]
    is_cut: bool


@dataclass(frozen=True)
class _TuningRun:
    """One run of the stage.

    Attributes:
        workers: The model, and who runs it.
        tasks: The tasks with their questions, tokenised.
        beam: How to search.
        store: Keeps scores.
        identity: The values by which a run recognises its own files.
        config: The settings.
        listener: Receives progress and notes.
    """

    workers: Workers
    tasks: Sequence[TaskQuestions]
    beam: Beam
    store: ResultStore
    identity: Mapping[str, Any]
    config: TuneConfig
    listener: Listener

    @property
    def is_repaired(self) -> bool:
        """Whether paths are repaired."""
        return "repair" in self.identity

    def find_paths(self, sources: Sequence[TextSource]) -> StaticPaths:
        """Search for paths, test the best path of each level, and return `paths.json`.

        Args:
            sources: The texts that paths are repaired with.
        """
        config = self.config
        base = self.workers.base
        full = StaticPath(range(base.num_layers))
        repair = None
        if self.is_repaired:
            repair = make_repair(self.workers, sources, config, self.store, self.listener)
        with self.listener.progress("tuning", "") as on_progress:
            max_seconds = None if config.minutes is None else 60 * config.minutes
            first_block = FirstBlock(self.listener, base.model.device, max_seconds)
            progress = TuningProgress(on_progress, first_block, max_seconds)
            table = ScoreTable(
                self.workers.executor, self.store, config.state_cache_gb, progress.add, repair
            )
            gains = Gains(table, self.tasks, full, config.max_loss, config.seed)
            search = self.search(gains, progress)
            named_paths = make_named_paths([full, *search.paths], self.as_used(gains))
            progress.finish()
        return self.make_record(named_paths, repair, is_cut=search.is_cut)

    def as_used(self, gains: Gains) -> Gains:
        """Return the gains of paths as they will be used: with their refits, if repaired."""
        if self.is_repaired:
            return gains.with_repair(REFIT)
        return gains

    def search(self, gains: Gains, progress: TuningProgress) -> _SearchResult:
        """Search for paths level by level; choose and test the best path of each level."""
        beam = self.beam
        minutes = self.config.minutes
        table = gains.table
        used_gains = self.as_used(gains)
        if self.is_repaired:
            gains = gains.with_repair(STAND_IN)

        def measure(paths: Sequence[StaticPath], num_questions: int) -> Floats:
            return _measure_fit(gains, paths, num_questions, beam.num_questions)

        progress.expect(estimate_pairs(beam, gains.tasks, is_repaired=self.is_repaired))
        best_paths: list[StaticPath] = []
        seconds_before = 0.0
        for level in beam.levels(measure, gains.may_extend):
            _fill_select(gains, level.paths)
            best = gains.choose_best(level.paths)
            self.test(best, gains)
            best_paths.append(best)
            self.report_level(level.saved, best, used_gains, progress)
            if level.saved == beam.max_saved:
                break
            seconds = self.predict_seconds(level.saved, table.seconds - seconds_before, gains.tasks)
            seconds_before = table.seconds
            if minutes is not None and table.seconds + seconds > 60 * minutes:
                self.listener.note(
                    f"the search ends here: one more level would probably take it beyond "
                    f"{write_minutes(minutes)} minutes"
                )
                return _SearchResult(best_paths, is_cut=True)
            if not gains.may_extend(best):  # so no path of the level may
                self.listener.note(
                    f"the search ends here: all paths of this level lose more than "
                    f"{gains.max_loss:g} nats"
                )
        return _SearchResult(best_paths, is_cut=False)

    def predict_seconds(
        self, saved: int, level_seconds: float, tasks: Sequence[TaskQuestions]
    ) -> float:
        """Predict how long the next level takes.

        Args:
            saved: How many layers the last level saves.
            level_seconds: How long it took.
            tasks: The tasks.
        """
        is_repaired = self.is_repaired
        num_pairs = estimate_level_pairs(self.beam, tasks, saved, is_repaired=is_repaired)
        num_next = estimate_level_pairs(self.beam, tasks, saved + 1, is_repaired=is_repaired)
        return level_seconds * num_next / num_pairs

    def report_level(
        self, saved: int, best: StaticPath, gains: Gains, progress: TuningProgress
    ) -> None:
        """Report the best path of a level, and about how much is left to do."""
        if saved == 1:
            self.listener.note(REPAIRED_HEAD if self.is_repaired else HEAD)
        level_pairs = estimate_pairs(self.beam, gains.tasks, saved, is_repaired=self.is_repaired)
        progress.expect(level_pairs, f"layers saved: {saved:.3g}")
        line = format_level(saved, gains.gain_with_interval(best))
        self.listener.note(f"{line}\n  {best.edits(self.beam.num_layers)}")

    def test(self, path: StaticPath, gains: Gains) -> None:
        """Score a path and the full path on all parts and their texts, and grade their answers.

        With repair, the path is scored both plain and with its refit.
        """
        table = gains.table
        tasks = gains.tasks
        paths = [gains.full, path]
        scores: list[PathsOnPart] = []
        answers: list[PathsOnPart] = []
        for task in tasks:
            scores += [PathsOnPart(task, part, paths) for part in task.items]
            if task.is_generated:
                answers += [PathsOnPart(task, part, paths) for part in (SELECT, TEST)]
        table.fill(scores)
        table.fill_grades(answers)
        if self.is_repaired:
            table.fill_repaired(path, tasks)

    def make_record(
        self,
        paths: Sequence[NamedPath],
        repair: Repair | None,
        *,
        is_cut: bool,
    ) -> StaticPaths:
        """Return the content of `paths.json`."""
        base = self.workers.base
        header = new_manifest("paths", model=base.identity, config=self.config.to_dict())
        num_tokens = 0
        if repair is not None:
            num_tokens = sum(map(len, repair.texts))
        return StaticPaths(
            **header,
            tasks=tuple(task.name for task in self.tasks),
            divided=tuple(task.name for task in self.tasks if task.is_divided),
            objective={task.name: task.objective for task in self.tasks},
            num_layers=base.num_layers,
            runtime=self.identity["runtime"],
            questions_sha256=self.identity["questions_sha256"],
            prompts_sha256=self.identity["prompts_sha256"],
            is_cut=is_cut,
            repair=self.identity.get("repair", ""),
            refit_tokens=num_tokens,
            texts_sha256=self.identity.get("texts_sha256", ""),
            paths=tuple(paths),
        )


def _fill_select(gains: Gains, paths: Sequence[StaticPath]) -> None:
    """Score paths and the full path on all questions of `select`."""
    scored_paths = [gains.mark_repair(path) for path in (gains.full, *paths)]
    gains.table.fill(PathsOnPart(task, SELECT, scored_paths) for task in gains.tasks)


def _measure_fit(
    gains: Gains, paths: Sequence[StaticPath], num_questions: int, num_all: int
) -> Floats:
    """Return each path's mean objective over the tasks, on the first questions of `fit`, `[N]`.

    Args:
        gains: The scores, and how paths are repaired.
        paths: N paths.
        num_questions: How many questions to score of the task with the most questions. Of another
            task the same share is scored, rounded up.
        num_all: All questions of the task with the most.
    """
    tasks = gains.tasks
    scored_paths = [gains.mark_repair(path) for path in paths]
    requests = []
    for task in tasks:
        limit = math.ceil(num_questions * len(task.items[FIT]) / num_all)
        requests.append(PathsOnPart(task, FIT, scored_paths, limit))
    gains.table.fill(requests)
    total = np.zeros(len(paths))
    for task in tasks:
        objectives = [gains.table.objective(task, FIT, path) for path in scored_paths]
        total += np.array([np.mean(values) for values in objectives])
    mean: Floats = total / len(tasks)
    return mean
