"""Which targets are held out, in what order the others come, and all other random draws.

Each draw is a function of the seed and of what it is for: resuming needs no state of a generator.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from drllm.records.splits import question_key

FEWEST_TO_HOLD_OUT = 10


def hold_out(
    questions: Sequence[str], fraction: float, seed: int, num_targets: int | None = None
) -> tuple[list[int], list[int]]:
    """Divide the targets into those trained on (never none) and an expected fraction held out.

    A question's side depends on the seed and its text (by `question_key`) alone, so that more
    targets never move one from side to side and all targets of a question stay together. Below 10
    targets nothing is held out; from there on, with a fraction above 0, at least one question is.
    `num_targets` is below the number of questions where the rest are the same again.
    """
    everything = list(range(len(questions)))
    num_targets = len(questions) if num_targets is None else num_targets
    if fraction == 0 or num_targets < FEWEST_TO_HOLD_OUT:
        return everything, []
    shares = [_hash(f"held out {seed} {question_key(text)}") / 2**63 for text in questions]
    threshold = max(fraction, math.nextafter(min(shares), math.inf))
    trained = [row for row in everything if shares[row] >= threshold]
    if not trained:
        return everything, []
    return trained, [row for row in everything if shares[row] < threshold]


def epoch_batches(rows: Sequence[int], size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the rows of each step of an epoch; the last step may have fewer."""
    order = torch.randperm(len(rows), generator=generator("order", seed, epoch)).tolist()
    for start in range(0, len(order), size):
        yield [rows[index] for index in order[start : start + size]]


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU for one purpose, seeded with the numbers."""
    return torch.Generator().manual_seed(_hash(" ".join([purpose, *map(str, numbers)])))


def _hash(text: str) -> int:
    """Return 63 bits that are the same on every machine, unlike Python's own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
