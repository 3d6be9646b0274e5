"""Which split a question belongs to, from its text alone."""

import hashlib
from collections.abc import Mapping

BOUNDS = {
    "train": {"search": 0.6, "fit": 0.8, "select": 1.0},
    "validation": {"test": 1.0},
    "single": {"select": 0.5, "test": 1.0},
    "own": {"search": 0.5, "fit": 0.6, "select": 0.75, "test": 1.0},
}
"""By origin of a question, where the share of each split ends: of a set's training and validation
questions, of sets that are only evaluated, and of one set that serves every stage."""


def split_of(question: str, origin: str) -> str:
    """Return the split that a question belongs to: `search`, `fit`, `select` or `test`.

    The same text always lands in the same split, in whatever file, order or copy it turns up, so
    a question that was trained on can't be reported on. Surrounding white space and case don't
    count; the origin is a key of `BOUNDS`.

    Source: ours.
    """
    return part_by_hash(question_key(question), BOUNDS[origin])


def part_by_hash(text: str, bounds: Mapping[str, float]) -> str:
    """Return the part that a text falls into, given where the share of each ends, the last at 1."""
    share = hash_of(text) / 2**64
    return next(part for part, bound in bounds.items() if share < bound or bound == 1)


def hash_of(text: str) -> int:
    """Return 64 bits that are the same on every machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def question_key(question: str) -> str:
    """Return a question without what two copies may differ in: white space and case."""
    return " ".join(question.split()).casefold()
