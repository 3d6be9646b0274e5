"""The stage `tune`: it reads questions of one or more tasks, and writes `paths.json`.

Paths are fitted on one part of the questions, chosen on another and tested on a third (see
`data_splits`). The search proceeds in levels (see `beam`). An interrupted tuning can be resumed.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from msgspec.structs import replace

from drllm.config import TuneConfig
from drllm.config.fields import make_settings, replace_settings
from drllm.cost import path_executions
from drllm.models.base.load import BaseModel
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.paths import StaticPath
from drllm.processes import count, from_first
from drllm.records.codec import hash_values, write_json
from drllm.records.manifest import new_manifest
from drllm.records.places import only_writer, stage_folder
from drllm.records.resume import Chunks, refuse_other_run
from drllm.records.static_paths import (
    FIT,
    PATHS_FILE,
    SELECT,
    TEST,
    NamedPath,
    PathScore,
    StaticPaths,
    read_paths,
    steps_to_write,
)
from drllm.statistics.intervals import Floats, accuracy_interval, mean_interval, sum_interval
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import compare
from drllm.tasks.base import Task
from drllm.tuning.beam import Beam, Level, make_beam, num_pairs
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.level_lines import HEAD, describe_level, format_level
from drllm.tuning.objectives import GOLD
from drllm.tuning.task_scorer import TEXTS_OF, TaskScorer
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener, OnProgress

CHUNKS_FOLDER = "paths.partial"
TEST_LEVELS = 1  # the test after the search takes about as long as this many levels


def tune(
    model: Any,
    tasks: Task | str | Sequence[Task | str] | None = None,
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
        model: The name of a model or a `ModelConfig`, which is loaded here; a `BaseModel`, as
            `load` returns it; a `RoutedModel`; or a causal language model of transformers.
        tasks: Tasks, names of tasks, or files of questions; None takes the config's tasks.
        config: The settings; None takes the defaults.
        output_dir: Folder for `paths.json`; None keeps no files.
        tokenizer: The model's tokenizer; None loads it by the model's name.
        listener: Receives the progress.
        settings: Settings of `TuneConfig` by name, which replace the config's settings.

    Returns:
        The full path and the best path of each level, from the most executions to the fewest. A
        path is marked as dominated if a shorter path does at least as well.

    Raises:
        ConfigError: Settings have no effect or make no sense, or the folder belongs to another run.
        TaskError: A task is unknown, or has too few questions.

    Source: ours; the objective is TALE's (arXiv 2510.22767), as a log-probability.
    """
    config = replace_settings(TuneConfig, config, settings)
    listener = listener or Listener()
    splits = split_tasks(config, tasks)
    with ExitStack() as stack:
        folder = stage_folder(output_dir, stack)
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        stack.enter_context(only_writer(folder, "tuning", "--output-dir"))
        return _Tuning(base, routed, splits, config, folder, listener).run()


class _Tuning:
    """One run of a tuning: it searches, chooses and tests paths.

    The *gain* of a path is its objective minus the objective of the full path, on the part `select`
    of the questions, as a mean over the tasks.
    """

    def __init__(
        self,
        base: BaseModel,
        routed: RoutedModel,
        splits: Sequence[TaskSplits],
        config: TuneConfig,
        folder: Path,
        listener: Listener,
    ) -> None:
        self.routed = routed
        self.config = config
        self.folder = folder
        self.listener = listener
        self.full = StaticPath(range(routed.num_layers))
        self.header = new_manifest("paths", model=base.identity, config=config.to_dict())
        self.identity: dict[str, Any] = {
            "settings": config.decisive(),
            "model": base.identity,
            "runtime": base.runtime,
            "questions_sha256": hash_values(task.digest_values() for task in splits),
        }
        self.chunks = Chunks(folder / CHUNKS_FOLDER, self.identity, stage="tuning")
        self.beam = make_beam(config, splits, routed.num_layers)
        self.progress = _Progress(self.beam, FirstBlock(listener, base.model.device))
        self.tasks = [
            TaskScorer(routed, task, config, self.chunks, self._report_scores) for task in splits
        ]
        self._is_cut = False  # whether `--minutes` ended the search early

    def run(self) -> StaticPaths:
        """Search for paths, or return the result that an earlier run with these settings wrote."""
        finished = from_first(self._read_finished)
        if finished is not None:
            if not finished.is_cut:  # a cut search may go on from its chunks
                self.chunks.remove()  # a killed run may have left them
            return finished
        self.chunks.open()
        with self.listener.progress("tuning", "") as self.progress.report:
            paths = [self.full, *self._search()]
            self._test(paths)
            result = self._make_record(paths)
            self.progress.finish()
        write_json(self.folder / PATHS_FILE, result)
        if not result.is_cut:
            self.chunks.remove()
        return result

    def _read_finished(self) -> StaticPaths | None:
        """Return the result that the folder has; refuse the result of another run.

        Return None if there is no result, or if a cut search goes on because `--minutes` changed.
        """
        file = self.folder / PATHS_FILE
        if not file.exists():
            return None
        record = read_paths(file)
        identity = {
            "settings": make_settings(TuneConfig, record.config).decisive(),
            "model": record.model,
            # Older files have no runtime and no digest, so these aren't compared.
            "runtime": record.runtime or self.identity["runtime"],
            "questions_sha256": record.questions_sha256 or self.identity["questions_sha256"],
        }
        remedy = "choose another --output-dir, or delete the old one"
        refuse_other_run(f"the tuning in {file}", identity, self.identity, remedy)
        if record.is_cut and record.config.get("minutes") != self.config.minutes:
            return None
        return record

    def _search(self) -> list[StaticPath]:
        """Search for paths; return the best path of each level."""
        best_paths: list[StaticPath] = []
        for level in self.beam.levels(self._measure_fit, self._may_extend):
            for task in self.tasks:
                task.score_paths(SELECT, [self.full, *level.paths])
            # Paths that may be extended come before all others, whatever their gain.
            best = max(level.paths, key=lambda path: (self._may_extend(path), self._gain(path)))
            if not best_paths:
                self.listener.note(HEAD)
            best_paths.append(best)
            self._note_level(level, best)
            is_last = level.saved == self.beam.max_saved
            if self._is_time_over():
                self._is_cut = not is_last
                break
            if not is_last and not self._may_extend(best):  # so no path of the level may
                self.listener.note(
                    f"all paths of this level lose more than --max-loss {self.config.max_loss:g}, "
                    f"so the search ends"
                )
        return best_paths

    def _note_level(self, level: Level, best: StaticPath) -> None:
        """Print what the best path of a level saves and loses."""
        saved = self.beam.saved(best)
        change = self._change(best)
        self.progress.finish_level(level.saved, describe_level(saved, change))
        edits = best.edits(self.routed.num_layers)
        self.listener.note(f"{format_level(saved, change)}\n  {edits}")

    def _is_time_over(self) -> bool:
        """Tell whether the time of `--minutes` is over, and print it if it is."""
        minutes = self.config.minutes
        if minutes is None or self._seconds() <= 60 * minutes:
            return False
        self.listener.note(f"{minutes:g} minutes are over; no further level begins")
        return True

    def _seconds(self) -> float:
        """Return how long scoring took, including stored scores, as a mean over the processes."""
        return sum(task.seconds for task in self.tasks) / count()

    def _report_scores(self, num_pairs: int, note: str) -> None:
        self.progress.add(num_pairs, note, self._seconds())

    def _test(self, paths: Sequence[StaticPath]) -> None:
        """Score all paths on the questions of `select` and `test`, and on their texts."""
        expected = 0  # pairs of a question and a path to score, about
        for task in self.tasks:
            for part in (SELECT, TEST):
                if part == TEST or task.is_generated:
                    num_texts = task.num_questions(TEXTS_OF + part)
                    expected += len(paths) * (num_texts + task.num_questions(part))
        self.progress.begin_test(expected)
        for task in self.tasks:
            for part in (SELECT, TEST):
                task.score_paths(part, paths)
                task.score_paths(TEXTS_OF + part, paths)

    def _measure_fit(self, paths: Sequence[StaticPath], num_questions: int) -> Floats:
        """Return each path's mean objective over the tasks, on the first questions of `fit`.

        Of the task with the most questions, `num_questions` are scored. Of another task the same
        share is scored, rounded up.
        """
        if num_questions == self.beam.rungs[0][0]:  # a level begins
            self.progress.expect(self._estimate_pairs(len(paths)))
        total = np.zeros(len(paths))
        for task in self.tasks:
            limit = math.ceil(num_questions * task.num_questions(FIT) / self.beam.num_questions)
            means = [np.mean(values) for values in task.score_paths(FIT, paths, limit)]
            total += np.array(means)
        mean: Floats = total / len(self.tasks)
        return mean

    def _estimate_pairs(self, num_paths: int) -> float:
        """Return about how many pairs of a question and a path a level scores."""
        num_fit = sum(task.num_questions(FIT) for task in self.tasks)
        num_select = sum(task.num_questions(SELECT) for task in self.tasks)
        # `num_pairs` counts the questions of the largest task only.
        all_tasks = num_fit / self.beam.num_questions
        return all_tasks * num_pairs(num_paths, self.beam.rungs) + self.beam.width * num_select

    def _gain(self, path: StaticPath) -> float:
        """Return the gain of a path."""
        total = 0.0
        for task in self.tasks:
            total += fmean(task.compare_paths(SELECT, path, self.full))
        return total / len(self.tasks)

    def _change(self, path: StaticPath) -> tuple[float, float, float]:
        """Return the gain of a path, and the low and the high end of its 95 % interval."""
        weights_and_differences = []
        for task in self.tasks:
            differences = task.compare_paths(SELECT, path, self.full)
            weights_and_differences.append((1 / len(self.tasks), differences))
        return sum_interval(weights_and_differences, self.config.seed)

    def _may_extend(self, path: StaticPath) -> bool:
        """Tell whether the search may skip one more layer of a path.

        It may not if the path loses more than `--max-loss` on a task, even at the high end of the
        95 % interval of its gain on the task.
        """
        for task in self.tasks:
            differences = task.compare_paths(SELECT, path, self.full)
            _, high = mean_interval(differences, self.config.seed)
            if high < -self.config.max_loss:
                return False
        return True

    def _find_dominated(self, paths: Sequence[StaticPath]) -> list[bool]:
        """Tell for each path whether a shorter path has as high a gain; never for the full path.

        The paths must be in order, from the longest to the shortest.
        """
        gains = [self._gain(path) for path in paths]
        dominated = []
        for place, path in enumerate(paths):
            shorter_is_as_good = any(gain >= gains[place] for gain in gains[place + 1 :])
            dominated.append(path != self.full and shorter_is_as_good)
        return dominated

    def _name(self, path: StaticPath) -> str:
        """Return the name of a path in `paths.json`, such as `skip3`."""
        if path == self.full:
            return "full"
        return f"skip{self.routed.num_layers - path_executions(path):.3g}"

    def _make_record(self, paths: Sequence[StaticPath]) -> StaticPaths:
        """Return the content of `paths.json`."""
        named_paths = []
        for path, is_dominated in zip(paths, self._find_dominated(paths), strict=True):
            scores = []
            for part in (FIT, SELECT, TEST):
                scores += [self._make_score(task, part, path) for task in self.tasks]
            named_paths.append(
                NamedPath(
                    name=self._name(path),
                    steps=steps_to_write(path),
                    executions=path_executions(path),
                    dominated=is_dominated,
                    measured=tuple(scores),
                )
            )
        return StaticPaths(
            **self.header,
            tasks=tuple(task.name for task in self.tasks),
            divided=tuple(task.name for task in self.tasks if task.splits.is_divided),
            objective={task.name: task.objective for task in self.tasks},
            num_layers=self.routed.num_layers,
            runtime=self.identity["runtime"],
            questions_sha256=self.identity["questions_sha256"],
            is_cut=self._is_cut,
            paths=tuple(named_paths),
        )

    def _make_score(self, task: TaskScorer, part: str, path: StaticPath) -> PathScore:
        """Return the scores of a path on a part of a task's questions, for `paths.json`."""
        [values] = task.score_paths(part, [path])
        score = PathScore(
            task=task.name, part=part, num_questions=len(values), objective=fmean(values)
        )
        if path != self.full:
            differences = task.compare_paths(part, path, self.full)
            low, high = mean_interval(differences, self.config.seed)
            score = replace(score, change=(fmean(differences), low, high))
        if part == FIT:  # the path was fitted on this part, so no accuracy is reported
            return score
        outcomes = self._find_outcomes(task, part, path)
        score = replace(score, text_loss=fmean(outcomes.text_loss))
        if not outcomes.correct:
            return score
        score = replace(score, accuracy=fmean(outcomes.correct))
        if path == self.full:
            return score
        full_outcomes = self._find_outcomes(task, part, self.full)
        low, _ = accuracy_interval(full_outcomes.correct, self.config.seed)
        is_above_chance = low > task.chance
        verdicts = compare(outcomes, full_outcomes, self.config.seed, above_chance=is_above_chance)
        return replace(score, against_full=verdicts)

    def _find_outcomes(self, task: TaskScorer, part: str, path: StaticPath) -> Outcomes:
        """Return what a path gives for each question of a part of a task."""
        [objective] = task.score_paths(part, [path])
        [texts] = task.score_paths(TEXTS_OF + part, [path])
        return Outcomes(
            name=self._name(path),
            executions=path_executions(path),
            correct=task.grade_path(part, path),
            gold_logprob=objective if task.objective == GOLD else [],
            text_loss=[-value for value in texts],
        )


class _Progress:
    """The progress of a tuning in levels; the test counts as `TEST_LEVELS` further levels.

    Within a level, the progress is the share of the *pairs* (of a question and a path) that are
    scored.

    Attributes:
        report: Called with the number of finished levels, the number of all levels, and a text
            about the last work. It is set when the work begins.
    """

    report: OnProgress

    def __init__(self, beam: Beam, first_block: FirstBlock) -> None:
        self._num_levels = beam.max_saved
        self._first_block = first_block
        self._level = 0  # the last finished level
        self._done = 0.0  # finished levels, as reported; the number never decreases
        self._pairs = 0  # pairs that were scored since the last level
        self._expected = 1.0  # pairs that are scored from the last level to the next, about

    def finish_level(self, level: int, note: str) -> None:
        """Report that a level is done, with a note on its best path."""
        self._level = level
        self._pairs = 0
        self._report(note)

    def begin_test(self, num_pairs: float) -> None:
        """Begin the test after all levels; it scores about `num_pairs` pairs."""
        self._level = self._num_levels
        self.expect(num_pairs)

    def expect(self, num_pairs: float) -> None:
        """Begin to count pairs again; about `num_pairs` are scored until the next level."""
        self._pairs = 0
        self._expected = num_pairs

    def add(self, num_pairs: int, note: str, seconds: float) -> None:
        """Count pairs that were scored, and report the progress.

        Args:
            num_pairs: The number of the pairs.
            note: A text that describes them.
            seconds: The time of all scores so far, including stored scores.
        """
        self._pairs += num_pairs
        self._report(note)
        if num_pairs > 0:
            self._first_block.finish(self._done / self._total, seconds)

    def finish(self) -> None:
        """Report that all is done."""
        self.report(self._total, self._total, "")

    @property
    def _total(self) -> int:
        """The number of all levels, with the test."""
        return self._num_levels + TEST_LEVELS

    def _report(self, note: str) -> None:
        """Report the progress; it never decreases, even if more pairs are scored than expected."""
        share = min(1.0, self._pairs / self._expected)
        size = TEST_LEVELS if self._level == self._num_levels else 1
        self._done = max(self._done, self._level + size * share)
        self.report(self._done, self._total, note)
