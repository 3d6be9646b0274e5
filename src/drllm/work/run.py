"""Run the blocks of a stage: read the kept results, run the other blocks, keep each result.

    results = run(blocks, function, executor, keep=store.of(Scores))

A stage is a list of independent blocks and a function of one block. It doesn't know whether its
blocks run in this process or in the workers of Ray, or which of them an earlier run has finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from drllm.errors import WorkerError
from drllm.work.store import ResultStore

D = TypeVar("D")  # a block's data
R = TypeVar("R")  # a block's result


@dataclass(frozen=True, slots=True)
class Block(Generic[D]):
    """A part of a stage's work that depends on no other part.

    Attributes:
        key: The block's name in its stage; the result is kept under this name.
        data: What the stage's function needs for this block. Ray sends it to a worker, so it can be
            pickled.
        size: How much work the block is, in the stage's own unit.
    """

    key: str
    data: D
    size: float = 1.0


class OnStep(Protocol):
    """Called with the progress within one block."""

    def __call__(self, share: float, num_units: int, note: str, /) -> None:
        """Report progress.

        Args:
            share: The share of the block's work that is done, from 0 to 1.
            num_units: How many units of work (paths, questions) this run has done of the block.
            note: The current step in words.
        """


@dataclass(frozen=True)
class BlockSteps:
    """Where the steps within one block are kept and reported.

    Attributes:
        store: Keeps results of steps until the block is done; None keeps none.
        report: Receives the progress within the block.
    """

    store: ResultStore | None = None
    report: OnStep | None = None


class BlockFunction(Generic[D, R]):
    """What a stage does with one block; a stage writes a subclass.

    Ray sends the function to each worker once, so its attributes can be pickled.
    """

    def prepare(self, model: Any) -> Any:
        """Return what the blocks need of the model. Each worker calls this once."""
        return model

    def __call__(self, prepared: Any, data: D, steps: BlockSteps) -> R:
        """Return a block's result.

        Args:
            prepared: What `prepare` returned in this worker.
            data: The block's data.
            steps: For long blocks, keeps and reports the steps.
        """
        raise NotImplementedError

    def split(self, data: D) -> Sequence[D]:
        """Divide a block whose worker died into the parts that are run again, each by itself."""
        return [data]

    def join(self, data: D, results: Sequence[R]) -> R:
        """Return a block's result from the results of its parts, in the order of `split`."""
        [result] = results
        return result

    def give_up(self, data: D, num_losses: int) -> R:
        """Return the result of a part on which `num_losses` workers died, or raise WorkerError."""
        raise WorkerError(
            f"{num_losses} workers died on the same block; run the same command again to continue, "
            f"with fewer workers (--num-workers) or --executor local"
        )


class Keep(Protocol[R]):
    """Keeps the results of blocks by key."""

    def get(self, key: str) -> R | None:
        """Return a block's result; None if it isn't there."""

    def put(self, key: str, result: R) -> R:
        """Keep a block's result; return it as a later run would read it."""

    def steps_of(self, key: str) -> ResultStore | None:
        """Return the store for the steps of an unfinished block; None keeps no steps."""


class Executor(Protocol):
    """Runs blocks, in this process or elsewhere.

    Attributes:
        identity: Which base model runs, as manifests record it.
        runtime: How the model runs, such as its dtype and device.
    """

    identity: Mapping[str, Any]
    runtime: Mapping[str, Any]

    @property
    def num_workers(self) -> int:
        """How many workers there are; 1 in this process."""

    @property
    def num_sharing(self) -> int:
        """How many workers share the memory of one machine."""

    def run(
        self,
        blocks: Sequence[Block[D]],
        function: BlockFunction[D, R],
        keep: Keep[R] | None = None,
        on_step: OnBlockStep | None = None,
    ) -> Iterator[tuple[Block[D], R]]:
        """Yield each block with its result, in any order; `keep` is for the blocks' steps."""


class OnBlockStep(Protocol):
    """Called with a block and the progress within it; see `OnStep`."""

    def __call__(self, block: Block[Any], share: float, num_units: int, note: str, /) -> None:
        """Report progress."""


class OnResult(Protocol):
    """Called with each block that is done."""

    def __call__(self, block: Block[Any], result: Any, /, *, is_new: bool) -> None:
        """Receive a result; `is_new` says that this run made it. An exception ends the run."""


def run(
    blocks: Sequence[Block[D]],
    function: BlockFunction[D, R],
    executor: Executor,
    *,
    keep: Keep[R] | None = None,
    on_result: OnResult | None = None,
    on_step: OnBlockStep | None = None,
) -> list[R]:
    """Return the results of all blocks, in the order of the blocks.

    Results that are kept are read. The other blocks run, and each result is kept as soon as it is
    there, so a run that is killed loses only the blocks that it was running.

    Args:
        blocks: The blocks; their keys differ.
        function: What to do with one block.
        executor: Runs the blocks.
        keep: Keeps results between runs; None keeps none.
        on_result: Called with each block that is done: first those that are kept, then the others
            as they are finished.
        on_step: Called with the progress within a block. Workers of Ray don't report it.

    Source: ours.
    """
    results: dict[str, R] = {}
    remaining: list[Block[D]] = []
    for block in blocks:
        kept = None if keep is None else keep.get(block.key)
        if kept is None:
            remaining.append(block)
            continue
        results[block.key] = kept
        if on_result is not None:
            on_result(block, kept, is_new=False)
    for block, result in executor.run(remaining, function, keep, on_step):
        if keep is not None:
            result = keep.put(block.key, result)
        results[block.key] = result
        if on_result is not None:
            on_result(block, result, is_new=True)
    return [results[block.key] for block in blocks]
