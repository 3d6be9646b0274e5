"""The progress of an evaluation: how many of the planned tokens are done."""

from dataclasses import dataclass, field
from typing import Any

from drllm.work.listener import OnProgress
from drllm.work.run import Block


@dataclass
class EvaluationProgress:
    """Counts the work that is done, and reports it.

    Work is measured by its cost, which is about how many tokens it reads and writes.

    Attributes:
        total: The cost of all planned work.
        on_progress: Called with the cost of the work that is done, with `total`, and with the name
            of the current work.
        done: The cost of the work that is done.
    """

    total: float
    on_progress: OnProgress
    done: float = 0.0
    _unplanned: dict[str, int] = field(default_factory=dict)  # by block, counted so far

    def finish_block(self, block: Block[Any], _result: Any, *, is_new: bool) -> None:
        """Count a block as done; its data names the work."""
        self.finish(block.data.system, block.size)

    def finish(self, name: str, cost: float) -> None:
        """Count some work as done."""
        self.done += cost
        self.on_progress(self.done, self.total, name)

    def report_step(self, block: Block[Any], share: float, num_tokens: int, note: str) -> None:
        """Report a step within a block.

        Args:
            block: The block.
            share: Not used.
            num_tokens: The tokens of the block that weren't planned and are read so far. They count
                as planned from now on.
            note: The name of the work; empty if the block's data names it.
        """
        unplanned = num_tokens - self._unplanned.get(block.key, 0)
        self._unplanned[block.key] = num_tokens
        self.total += unplanned
        self.finish(note or block.data.system, unplanned)
