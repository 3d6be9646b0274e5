"""One task's questions, and what is known of paths on them: each pair is scored once, and kept.

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

MOST_PAIRS = 100  # questions times paths that are scored in one go, and that a kill loses, at most
MOST_ANSWERS = 32  # the same of answers that are generated
NUM_TEXTS = 100  # questions of a part whose text's next-token loss is read too, at most
TEXTS_OF = "texts of "


class TaskScorer:
    """Scores paths on one task, part by part; `seconds` is the time that it took.

    Args:
        routed: The model.
        splits: The task with its questions.
        config: The settings.
        chunks: Keeps what is scored.
        on_scored: Called with the number of questions times paths scored, and what they were.
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
        # Objective and right answers on the first questions of a part, [2, Q].
        self._scores: dict[tuple[str, StaticPath], Floats] = defaultdict(lambda: np.zeros((2, 0)))
        self._grades: dict[tuple[str, StaticPath], list[float]] = {}

    def prompts(self, part: str) -> list[Prompt]:
        """Return how the questions of a part are asked."""
        examples = self.splits.examples[part]
        if part == FIT:  # in random order, since a search looks at the first ones first
            order = np.random.RandomState(self.config.seed).permutation(len(examples))
            examples = [examples[place] for place in order]
        else:
            examples = choose(examples, self.config.num_judged, self.config.seed)
        return [make_prompt(self.task, example, self.objective) for example in examples]

    def scorer(self, part: str) -> PathScorer:
        """Return what scores paths on a part; `texts of PART` reads the texts of its questions."""
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
        """Return how many questions of a part are asked, or how many of its texts are read."""
        return len(self.scorer(part).items)

    def objectives(
        self, part: str, paths: Sequence[StaticPath], num: int | None = None
    ) -> list[list[float]]:
        """Return the objective of paths on the first questions of a part, each asked once."""
        most = self.num_questions(part)
        num = most if num is None else min(num, most)
        by_start: dict[int, list[StaticPath]] = {}  # paths by how many questions are known
        for path in dict.fromkeys(paths):
            start = self._scores[part, path].shape[1]
            if start < num:
                by_start.setdefault(start, []).append(path)
        for start, unknown in by_start.items():
            scores = self._score_range(part, unknown, start, num)
            for place, path in enumerate(unknown):
                known = self._scores[part, path]
                self._scores[part, path] = np.concatenate((known, scores[:, place]), axis=1)
        return [self._scores[part, path][0].tolist() for path in paths]

    def _score_range(self, part: str, paths: Sequence[StaticPath], first: int, last: int) -> Floats:
        """Score paths on a range of questions, a few of like length in each go, `[2, N, Q]`."""
        scorer = self.scorer(part)
        order = sorted(range(first, last), key=lambda place: scorer.items[place].request.length)
        size = max(1, MOST_PAIRS // len(paths))
        digest = hash_values(path.layers for path in paths)[:16]
        blocks = [order[start : start + size] for start in range(0, len(order), size)]
        calls = {}
        for number, places in enumerate(blocks):
            key = f"{self.name} {part} {first} to {last} from {number * size} {digest}"
            calls[key] = partial(scorer.score, paths, places)
        found = np.zeros((2, len(paths), last - first))
        num_scored = 0
        for places, scores in zip(blocks, self.chunks.get_or_make_all(calls, Scores), strict=True):
            columns = [place - first for place in places]
            found[0][:, columns] = scores.objective
            found[1][:, columns] = scores.right or 0.0
            self.seconds += scores.seconds
            num_scored += len(places)
            note = f"scoring {len(paths)} candidate paths, question {num_scored} of {len(order)}"
            self.on_scored(len(paths) * len(places), note)
        return found

    def correct(self, part: str, path: StaticPath) -> list[float]:
        """Return which questions of a part are answered right; empty where nothing says so."""
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
        """Generate the answers of a part along a path, some in each go, and grade them."""
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
        """Return what a path has more of the objective than the full one, question by question."""
        ours, theirs = self.objectives(part, [path, full])
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        if self.objective != GOLD:
            return 0.0
        examples = self.splits.examples[SELECT]
        return fmean(1 / len(example.choices) for example in examples)
