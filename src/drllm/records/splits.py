"""Finds the split of a question from its text alone."""

import hashlib
import unicodedata
from collections.abc import Mapping

BOUNDS = {
    "train": {"search": 0.6, "fit": 0.8, "select": 1.0},
    "validation": {"test": 1.0},
    "single": {"select": 0.5, "test": 1.0},
    "own": {"search": 0.5, "fit": 0.6, "select": 0.75, "test": 1.0},
}
"""How the questions of each origin are divided into splits.

Each split goes from the bound of the split before it to its own bound. So 60 % of training
questions are in `search`, the next 20 % in `fit` and the last 20 % in `select`. The origins are:

- `train`: the training questions of a set;
- `validation`: the validation questions of a set;
- `single`: a set that is only evaluated;
- `own`: a set that serves every stage.
"""


def find_split(question: str, origin: str) -> str:
    """Return the split of a question: `search`, `fit`, `select` or `test`.

    The same text is always in the same split, whatever its file and place. So a question that was
    trained on is never reported on. White space, case and the Unicode form don't matter.

    Args:
        question: The text of the question.
        origin: A key of `BOUNDS`.

    Source: ours.
    """
    return part_by_hash(question_key(question), BOUNDS[origin])


def part_by_hash(text: str, bounds: Mapping[str, float]) -> str:
    """Return the part that a text falls into by its hash.

    `bounds` maps each part to the share of all texts at which it ends, like an entry of `BOUNDS`.
    """
    share = hash_text(text) / 2**64
    for part, bound in bounds.items():
        if share < bound or bound == 1:  # a share may round to 1
            return part
    raise ValueError(f"the bounds are {dict(bounds)}; expected the last bound to be 1")


def hash_text(text: str) -> int:
    """Return a hash of 64 bits. Unlike Python's own hash, it is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def question_key(question: str) -> str:
    """Return the key of a question: its text with Unicode form, white space and case normalised.

    Questions with equal keys count as copies of one question.
    """
    # NFC comes first. So texts that are in NFC already, nearly all of them, keep the keys that
    # earlier versions gave them.
    composed = unicodedata.normalize("NFC", question)
    return " ".join(composed.split()).casefold()
