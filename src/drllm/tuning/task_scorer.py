"""Scores static paths on one task; each pair of a path and a question is scored once, and kept.

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

MOST_PAIRS = 100  # most questions times paths that are scored at once, and lost by a kill
MOST_ANSWERS = 32  # the same for generated answers
NUM_TEXTS = 100  # most questions of a part whose texts' next-token loss is measured too
TEXTS_OF = "texts of "


class TaskScorer:
    """Scores paths on the parts of one task; `seconds` is the time that all scores took.

    Args:
        routed: The model.
        splits: The task with its questions.
        config: The settings.
        chunks: Keeps the scores.
        on_scored: Called with the number of questions times paths that were scored, and a text that
            describes them.
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
        # By part and path, the objective and right answers on the part's first questions, [2, Q].
        self._scores: dict[tuple[str, StaticPath], Floats] = defaultdict(lambda: np.zeros((2, 0)))
        self._grades: dict[tuple[str, StaticPath], list[float]] = {}

    def prompts(self, part: str) -> list[Prompt]:
        """Return the prompts of a part's questions."""
        examples = self.splits.examples[part]
        if part == FIT:  # in random order, since a search begins with the first questions
            order = np.random.RandomState(self.config.seed).permutation(len(examples))
            examples = [examples[place] for place in order]
        else:
            examples = choose(examples, self.config.num_judged, self.config.seed)
        return [make_prompt(self.task, example, self.objective) for example in examples]

    def scorer(self, part: str) -> PathScorer:
        """Return the scorer of a part; for `texts of PART`, that of its questions' texts."""
        if part not in self._scorers:
            self._scorers[part] = self._make_scorer(part)
        return self._scorers[part]

    def _make_scorer(self, part: str) -> PathScorer:
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
        """Return how many questions or texts a part has."""
        return len(self.scorer(part).items)

    def objectives(
        self, part: str, paths: Sequence[StaticPath], num: int | None = None
    ) -> list[list[float]]:
        """Return the objective of paths on the first `num` questions of a part, or on all."""
        total = self.num_questions(part)
        num = total if num is None else min(num, total)
        by_start: dict[int, list[StaticPath]] = {}  # paths by how many questions are scored already
        for path in dict.fromkeys(paths):
            start = self._scores[part, path].shape[1]
            if start < num:
                by_start.setdefault(start, []).append(path)
        for start, new_paths in by_start.items():
            new_scores = self._score_range(part, new_paths, start, num)  # [2, N, Q]
            for place, path in enumerate(new_paths):
                scores = self._scores[part, path]
                self._scores[part, path] = np.concatenate((scores, new_scores[:, place]), axis=1)
        return [self._scores[part, path][0].tolist() for path in paths]

    def _score_range(self, part: str, paths: Sequence[StaticPath], first: int, last: int) -> Floats:
        """Score paths on a range of questions, a few of similar length at once, `[2, N, Q]`."""
        scorer = self.scorer(part)
        order = sorted(range(first, last), key=lambda place: scorer.items[place].request.length)
        size = max(1, MOST_PAIRS // len(paths))
        digest = hash_values(path.layers for path in paths)[:16]
        blocks = [order[start : start + size] for start in range(0, len(order), size)]
        calls = {}
        for number, places in enumerate(blocks):
            key = f"{self.name} {part} {first} to {last} from {number * size} {digest}"
            calls[key] = partial(scorer.score, paths, places)
        all_scores = np.zeros((2, len(paths), last - first))
        num_scored = 0
        for places, scores in zip(blocks, self.chunks.get_or_make_all(calls, Scores), strict=True):
            columns = [place - first for place in places]
            all_scores[0][:, columns] = scores.objective
            all_scores[1][:, columns] = scores.right or 0.0
            self.seconds += scores.seconds
            num_scored += len(places)
            note = f"scoring {len(paths)} candidate paths, question {num_scored} of {len(order)}"
            self.on_scored(len(paths) * len(places), note)
        return all_scores

    def correct(self, part: str, path: StaticPath) -> list[float]:
        """Return for each question of a part whether it is answered right; empty if unknown."""
        if self.objective == GOLD:
            self.objectives(part, [path])
            right: list[float] = self._scores[part, path][1].tolist()
            return right
        if not self.is_generated:
            return []
        if (part, path) not in self._grades:
            self._grades[part, path] = self._grade(part, path)
        return self._grades[part, path]

    def _grade(self, part: str, path: StaticPath) -> list[float]:
        """Generate the answers of a part along a path, some at once, and grade them."""
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

    def differences(self, part: str, path: StaticPath, full: StaticPath) -> list[float]:
        """Return for each question the objective of a path minus that of the full one."""
        ours, theirs = self.objectives(part, [path, full])
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        if self.objective != GOLD:
            return 0.0
        examples = self.splits.examples[SELECT]
        return fmean(1 / len(example.choices) for example in examples)
