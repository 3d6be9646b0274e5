"""Reads texts to fit on and to measure on, one kind of text a file."""

from __future__ import annotations

import random

from common.compare import SEED
from drllm.model.load import BaseModel
from drllm.model.prompts import encode
from drllm.tasks.texts import Tokens, read_texts

Kinds = dict[str, list[Tokens]]
"""The texts of each kind, by the name of its file."""


def refuse_fitted_texts(to_fit: Kinds, to_measure: Kinds) -> None:
    """Stop if a text that is to be measured could be fitted on."""
    fitted_texts = {text for texts in to_fit.values() for text in texts}
    for kind, texts in to_measure.items():
        if fitted_texts.intersection(texts):
            raise SystemExit(f"{kind} has texts that are in --text and in --held-out")


def read_kinds(files: str | None, base: BaseModel, max_tokens: int) -> Kinds:
    """Return the texts of files as tokens, shuffled with a fixed seed.

    Args:
        files: The names of the files, separated by commas; None for none.
        base: The model, whose tokenizer is used.
        max_tokens: Maximum tokens of a text; longer ones are cut.
    """
    if not files:
        return {}
    kinds: Kinds = {}
    for name, source_texts in read_texts(files, None, SEED).items():
        texts = [tuple(encode(base.tokenizer, text))[:max_tokens] for text in source_texts]
        unique = [text for text in dict.fromkeys(texts) if len(text) > 1]
        random.Random(SEED).shuffle(unique)
        kinds[name] = unique
    return kinds
