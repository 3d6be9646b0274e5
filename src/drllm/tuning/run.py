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
from drllm.models.workers import Workers, open_workers
from drllm.paths import StaticPath
from drllm.records.codec import hash_values, write_json
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer, stage_folder
from drllm.records.static_paths import FIT, PATHS_FILE, SELECT, TEST, StaticPaths, read_paths
from drllm.statistics.intervals import Floats
from drllm.tuning.beam import Beam, make_beam
from drllm.tuning.data_splits import TasksArgument, TaskSplits, split_tasks
from drllm.tuning.gains import Gains
from drllm.tuning.level_lines import HEAD, describe_level, format_level
from drllm.tuning.named_paths import make_named_paths
from drllm.tuning.progress import TuningProgress, estimate_pairs
from drllm.tuning.score_table import PathsOnPart, ScoreTable
from drllm.tuning.task_questions import TaskQuestions, tokenize_task
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener
from drllm.work.store import ResultStore, refuse_other_run

PARTIAL_FOLDER = "paths.partial"


def tune(
    model: Any,
    tasks: TasksArgument = None,
    config: TuneConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> StaticPaths:
    """Find static paths that save layers on tasks at the least loss, and write `paths.json`.

    Finished work is stored. After an interruption the same call resumes, and finds the same paths.

    Args:
        model: The name of a model or a `ModelConfig`, which is loaded here or in the workers of
            Ray. Without Ray also a `BaseModel`, as `load` returns it; a `RoutedModel`; or a causal
            language model of transformers.
        tasks: Tasks, names of tasks, or files of questions; or the result of `split_tasks`. None
            takes the config's tasks.
        config: The settings; None takes the defaults.
        output_dir: Folder for `paths.json`; None keeps no files.
        tokenizer: The model's tokenizer; None loads it by the model's name.
        listener: Receives the progress.
        settings: Settings of `TuneConfig` by name, which replace the config's settings.

    Returns:
        The full path and the best path of each level, from the most executions to the fewest. A
        path is marked as dominated if a shorter path does at least as well.

    Raises:
        ConfigError: Settings have no effect or make no sense, the folder belongs to another run,
            or Ray is to run a model that isn't named.
        TaskError: A task is unknown, or has too few questions.

    Source: ours; the objective is TALE's (arXiv 2510.22767), as a log-probability.
    """
    config = replace_settings(TuneConfig, config, settings)
    listener = listener or Listener()
    splits = split_tasks(config, tasks)
    with ExitStack() as stack:
        folder = stage_folder(output_dir, stack)
        workers = stack.enter_context(open_workers(model, tokenizer, config, listener))
        stack.enter_context(only_writer(folder, "tuning", "--output-dir"))
        identity = {
            "settings": config.decisive(),
            "model": workers.base.identity,
            "runtime": workers.base.runtime,
            "questions_sha256": hash_values(task.digest_values() for task in splits),
        }
        beam = make_beam(config, splits, workers.base.num_layers)
        store = ResultStore(folder / PARTIAL_FOLDER, identity, stage="tuning")
        finished = _read_finished(folder / PATHS_FILE, identity, config)
        if finished is not None:
            if not finished.is_cut:  # a cut search may go on from its kept results
                store.remove()  # a killed run may have left them
            return finished
        store.open()
        result = _find_paths(workers, splits, beam, store, identity, config, listener)
        write_json(folder / PATHS_FILE, result)
        if not result.is_cut:
            store.remove()
        return result


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
        # Older files have no runtime and no digest, so these aren't compared.
        "runtime": record.runtime or identity["runtime"],
        "questions_sha256": record.questions_sha256 or identity["questions_sha256"],
    }
    remedy = "choose another --output-dir, or delete the old one"
    refuse_other_run(f"the tuning in {file}", stored, identity, remedy)
    if record.is_cut and record.config.get("minutes") != config.minutes:
        return None
    return record


def _find_paths(
    workers: Workers,
    splits: Sequence[TaskSplits],
    beam: Beam,
    store: ResultStore,
    identity: Mapping[str, Any],
    config: TuneConfig,
    listener: Listener,
) -> StaticPaths:
    """Search for paths, test the best path of each level, and return the content of `paths.json`.

    Args:
        workers: The model, and who runs it.
        splits: The tasks with their questions.
        beam: How to search.
        store: Keeps scores.
        identity: The values by which a run recognises its own files.
        config: The settings.
        listener: Receives progress and notes.
    """
    base = workers.base
    header = new_manifest("paths", model=base.identity, config=config.to_dict())
    full = StaticPath(range(base.num_layers))
    with listener.progress("tuning", "scores") as on_progress:
        tasks = [tokenize_task(base, task, config, number) for number, task in enumerate(splits)]
        progress = TuningProgress(on_progress, FirstBlock(listener, base.model.device))
        table = ScoreTable(workers.executor, store, config.state_cache_gb, progress.add)
        gains = Gains(table, tasks, full, config.max_loss, config.seed)
        search = _search(beam, gains, config, progress, listener)
        paths = [full, *search.paths]
        _test(paths, tasks, table, progress)
        named_paths = make_named_paths(paths, gains)
        progress.finish()
    return StaticPaths(
        **header,
        tasks=tuple(task.name for task in tasks),
        divided=tuple(task.name for task in tasks if task.is_divided),
        objective={task.name: task.objective for task in tasks},
        num_layers=base.num_layers,
        runtime=identity["runtime"],
        questions_sha256=identity["questions_sha256"],
        is_cut=search.is_cut,
        paths=tuple(named_paths),
    )


@dataclass(frozen=True)
class _SearchResult:
    """The result of the search.

    Attributes:
        paths: The best path of each level.
        is_cut: Whether `--minutes` ended the search early.
    """

    paths: Sequence[StaticPath]
    is_cut: bool


def _search(
    beam: Beam, gains: Gains, config: TuneConfig, progress: TuningProgress, listener: Listener
) -> _SearchResult:
    """Search for paths level by level, and choose the best path of each level."""
    tasks = gains.tasks

    def measure(paths: Sequence[StaticPath], num_questions: int) -> Floats:
        return _measure_fit(gains.table, tasks, paths, num_questions, beam.num_questions)

    progress.expect(estimate_pairs(beam, tasks))
    best_paths: list[StaticPath] = []
    for level in beam.levels(measure, gains.may_extend):
        scored_paths = [gains.full, *level.paths]
        gains.table.fill(PathsOnPart(task, SELECT, scored_paths) for task in tasks)
        best = gains.choose_best(level.paths)
        if not best_paths:
            listener.note(HEAD)
        best_paths.append(best)
        change = gains.gain_with_interval(best)
        num_left = estimate_pairs(beam, tasks, level.saved)
        progress.expect(num_left, describe_level(level.saved, change))
        listener.note(f"{format_level(level.saved, change)}\n  {best.edits(beam.num_layers)}")

        is_last = level.saved == beam.max_saved
        if _is_time_over(config.minutes, gains.table.seconds):
            listener.note(f"{config.minutes:g} minutes are over; no further level begins")
            return _SearchResult(best_paths, is_cut=not is_last)
        if not is_last and not gains.may_extend(best):  # so no path of the level may
            listener.note(
                f"all paths of this level lose more than --max-loss {config.max_loss:g}, "
                f"so the search ends"
            )
    return _SearchResult(best_paths, is_cut=False)


def _is_time_over(minutes: float | None, seconds: float) -> bool:
    """Tell whether the time of `--minutes` is over."""
    return minutes is not None and seconds > 60 * minutes


def _measure_fit(
    table: ScoreTable,
    tasks: Sequence[TaskQuestions],
    paths: Sequence[StaticPath],
    num_questions: int,
    num_all: int,
) -> Floats:
    """Return each path's mean objective over the tasks, on the first questions of `fit`, `[N]`.

    Args:
        table: The scores.
        tasks: The tasks.
        paths: N paths.
        num_questions: How many questions to score of the task with the most questions. Of another
            task the same share is scored, rounded up.
        num_all: All questions of the task with the most.
    """
    requests = []
    for task in tasks:
        limit = math.ceil(num_questions * len(task.items[FIT]) / num_all)
        requests.append(PathsOnPart(task, FIT, paths, limit))
    table.fill(requests)
    total = np.zeros(len(paths))
    for task in tasks:
        total += np.array([np.mean(table.objective(task, FIT, path)) for path in paths])
    mean: Floats = total / len(tasks)
    return mean


def _test(
    paths: Sequence[StaticPath],
    tasks: Sequence[TaskQuestions],
    table: ScoreTable,
    progress: TuningProgress,
) -> None:
    """Score paths on all parts and their texts, and grade generated answers."""
    scores: list[PathsOnPart] = []
    answers: list[PathsOnPart] = []
    for task in tasks:
        scores += [PathsOnPart(task, part, paths) for part in task.items]
        if task.is_generated:
            answers += [PathsOnPart(task, part, paths) for part in (SELECT, TEST)]
    progress.expect(table.count_missing(scores) + table.count_missing_grades(answers))
    table.fill(scores)
    table.fill_grades(answers)
