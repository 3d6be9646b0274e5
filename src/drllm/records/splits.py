"""Which split a question belongs to, from its text alone. Loads no torch."""

from __future__ import annotations

import hashlib


def split_of(question: str, origin: str) -> str:
    """Return the split that a question belongs to, from its text alone.

    The same text always lands in the same split, in whatever file, order or copy it turns up, so
    a question that was trained on can't be reported on.

    Args:
        question: The question's text; surrounding white space and case don't count.
        origin: `train` (divided 60/20/20 into search, fit, select), `validation` (all test),
            `single` for sets that are only evaluated (halved into select and test), or `own` for
            one set that serves every stage (50/10/15/25 into search, fit, select, test).

    Returns:
        One of `search`, `fit`, `select`, `test`.

    Source: ours.

    Example:
        >>> split_of("What is the boiling point of water?", "validation")
        'test'
    """
    if origin == "validation":
        return "test"
    digest = hashlib.sha256(question_key(question).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if origin == "train":
        return "search" if share < 0.6 else "fit" if share < 0.8 else "select"
    if origin == "single":
        return "select" if share < 0.5 else "test"
    if origin == "own":
        bounds = {"search": 0.5, "fit": 0.6, "select": 0.75, "test": 1.0}
        return next(split for split, bound in bounds.items() if share < bound)
    raise ValueError(f"origin {origin!r} is not train, validation, single or own")


def question_key(question: str) -> str:
    """Return the text under which two copies of a question count as the same one.

    Surrounding white space, line breaks and case don't count.

    Example:
        >>> question_key("  What is  ICE? ")
        'what is ice?'
    """
    return " ".join(question.split()).casefold()
