"""The texts that a tuning repairs paths with: questions with their answers, and other texts.

The questions are those that paths may be fitted on, never those that paths are chosen or tested on.
This module doesn't import torch.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from drllm.config import HealConfig, TuneConfig
from drllm.errors import TaskError
from drllm.records.codec import hash_values
from drllm.records.static_paths import FIT
from drllm.tuning.data_splits import TaskSplits
from drllm.tuning.heal_texts import TextArgument, TextSource, Tokens, read_sources

NO_REPAIR = "none"  # the value of `--repair` with which paths aren't repaired
REFIT_TOKENS = 50_000  # maximum tokens of the texts that a path is repaired with
STAND_IN_TOKENS = 10_000  # maximum tokens of the texts that the stand-in is fitted on
MAX_TOKENS = 512  # maximum tokens of a sequence; longer texts are cut
FEW_TOKENS = 20_000  # with fewer tokens, a note says so


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
    if texts is not None and not isinstance(texts, str):
        earlier_result = [item for item in texts if isinstance(item, TextSource)]
        if earlier_result:
            return earlier_result
    heal_config = HealConfig(data_dir=config.data_dir, seed=config.seed)
    sources: list[TextSource] = []
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


def choose_texts(by_source: Mapping[str, Sequence[Tokens]], num_tokens: int) -> list[Tokens]:
    """Choose texts with about `num_tokens` tokens, the same number from each source if it has them.

    The texts of a source are drawn by their hash. Texts that are longer than `MAX_TOKENS` are cut.
    A text that occurs several times counts once.

    Args:
        by_source: Name of a source → its texts, as tokens.
        num_tokens: The number of tokens; the last text may exceed it.

    Raises:
        TaskError: There are fewer than two texts.
    """
    seen: set[Tokens] = set()
    waiting: dict[str, deque[Tokens]] = {}
    for name, texts in by_source.items():
        new_texts = set(_cut_texts(texts)) - seen
        seen |= new_texts
        if new_texts:
            waiting[name] = deque(sorted(new_texts, key=lambda text: hash_values([text])))
    chosen: list[Tokens] = []
    num_chosen = Counter(dict.fromkeys(waiting, 0))  # tokens by source
    while waiting and num_chosen.total() < num_tokens:
        name = min(waiting, key=num_chosen.__getitem__)
        text = waiting[name].popleft()
        if not waiting[name]:
            del waiting[name]
        chosen.append(text)
        num_chosen[name] += len(text)
    if len(chosen) < 2:
        raise TaskError(
            f"there are {len(chosen)} texts to repair paths with, and one chooses how strongly; "
            f"give more questions or --text FILE, or --repair none"
        )
    return chosen


def _cut_texts(texts: Sequence[Tokens]) -> list[Tokens]:
    """Cut texts into sequences of at most `MAX_TOKENS`, without sequences of a single token."""
    sequences = []
    for text in texts:
        for start in range(0, len(text), MAX_TOKENS):
            sequence = text[start : start + MAX_TOKENS]
            if len(sequence) > 1:
                sequences.append(sequence)
    return sequences


def describe_calibration(names: Sequence[str], texts: Sequence[Tokens], size: int) -> list[str]:
    """Say what paths are repaired with and what the stand-in needs, and warn if that is little.

    Args:
        names: The names of the sources.
        texts: The texts that paths are repaired with.
        size: The memory of the stand-in's states, in bytes.
    """
    num_tokens = sum(map(len, texts))
    lines = [
        f"paths are repaired with {num_tokens:,} tokens of {', '.join(names)}; the stand-in that "
        f"candidates are repaired with keeps {size / 1e9:.2g} GB of states"
    ]
    if num_tokens < FEW_TOKENS:
        lines.append(
            f"{num_tokens:,} tokens are few: with 10 thousand instead of 45 thousand, five of 30 "
            f"layers out cost 0.04 nats a token more; give more texts with --text"
        )
    if len(names) == 1:
        lines.append(
            f"{names[0]} is the only source: paths repaired with one kind of text did worse on "
            f"others, by 0.1 nats a token and more; add other texts with --text if the path is to "
            f"keep them"
        )
    return lines
