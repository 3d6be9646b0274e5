"""Texts to fit and to train on: files, data sets of the hub, and those that come with drllm.

A file or a data set is a *source*. This module doesn't import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TypeAlias

from drllm.errors import ConfigError, TaskError
from drllm.records.codec import read_text
from drllm.tasks.examples import FILE_ENDINGS, choose
from drllm.tasks.row_files import READERS, describe_place, read_rows
from drllm.tasks.rows import HUB_ROWS, HUB_SET, read_hub_set

Tokens: TypeAlias = tuple[int, ...]

BUILTIN_TEXTS = "builtin_texts"  # the texts that come with drllm
BUILTIN_TEXTS_FILE = Path(__file__).parent / "data" / "builtin_texts.jsonl.gz"
"""The texts that `BUILTIN_TEXTS` names.

SmolLM2-135M-Instruct (Apache-2.0) wrote them; `benchmarks/make_builtin_texts.py` makes the file.
"""
TEXT_FILE_NAMES = (*FILE_ENDINGS, ".txt")  # how the names of files of texts end
FEW_TOKENS = 20_000  # with fewer tokens to fit on, there is a warning


def read_texts(names: str, limit: int | None, seed: int) -> dict[str, list[str]]:
    """Read files of texts and data sets of the hub.

    Args:
        names: The files, the data sets as OWNER/NAME[:CONFIG[:SPLIT]], and `BUILTIN_TEXTS`,
            separated by commas.
        limit: Maximum texts of a source; None for whole files and the first `HUB_ROWS` of a set.
        seed: Seed by which the texts of a file are drawn.

    Returns:
        Name of a source → its texts.

    Raises:
        ConfigError: A name is neither a file nor a data set, or two sources have the same name.
        TaskError: A file or a data set can't be read.
    """
    by_source: dict[str, list[str]] = {}
    words = [word.strip() for word in names.split(",")]
    for word in dict.fromkeys(words):
        if not word:
            continue
        file = Path(word).expanduser()
        if word == BUILTIN_TEXTS:
            file = BUILTIN_TEXTS_FILE
        is_file = file.is_file() or word.endswith(TEXT_FILE_NAMES)
        if HUB_SET.fullmatch(word) and not is_file:
            name = word.partition("/")[2]  # of OWNER/NAME
            texts = _read_hub_texts(word, limit or HUB_ROWS)
        else:
            name = file.name.partition(".")[0]
            texts = _read_file(file)
        refuse_same_name(name, by_source)
        by_source[name] = choose(texts, limit, seed)
    return by_source


def refuse_same_name(name: str, others: Mapping[str, object]) -> None:
    """Refuse a source that has the name of another one."""
    if name in others:
        raise ConfigError(
            f"two tasks or files to train on are called {name!r}; rename a file, or leave out one "
            f"of the two"
        )


def _read_hub_texts(name: str, limit: int) -> list[str]:
    """Read the first texts of a data set of the hub, at most `limit`; leave out blank texts."""
    texts: list[str] = []
    for row in read_hub_set(name, "--text"):
        text = row.get("text")
        if not isinstance(text, str):
            raise TaskError(
                f"--text {name} has no texts in a column 'text'; its columns are {list(row)}; give "
                f"another set, or a file of texts"
            )
        if text.strip():
            texts.append(text)
        if len(texts) == limit:
            break
    return texts


def _read_file(file: Path) -> list[str]:
    """Read the texts of a file: the paragraphs of a .txt file, or the fields `text` of rows."""
    if not file.name.endswith(TEXT_FILE_NAMES):
        endings = ", ".join((*READERS, ".txt"))
        raise ConfigError(
            f"--text: the name of {file} ends in none of {endings}; give a file of this kind, or a "
            f"data set of the hub as OWNER/NAME[:CONFIG[:SPLIT]]"
        )
    if not file.exists():
        raise ConfigError(
            f"--text: {file} doesn't exist; give a file of texts, a data set of the hub as "
            f"OWNER/NAME[:CONFIG[:SPLIT]], or {BUILTIN_TEXTS}"
        )
    if file.suffix == ".txt":
        paragraphs = re.split(r"\n\s*\n", read_text(file))
        return [paragraph for paragraph in paragraphs if paragraph.strip()]
    texts = []
    for line, row in read_rows(file):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            place = describe_place(file, line)
            raise TaskError(f"{place}: 'text' is {text!r}; give a text in every row")
        texts.append(text)
    return texts


def cut_texts(texts: Sequence[Tokens], size: int) -> list[Tokens]:
    """Cut texts into sequences of at most `size` tokens; those of one token are left out."""
    sequences = []
    for text in texts:
        for start in range(0, len(text), size):
            sequence = text[start : start + size]
            if len(sequence) > 1:
                sequences.append(sequence)
    return sequences


def choose_calibration_texts(
    by_source: Mapping[str, Sequence[Tokens]], num_tokens: int, seed: int
) -> dict[str, list[Tokens]]:
    """Choose sequences to fit on, with as many tokens of each source as possible.

    A source with fewer tokens than its share leaves the rest to the others. The last sequence is
    cut, so that there are exactly `num_tokens` tokens if the sources have as many.

    Args:
        by_source: Name of a source → its sequences.
        num_tokens: Maximum number of tokens.
        seed: Seed of the draw.
    """
    random = Random(seed)
    remaining = {}
    for name, sequences in by_source.items():
        remaining[name] = random.sample(sequences, k=len(sequences))
    chosen: dict[str, list[Tokens]] = {name: [] for name in by_source}
    counts = dict.fromkeys(by_source, 0)
    num_left = num_tokens
    while num_left > 1 and any(remaining.values()):
        names = [name for name in remaining if remaining[name]]
        name = min(names, key=counts.__getitem__)
        sequence = remaining[name].pop()
        if len(sequence) > num_left:
            sequence = sequence[:num_left]
        chosen[name].append(sequence)
        counts[name] += len(sequence)
        num_left -= len(sequence)
    return {name: sequences for name, sequences in chosen.items() if sequences}


def list_text_warnings(names: Sequence[str], num_tokens: int, what: str = "refit") -> list[str]:
    """Return warnings: that the texts are all of one kind, or that they are few.

    Args:
        names: The names of the sources.
        num_tokens: How many tokens they have.
        what: What they are for: a refit, or a bypass.
    """
    warnings = []
    if len(names) == 1:
        warnings.append(
            f"all texts of the {what} are of one kind ({names[0]}), so the model may get worse on "
            f"other text (a refit of SmolLM2-135M on GSM8K alone lost 0.11 nats a token, averaged "
            f"over four kinds); add other texts with --text"
        )
    if num_tokens < FEW_TOKENS:
        warnings.append(
            f"{num_tokens:,} tokens are few for a {what} (a refit of SmolLM2-135M lost 0.07 nats "
            f"a token more with 5,000 than with 45,000); give more texts, {FEW_TOKENS:,} tokens or "
            f"more"
        )
    return warnings
