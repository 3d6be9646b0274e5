"""The stage `tune`: it reads questions of one or more tasks, and writes `paths.json`.

Paths are fitted on one part of the questions, chosen on another and tested on a third; see
`data_splits`. An interrupted tuning can be resumed.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from msgspec.structs import replace

from drllm.config import TuneConfig
from drllm.config.fields import changed, make_settings
from drllm.cost import path_executions
from drllm.listener import Listener, OnProgress
from drllm.models.base.first_block import FirstBlock
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
from drllm.tuning.level_lines import HEAD, describe_level, level_line
from drllm.tuning.objectives import GOLD
from drllm.tuning.task_scorer import TEXTS_OF, TaskScorer

CHUNKS_FOLDER = "paths.partial"
FINAL = 1  # testing takes about as long as this many levels


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
        model: A name or a `ModelConfig` (loaded here), what `load` returns, a `RoutedModel`, or a
            causal language model of transformers.
        tasks: Tasks, names of tasks, or files of questions; None takes the config's tasks.
        config: The settings.
        output_dir: Folder for `paths.json`; None keeps no files.
        tokenizer: The model's tokenizer; None loads it by the model's name.
        listener: Receives the progress.
        settings: Settings of `TuneConfig` by name, which replace the config's settings.

    Returns:
        The full path and the best path of each cost, from the most executions to the fewest. A path
        is marked as dominated if a shorter one does at least as well.

    Raises:
        ConfigError: Settings have no effect or make no sense, or the folder belongs to another run.
        TaskError: A task is unknown, or has too few questions.

    Source: ours; the objective is TALE's (arXiv 2510.22767), as a log-probability.
    """
    config = changed(TuneConfig, config, settings)
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
    """One run of a tuning: it searches, chooses and tests paths."""

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
            "questions_sha256": hash_values(each.digest_values() for each in splits),
        }
        self.chunks = Chunks(folder / CHUNKS_FOLDER, self.identity, stage="tuning")
        self.beam = make_beam(config, splits, routed.num_layers)
        self.progress = _Progress(self.beam, FirstBlock(listener, base.model.device))
        self.tasks = [
            TaskScorer(routed, each, config, self.chunks, self._note_scored) for each in splits
        ]
        self._is_cut = False  # whether `--minutes` ended the search early

    def run(self) -> StaticPaths:
        """Search for paths, or return the result that an earlier run with these settings wrote."""
        finished = from_first(self._read_finished)
        if finished is not None:
            if not finished.is_cut:
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
        """Return the folder's result; None if it has none, or if a cut search may go on."""
        file = self.folder / PATHS_FILE
        if not file.exists():
            return None
        record = read_paths(file)
        identity = {
            "settings": make_settings(TuneConfig, record.config).decisive(),
            "model": record.model,
            # Older files have neither of these two.
            "runtime": record.runtime or self.identity["runtime"],
            "questions_sha256": record.questions_sha256 or self.identity["questions_sha256"],
        }
        remedy = "choose another --output-dir, or delete the old one"
        refuse_other_run(f"the tuning in {file}", identity, self.identity, remedy)
        if record.is_cut and record.config.get("minutes") != self.config.minutes:
            return None
        return record

    def _search(self) -> list[StaticPath]:
        """Return the best path of each level."""
        best_paths: list[StaticPath] = []
        for level in self.beam.levels(self._score_fit, self._may_extend):
            for task in self.tasks:
                task.score_paths(SELECT, [self.full, *level.paths])
            best = max(level.paths, key=lambda path: (self._may_extend(path), self._gain(path)))
            if not best_paths:
                self.listener.note(HEAD)
            best_paths.append(best)
            self._note_level(level, best)
            is_last = level.saved == self.beam.max_saved
            if self._is_time_over():
                self._is_cut = not is_last
                break
            if not (is_last or self._may_extend(best)):
                limit = f"--max-loss {self.config.max_loss:g}"
                self.listener.note(
                    f"all paths of this level lose more than {limit}: none is edited further"
                )
        return best_paths

    def _note_level(self, level: Level, best: StaticPath) -> None:
        """Print what the best path of a level saves and loses."""
        saved = self.beam.saved(best)
        change = self._change(best)
        self.progress.begin_level(level.saved, describe_level(saved, change))
        edits = best.edits(self.routed.num_layers)
        self.listener.note(f"{level_line(saved, change)}\n  {edits}")

    def _is_time_over(self) -> bool:
        """Tell whether the minutes are over, and print it if they are."""
        minutes = self.config.minutes
        if minutes is None or self._seconds() <= 60 * minutes:
            return False
        self.listener.note(f"{minutes:g} minutes are over; no further level begins")
        return True

    def _seconds(self) -> float:
        """Return each process's seconds of scoring, including the seconds of stored scores."""
        return sum(task.seconds for task in self.tasks) / count()

    def _note_scored(self, num_pairs: int, note: str) -> None:
        self.progress.add(num_pairs, note, self._seconds())

    def _test(self, paths: Sequence[StaticPath]) -> None:
        """Score all paths on the questions and texts that test them."""
        num_pairs = 0
        for task in self.tasks:
            for part in (SELECT, TEST):
                if part == TEST or task.is_generated:
                    num_texts = task.num_questions(TEXTS_OF + part)
                    num_pairs += len(paths) * (num_texts + task.num_questions(part))
        self.progress.begin_test(num_pairs)
        for task in self.tasks:
            for part in (SELECT, TEST):
                task.score_paths(part, paths)
                task.score_paths(TEXTS_OF + part, paths)

    def _score_fit(self, paths: Sequence[StaticPath], num_questions: int) -> Floats:
        """Return each path's mean objective over the tasks, on the first questions of `fit`."""
        most = self.beam.num_questions
        if num_questions == self.beam.rungs[0][0]:  # a level begins
            self.progress.expect(self._pairs_of_level(len(paths)))
        total = np.zeros(len(paths))
        for task in self.tasks:
            # The same share of each task's questions is scored.
            num = -(-num_questions * task.num_questions(FIT) // most)
            means = [np.mean(values) for values in task.score_paths(FIT, paths, num)]
            total += np.array(means)
        mean: Floats = total / len(self.tasks)
        return mean

    def _pairs_of_level(self, num_paths: int) -> float:
        """Return about how many pairs of a question and a path a level scores."""
        num_fit = sum(task.num_questions(FIT) for task in self.tasks)
        num_select = sum(task.num_questions(SELECT) for task in self.tasks)
        share = num_fit / self.beam.num_questions
        return share * num_pairs(num_paths, self.beam.rungs) + self.beam.width * num_select

    def _gain(self, path: StaticPath) -> float:
        """Return the objective of a path minus the objective of the full path, on `select`."""
        total = 0.0
        for task in self.tasks:
            total += fmean(task.compare_paths(SELECT, path, self.full))
        return total / len(self.tasks)

    def _change(self, path: StaticPath) -> tuple[float, float, float]:
        """Return the gain of a path with its 95 % interval."""
        weighted = []
        for task in self.tasks:
            differences = task.compare_paths(SELECT, path, self.full)
            weighted.append((1 / len(self.tasks), differences))
        return sum_interval(weighted, self.config.seed)

    def _may_extend(self, path: StaticPath) -> bool:
        """Tell whether a path may be edited further: no task shows that it loses too much."""
        for task in self.tasks:
            differences = task.compare_paths(SELECT, path, self.full)
            _, highest = mean_interval(differences, self.config.seed)
            if highest < -self.config.max_loss:
                return False
        return True

    def _find_dominated(self, paths: Sequence[StaticPath]) -> list[bool]:
        """Tell for each path whether a shorter path does as well; never for the full path."""
        gains = [self._gain(path) for path in paths]
        dominated = []
        for place, path in enumerate(paths):
            is_shorter_as_good = any(gain >= gains[place] for gain in gains[place + 1 :])
            dominated.append(path != self.full and is_shorter_as_good)
        return dominated

    def _name(self, path: StaticPath) -> str:
        if path == self.full:
            return "full"
        return f"skip{self.routed.num_layers - path_executions(path):.3g}"

    def _make_record(self, paths: Sequence[StaticPath]) -> StaticPaths:
        """Return the content of `paths.json`."""
        named = []
        for path, is_dominated in zip(paths, self._find_dominated(paths), strict=True):
            scores = [
                self._score(task, part, path) for part in (FIT, SELECT, TEST) for task in self.tasks
            ]
            named.append(
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
            paths=tuple(named),
        )

    def _score(self, task: TaskScorer, part: str, path: StaticPath) -> PathScore:
        """Return the scores of a path on a part of a task's questions."""
        [values] = task.score_paths(part, [path])
        score = PathScore(
            task=task.name, part=part, num_questions=len(values), objective=fmean(values)
        )
        if path != self.full:
            differences = task.compare_paths(part, path, self.full)
            low, high = mean_interval(differences, self.config.seed)
            score = replace(score, change=(fmean(differences), low, high))
        if part == FIT:  # paths were fitted on this part, so nothing is claimed
            return score
        ours = self._outcomes(task, part, path)
        score = replace(score, text_loss=fmean(ours.text_loss))
        if not ours.correct:
            return score
        score = replace(score, accuracy=fmean(ours.correct))
        if path == self.full:
            return score
        full = self._outcomes(task, part, self.full)
        lowest, _ = accuracy_interval(full.correct, self.config.seed)
        is_above_chance = lowest > task.chance
        verdicts = compare(ours, full, self.config.seed, above_chance=is_above_chance)
        return replace(score, against_full=verdicts)

    def _outcomes(self, task: TaskScorer, part: str, path: StaticPath) -> Outcomes:
        """Return a path's outcomes on a part of a task's questions."""
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
    """The progress of a tuning in levels; testing counts as `FINAL` further levels.

    `report` is called with the number of finished levels, the number of all levels, and a text
    about the last work.
    """

    report: OnProgress

    def __init__(self, beam: Beam, first_block: FirstBlock) -> None:
        self._num_levels = beam.max_saved
        self._first_block = first_block
        self._level = 0  # the last finished level
        self._done = 0.0  # finished levels, as reported; the number never decreases
        self._pairs = 0  # pairs of a question and a path that were scored since the last level
        self._expected = 1.0  # pairs that will be scored until the next level

    def begin_level(self, saved: int, note: str) -> None:
        """Report that a level is done, with a note on its best path."""
        self._level = saved
        self._pairs = 0
        self._report(note)

    def begin_test(self, expected: float) -> None:
        """Begin the test after all levels, which scores `expected` pairs (see `expect`)."""
        self._level = self._num_levels
        self.expect(expected)

    def expect(self, expected: float) -> None:
        """Set how many pairs of a question and a path will be scored until the next level."""
        self._pairs = 0
        self._expected = expected

    def add(self, num_pairs: int, note: str, seconds: float) -> None:
        """Count pairs of a question and a path that were scored, and report the progress.

        Args:
            num_pairs: The number of these pairs.
            note: A text that describes them.
            seconds: The time of all scores so far, including stored scores.
        """
        self._pairs += num_pairs
        self._report(note)
        if num_pairs > 0:
            self._first_block.finish(self._done / (self._num_levels + FINAL), seconds)

    def finish(self) -> None:
        """Report that all is done."""
        total = self._num_levels + FINAL
        self.report(total, total, "")

    def _report(self, note: str) -> None:
        share = min(1.0, self._pairs / self._expected)
        size = FINAL if self._level == self._num_levels else 1
        self._done = max(self._done, self._level + size * share)
        self.report(self._done, self._num_levels + FINAL, note)
