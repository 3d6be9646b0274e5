"""What workers that may die are handed: whole blocks, and a lost block's questions one by one.

Owns the order of jobs, which of them is done again, and joining single questions to their block.
Leaves who does a job to an executor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from drllm.search.counts import Tally
from drllm.search.questions import Block
from drllm.search.retry import Searched, given_up

MAX_LOSSES = 3
"""Workers that a question may cost while it is searched alone, before it is set aside."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A block to search, or one of its questions.

    Attributes:
        whole: The block.
        place: In the block, of the only question that is searched; None where all of them are.
    """

    whole: Block
    place: int | None = None

    @property
    def block(self) -> Block:
        """What is searched, as a block."""
        if self.place is None:
            return self.whole
        example = self.whole.examples[self.place]
        return dataclasses.replace(self.whole, examples=(example,), places=())


class Jobs:
    """The jobs of a search.

    A block that costs a worker is searched again question by question, which gives the same
    decisions and rewards; a question that costs workers when it is alone is set aside alone. What
    is to be done again comes before blocks that nobody has seen yet, so no more blocks are under
    way than jobs.

    Args:
        blocks: What to search; one is taken when nothing else is left to do.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._fresh = iter(blocks)
        self._again: deque[Job] = deque()
        self._losses: Counter[tuple[int, int]] = Counter()
        self._parts: dict[int, dict[int, Searched]] = {}  # of a block, by place

    def take(self) -> Job | None:
        """Return the next job; None where there is none at the moment."""
        if self._again:
            return self._again.popleft()
        block = next(self._fresh, None)
        return None if block is None else Job(block)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Take back jobs that weren't begun."""
        self._again.extend(jobs)

    @property
    def are_waiting(self) -> bool:
        """Whether something is to be done again."""
        return bool(self._again)

    def done(self, job: Job, result: Searched) -> tuple[Block, Searched] | None:
        """Take the result of a job.

        Returns:
            A whole block with its result; None while other questions of it are missing.
        """
        whole = job.whole
        if job.place is None:
            return whole, result
        parts = self._parts[whole.number]
        parts[job.place] = result
        if len(parts) < len(whole.examples):
            return None
        del self._parts[whole.number]
        return whole, _joined([parts[place] for place in range(len(whole.examples))])

    def lost(self, job: Job) -> tuple[Block, Searched] | None:
        """Hear that a worker died of a job.

        Returns:
            As `done`, of the questions that are set aside; None where they are searched again.
        """
        whole, size = job.whole, len(job.whole.examples)
        if job.place is None and size > 1:
            logger.warning(
                "a worker died while it searched block %d; its %d questions are searched again, "
                "one by one",
                *(whole.number, size),
            )
            self._parts[whole.number] = {}
            self._again.extend(Job(whole, place) for place in range(size))
            return None
        key = whole.number, job.place or 0
        self._losses[key] += 1
        logger.warning(
            "a worker died while it searched question %s of %s (loss %d of at most %d)",
            *(job.block.examples[0].id, whole.task.name, self._losses[key], MAX_LOSSES),
        )
        if self._losses[key] < MAX_LOSSES:
            self._again.append(job)
            return None
        return self.done(job, given_up(job.block, "its worker process died", MAX_LOSSES))


def _joined(parts: Iterable[Searched]) -> Searched:
    """Return the result of a block whose questions were searched one by one."""
    found = [*parts]
    lines = "".join(part.lines for part in found)
    return Searched(lines, sum((part.tally for part in found), start=Tally()))
