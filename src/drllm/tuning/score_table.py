"""The scores of a tuning: each path on each question, computed when they are first needed.

Missing scores are computed in blocks of a few questions. Each block is kept on disk as soon as it
is done, so nothing is scored twice, and a killed run loses little.

Axes: N paths, Q questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.statistics.intervals import Floats
from drllm.tasks.examples import Prompt
from drllm.tuning.objectives import GOLD
from drllm.tuning.path_scorer import (
    GradeAnswers,
    PathsToScore,
    PromptsToAnswer,
    ScorePaths,
    Scores,
)
from drllm.tuning.task_questions import TaskQuestions
from drllm.work.run import Block, Executor, run
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

    Attributes:
        seconds: How long scoring took, including kept scores, as a mean over the workers. The time
            to generate answers isn't counted.
    """

    def __init__(
        self,
        executor: Executor,
        store: ResultStore,
        state_cache_gb: float | None,
        on_scored: OnScored,
    ) -> None:
        if state_cache_gb is not None:
            state_cache_gb /= executor.num_sharing
        self.seconds = 0.0
        self._executor = executor
        self._store = store
        self._on_scored = on_scored
        self._score_paths = ScorePaths(state_cache_gb)
        self._grade_answers = GradeAnswers()
        # The scores on the first Q questions of a part, [2, Q]: the objective, and 1 if the right
        # option is the likeliest.
        self._scores: dict[Place, Floats] = {}
        self._grades: dict[Place, list[float]] = {}  # of generated answers

    def objective(self, task: TaskQuestions, part: str, path: StaticPath) -> list[float]:
        """Return the objective of a path on each question of a part that is scored."""
        values: list[float] = self._scores[task, part, path][0].tolist()
        return values

    def compare(
        self, task: TaskQuestions, part: str, path: StaticPath, other: StaticPath
    ) -> list[float]:
        """Return each question's objective of a path minus the objective of another path."""
        pairs = zip(
            self.objective(task, part, path), self.objective(task, part, other), strict=True
        )
        return [value - other_value for value, other_value in pairs]

    def grades(self, task: TaskQuestions, part: str, path: StaticPath) -> list[float]:
        """Return the grade of a path on each question of a part, from 0 (wrong) to 1 (right).

        The list is empty if the objective compares no options and no answers are generated.
        """
        if task.objective == GOLD:
            is_right: list[float] = self._scores[task, part, path][1].tolist()
            return is_right
        return self._grades.get((task, part, path), [])

    def count_missing(self, requests: Iterable[PathsOnPart]) -> int:
        """Return how many pairs of a path and a question `fill` would score."""
        num_pairs = 0
        for gap in self._find_gaps(requests):
            num_pairs += len(gap.paths) * (gap.end - gap.start)
        return num_pairs

    def count_missing_grades(self, requests: Iterable[PathsOnPart]) -> int:
        """Return how many answers `fill_grades` would generate."""
        return sum(len(answers.prompts) for answers in self._find_answers(requests))

    def fill(self, requests: Iterable[PathsOnPart]) -> None:
        """Compute the scores that are missing."""
        parts: list[_GapPart] = []
        for gap in self._find_gaps(requests):
            parts += gap.divide()
        gap_of_block = {part.key: part.gap for part in parts}

        def on_result(
            block: Block[PathsToScore],
            scores: Scores,
            *,
            is_new: bool,  # noqa: ARG001
        ) -> None:
            self.seconds += scores.seconds / self._executor.num_workers
            note = gap_of_block[block.key].count(len(block.data.items))
            self._on_scored(block.size, self.seconds, note)

        results = run(
            [part.make_block() for part in parts],
            self._score_paths,
            self._executor,
            keep=self._store.of(Scores),
            on_result=on_result,
        )
        for part, scores in zip(parts, results, strict=True):
            part.gap.insert(part.places, scores)
        for gap in dict.fromkeys(part.gap for part in parts):
            self._close(gap)

    def fill_grades(self, requests: Iterable[PathsOnPart]) -> None:
        """Generate and grade the answers that are missing, to all questions of each part."""
        parts: list[_AnswersPart] = []
        for answers in self._find_answers(requests):
            parts += answers.divide()
        answers_of_block = {part.key: part.answers for part in parts}

        def on_result(
            block: Block[PromptsToAnswer],
            grades: list[float],
            *,
            is_new: bool,  # noqa: ARG001
        ) -> None:
            note = answers_of_block[block.key].count(len(grades))
            self._on_scored(block.size, self.seconds, note)

        results = run(
            [part.make_block() for part in parts],
            self._grade_answers,
            self._executor,
            keep=self._store.of(list[float]),
            on_result=on_result,
        )
        for part, grades in zip(parts, results, strict=True):
            self._grades.setdefault(part.answers.place, []).extend(grades)

    def _find_gaps(self, requests: Iterable[PathsOnPart]) -> list[_Gap]:
        """Return the gaps of the table: the paths of a gap have the same number of scores."""
        gaps: list[_Gap] = []
        for request in requests:
            paths_by_start: dict[int, list[StaticPath]] = {}
            for path in dict.fromkeys(request.paths):
                scores = self._scores.get((request.task, request.part, path))
                num_scored = 0 if scores is None else scores.shape[1]
                if num_scored < request.num_questions:
                    paths_by_start.setdefault(num_scored, []).append(path)
            for start, paths in paths_by_start.items():
                gaps.append(_Gap(request.task, request.part, paths, start, request.num_questions))
        return gaps

    def _close(self, gap: _Gap) -> None:
        """Add the scores of a gap to the table."""
        for number, path in enumerate(gap.paths):
            key = (gap.task, gap.part, path)
            scores = gap.scores[:, number]
            if key in self._scores:
                scores = np.concatenate((self._scores[key], scores), axis=1)
            self._scores[key] = scores

    def _find_answers(self, requests: Iterable[PathsOnPart]) -> list[_Answers]:
        """Return the answers that are missing, for each path and part."""
        answers: list[_Answers] = []
        for request in requests:
            for path in dict.fromkeys(request.paths):
                missing = _Answers(request.task, request.part, path)
                if missing.place not in self._grades:
                    answers.append(missing)
        return answers


class _Gap:
    """Missing scores: of paths on the questions of a part from place `start` to `end`.

    Attributes:
        scores: The scores, `[2, N, Q]`; `insert` fills them in.
    """

    def __init__(
        self, task: TaskQuestions, part: str, paths: Sequence[StaticPath], start: int, end: int
    ) -> None:
        self.task = task
        self.part = part
        self.paths = paths
        self.start = start
        self.end = end
        self.scores: Floats = np.zeros((2, len(paths), end - start))
        self._num_scored = 0  # questions

    def divide(self) -> list[_GapPart]:
        """Divide the questions into blocks of similar length."""
        items = self.task.items[self.part]
        places = sorted(range(self.start, self.end), key=lambda place: items[place].request.length)
        size = max(1, MOST_PAIRS // len(self.paths))
        digest = hash_values(path.layers for path in self.paths)[:16]
        name = f"{self.task.name} {self.part} {self.start} to {self.end}"
        parts = []
        for first in range(0, len(places), size):
            key = f"{name} from {first} {digest}"
            parts.append(_GapPart(self, key, places[first : first + size]))
        return parts

    def count(self, num_questions: int) -> str:
        """Count questions that were scored, and say how many they are so far."""
        self._num_scored += num_questions
        total = self.end - self.start
        return f"scoring {len(self.paths)} candidate paths, question {self._num_scored} of {total}"

    def insert(self, places: Sequence[int], scores: Scores) -> None:
        """Insert the scores of the questions at some places of the part."""
        columns = [place - self.start for place in places]
        self.scores[0][:, columns] = scores.objective
        if scores.right:  # empty if the questions have no options
            self.scores[1][:, columns] = scores.right


@dataclass(frozen=True, eq=False)
class _GapPart:
    """The questions of a gap that one block scores."""

    gap: _Gap
    key: str
    places: Sequence[int]

    def make_block(self) -> Block[PathsToScore]:
        """Return the block."""
        gap = self.gap
        all_items = gap.task.items[gap.part]
        items = [all_items[place] for place in self.places]
        data = PathsToScore(gap.paths, items, gap.task.objective_on(gap.part))
        return Block(self.key, data, size=len(gap.paths) * len(items))


class _Answers:
    """Missing grades: of the generated answers to the questions of a part, along one path."""

    def __init__(self, task: TaskQuestions, part: str, path: StaticPath) -> None:
        self.task = task
        self.part = part
        self.path = path
        self.prompts = task.prompts[part]
        self._num_answered = 0

    @property
    def place(self) -> Place:
        """Where the grades belong in the table."""
        return (self.task, self.part, self.path)

    def divide(self) -> list[_AnswersPart]:
        """Divide the prompts into blocks."""
        digest = hash_values(self.path.layers)[:16]
        parts = []
        for start in range(0, len(self.prompts), MOST_ANSWERS):
            key = f"{self.task.name} answers {self.part} from {start} {digest}"
            parts.append(_AnswersPart(self, key, self.prompts[start : start + MOST_ANSWERS]))
        return parts

    def count(self, num_answers: int) -> str:
        """Count answers that were graded, and say how many they are so far."""
        self._num_answered += num_answers
        return f"answering along one path, question {self._num_answered} of {len(self.prompts)}"


@dataclass(frozen=True, eq=False)
class _AnswersPart:
    """The prompts that one block answers."""

    answers: _Answers
    key: str
    prompts: Sequence[Prompt]

    def make_block(self) -> Block[PromptsToAnswer]:
        """Return the block."""
        data = PromptsToAnswer(self.answers.path, self.prompts)
        return Block(self.key, data, size=len(self.prompts))
