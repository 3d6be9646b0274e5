"""The interface of repairs, and their registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from drllm.config import LearnConfig
from drllm.model.load import BaseModel
from drllm.prune.loss import Item
from drllm.prune.questions import make_items
from drllm.prune.states import Tokens
from drllm.registry import Registry
from drllm.tasks.parts import Questions
from drllm.tasks.texts import choose_calibration_texts
from drllm.work.listener import Listener

MOST_CHECKED = {False: 400, True: 100}  # questions and texts of the check part
MOST_CHECKED_TOKENS = 20_000  # of both; four hundred questions of ARC have 17,000
MOST_CHECKED_TEXTS = 100  # of both, if whole texts are measured


@dataclass(frozen=True)
class Lessons:
    """What a repair learns from.

    Attributes:
        fit: Name of a task or source → its questions and texts to fit on.
        check: The same to check on.
    """

    fit: Mapping[str, Sequence[Item]]
    check: Mapping[str, Sequence[Item]]

    @classmethod
    def read(
        cls, base: BaseModel, questions: Questions, max_tokens: int, listener: Listener
    ) -> Lessons:
        """Return the parts of questions as tokens; see `make_items`."""
        return cls(
            fit=make_items(base, questions, "fit", max_tokens=max_tokens, listener=listener),
            check=make_items(base, questions, "check", max_tokens=max_tokens, listener=listener),
        )

    def sample_checked(self, seed: int) -> list[Item]:
        """Return what is measured of the check part: at most 400 questions and 100 texts.

        Where these are long, there are fewer of both.
        """
        checked: list[Item] = []
        for is_text, number in MOST_CHECKED.items():
            items = [
                item
                for of_source in self.check.values()
                for item in of_source
                if item.is_text == is_text
            ]
            checked += Random(seed).sample(items, min(len(items), number))
        num_tokens = sum(item.num_tokens for item in checked)
        every = max(1, math.ceil(num_tokens / MOST_CHECKED_TOKENS))
        return checked[::every]

    def sample_checked_texts(self, seed: int) -> list[Tokens]:
        """Return texts of the check part; that of a question ends with its right answer."""
        items = self.sample_checked(seed)
        chosen = Random(seed).sample(items, min(len(items), MOST_CHECKED_TEXTS))
        return [(*item.context, *item.answers[item.gold]) for item in chosen]

    def choose_texts(self, num_tokens: int, seed: int) -> list[Tokens]:
        """Choose texts to fit on, with as many tokens of each source as possible.

        The text of a question is the question with its right answer.
        """
        by_source = {}
        for name, items in self.fit.items():
            by_source[name] = [(*item.context, *item.answers[item.gold]) for item in items]
        chosen = choose_calibration_texts(by_source, num_tokens, seed)
        return [text for texts in chosen.values() for text in texts]


class Repair(ABC):
    """A way to make up for the layers that a model leaves out.

    To add one, put a subclass into a module of this package, under `@REPAIRS.register(NAME)`.

    Args:
        config: The settings.
    """

    def __init__(self, config: LearnConfig) -> None:
        self.config = config

    @abstractmethod
    def check(self, model: Any, teacher: Any) -> None:
        """Raise an error with the reason if a model can't have this repair.

        Args:
            model: The shortened model.
            teacher: The full model.
        """

    @abstractmethod
    def fit(
        self, model: Any, teacher: Any, lessons: Lessons, work: Path, listener: Listener
    ) -> dict[str, Any]:
        """Repair the shortened model in place, with new tensors, and return a report as plain JSON.

        Its `before` and `after` are a loss on the check part. The repair is undone unless it falls.

        Args:
            model: The shortened model.
            teacher: The full model, which isn't changed.
            lessons: What to learn from.
            work: A folder for what an interrupted repair resumes from.
            listener: Receives progress and notes.
        """


REPAIRS: Registry[type[Repair]] = Registry("repair", ("drllm.prune.repairs.*",))
