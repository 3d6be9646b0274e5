"""What an adapter is trained on: questions with their answers, and further texts. Loads no torch.

Texts are held out by their hash and never trained on.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

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

LEAST_PER_HELD_OUT = 5  # of a source, at most one text in so many is held out, but one in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A task or a file whose texts are trained on.

    It has questions as they are asked, which are read with their right answers or, where there are
    none (`is_open`), with the full path's; or it has texts. `is_divided` is that of `TaskSplits`.
    """

    name: str
    prompts: Sequence[Prompt] = ()
    texts: Sequence[str] = ()
    is_open: bool = False
    is_divided: bool = False


def sources_of(
    config: HealConfig,
    tasks: Task | str | Sequence[Task | str] | None = None,
    texts: str | Sequence[str] | None = None,
) -> list[Source]:
    """Return what is trained on: of tasks and texts those given, else those of the settings.

    Of a task it is what `tune` fits paths on. Texts are names of files and of data sets of the hub
    in one string, or the texts themselves. Nothing to train on and two sources of one name are a
    ConfigError, an unknown task or what can't be read a TaskError.
    """
    num, seed = config.limit or LARGEST_INT, config.seed
    fitted = TuneConfig(data_dir=config.data_dir, num_fit=num, seed=seed)
    tasks, texts = config.tasks if tasks is None else tasks, config.text if texts is None else texts
    found = [_of_task(parts) for parts in split_tasks(fitted, tasks or [])]
    if isinstance(texts, str):
        words = dict.fromkeys(filter(None, map(str.strip, texts.split(","))))
        given = [_texts_of(word, config.limit or HUB_ROWS) for word in words]
    else:
        given = [("texts", list(texts))] if texts else []
    found += [Source(name=name, texts=choose(own, num, seed)) for name, own in given]
    if not found:
        raise ConfigError(
            "there is nothing to train on; give tasks (--tasks), files of texts (--text), or both"
        )
    for name, count in Counter(source.name for source in found).items():
        if count > 1:
            raise ConfigError(f"two sources are called {name!r}; rename a file, or leave one out")
    return found


def _of_task(parts: TaskSplits) -> Source:
    task, objective = parts.task, choose_objective(parts.task, TuneConfig())
    return Source(
        name=task.name,
        prompts=[make_prompt(task, example, objective) for example in parts.examples[FIT]],
        is_open=not task.has_answers,
        is_divided=parts.is_divided,
    )


def _texts_of(word: str, num: int) -> tuple[str, list[str]]:
    """Return a name and the texts of a file, or of a data set of the hub the first `num`."""
    file, hub_set = Path(word).expanduser(), HUB_SET.fullmatch(word)
    if hub_set and not file.is_file() and not word.endswith((*FILE_NAMES, ".txt")):
        return word.partition("/")[2], _texts_on_hub(word, num)
    return file.name.partition(".")[0], _texts_in(file)


@functools.cache  # asked for twice: to check the settings, and to train
def _texts_on_hub(name: str, num: int) -> list[str]:
    found: list[str] = []
    for row in read_hub_set(name, "--text"):
        if not isinstance(text := row.get("text"), str):
            said = f"--text {name} has no text in a column 'text' of {[*row]}"
            raise TaskError(f"{said}; give another set, or a file of texts")
        found += [text] if text.strip() else []
        if len(found) == num:
            break
    return found


def _texts_in(file: Path) -> list[str]:
    """Return the texts of a file: the rows' field `text`, or the paragraphs."""
    if file.suffix == ".txt":
        return [part for part in re.split(r"\n\s*\n", read_text(file)) if part.strip()]
    if not file.name.endswith(FILE_NAMES):
        raise ConfigError(
            f"--text: {file} is neither .jsonl, .jsonl.gz nor .txt; give a file of one of these, "
            f"or a data set of the hub as OWNER/NAME[:CONFIG[:SPLIT]]"
        )
    found = []
    for line, row in read_rows(file):
        if not isinstance(text := row.get("text"), str) or not text.strip():
            raise TaskError(f"{file}, line {line}: 'text' is {text!r}; give a text in every row")
        found.append(text)
    return found


def divided(
    by_source: Mapping[str, Sequence[Tokens]], config: HealConfig
) -> tuple[dict[str, list[Tokens]], dict[str, list[Tokens]]]:
    """Cut texts into sequences, and return by source those trained on and those held out.

    A text counts once, however often it is there; of one that is held out the beginning is read.
    A source of which nothing can be held out is a TaskError.
    """
    trained: dict[str, list[Tokens]] = {}
    held_out: dict[str, list[Tokens]] = {}
    seen: set[Tokens] = set()
    wanted, size = -(-config.num_held_out // len(by_source)), config.max_tokens
    for name, texts in by_source.items():
        left = {text for text in texts if len(text) > 1} - seen
        own = sorted(left, key=lambda text: hash_values([text]))
        seen.update(own)
        if len(own) < 2:
            raise TaskError(
                f"{name} has {len(own)} texts that no other source has, and one is held out to "
                f"measure on; give at least 2"
            )
        num = min(wanted, max(1, len(own) // LEAST_PER_HELD_OUT))
        held_out[name] = [text[:size] for text in own[:num]]
        pieces = (t[start : start + size] for t in own[num:] for start in range(0, len(t), size))
        trained[name] = [piece for piece in pieces if len(piece) > 1]  # one token predicts nothing
    return trained, held_out
