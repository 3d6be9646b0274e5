"""Run blocks in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from drllm.work.run import (
    Block,
    BlockFunction,
    BlockSteps,
    D,
    Keep,
    OnBlockStep,
    R,
)


class LocalExecutor:
    """Runs blocks in this process with a model that is loaded already.

    Args:
        model: What the functions of blocks get in `prepare`.
        identity: Which base model it is, as manifests record it.
        runtime: How the model runs.
    """

    num_workers = 1
    num_sharing = 1

    def __init__(self, model: Any, identity: Mapping[str, Any], runtime: Mapping[str, Any]) -> None:
        self.model = model
        self.identity = identity
        self.runtime = runtime
        self._function: Any = None  # the function that is prepared
        self._prepared: Any = None

    def run(
        self,
        blocks: Sequence[Block[D]],
        function: BlockFunction[D, R],
        keep: Keep[R] | None = None,
        on_step: OnBlockStep | None = None,
    ) -> Iterator[tuple[Block[D], R]]:
        """Yield each block with its result, in the order of the blocks."""
        for block in blocks:
            steps = BlockSteps(
                store=None if keep is None else keep.steps_of(block.key),
                report=None if on_step is None else partial(on_step, block),
            )
            yield block, function(self._prepare(function), block.data, steps)

    def _prepare(self, function: BlockFunction[D, R]) -> Any:
        """Return what a function has prepared; a function is prepared once."""
        if function is not self._function:
            self._prepared = function.prepare(self.model)
            self._function = function
        return self._prepared
