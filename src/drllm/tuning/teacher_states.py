"""The teacher's states of the sequences that an adapter is trained on, each computed once.

A training draws the same sequences again and again, and its teacher, the full path, never changes.
So the states of a sequence are kept in memory, up to a limit.

Axes: T tokens, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from drllm.tuning.heal_texts import Tokens

MAX_BYTES = 2 * 10**9
"""The memory for kept states: 430 thousand tokens of SmolLM2-135M, 60 thousand of a hidden size of
4,096."""


class SequenceStates(NamedTuple):
    """The teacher's states of one sequence.

    Attributes:
        start: The states after the layers that teacher and student share, `[T, D]`; None if they
            share none.
        last: The states after the last layer, `[T, D]`.
    """

    start: Tensor | None
    last: Tensor


class TeacherStates:
    """Computes the teacher's states of sequences, and keeps them.

    Rounding depends on which sequences are computed together. So sequences that are kept are
    always computed together with those that were new in the same batch, also in a resumed training.

    Args:
        compute: Returns the states of sequences, which it computes together.
        max_tokens: How many tokens are kept.
    """

    def __init__(
        self, compute: Callable[[Sequence[Tokens]], list[SequenceStates]], max_tokens: int
    ) -> None:
        self._compute = compute
        self._max_tokens = max_tokens
        self._num_tokens = 0  # of all groups
        self._groups: dict[Tokens, list[Tokens]] = {}  # kept sequence → those computed with it
        self._states: dict[Tokens, SequenceStates] = {}  # kept, by sequence

    def register(self, batch: Sequence[Tokens]) -> None:
        """Decide that the new sequences of a batch are kept, if they fit.

        A resumed training calls this for the batches that it skips.
        """
        group = [tokens for tokens in dict.fromkeys(batch) if tokens not in self._groups]
        num_tokens = sum(map(len, group))
        if self._num_tokens + num_tokens > self._max_tokens:
            return
        self._num_tokens += num_tokens
        for tokens in group:
            self._groups[tokens] = group

    def get(self, batch: Sequence[Tokens]) -> list[SequenceStates]:
        """Return the states of each sequence of a batch."""
        self.register(batch)
        others: list[Tokens] = []
        for tokens in dict.fromkeys(batch):
            if tokens not in self._groups:
                others.append(tokens)
            elif tokens not in self._states:
                group = self._groups[tokens]
                self._states.update(zip(group, self._compute(group), strict=True))
        not_kept: dict[Tokens, SequenceStates] = {}
        if others:
            not_kept.update(zip(others, self._compute(others), strict=True))
        return [self._states.get(tokens) or not_kept[tokens] for tokens in batch]
