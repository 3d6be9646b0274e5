"""Scores static paths on one task, and stores the scores, so that nothing is scored twice.

A killed run loses at most the scores of one block, a small number of questions.

Axes: N paths, Q questions.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import numpy as np

from drllm.config import TuneConfig
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import StaticPath
from drllm.records.codec import hash_values
from drllm.records.resume import Chunks
from drllm.records.static_paths import FIT, SELECT
from drllm.statistics.intervals import Floats
from drllm.tasks.examples import Prompt, choose
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.objectives import GOLD, LOSS, choose_objective, make_prompt
from drllm.tuning.path_scorer import (
    PathScorer,
    Scores,
    grade_answers,
    make_items,
    make_text_items,
)

MOST_PAIRS = 100  # maximum pairs of a question and a path in a block
MOST_ANSWERS = 32  # maximum generated answers in a block
NUM_TEXTS = 100  # maximum questions of a part on whose texts the next-token loss is measured
TEXTS_OF = "texts of "
"""A prefix for the name of a part. `texts of PART` is a part too: its items are the questions of
PART with their right answers, as texts that are scored by their next-token loss."""


class TaskScorer:
    """Scores paths on the parts of one task: `fit`, `select`, `test`, and their texts.

    Args:
        routed: The model.
        splits: The task with its questions.
        config: The settings.
        chunks: The files that the scores are stored in.
        on_scored: Called after each block with the number of pairs of a question and a path that
            were scored, and a text that describes the progress.

    Attributes:
        task: The task.
        name: The task's name.
        objective: The task's objective, see `objectives`.
        is_generated: Whether accuracy is measured by generating and grading answers.
        seconds: How long scoring took in all, including the time of stored scores.
    """

    def __init__(
        self,
        routed: RoutedModel,
        splits: TaskSplits,
        config: TuneConfig,
        chunks: Chunks,
        on_scored: Callable[[int, str], None],
    ) -> None:
        self.routed = routed
        self.splits = splits
        self.config = config
        self.chunks = chunks
        self.on_scored = on_scored
        self.task = splits.task
        self.name = splits.task.name
        self.objective = choose_objective(self.task, config)
        self.is_generated = splits.is_generated(self.objective)
        self.seconds = 0.0
        self._scorers: dict[str, PathScorer] = {}
        # (part, path) → the scores on the first Q questions of the part, [2, Q]: the objective, and
        # 1 if the right option is the likeliest.
        self._scores: dict[tuple[str, StaticPath], Floats] = defaultdict(lambda: np.zeros((2, 0)))
        self._grades: dict[tuple[str, StaticPath], list[float]] = {}  # of generated answers

    def prompts(self, part: str) -> list[Prompt]:
        """Return the prompts of the questions of a part: all of `fit`, else `num_judged` of them.

        The questions of `fit` are in random order, since the search begins with the first ones.
        """
        examples = self.splits.examples[part]
        if part == FIT:
            order = np.random.RandomState(self.config.seed).permutation(len(examples))
            examples = [examples[place] for place in order]
        else:
            examples = choose(examples, self.config.num_judged, self.config.seed)
        return [make_prompt(self.task, example, self.objective) for example in examples]

    def scorer(self, part: str) -> PathScorer:
        """Return the scorer of a part, which is made on first use."""
        if part not in self._scorers:
            self._scorers[part] = self._make_scorer(part)
        return self._scorers[part]

    def _make_scorer(self, part: str) -> PathScorer:
        """Make the scorer of a part, for the task's objective, or for `LOSS` on texts."""
        if part.startswith(TEXTS_OF):
            prompts = self.prompts(part.removeprefix(TEXTS_OF))
            prompts = choose(prompts, NUM_TEXTS, self.config.seed)
            items = make_text_items(self.routed, prompts)
            objective = LOSS
        else:
            items = make_items(self.routed, self.prompts(part), self.objective)
            objective = self.objective
        return PathScorer(self.routed, items, objective, self.config.state_cache_gb)

    def num_questions(self, part: str) -> int:
        """Return how many items a part has: questions or texts."""
        return len(self.scorer(part).items)

    def score_paths(
        self, part: str, paths: Sequence[StaticPath], limit: int | None = None
    ) -> list[list[float]]:
        """Return the objective of each path on each question of a part.

        Args:
            part: The part.
            paths: The paths.
            limit: How many questions to score, from the first; None scores all. If an earlier call
                scored further questions, their scores are returned too.
        """
        end = self.num_questions(part)
        if limit is not None:
            end = min(limit, end)
        for start, group in self._group_paths(part, paths, end).items():
            new_scores = self._score_range(part, group, start, end)  # [2, N, Q]
            for number, path in enumerate(group):
                scores = self._scores[part, path]
                self._scores[part, path] = np.concatenate((scores, new_scores[:, number]), axis=1)
        return [self._scores[part, path][0].tolist() for path in paths]

    def _group_paths(
        self, part: str, paths: Sequence[StaticPath], end: int
    ) -> dict[int, list[StaticPath]]:
        """Return the paths that lack scores, by the number of questions that have scores."""
        groups: dict[int, list[StaticPath]] = {}
        for path in dict.fromkeys(paths):
            num_scored = self._scores[part, path].shape[1]
            if num_scored < end:
                groups.setdefault(num_scored, []).append(path)
        return groups

    def _score_range(self, part: str, paths: Sequence[StaticPath], start: int, end: int) -> Floats:
        """Score paths on the questions from place `start` to `end`; return scores `[2, N, Q]`.

        The questions are scored in blocks of similar length.
        """
        scorer = self.scorer(part)
        places = sorted(range(start, end), key=lambda place: scorer.items[place].request.length)
        block_size = max(1, MOST_PAIRS // len(paths))
        digest = hash_values(path.layers for path in paths)[:16]
        blocks = []
        calls = {}  # name of the file for a block's scores → the call that makes them
        for first in range(0, len(places), block_size):
            block = places[first : first + block_size]
            blocks.append(block)
            key = f"{self.name} {part} {start} to {end} from {first} {digest}"
            calls[key] = partial(scorer.score, paths, block)
        all_scores = np.zeros((2, len(paths), end - start))
        num_scored = 0
        for block, scores in zip(blocks, self.chunks.get_or_make_all(calls, Scores), strict=True):
            columns = [place - start for place in block]
            all_scores[0][:, columns] = scores.objective
            if scores.right:  # empty if the questions have no options
                all_scores[1][:, columns] = scores.right
            self.seconds += scores.seconds
            num_scored += len(block)
            note = f"scoring {len(paths)} candidate paths, question {num_scored} of {len(places)}"
            self.on_scored(len(paths) * len(block), note)
        return all_scores

    def grade_path(self, part: str, path: StaticPath) -> list[float]:
        """Grade a path on each question of a part, from 0 (wrong) to 1 (right).

        If the objective compares no options and no answers are generated, return an empty list.
        """
        if self.objective == GOLD:
            self.score_paths(part, [path])
            right: list[float] = self._scores[part, path][1].tolist()
            return right
        if not self.is_generated:
            return []
        if (part, path) not in self._grades:
            self._grades[part, path] = self._grade_generated(part, path)
        return self._grades[part, path]

    def _grade_generated(self, part: str, path: StaticPath) -> list[float]:
        """Generate answers to all questions of a part along a path, and grade them."""
        prompts = self.prompts(part)
        digest = hash_values(path.layers)[:16]
        calls = {}
        for start in range(0, len(prompts), MOST_ANSWERS):
            block = prompts[start : start + MOST_ANSWERS]
            key = f"{self.name} answers {part} from {start} {digest}"
            calls[key] = partial(grade_answers, self.routed, path, block)
        grades: list[float] = []
        for block_grades in self.chunks.get_or_make_all(calls, list[float]):
            grades += block_grades
            note = f"answering along one path, question {len(grades)} of {len(prompts)}"
            self.on_scored(len(block_grades), note)
        return grades

    def compare_paths(self, part: str, path: StaticPath, full: StaticPath) -> list[float]:
        """Return each question's objective of a path minus the objective of the full path."""
        path_scores, full_scores = self.score_paths(part, [path, full])
        pairs = zip(path_scores, full_scores, strict=True)
        return [path_score - full_score for path_score, full_score in pairs]

    @property
    def chance(self) -> float:
        """The accuracy of guessing; 0 if answers are generated."""
        if self.objective != GOLD:
            return 0.0
        examples = self.splits.examples[SELECT]
        return fmean(1 / len(example.choices) for example in examples)
