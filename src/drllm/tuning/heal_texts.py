"""The texts that `heal` trains on: questions with their answers, and other texts.

Some texts, chosen by their hash, are held out: they are measured on, and never trained on. This
module doesn't import torch.
"""

import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, TypeAlias

from drllm.config import HealConfig, TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.errors import ConfigError, TaskError
from drllm.records.codec import hash_values, read_text
from drllm.records.static_paths import FIT
from drllm.tasks.base import Task
from drllm.tasks.examples import FILE_NAMES, Prompt, choose
from drllm.tasks.rows import HUB_ROWS, HUB_SET, read_hub_set, read_rows
from drllm.tuning.data_splits import TaskSplits, split_tasks
from drllm.tuning.objectives import choose_objective, make_prompt

Tokens: TypeAlias = tuple[int, ...]

LEAST_PER_HELD_OUT = 5  # at most one text in 5 is held out, but at least one of each source


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """A task or a file whose texts are trained on.

    Attributes:
        name: Its name in records and reports.
        prompts: The questions of a task.
        texts: The texts of a file, of a data set of the hub, or from the caller.
        is_open: Whether the prompts lack right answers. They are then read with the full path's
            answers.
        is_divided: As in `TaskSplits`.
    """

    name: str
    prompts: Sequence[Prompt] = ()
    texts: Sequence[str] = ()
    is_open: bool = False
    is_divided: bool = False


def read_sources(
    config: HealConfig,
    tasks: Task | str | Sequence[Task | str] | None = None,
    texts: str | Sequence[str] | None = None,
) -> list[TextSource]:
    """Read the tasks and texts to train on.

    Args:
        config: The settings.
        tasks: Tasks, or their names; None takes the tasks of the settings. The questions of a task
            are those that `tune` fits paths on.
        texts: Texts, or one string with the names of files and data sets of the hub; None takes the
            texts of the settings.

    Raises:
        ConfigError: There is nothing to train on, or two sources have the same name.
        TaskError: A task is unknown, or a file or a data set can't be read.
    """
    if tasks is None:
        tasks = config.tasks
    if texts is None:
        texts = config.text
    limit = config.limit or LARGEST_INT
    tune_config = TuneConfig(data_dir=config.data_dir, num_fit=limit, seed=config.seed)
    sources = [_make_task_source(splits) for splits in split_tasks(tune_config, tasks or [])]
    if isinstance(texts, str):
        sources += _read_text_sources(texts, config)
    elif texts:
        sources.append(TextSource(name="texts", texts=choose(list(texts), limit, config.seed)))
    if not sources:
        raise ConfigError(
            "there is nothing to train on; give tasks (--tasks), files of texts (--text), or both"
        )
    _refuse_same_name([source.name for source in sources])
    return sources


def _refuse_same_name(names: Sequence[str]) -> None:
    """Refuse two sources of the same name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"two sources are called {name!r}; rename a file, or leave one out")


def _make_task_source(splits: TaskSplits) -> TextSource:
    """Return a task with the questions that `tune` fits paths on."""
    task = splits.task
    objective = choose_objective(task, TuneConfig())
    return TextSource(
        name=task.name,
        prompts=[make_prompt(task, example, objective) for example in splits.examples[FIT]],
        is_open=not task.has_answers,
        is_divided=splits.is_divided,
    )


def _read_text_sources(names: str, config: HealConfig) -> list[TextSource]:
    """Read files of texts and data sets of the hub, from a comma-separated list of names."""
    words = [word.strip() for word in names.split(",")]
    sources = []
    for word in dict.fromkeys(words):
        if not word:
            continue
        file = Path(word).expanduser()
        is_named_like_file = word.endswith((*FILE_NAMES, ".txt"))
        if HUB_SET.fullmatch(word) and not file.is_file() and not is_named_like_file:
            name = word.partition("/")[2]
            texts = _read_hub_texts(word, config.limit or HUB_ROWS)
        else:
            name = file.name.partition(".")[0]
            texts = _read_file(file)
        sources.append(TextSource(name=name, texts=choose(texts, config.limit, config.seed)))
    return sources


@functools.cache  # a data set is needed twice: to check the settings, and to train
def _read_hub_texts(name: str, num: int) -> list[str]:
    """Read the first `num` texts of a data set of the hub; blank texts are left out."""
    texts: list[str] = []
    for row in read_hub_set(name, "--text"):
        text = row.get("text")
        if not isinstance(text, str):
            raise TaskError(
                f"--text {name} has no text in a column 'text' of {list(row)}; give another set, "
                f"or a file of texts"
            )
        if text.strip():
            texts.append(text)
        if len(texts) == num:
            break
    return texts


def digest_sources(sources: Sequence[TextSource]) -> str:
    """Return the digest by which a run recognises its sources.

    It is the digest of the sources' `repr` at commit 3820ce17, where the class was called `Source`,
    so that a run of that version can be resumed.
    """
    texts = []
    for source in sources:
        values = [f"{field.name}={getattr(source, field.name)!r}" for field in fields(source)]
        texts.append(f"Source({', '.join(values)})")
    return hashlib.sha256(f"[{', '.join(texts)}]".encode()).hexdigest()


def _read_file(file: Path) -> list[str]:
    """Read the texts of a file: the field `text` of its rows, or its paragraphs."""
    if file.suffix == ".txt":
        return [part for part in re.split(r"\n\s*\n", read_text(file)) if part.strip()]
    if not file.name.endswith(FILE_NAMES):
        raise ConfigError(
            f"--text: {file} is neither .jsonl, .jsonl.gz nor .txt; give a file of one of these, "
            f"or a data set of the hub as OWNER/NAME[:CONFIG[:SPLIT]]"
        )
    texts = []
    for line, row in read_rows(file):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            raise TaskError(f"{file}, line {line}: 'text' is {text!r}; give a text in every row")
        texts.append(text)
    return texts


class SplitTexts(NamedTuple):
    """Sequences of tokens by source."""

    trained: dict[str, list[Tokens]]
    held_out: dict[str, list[Tokens]]


def split_texts(by_source: Mapping[str, Sequence[Tokens]], config: HealConfig) -> SplitTexts:
    """Split each source's texts into sequences to train on and sequences to measure on.

    A text that occurs several times counts once. Texts to train on are cut into sequences of
    `max_tokens`. Of a held-out text, only the first sequence is used.

    Raises:
        TaskError: A source has fewer than two texts that no earlier source has.
    """
    num_per_source = math.ceil(config.num_held_out / len(by_source))
    size = config.max_tokens
    trained: dict[str, list[Tokens]] = {}
    held_out: dict[str, list[Tokens]] = {}
    seen: set[Tokens] = set()
    for name, texts in by_source.items():
        new_texts = {text for text in texts if len(text) > 1} - seen
        in_order = sorted(new_texts, key=lambda text: hash_values([text]))
        seen |= new_texts
        if len(in_order) < 2:
            raise TaskError(
                f"{name} has {len(in_order)} texts that no other source has, and one is held out "
                f"to measure on; give at least 2"
            )
        num = min(num_per_source, max(1, len(in_order) // LEAST_PER_HELD_OUT))
        held_out[name] = [text[:size] for text in in_order[:num]]
        trained[name] = _cut_texts(in_order[num:], size)
    return SplitTexts(trained, held_out)


def _cut_texts(texts: Sequence[Tokens], size: int) -> list[Tokens]:
    """Cut texts into sequences of at most `size` tokens."""
    sequences = []
    for text in texts:
        for start in range(0, len(text), size):
            sequence = text[start : start + size]
            if len(sequence) > 1:  # one token predicts nothing
                sequences.append(sequence)
    return sequences
