"""The questions and texts of a shrink: those that find and heal paths, and those held out.

What a task calls `test` is held out: no path is chosen or healed on it. Of other texts a share is
held out by the hash of each text. This module doesn't import torch.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from drllm.config import HealConfig, ShrinkConfig, TuneConfig
from drllm.errors import TaskError
from drllm.records.codec import hash_values
from drllm.records.splits import part_by_hash
from drllm.records.static_paths import FIT, SELECT, TEST
from drllm.statistics.verdicts import FEWEST_TEXTS
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, Prompt, choose
from drllm.tasks.files import PROMPTS_ALONE, FileTask
from drllm.tuning.data_splits import TasksArgument, TaskSplits, split_tasks
from drllm.tuning.heal_texts import TextArgument, TextSource, read_sources

MAX_ANSWERS = 200
"""Of prompts without answers, at most so many are answered by the full model to heal on, and at
most so many to measure on."""
MAX_TEXTS = 400  # maximum held-out texts of a source
TEXT_BOUNDS = {"find": 0.75, "held out": 1.0}
"""Where each part of a source of texts ends, as a share of all texts."""
MIN_TEXTS = 3  # of a source: one to fit paths on, one to choose them and one to test them
NUM_SELECT_TEXTS = 100  # maximum texts of a source that choose among paths
NUM_TEST_TEXTS = 20  # maximum texts of a source that `tune` reports on


class TextsTask(Task):
    """The texts of a source as a task, so that paths are compared on them too."""

    description = "texts"
    prompt_format = PROMPTS_ALONE

    def __init__(self, name: str) -> None:
        self.name = name

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return no questions, since the caller has divided the texts already."""
        return []

    def prompts(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the text as it is, not as a user's turn, since its loss is measured so too."""
        return tuple(replace(prompt, chat=False) for prompt in super().prompts(example, reward))


@dataclass(frozen=True)
class ShrinkQuestions:
    """The questions and texts of a shrink.

    Attributes:
        tasks: The tasks with their questions by part; `test` is held out.
        sources: What paths are healed on: the questions of the tasks that aren't held out, and
            texts. Those that may be fitted on come first.
        num_to_fit: Name of a source → how many of its questions or texts may be fitted on while
            paths are compared. The others choose among paths.
        held_out_texts: Name of a source of texts → its held-out texts.
    """

    tasks: Sequence[TaskSplits]
    sources: Sequence[TextSource]
    num_to_fit: Mapping[str, int]
    held_out_texts: Mapping[str, Sequence[str]]

    @property
    def graded_tasks(self) -> list[TaskSplits]:
        """The tasks whose questions have right answers."""
        return [splits for splits in self.tasks if splits.task.has_answers]

    @property
    def open_tasks(self) -> list[TaskSplits]:
        """The tasks that are prompts alone."""
        return [splits for splits in self.tasks if not splits.task.has_answers]

    @property
    def files(self) -> list[str]:
        """The names of tasks and sources of texts of which a quarter is held out."""
        names = [splits.task.name for splits in self.tasks if isinstance(splits.task, FileTask)]
        return [*names, *self.held_out_texts]

    @property
    def held_out_sources(self) -> list[TextSource]:
        """The held-out prompts without answers of each task, and the held-out texts."""
        sources = []
        for splits in self.open_tasks:
            held_out = replace(splits, examples={**splits.examples, FIT: splits.examples[TEST]})
            sources += read_sources(HealConfig(), [held_out])
        for name, texts in self.held_out_texts.items():
            sources.append(TextSource(name=name, texts=texts))
        return sources

    def take_to_fit(self, sources: Sequence[TextSource]) -> list[TextSource]:
        """Return the part of some sources that paths are refitted on while they are compared.

        Args:
            sources: The sources, perhaps with texts in place of their prompts, in the same order.
        """
        parts = []
        for source in sources:
            number = self.num_to_fit[source.name]
            part = replace(source, prompts=source.prompts[:number], texts=source.texts[:number])
            parts.append(part)
        return parts

    def make_text_tasks(self, num_fit: int, cut: Callable[[str], str]) -> list[TaskSplits]:
        """Make a task from the texts of each source, so that paths are compared on them.

        Args:
            num_fit: Maximum texts of a source that paths are fitted on.
            cut: Cuts a text that is too long to be measured.
        """
        tasks = []
        for source in self.sources:
            if source.texts:
                number = self.num_to_fit[source.name]
                tasks.append(_make_text_task(source, number, num_fit, cut))
        return tasks

    def count_to_find(self) -> dict[str, int]:
        """Return how many questions and texts find and heal paths, by task or source."""
        return {source.name: len(source.prompts) or len(source.texts) for source in self.sources}

    def count_held_out(self) -> dict[str, int]:
        """Return how many questions and texts are held out, by task or source."""
        counts = {splits.task.name: len(splits.examples[TEST]) for splits in self.tasks}
        for name, texts in self.held_out_texts.items():
            counts[name] = len(texts)
        return counts

    def digest(self) -> str:
        """Return the hash of all questions and texts."""
        values = [*(splits.digest_values() for splits in self.tasks), *self.held_out_texts.items()]
        return hash_values([*values, *map(repr, self.sources)])


def read_questions(
    config: ShrinkConfig, tasks: TasksArgument, texts: TextArgument = None
) -> ShrinkQuestions:
    """Read the questions and texts, and divide them.

    Args:
        config: The settings.
        tasks: Tasks, names of tasks, or files of questions.
        texts: As for `heal`; None takes the config's texts.

    Raises:
        TaskError: A task is unknown or has too few questions, a file can't be read, or two sources
            have the same name.
    """
    all_splits = _read_tasks(config, tasks)
    heal_config = HealConfig(data_dir=config.data_dir, seed=config.seed)
    to_find = []
    num_to_fit = {}
    for splits in all_splits:
        to_fit, to_choose = _divide_to_find(splits, config.seed)
        num_to_fit[splits.task.name] = len(to_fit)
        to_find.append(replace(splits, examples={**splits.examples, FIT: to_fit + to_choose}))
    sources = read_sources(heal_config, to_find, [])
    held_out_texts = {}
    for source in _read_texts(config, heal_config, texts):
        part_to_find, held_out = _divide_texts(source, config.seed)
        sources.append(part_to_find)
        held_out_texts[source.name] = held_out
        num_texts = len(part_to_find.texts)
        num_to_fit[source.name] = num_texts - sum(_count_judged_texts(num_texts))
    _refuse_same_name([source.name for source in sources])
    return ShrinkQuestions(all_splits, sources, num_to_fit, held_out_texts)


def _read_tasks(config: ShrinkConfig, tasks: TasksArgument) -> list[TaskSplits]:
    """Read the tasks with their questions by part; see `read_questions`."""
    tune_config = TuneConfig(
        data_dir=config.data_dir,
        trust_task_code=config.trust_task_code,
        num_fit=config.num_fit,
        seed=config.seed,
    )
    all_splits = []
    for splits in split_tasks(tune_config, tasks):
        _refuse_divided(splits)
        all_splits.append(_limit_held_out(splits, config.seed))
    return all_splits


def _read_texts(
    config: ShrinkConfig, heal_config: HealConfig, texts: TextArgument
) -> list[TextSource]:
    """Read the texts beside the questions; an empty list if none are given."""
    if texts is None:
        texts = config.text
    if not texts:
        return []
    return read_sources(heal_config, [], texts)


def _refuse_divided(splits: TaskSplits) -> None:
    """Refuse a task without questions of its own to report on."""
    if splits.is_divided:
        raise TaskError(
            f"{splits.task.name} has no split of its own for the last test, so nothing could be "
            f"held out; give its questions as a file (FILE.jsonl)"
        )


def _limit_held_out(splits: TaskSplits, seed: int) -> TaskSplits:
    """Limit the held-out prompts without answers, since the full model answers them first."""
    if splits.task.has_answers:
        return splits
    held_out = choose(splits.examples[TEST], MAX_ANSWERS, seed)
    return replace(splits, examples={**splits.examples, TEST: held_out})


def _divide_to_find(splits: TaskSplits, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the questions that paths may be fitted on, and those that choose among paths.

    Of prompts without answers, at most `MAX_ANSWERS` are kept, in the same proportion.
    """
    to_fit = list(dict.fromkeys([*splits.all_to_fit, *splits.spare]))
    known = set(to_fit)
    to_choose = [each for each in dict.fromkeys(splits.examples[SELECT]) if each not in known]
    number = len(to_fit) + len(to_choose)
    if not splits.task.has_answers and number > MAX_ANSWERS:
        num_to_choose = MAX_ANSWERS * len(to_choose) // number
        to_fit = choose(to_fit, MAX_ANSWERS - num_to_choose, seed)
        to_choose = choose(to_choose, num_to_choose, seed)
    return to_fit, to_choose


def _divide_texts(source: TextSource, seed: int) -> tuple[TextSource, list[str]]:
    """Divide the texts of a source: those to find and heal paths with, and those held out.

    Raises:
        TaskError: A part would be empty.
    """
    parts: dict[str, list[str]] = {part: [] for part in TEXT_BOUNDS}
    for text in dict.fromkeys(source.texts):
        composed = unicodedata.normalize("NFC", text)  # copies in another form fall into one part
        parts[part_by_hash(f"shrink:{composed}", TEXT_BOUNDS)].append(text)
    to_find, held_out = parts.values()
    if len(to_find) < MIN_TEXTS or not held_out:
        raise TaskError(
            f"{source.name} has {len(source.texts)} texts, too few to find paths on some and to "
            f"hold out a quarter; give {FEWEST_TEXTS * 4} texts or more"
        )
    return replace(source, texts=to_find), choose(held_out, MAX_TEXTS, seed)


def _count_judged_texts(num_texts: int) -> tuple[int, int]:
    """Return how many texts of a source choose among paths, and how many `tune` reports on."""
    third = max(1, num_texts // 3)
    return min(third, NUM_SELECT_TEXTS), min(third, NUM_TEST_TEXTS)


def _make_text_task(
    source: TextSource, num_to_fit: int, num_fit: int, cut: Callable[[str], str]
) -> TaskSplits:
    """Make a task from the texts of a source; they choose among paths as questions do.

    None of them are held out from the shrink.
    """
    num_to_choose, num_to_report = _count_judged_texts(len(source.texts))
    end_of_select = num_to_fit + num_to_choose
    parts = {
        FIT: source.texts[: min(num_fit, num_to_fit)],
        SELECT: source.texts[num_to_fit:end_of_select],
        TEST: source.texts[end_of_select : end_of_select + num_to_report],
    }
    examples = {}
    for part, texts in parts.items():
        examples[part] = [Example(question=cut(text), answer="") for text in texts]
    return TaskSplits(TextsTask(source.name), examples, is_divided=True)


def _refuse_same_name(names: Sequence[str]) -> None:
    """Refuse a file of texts with the name of a task."""
    for name in names:
        if names.count(name) > 1:
            raise TaskError(
                f"the questions and a file of texts are both called {name!r}; rename one of them"
            )
