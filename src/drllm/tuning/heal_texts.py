"""The texts that `heal` trains on: the questions of tasks with their answers, and other texts.

`read_sources` reads the texts. After they are tokenized, `split_texts` chooses some by their hash
that are *held out*: the loss is measured on them, and they are never trained or refitted on. This
module doesn't import torch.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias

from drllm.config import HealConfig, TuneConfig
from drllm.config.fields import LARGEST_INT
from drllm.errors import ConfigError, TaskError
from drllm.records.codec import hash_values
from drllm.records.static_paths import FIT
from drllm.tasks.examples import Prompt, choose
from drllm.tasks.texts import Tokens as Tokens
from drllm.tasks.texts import read_texts
from drllm.tuning.data_splits import TasksArgument, TaskSplits, split_tasks
from drllm.tuning.objectives import choose_objective, make_prompt

MIN_TEXTS = 2  # to refit on: one to fit, and one to choose λ
LEAST_PER_HELD_OUT = 5
"""A source has at least this many texts for each text that is held out. But one text of each source
is always held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """A task, a file or a data set whose texts are trained on. It has prompts or texts, not both.

    The digest of a run contains the names and the order of the fields (see `digest_sources`).

    Attributes:
        name: The name in records and reports.
        prompts: The questions of a task.
        texts: The texts of a file, of a data set of the hub, or from the caller.
        is_open: Whether the prompts lack right answers. The answers that the full path generates
            are then trained on.
        is_divided: Whether a task's questions were divided again, as in `TaskSplits`.
    """

    name: str
    prompts: Sequence[Prompt] = ()
    texts: Sequence[str] = ()
    is_open: bool = False
    is_divided: bool = False


class TextPart(tuple[int, ...]):
    """A sequence of tokens that was cut from a longer text. It equals its tokens.

    Attributes:
        text_sha256: A hash of the text, which says what parts are of one text.
    """

    text_sha256: str

    def __new__(cls, tokens: Tokens, text_sha256: str = "") -> "TextPart":
        """Make a part of a text."""
        part = super().__new__(cls, tokens)
        part.text_sha256 = text_sha256
        return part


TextArgument: TypeAlias = "str | Sequence[str] | Sequence[TextSource] | None"
"""The argument `texts` of `heal` and of `read_sources`, which explains it."""


def read_sources(
    config: HealConfig,
    tasks: TasksArgument = None,
    texts: TextArgument = None,
) -> list[TextSource]:
    """Read the tasks and texts to train on.

    Args:
        config: The settings.
        tasks: Tasks, or their names; None takes the tasks of the settings. Only the questions that
            `tune` fits paths on are read. Or a result of `split_tasks`.
        texts: A list of texts, or one string with the names of files and data sets of the hub,
            separated by commas; None takes the value of `--text`. A result of this function is
            returned as it is.

    Raises:
        ConfigError: There is nothing to train on, or two sources have the same name.
        TaskError: A task is unknown, or a file or a data set can't be read.
    """
    sources = find_sources(texts)
    if sources:
        return sources
    if texts is None:
        texts = config.text
    if tasks is None:
        tasks = config.tasks
    limit = config.limit or LARGEST_INT
    # The settings of a tuning divide the questions as `tune` does.
    tune_config = TuneConfig(
        data_dir=config.data_dir,
        trust_task_code=config.trust_task_code,
        num_fit=limit,
        seed=config.seed,
    )
    sources = [_make_task_source(splits) for splits in split_tasks(tune_config, tasks or [])]
    if isinstance(texts, str):
        for name, source_texts in read_texts(texts, config.limit, config.seed).items():
            sources.append(TextSource(name=name, texts=source_texts))
    elif texts:
        strings = [text for text in texts if not isinstance(text, TextSource)]
        sources.append(TextSource(name="texts", texts=choose(strings, limit, config.seed)))
    if not sources:
        raise ConfigError(
            "there is nothing to train on; give tasks (--tasks, for a first try builtin_facts), "
            "files of texts (--text), or both"
        )
    _refuse_same_name([source.name for source in sources])
    return sources


def find_sources(texts: TextArgument) -> list[TextSource]:
    """Return the sources in an argument `texts`, which is then a result of `read_sources`."""
    if texts is None or isinstance(texts, str):
        return []
    return [item for item in texts if isinstance(item, TextSource)]


def _refuse_same_name(names: Sequence[str]) -> None:
    """Refuse two sources of the same name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(
                f"two tasks or files to train on are called {name!r}; rename a file, or leave out "
                f"one of the two"
            )


def _make_task_source(splits: TaskSplits) -> TextSource:
    """Make a source from the questions of a task that `tune` fits paths on."""
    task = splits.task
    objective = choose_objective(task, TuneConfig())
    return TextSource(
        name=task.name,
        prompts=[make_prompt(task, example, objective) for example in splits.examples[FIT]],
        is_open=not task.has_answers,
        is_divided=splits.is_divided,
    )


def digest_sources(sources: Sequence[TextSource]) -> str:
    """Return the digest by which a run recognises its sources.

    Commit 3820ce17 hashed the `repr` of a list of sources, and the class was called `Source`. The
    same text is hashed here, so that a run of that version can be resumed.
    """
    texts = []
    for source in sources:
        values = [f"{field.name}={getattr(source, field.name)!r}" for field in fields(source)]
        texts.append(f"Source({', '.join(values)})")
    return hashlib.sha256(f"[{', '.join(texts)}]".encode()).hexdigest()


class SplitTexts(NamedTuple):
    """The sequences of tokens to train on, and those to measure the loss on; source → sequences."""

    to_train: dict[str, list[Tokens]]
    held_out: dict[str, list[Tokens]]


def split_texts(by_source: Mapping[str, Sequence[Tokens]], config: HealConfig) -> SplitTexts:
    """Split the texts of each source into sequences to train on and held-out sequences.

    A text that occurs several times counts once, for the first source that has it. Texts to train
    on are cut into sequences of `max_tokens`. Of a held-out text, only the first sequence is used.

    Args:
        by_source: Name of a source → its texts, as tokens.
        config: The settings.

    Raises:
        TaskError: A source has fewer than two texts that no earlier source has.
    """
    max_per_source = math.ceil(config.num_held_out / len(by_source))
    size = config.max_tokens
    to_train: dict[str, list[Tokens]] = {}
    held_out: dict[str, list[Tokens]] = {}
    seen: set[Tokens] = set()
    for name, texts in by_source.items():
        new_texts = {text for text in texts if len(text) > 1} - seen
        seen |= new_texts
        if len(new_texts) < 2:
            raise TaskError(
                f"{name} has {len(new_texts)} texts that no source before it has, and one text is "
                f"held out to measure the loss on; give at least 2"
            )
        shuffled = sorted(new_texts, key=lambda text: hash_values([text]))
        max_of_texts = max(1, len(shuffled) // LEAST_PER_HELD_OUT)
        num_held_out = min(max_per_source, max_of_texts)
        held_out[name] = [text[:size] for text in shuffled[:num_held_out]]
        to_train[name] = cut_texts(shuffled[num_held_out:], size)
    return SplitTexts(to_train, held_out)


def cut_texts(texts: Sequence[Tokens], size: int) -> list[Tokens]:
    """Cut texts into sequences of at most `size` tokens; those of a longer text are `TextPart`s."""
    sequences: list[Tokens] = []
    for text in texts:
        if len(text) > size:
            sequences += _cut_text(text, size)
        elif len(text) > 1:
            sequences.append(text)
    return sequences


def _cut_text(text: Tokens, size: int) -> list[TextPart]:
    """Cut a text into parts of at most `size` tokens."""
    text_sha256 = hash_values([text])
    parts = []
    for start in range(0, len(text), size):
        part = TextPart(text[start : start + size], text_sha256)
        if len(part) > 1:  # no token of a shorter part is predicted
            parts.append(part)
    return parts


def identify_text(sequence: Tokens) -> Tokens | str:
    """Return what a sequence's text is known by: its tokens, or the hash of a text that was cut."""
    return sequence.text_sha256 if isinstance(sequence, TextPart) else sequence


def group_by_text(sequences: Sequence[Tokens]) -> list[list[Tokens]]:
    """Put the parts of each text together; a text that wasn't cut is a group by itself."""
    groups: list[list[Tokens]] = []
    parts: dict[str, list[Tokens]] = {}
    for sequence in sequences:
        if isinstance(sequence, TextPart):
            parts.setdefault(sequence.text_sha256, []).append(sequence)
        else:
            groups.append([sequence])
    return groups + list(parts.values())
