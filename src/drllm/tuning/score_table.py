"""The scores of a tuning: each path on each question, computed when they are first needed.

Missing scores are computed in blocks of a few questions. Each block is kept on disk as soon as it
is done, so nothing is scored twice, and a killed run loses little.

A path may have scores plain, with the stand-in and with its refit. The table tells them apart by
the path's adapter, which is `PLAIN`, `STAND_IN` or `REFIT`. The full path is always plain.

Axes: N paths, Q questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from drllm.config.heal import REFIT
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.static_paths import SELECT, TEST
from drllm.statistics.intervals import Floats
from drllm.tuning.objectives import GOLD
from drllm.tuning.path_scorer import PathScores
from drllm.tuning.repair import Repair
from drllm.tuning.score_blocks import (
    AnswerGrades,
    PartScores,
    PartToScore,
    PathsToScore,
    PathToRepair,
    PromptsToAnswer,
    RepairedScores,
    ScoringBlocks,
)
from drllm.tuning.task_questions import TaskQuestions
from drllm.work.run import Block, BlockFunction, Executor, run
from drllm.work.store import ResultStore

MOST_PAIRS = 100  # maximum pairs of a path and a question in a block
MOST_ANSWERS = 32  # maximum generated answers in a block

Place: TypeAlias = tuple[TaskQuestions, str, StaticPath]
"""A place in the table: a task, a part of its questions, and a path."""


@dataclass(frozen=True, eq=False)
class PathsOnPart:
    """Paths, and the questions to score them on.

    Attributes:
        task: The task.
        part: The part of its questions.
        paths: The paths.
        limit: The number of questions, from the first; None for all.
    """

    task: TaskQuestions
    part: str
    paths: Sequence[StaticPath]
    limit: int | None = None

    @property
    def num_questions(self) -> int:
        """The number of questions."""
        num_questions = len(self.task.items[self.part])
        if self.limit is None:
            return num_questions
        return min(self.limit, num_questions)


class OnScored(Protocol):
    """Called after each block, also after a block that an earlier run kept."""

    def __call__(self, num_pairs: float, seconds: float, note: str, /) -> None:
        """Report progress.

        Args:
            num_pairs: The number of pairs of a path and a question in the block.
            seconds: How long scoring took so far; see `ScoreTable.seconds`.
            note: What is done.
        """


class ScoreTable:
    """The scores of paths on the questions of tasks.

    Args:
        executor: Runs the blocks.
        store: Keeps the blocks.
        state_cache_gb: Size of the cache of states that paths share, divided among workers that
            share a machine; None chooses it by memory.
        on_scored: Receives the progress.
        repair: What paths are repaired with; None if they aren't.

    Attributes:
        seconds: How long scoring, answering and refitting took, as it would have without an
            interruption: the time of kept work counts. What workers do together counts as a mean
            over them.
    """

    def __init__(
        self,
        executor: Executor,
        store: ResultStore,
        state_cache_gb: float | None,
        on_scored: OnScored,
        repair: Repair | None = None,
    ) -> None:
        if state_cache_gb is not None:
            state_cache_gb /= executor.num_sharing
        self.seconds = 0.0
        self._executor = executor
        self._store = store
        self._on_scored = on_scored
        # One function for all blocks, so that a worker keeps what it has prepared.
        self._function: BlockFunction[Any, Any] = ScoringBlocks(state_cache_gb)
        if repair is not None:
            self._function = ScoringBlocks(state_cache_gb, repair.stand_in_texts, repair.texts)
        # A row has a value for each question of a part, [Q]; NaN where it is missing.
        self._objectives: dict[Place, Floats] = {}
        self._is_right: dict[Place, Floats] = {}  # 1 if the right option is the likeliest
        self._grades: dict[Place, Floats] = {}  # of generated answers

    def objective(self, task: TaskQuestions, part: str, path: StaticPath) -> list[float]:
        """Return the objective of a path on each question of a part that is scored."""
        return _list_known(self._objectives[task, part, path])

    def compare(
        self, task: TaskQuestions, part: str, path: StaticPath, other: StaticPath
    ) -> list[float]:
        """Return each question's objective of a path minus the objective of another path."""
        objectives = self.objective(task, part, path)
        other_objectives = self.objective(task, part, other)
        pairs = zip(objectives, other_objectives, strict=True)
        return [value - other_value for value, other_value in pairs]

    def grades(self, task: TaskQuestions, part: str, path: StaticPath) -> list[float]:
        """Return the grade of a path on each question of a part, from 0 (wrong) to 1 (right).

        The list is empty if the objective compares no options and no answers are generated.
        """
        if task.objective == GOLD:
            return _list_known(self._is_right[task, part, path])
        if task.is_generated:
            return _list_known(self._grades[task, part, path])
        return []

    def fill(self, requests: Iterable[PathsOnPart]) -> None:
        """Score paths on questions where the scores are missing."""
        blocks = {block.key: block for block in self._make_score_blocks(requests)}

        def on_result(block: Block[PathsToScore], scores: PathScores, **_: bool) -> None:
            self._insert_scores(blocks[block.key], scores)

        run(
            [block.to_run() for block in blocks.values()],
            self._function,
            self._executor,
            keep=self._store.of(PathScores),
            on_result=on_result,
        )

    def fill_grades(self, requests: Iterable[PathsOnPart]) -> None:
        """Generate and grade answers to all questions of parts where the grades are missing."""
        blocks = {block.key: block for block in self._make_answer_blocks(requests)}

        def on_result(block: Block[PromptsToAnswer], grades: AnswerGrades, **_: bool) -> None:
            self._insert_grades(blocks[block.key], grades)

        run(
            [block.to_run() for block in blocks.values()],
            self._function,
            self._executor,
            keep=self._store.of(AnswerGrades),
            on_result=on_result,
        )

    def fill_repaired(self, path: StaticPath, tasks: Sequence[TaskQuestions]) -> None:
        """Refit a plain path, and score it on all parts of tasks under the adapter `REFIT`."""
        block = _RepairBlock(path, _list_places(tasks))

        def on_step(_block: Block[PathToRepair], _share: float, _num: int, note: str) -> None:
            self._on_scored(0, self.seconds, note)

        [scores] = run(
            [block.to_run()],
            self._function,
            self._executor,
            keep=self._store.of(RepairedScores),
            on_step=on_step,
        )
        for key, part_scores in scores.parts.items():
            task, part = block.places[key]
            self._insert_part(task, part, path.with_adapter(REFIT), part_scores)
        self.seconds += scores.seconds
        self._on_scored(block.num_scores, self.seconds, "refitting the best path")

    def _insert_part(
        self, task: TaskQuestions, part: str, path: StaticPath, scores: PartScores
    ) -> None:
        """Insert the scores of a path on a whole part."""
        place = (task, part, path)
        self._objectives[place] = np.array(scores.objective)
        if scores.right:
            self._is_right[place] = np.array(scores.right)
        if scores.grades:
            self._grades[place] = np.array(scores.grades)

    def _make_score_blocks(self, requests: Iterable[PathsOnPart]) -> list[_ScoreBlock]:
        """Divide what is missing into blocks of questions of similar length."""
        blocks: list[_ScoreBlock] = []
        for request in requests:
            # By the first question without a score, and by how paths are repaired.
            groups: dict[tuple[int, str], list[StaticPath]] = {}
            for path in dict.fromkeys(request.paths):
                num_scored = self._count_scored(request.task, request.part, path)
                if num_scored < request.num_questions:
                    groups.setdefault((num_scored, path.adapter), []).append(path)
            for (start, _), paths in groups.items():
                questions = range(start, request.num_questions)
                blocks += _divide_questions(request.task, request.part, paths, questions)
        return blocks

    def _count_scored(self, task: TaskQuestions, part: str, path: StaticPath) -> int:
        """Return on how many questions of a part a path is scored, from the first."""
        objectives = self._objectives.get((task, part, path))
        if objectives is None:
            return 0
        return _count_known(objectives)

    def _insert_scores(self, block: _ScoreBlock, scores: PathScores) -> None:
        """Insert the scores of a block, and report the progress."""
        for number, path in enumerate(block.paths):
            row = _get_row(self._objectives, block.task, block.part, path)
            row[block.places] = scores.objective[number]
            if scores.right:  # empty if the questions have no options
                row = _get_row(self._is_right, block.task, block.part, path)
                row[block.places] = scores.right[number]
        self.seconds += scores.seconds / self._executor.num_workers
        num_paths = len(block.paths)
        note = "scoring 1 path" if num_paths == 1 else f"comparing {num_paths} paths"
        self._on_scored(block.num_pairs, self.seconds, note)

    def _make_answer_blocks(self, requests: Iterable[PathsOnPart]) -> list[_AnswerBlock]:
        """Divide the prompts without grades into blocks."""
        blocks: list[_AnswerBlock] = []
        for request in requests:
            for path in dict.fromkeys(request.paths):
                if (request.task, request.part, path) not in self._grades:
                    blocks += _divide_prompts(request.task, request.part, path)
        return blocks

    def _insert_grades(self, block: _AnswerBlock, grades: AnswerGrades) -> None:
        """Insert the grades of a block, and report the progress."""
        row = _get_row(self._grades, block.task, block.part, block.path)
        row[block.places] = grades.grades
        self.seconds += grades.seconds / self._executor.num_workers
        note = f"answering along one path, question {_count_known(row)} of {len(row)}"
        self._on_scored(len(grades.grades), self.seconds, note)


def _get_row(rows: dict[Place, Floats], task: TaskQuestions, part: str, path: StaticPath) -> Floats:
    """Return a row of the table `[Q]`; add it if it isn't there."""
    place = (task, part, path)
    if place not in rows:
        rows[place] = np.full(len(task.items[part]), np.nan)
    return rows[place]


def _count_known(row: Floats) -> int:
    """Return how many values of a row are known."""
    return int(np.count_nonzero(~np.isnan(row)))


def _list_known(row: Floats) -> list[float]:
    """Return the values of a row that are known."""
    values: list[float] = row[~np.isnan(row)].tolist()
    return values


@dataclass(frozen=True, eq=False)
class _ScoreBlock:
    """Paths, and the questions that one block scores them on.

    Attributes:
        key: The key of the block.
        task: The task.
        part: The part of its questions.
        paths: The paths.
        places: The places of the questions in the part.
        questions: The places of all questions that these paths lack scores on.
    """

    key: str
    task: TaskQuestions
    part: str
    paths: Sequence[StaticPath]
    places: list[int]
    questions: range

    @property
    def num_pairs(self) -> int:
        """The number of pairs of a path and a question."""
        return len(self.paths) * len(self.places)

    def to_run(self) -> Block[PathsToScore]:
        """Return the block for `run`."""
        items = [self.task.items[self.part][place] for place in self.places]
        data = PathsToScore(self.paths, items, self.task.objective_on(self.part))
        return Block(self.key, data, self.num_pairs)


def _divide_questions(
    task: TaskQuestions, part: str, paths: Sequence[StaticPath], questions: range
) -> list[_ScoreBlock]:
    """Divide questions of a part into blocks of similar length."""
    items = task.items[part]
    places = sorted(questions, key=lambda place: items[place].request.length)
    size = max(1, MOST_PAIRS // len(paths))
    digest = hash_values(path.layers for path in paths)[:16]
    name = f"{task.key} {part} {questions.start} to {questions.stop}"
    if paths[0].adapter:
        name = f"{name} {paths[0].adapter}"
    blocks = []
    for first in range(0, len(places), size):
        key = f"{name} from {first} {digest}"
        block_places = places[first : first + size]
        blocks.append(_ScoreBlock(key, task, part, paths, block_places, questions))
    return blocks


@dataclass(frozen=True, eq=False)
class _AnswerBlock:
    """A path, and the prompts of a part that one block answers along it.

    Attributes:
        key: The key of the block.
        task: The task.
        part: The part of its questions.
        path: The path.
        places: The places of the prompts in the part.
    """

    key: str
    task: TaskQuestions
    part: str
    path: StaticPath
    places: range

    def to_run(self) -> Block[PromptsToAnswer]:
        """Return the block for `run`."""
        prompts = [self.task.prompts[self.part][place] for place in self.places]
        return Block(self.key, PromptsToAnswer(self.path, prompts), len(prompts))


def _divide_prompts(task: TaskQuestions, part: str, path: StaticPath) -> list[_AnswerBlock]:
    """Divide the prompts of a part into blocks."""
    num_prompts = len(task.prompts[part])
    digest = hash_values(path.layers)[:16]
    blocks = []
    for start in range(0, num_prompts, MOST_ANSWERS):
        places = range(start, min(start + MOST_ANSWERS, num_prompts))
        key = f"{task.key} answers {part} from {start} {digest}"
        blocks.append(_AnswerBlock(key, task, part, path, places))
    return blocks


def _list_places(tasks: Sequence[TaskQuestions]) -> dict[str, tuple[TaskQuestions, str]]:
    """Return all parts of tasks, by a key of their own."""
    places = {}
    for task in tasks:
        for part in task.items:
            places[f"{task.key} {part}"] = (task, part)
    return places


@dataclass(frozen=True, eq=False)
class _RepairBlock:
    """A path that one block refits and scores.

    Attributes:
        path: The path, plain.
        places: The parts to score it on, by a key of their own.
    """

    path: StaticPath
    places: Mapping[str, tuple[TaskQuestions, str]]

    @property
    def key(self) -> str:
        """The key of the block."""
        return f"{REFIT} {hash_values(self.path.layers)[:16]}"

    @property
    def num_scores(self) -> int:
        """How many questions are scored and answered."""
        return sum(part.num_scores for part in self._list_parts())

    def to_run(self) -> Block[PathToRepair]:
        """Return the block for `run`."""
        parts = self._list_parts()
        return Block(self.key, PathToRepair(self.path, parts), self.num_scores)

    def _list_parts(self) -> list[PartToScore]:
        parts = []
        for key, (task, part) in self.places.items():
            prompts = task.prompts.get(part, ()) if part in (SELECT, TEST) else ()
            parts.append(PartToScore(key, task.items[part], task.objective_on(part), prompts))
        return parts
