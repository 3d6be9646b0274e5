"""Finds the split of a question from its text alone."""

import hashlib
from collections.abc import Mapping

BOUNDS = {
    "train": {"search": 0.6, "fit": 0.8, "select": 1.0},
    "validation": {"test": 1.0},
    "single": {"select": 0.5, "test": 1.0},
    "own": {"search": 0.5, "fit": 0.6, "select": 0.75, "test": 1.0},
}
"""The bound at which the share of each split ends, by the origin of a question.

The origins are: the training questions of a set (`train`), its validation questions (`validation`),
a set that is only evaluated (`single`), and a set that serves every stage (`own`).
"""


def find_split(question: str, origin: str) -> str:
    """Return the split of a question: `search`, `fit`, `select` or `test`.

    The same text is always in the same split, whatever its file and place. So a question that was
    trained on is never reported on. White space and case don't matter.

    Args:
        question: The text of the question.
        origin: A key of `BOUNDS`.

    Source: ours.
    """
    return part_by_hash(question_key(question), BOUNDS[origin])


def part_by_hash(text: str, bounds: Mapping[str, float]) -> str:
    """Return the part that a text falls into; the share of each part ends at its bound."""
    share = hash_text(text) / 2**64
    for part, bound in bounds.items():
        if share < bound or bound == 1:  # a share may round to 1
            return part
    raise ValueError(f"the last share ends at {bounds}; expected 1")


def hash_text(text: str) -> int:
    """Return a hash of 64 bits. Unlike Python's own hash, it is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def question_key(question: str) -> str:
    """Return a question with white space and case normalised, so that copies are equal."""
    return " ".join(question.split()).casefold()
