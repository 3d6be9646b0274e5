"""Tuning as a stage: questions of one or more tasks in, `paths.json` out, resumable.

Paths are fitted on one part of the questions, chosen on another and tested on the rest; see
`parts`.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from drllm.config import TuneConfig
from drllm.config.fields import changed, make_settings
from drllm.cost import path_executions
from drllm.listener import Listener
from drllm.models.base.first_block import FirstBlock
from drllm.models.base.load import BaseModel
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.paths import StaticPath
from drllm.processes import count, from_first
from drllm.records.codec import digest_of, write_json
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
from drllm.statistics.verdicts import compare, signed
from drllm.tasks.base import Task
from drllm.tasks.examples import Prompt
from drllm.tasks.examples import choose as draw
from drllm.tuning.beam import beam_of
from drllm.tuning.judge import Item, Judge, Scores, graded, items_of, texts_of
from drllm.tuning.parts import GOLD, LOSS, TaskParts, objective_of, parts_of_tasks, prompt_of

CHUNKS_FOLDER = "paths.partial"
FINAL = 1  # levels whose time testing takes, about
MOST_PAIRS = 100  # questions times paths that are scored in one go, and that a kill loses, at most
MOST_ANSWERS = 32  # the same of answers that are generated
NUM_TEXTS = 100  # questions of a part whose text's next-token loss is read too, at most


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

    What is done is kept; after an interruption the same call resumes, and ends with the same paths.

    Args:
        model: A name or a `ModelConfig` (loaded here), what `load` returns, a `RoutedModel`, or a
            causal language model of transformers.
        tasks: Tasks, their names or files of questions; None for those of the config.
        config: The settings.
        output_dir: Folder for `paths.json`; None writes nothing that stays.
        tokenizer: The model's; None loads the one of its name, unless it comes with one.
        listener: Hears how far it is.
        settings: Settings of `TuneConfig` by name, in place of the config's.

    Returns:
        The full path and the best path of each cost, from the most executions to the fewest;
        marked are those that a shorter path does better than.

    Raises:
        ConfigError: Settings without effect or that make no sense, or a folder of another run.
        TaskError: An unknown task, or too few questions.

    Source: ours; the objective is that of TALE (arXiv 2510.22767) as a log-probability.
    """
    config, listener = changed(TuneConfig, config, settings), listener or Listener()
    divided = parts_of_tasks(config, tasks)
    with ExitStack() as stack:
        folder = stage_folder(output_dir, stack)
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        stack.callback(routed.detach)
        stack.enter_context(only_writer(folder, "tuning", "--output-dir"))
        return _Tuning(base, routed, divided, config, folder, listener).run()


class TaskScorer:
    """One task's questions, and what is known of paths on them."""

    def __init__(
        self,
        routed: RoutedModel,
        divided: TaskParts,
        config: TuneConfig,
        chunks: Chunks,
        on_scored: Callable[[int, str], None],
    ) -> None:
        self.routed, self.config, self.chunks = routed, config, chunks
        self.on_scored = on_scored
        self.task, self.divided = divided.task, divided
        self.name = divided.task.name
        self.objective = objective_of(self.task, config)
        self.weight = (config.weights or {}).get(self.name, 1.0)
        self.is_generated = divided.is_generated(self.objective)
        self.seconds = 0.0
        self._judges: dict[str, Judge] = {}
        # Objective and right answers on the first questions of a part, [2, Q].
        self._known: dict[tuple[str, StaticPath], Floats] = defaultdict(lambda: np.zeros((2, 0)))
        self._answered: dict[tuple[str, StaticPath], list[float]] = {}

    def prompts(self, part: str) -> list[Prompt]:
        """Return how the questions of a part are asked."""
        examples = self.divided.examples[part]
        if part != FIT:
            examples = draw(examples, self.config.num_judged, self.config.seed)
        else:  # in random order, since a search looks at the first ones first
            order = np.random.RandomState(self.config.seed).permutation(len(examples))
            examples = [examples[place] for place in order]
        return [prompt_of(self.task, example, self.objective) for example in examples]

    def judge(self, part: str) -> Judge:
        """Return what scores paths on a part; `texts of PART` reads the texts of its questions."""
        if part not in self._judges:
            of_texts = part.removeprefix("texts of ")
            prompts = self.prompts(of_texts)
            items: list[Item]
            if of_texts == part:
                items, objective = items_of(self.routed, prompts, self.objective), self.objective
            else:
                prompts = draw(prompts, NUM_TEXTS, self.config.seed)
                items, objective = texts_of(self.routed, prompts), LOSS
            self._judges[part] = Judge(self.routed, items, objective, self.config.state_cache_gb)
        return self._judges[part]

    def objectives(
        self, part: str, paths: Sequence[StaticPath], num: int | None = None
    ) -> list[list[float]]:
        """Return the objective of paths on the first questions of a part, each asked once."""
        judge = self.judge(part)
        num = len(judge.items) if num is None else min(num, len(judge.items))
        by_known: dict[int, list[StaticPath]] = {}
        for path in dict.fromkeys(paths):
            known = self._known[part, path].shape[1]
            if known < num:
                by_known.setdefault(known, []).append(path)
        for known, unknown in by_known.items():
            found = self._once(part, unknown, known, num)
            for place, path in enumerate(unknown):
                both = self._known[part, path], found[:, place]
                self._known[part, path] = np.concatenate(both, axis=1)
        return [self._known[part, path][0].tolist() for path in paths]

    def _once(self, part: str, paths: Sequence[StaticPath], first: int, last: int) -> Floats:
        """Score paths on a range of questions, a few of like length in each go, `[2, N, Q]`."""
        judge = self.judge(part)
        order = sorted(range(first, last), key=lambda place: judge.items[place].question.length)
        size = max(1, MOST_PAIRS // len(paths))
        found = np.zeros((2, len(paths), last - first))
        digest = digest_of(path.layers for path in paths)[:16]
        parts = {start: order[start : start + size] for start in range(0, len(order), size)}
        makes = {
            f"{self.name} {part} {first} to {last} from {start} {digest}": partial(
                judge.scores, paths, places
            )
            for start, places in parts.items()
        }
        scored = self.chunks.each_once(makes, Scores)
        for (start, places), scores in zip(parts.items(), scored, strict=True):
            at = [place - first for place in places]
            found[0][:, at] = scores.objective
            found[1][:, at] = scores.right or 0.0
            self.seconds += scores.seconds
            told = f"{len(paths)} paths on {start + len(places)} of {len(order)} questions"
            self.on_scored(len(paths) * len(places), told)
        return found

    def correct(self, part: str, path: StaticPath) -> list[float]:
        """Return which questions of a part are answered right; empty where nothing says so."""
        if self.objective == GOLD:
            self.objectives(part, [path])
            right: list[float] = self._known[part, path][1].tolist()
            return right
        if self.is_generated and (part, path) not in self._answered:
            prompts, digest = self.prompts(part), digest_of(path.layers)[:16]
            makes = {
                f"{self.name} answers {part} from {start} {digest}": partial(
                    graded, self.routed, path, prompts[start : start + MOST_ANSWERS]
                )
                for start in range(0, len(prompts), MOST_ANSWERS)
            }
            found: list[float] = []
            for grades in self.chunks.each_once(makes, list[float]):
                found += grades
                self.on_scored(len(grades), f"{len(found)} of {len(prompts)} answers of a path")
            self._answered[part, path] = found
        return self._answered.get((part, path), [])

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        if self.objective != GOLD:
            return 0.0
        examples = self.divided.examples[SELECT]
        return fmean(1 / len(example.choices) for example in examples)


class _Tuning:
    """One run: search, choice, test."""

    def __init__(
        self,
        base: BaseModel,
        routed: RoutedModel,
        divided: Sequence[TaskParts],
        config: TuneConfig,
        folder: Path,
        listener: Listener,
    ) -> None:
        self.routed, self.config, self.folder, self.listener = routed, config, folder, listener
        L = routed.num_layers
        self.full = StaticPath(range(L))
        self.header = new_manifest("paths", model=base.identity, config=config.to_dict())
        self.identity: dict[str, Any] = {
            "settings": config.decisive(),
            "model": base.identity,
            "runtime": base.runtime,
            "questions_sha256": digest_of(each.digested() for each in divided),
        }
        self.chunks = Chunks(folder / CHUNKS_FOLDER, self.identity, stage="tuning")
        self.tasks = [TaskScorer(routed, one, config, self.chunks, self._scored) for one in divided]
        self.beam = beam_of(config, divided, L)
        self._most = self.beam.max_saved
        self._first_block = FirstBlock(listener, base.model.device)
        self._is_cut = False  # by `--minutes`
        self._done = self._saved = 0.0  # of levels, as told; by the last one
        self._pairs, self._expected = 0, 1.0  # questions times paths scored since, of so many

    def run(self) -> StaticPaths:
        """Search, or return what an earlier run of the same has written."""
        finished = from_first(self._finished)
        if finished is not None:
            if not finished.is_cut:
                self.chunks.remove()  # where a kill ended the clean-up
            return finished
        self.chunks.open()
        with self.listener.progress("tuning", "") as self.on_progress:
            paths = {self.full: False} | self._dominated(self._search())
            self._measure_all(paths)
            result = self._result(paths)
            self.on_progress(self._most + FINAL, self._most + FINAL, "")
        write_json(self.folder / PATHS_FILE, result)
        if not result.is_cut:
            self.chunks.remove()
        return result

    def _finished(self) -> StaticPaths | None:
        """Return what the folder holds; None if there is nothing, or more is asked for."""
        file = self.folder / PATHS_FILE
        if file.exists():
            found, own = read_paths(file), self.identity
            refuse_other_run(
                f"the tuning in {file}",
                {
                    "settings": make_settings(TuneConfig, found.config).decisive(),
                    "model": found.model,
                    # Older files have neither.
                    "runtime": found.runtime or own["runtime"],
                    "questions_sha256": found.questions_sha256 or own["questions_sha256"],
                },
                own,
                "choose another --output-dir, or delete the old one",
            )
            if not found.is_cut or found.config.get("minutes") == self.config.minutes:
                return found
        return None

    def _search(self) -> list[StaticPath]:
        """Return the best path of each level."""
        config, L = self.config, self.routed.num_layers
        found: list[StaticPath] = []
        for level in self.beam.levels(self._measure, self._grows):
            for task in self.tasks:
                task.objectives(SELECT, [self.full, *level.paths])
            best = max(level.paths, key=lambda path: (self._grows(path), self._gain(path)))
            found.append(best)
            if len(found) == 1:
                self.listener.note(HEAD)
            level_is = self.beam.saved(best), self._change(best)
            self._saved, self._pairs = level.saved, 0
            self._scored(0, told(*level_is))
            self.listener.note(f"{line(*level_is)}\n  {best.edits(L)}")
            seconds = sum(task.seconds for task in self.tasks) / count()
            is_last = level.saved == self._most
            if config.minutes is not None and seconds > 60 * config.minutes:
                self.listener.note(f"{config.minutes:g} minutes are over; no further level begins")
                self._is_cut = not is_last
                break
            if not (is_last or self._grows(best)):
                lost = f"all paths of this level lose more than --max-loss {config.max_loss:g}"
                self.listener.note(f"{lost}: none is edited further")
        return found

    def _scored(self, num_pairs: int, note: str) -> None:
        """Tell how far it is; testing counts as `FINAL` levels more."""
        self._pairs += num_pairs
        share = min(1.0, self._pairs / self._expected)
        unit = FINAL if self._saved == self._most else 1
        self._done = max(self._done, self._saved + unit * share)
        self.on_progress(self._done, self._most + FINAL, note)
        if num_pairs > 0:  # the seconds are those of kept scores too, after an interruption
            seconds = sum(task.seconds for task in self.tasks) / count()
            self._first_block.finish(self._done / (self._most + FINAL), seconds)

    def _measure_all(self, dominated: Mapping[StaticPath, bool]) -> None:
        """Score all paths on what tests them, in common passes."""
        wanted = [(SELECT, list(dominated)), (TEST, list(dominated))]
        self._saved, self._pairs = self._most, 0
        self._expected = sum(
            len(paths) * (len(task.judge(f"texts of {part}").items) + len(task.judge(part).items))
            for task in self.tasks
            for part, paths in wanted
            if part != SELECT or task.is_generated
        )
        for task in self.tasks:
            for part, paths in wanted:
                task.objectives(part, paths)
                task.objectives(f"texts of {part}", paths)

    def _measure(self, paths: Sequence[StaticPath], num_questions: int) -> Floats:
        """Return the weighted mean of the tasks' objectives on the first questions of `fit`."""
        most = self.beam.num_questions
        if num_questions == self.beam.rungs[0][0]:  # a level begins
            shares = sum(len(task.judge(FIT).items) for task in self.tasks) / most
            chosen = sum(len(task.judge(SELECT).items) for task in self.tasks)
            self._pairs = 0
            self._expected = shares * num_pairs(len(paths), self.beam.rungs)
            self._expected += self.beam.width * chosen
        total = np.zeros(len(paths))
        for task in self.tasks:
            own = len(task.judge(FIT).items)
            found = task.objectives(FIT, paths, -(-num_questions * own // most))
            total += task.weight * np.array(list(map(np.mean, found)))
        weighted: Floats = total / sum(task.weight for task in self.tasks)
        return weighted

    def _differences(self, task: TaskScorer, part: str, path: StaticPath) -> list[float]:
        pairs = zip(*task.objectives(part, [path, self.full]), strict=True)
        return [ours - full for ours, full in pairs]

    def _gain(self, path: StaticPath) -> float:
        """Return what a path has more of the objective than the full one, on `select`."""
        total = sum(t.weight * fmean(self._differences(t, SELECT, path)) for t in self.tasks)
        return total / sum(task.weight for task in self.tasks)

    def _change(self, path: StaticPath) -> tuple[float, float, float]:
        """Return the gain of a path with its 95 % interval."""
        total = sum(task.weight for task in self.tasks)
        given = [(t.weight / total, self._differences(t, SELECT, path)) for t in self.tasks]
        return sum_interval(given, self.config.seed)

    def _grows(self, path: StaticPath) -> bool:
        """Tell whether no task shows that a path loses more than is allowed."""
        for task in self.tasks:
            _, highest = mean_interval(self._differences(task, SELECT, path), self.config.seed)
            if highest < -self.config.max_loss:
                return False
        return True

    def _dominated(self, paths: Sequence[StaticPath]) -> dict[StaticPath, bool]:
        """Return for each path whether a shorter one does as well on `select`."""
        gains = list(map(self._gain, paths))
        return {
            path: any(later >= gain for later in gains[place + 1 :])
            for place, (path, gain) in enumerate(zip(paths, gains, strict=True))
        }

    def _name(self, path: StaticPath) -> str:
        if path == self.full:
            return "full"
        saved = self.routed.num_layers - self._executions(path)
        return f"skip{saved:.3g}"

    def _executions(self, path: StaticPath) -> float:
        return path_executions(path)

    def _outcomes(self, task: TaskScorer, part: str, path: StaticPath) -> Outcomes:
        [own], [texts] = (task.objectives(name, [path]) for name in (part, f"texts of {part}"))
        return Outcomes(
            name=self._name(path),
            executions=self._executions(path),
            correct=task.correct(part, path),
            gold_logprob=own if task.objective == GOLD else [],
            text_loss=[-value for value in texts],
        )

    def _result(self, dominated: Mapping[StaticPath, bool]) -> StaticPaths:
        tasks = tuple(task.name for task in self.tasks)
        return StaticPaths(
            **self.header,
            tasks=tasks,
            divided=tuple(task.name for task in self.tasks if task.divided.is_divided),
            objective={task.name: task.objective for task in self.tasks},
            num_layers=self.routed.num_layers,
            runtime=self.identity["runtime"],
            questions_sha256=self.identity["questions_sha256"],
            is_cut=self._is_cut,
            paths=tuple(
                NamedPath(
                    name=self._name(path),
                    steps=steps_to_write(path),
                    executions=self._executions(path),
                    dominated=is_worse,
                    measured=tuple(
                        self._measured(task, part, path)
                        for part in (FIT, SELECT, TEST)
                        for task in self.tasks
                    ),
                )
                for path, is_worse in dominated.items()
            ),
        )

    def _measured(self, task: TaskScorer, part: str, path: StaticPath) -> PathScore:
        [values] = task.objectives(part, [path])
        told = PathScore(
            task=task.name, part=part, num_questions=len(values), objective=fmean(values)
        )
        is_full = path == self.full
        if not is_full:
            differences = self._differences(task, part, path)
            low, high = mean_interval(differences, self.config.seed)
            told = msgspec.structs.replace(told, change=(fmean(differences), low, high))
        if part == FIT:  # on which paths were fitted: nothing is claimed there
            return told
        ours = self._outcomes(task, part, path)
        told = msgspec.structs.replace(told, text_loss=fmean(ours.text_loss))
        if not ours.correct:
            return told
        full = self._outcomes(task, part, self.full)
        lowest, _ = accuracy_interval(full.correct, self.config.seed)
        verdicts = compare(ours, full, self.config.seed, above_chance=lowest > task.chance)
        return msgspec.structs.replace(
            told, accuracy=fmean(ours.correct), against_full=None if is_full else verdicts
        )


AXIS_FROM, AXIS_STEP, AXIS_WIDTH = -0.4, 0.02, 31
AXIS = f"−0.4{'0':>17}{'+0.2':>10}"
"""The numbers at the axis of a drawn interval, whose columns stand for `AXIS_STEP` each."""


def drawn(mean: float, low: float, high: float) -> str:
    """Draw a mean and its interval in columns of a fixed axis; what lies outside is an arrow."""
    marks = [round((value - AXIS_FROM) / AXIS_STEP) for value in (0.0, low, mean, high)]
    zero, first, middle, last = (min(max(mark, 0), AXIS_WIDTH - 1) for mark in marks)
    cells = [" "] * first + ["─"] * (last - first + 1) + [" "] * (AXIS_WIDTH - 1 - last)
    for mark, place in zip("│├┤●", (zero, first, last, middle), strict=True):
        cells[place] = mark
    cells[0] = "<" if marks[1] < 0 else cells[0]
    cells[-1] = ">" if marks[3] >= AXIS_WIDTH else cells[-1]
    return "".join(cells).rstrip()


HEAD = f"{'layers saved, change on select (95 %)':<46}  {AXIS}"  # what stands above the lines


def told(saved: float, change: tuple[float, float, float]) -> str:
    """Say what the best path of a level saves, and its change on `select`."""
    mean, low, high = (signed(value, 3) for value in change)
    return f"{saved:.3g} saved".replace("-", "−") + f"  {mean} nats ({low} to {high})"


def line(saved: float, change: tuple[float, float, float]) -> str:
    """Return the same with the interval drawn on the axis of `HEAD`."""
    return f"{told(saved, change):<46}  {drawn(*change)}"


def num_pairs(num_paths: int, rungs: Sequence[tuple[int, int]]) -> int:
    """Return how many questions times paths a level scores, given `parts.rungs`.

    Example:
        >>> num_pairs(28, [(38, 12), (100, 6), (300, 3)])  # 28 * 38 + 12 * 62 + 6 * 200
        3008
    """
    pairs = asked = 0
    for num_questions, kept in rungs:
        pairs += num_paths * (num_questions - asked)
        num_paths, asked = min(num_paths, kept), num_questions
    return pairs
