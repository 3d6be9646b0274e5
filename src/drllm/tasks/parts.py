"""The questions and texts that a model is shortened for, in three parts.

*Fit* chooses gaps, and is refitted and learned on. *Check* chooses sets of gaps and says when to
stop and what to keep. Nothing is chosen on what is *held out*, which a verdict alone reads.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drllm.config.fields import require_tasks
from drllm.config.questions import QuestionsConfig
from drllm.errors import TaskError
from drllm.records.splits import BOUNDS, part_by_hash, question_key
from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import Example, choose
from drllm.tasks.registry import get_tasks
from drllm.tasks.texts import read_texts

PARTS = {"fit": ("search", "fit"), "check": ("select",), "held out": ("test",)}
"""Part → the splits of a task that it has."""
MAX_PROMPTS = 200  # prompts without answers of each part that the full model answers
MAX_TEXTS = 400  # held-out texts of a source


@dataclass(frozen=True)
class Questions:
    """Questions and texts by part.

    Attributes:
        tasks: The tasks.
        examples: Part → for each task, its questions.
        texts: Part → name of a source → its texts.
    """

    tasks: Sequence[Task]
    examples: Mapping[str, Sequence[Sequence[Example]]]
    texts: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def count(self, part: str) -> dict[str, int]:
        """Return how many questions and texts a part has, by task and source."""
        counts = {}
        for task, examples in zip(self.tasks, self.examples[part], strict=True):
            counts[task.name] = len(examples)
        for name, texts in self.texts[part].items():
            counts[name] = len(texts)
        return counts


def read_questions(
    config: QuestionsConfig,
    tasks: Questions | Task | str | Sequence[Task | str] | None = None,
    texts: str | Sequence[str] | None = None,
) -> Questions:
    """Read questions and texts, and divide them.

    A question that several tasks have stays in the last of its parts.

    Args:
        config: What is read if `tasks` or `texts` aren't given, where data sets are, whether task
            files of the harness may run code, and the seed of the choice of prompts.
        tasks: Tasks, names of tasks, files of questions, or what this function returned.
        texts: Texts, or the names of files and data sets in one string.

    Raises:
        ConfigError: No task is given.
        TaskError: A task is unknown, or a part of it is empty; or two sources have the same name.
    """
    if isinstance(tasks, Questions):
        return tasks
    tasks = tasks or require_tasks(config.tasks)
    texts = texts or config.text
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    all_tasks: list[Task] = []
    for task in [tasks] if isinstance(tasks, (str, Task)) else tasks:
        if isinstance(task, str):
            all_tasks += get_tasks(task, trust_code=config.trust_task_code)
        else:
            all_tasks.append(task)
    examples: dict[str, list[list[Example]]] = {part: [] for part in PARTS}
    taken: set[str] = set()
    for part, splits in reversed(PARTS.items()):
        in_part: set[str] = set()
        for task in all_tasks:
            found = []
            for split in splits:
                with contextlib.suppress(NoSplitError):
                    found += task.examples(split, data_dir)
            new = [each for each in found if question_key(each.question) not in taken]
            if not task.has_answers:
                new = choose(new, MAX_PROMPTS, config.seed)
            if not new:
                raise TaskError(
                    f"task {task.name!r} has no questions of its own for the part {part!r}; give a "
                    f"few hundred questions, as a file (FILE.jsonl) or a task with training "
                    f"questions"
                )
            in_part.update(question_key(each.question) for each in new)
            examples[part].append(new)
        taken |= in_part
    sources: Mapping[str, Sequence[str]] = {}
    if isinstance(texts, str):
        sources = read_texts(texts, None, config.seed)
    elif texts:
        sources = {"texts": texts}
    divided: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
    for name, of_source in sources.items():
        if name in [task.name for task in all_tasks]:
            raise TaskError(
                f"the questions and a file of texts are both called {name!r}; rename one of them"
            )
        for part in PARTS:
            divided[part][name] = []
        for text in dict.fromkeys(of_source):
            composed = unicodedata.normalize("NFC", text)  # copies in another form fall together
            split = part_by_hash(f"shrink:{composed}", BOUNDS["own"])
            part = next(part for part, splits in PARTS.items() if split in splits)
            divided[part][name].append(text)
        for part in PARTS:
            if not divided[part][name]:
                raise TaskError(
                    f"{name} has {len(of_source)} texts, too few to fit on some, check on some and "
                    f"hold some out; give more"
                )
        divided["held out"][name] = choose(divided["held out"][name], MAX_TEXTS, config.seed)
    return Questions(all_tasks, examples, divided)
