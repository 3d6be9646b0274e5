"""The texts that a tuning repairs paths with: questions with their answers, and other texts.

The questions are those that paths may be fitted on, never those that paths are chosen or tested on.
This module doesn't import torch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from drllm.config import HealConfig, TuneConfig
from drllm.errors import TaskError
from drllm.records.static_paths import FIT
from drllm.tasks.texts import Tokens, choose_calibration_texts, list_text_warnings
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.heal_texts import (
    MIN_TEXTS,
    TextArgument,
    TextSource,
    cut_texts,
    find_sources,
    read_sources,
)

STAND_IN_TOKENS = 10_000  # maximum tokens of the texts that the stand-in is fitted on
MAX_TOKENS = 512  # maximum tokens of a sequence; longer texts are cut


def read_calibration(
    config: TuneConfig, splits: Sequence[TaskSplits], texts: TextArgument = None
) -> list[TextSource]:
    """Read the texts that paths are repaired with: the questions of each task, and other texts.

    Args:
        config: The settings.
        splits: The tasks with their questions.
        texts: As for `read_sources`; None takes the value of `--text`.

    Raises:
        ConfigError: A file has the name of another source.
        TaskError: A file or a data set can't be read.
    """
    sources = find_sources(texts)
    if sources:
        return sources
    heal_config = HealConfig(data_dir=config.data_dir, seed=config.seed)
    for task in splits:
        questions = replace(task, examples={**task.examples, FIT: list(task.all_to_fit)})
        sources += read_sources(heal_config, [questions])
    if texts is None:
        texts = config.text
    if texts:
        sources += read_sources(heal_config, [], texts)
    return _number_same_names(sources)


def _number_same_names(sources: Sequence[TextSource]) -> list[TextSource]:
    """Add numbers to the names of sources that have the same name."""
    counts = Counter(source.name for source in sources)
    distinct = []
    for number, source in enumerate(sources, start=1):
        if counts[source.name] > 1:
            source = replace(source, name=f"{source.name} ({number})")
        distinct.append(source)
    return distinct


def choose_texts(
    by_source: Mapping[str, Sequence[Tokens]],
    num_tokens: int,
    seed: int,
    max_tokens: int = MAX_TOKENS,
) -> list[Tokens]:
    """Choose texts of `num_tokens` tokens, as many of each source as possible.

    A text that occurs several times counts once.

    Args:
        by_source: Name of a source → its texts, as tokens.
        num_tokens: Maximum number of tokens.
        seed: Seed of the draw.
        max_tokens: Maximum tokens of a text; longer texts are cut.

    Raises:
        TaskError: There are fewer than two texts.
    """
    seen: set[Tokens] = set()
    new_by_source: dict[str, list[Tokens]] = {}
    for name, texts in by_source.items():
        new_texts = set(cut_texts(texts, max_tokens)) - seen
        seen |= new_texts
        new_by_source[name] = sorted(new_texts)  # so that the order in the file doesn't matter
    chosen: list[Tokens] = []
    for texts in choose_calibration_texts(new_by_source, num_tokens, seed).values():
        chosen += texts
    if len(chosen) < MIN_TEXTS:
        raise TaskError(
            f"there are {len(chosen)} texts to repair paths with, and a refit needs at least "
            f"{MIN_TEXTS}; give more questions or --text FILE, or --repair none"
        )
    return chosen


def describe_calibration(
    names: Sequence[str], texts: Sequence[Tokens], num_bytes: int
) -> list[str]:
    """Say what paths are repaired with and what the stand-in keeps, and warn if that is little.

    Args:
        names: The names of the sources.
        texts: The texts that paths are repaired with.
        num_bytes: The memory of the states that the stand-in keeps.
    """
    num_tokens = sum(map(len, texts))
    lines = [
        f"paths are refitted on {num_tokens:,} tokens of {', '.join(names)}; comparing "
        f"candidates keeps {num_bytes / 1e9:.2g} GB of states in memory"
    ]
    return lines + list_text_warnings(names, num_tokens)
