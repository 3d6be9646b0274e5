"""The runner of blocks: kept results are read, the others run, each is kept as it is finished."""

from pathlib import Path
from typing import Any

import pytest
from toys import BLOCKS, IDENTITY, RUNTIME, SUMS, AddUp

from drllm.errors import WorkerError
from drllm.work.local import LocalExecutor
from drllm.work.run import Block, BlockFunction, BlockSteps, run
from drllm.work.store import ResultStore


def make_store(folder: Path) -> ResultStore:
    store = ResultStore(folder / "kept", {"seed": 0}, stage="toy")
    store.open()
    return store


@pytest.fixture
def executor() -> LocalExecutor:
    return LocalExecutor(1, IDENTITY, RUNTIME)


def test_results_come_in_the_order_of_the_blocks(executor):
    assert run(BLOCKS, AddUp(), executor) == SUMS
    assert run([], AddUp(), executor) == []


def test_a_killed_run_is_resumed_with_the_blocks_that_are_left(tmp_path, executor):
    class KilledError(Exception):
        pass

    def stop_after_three(block: Block[Any], result: Any, *, is_new: bool) -> None:
        if block is BLOCKS[2]:
            raise KilledError

    with pytest.raises(KilledError):
        run(
            BLOCKS,
            AddUp(),
            executor,
            keep=make_store(tmp_path).of(list[int]),
            on_result=stop_after_three,
        )
    seen = []
    results = run(
        BLOCKS,
        AddUp(),
        executor,
        keep=make_store(tmp_path).of(list[int]),
        on_result=lambda block, result, *, is_new: seen.append((block.key, is_new)),
    )
    assert results == SUMS
    assert seen == [(block.key, place >= 3) for place, block in enumerate(BLOCKS)]


def test_a_new_result_equals_the_one_that_a_later_run_reads(tmp_path, executor):
    class Tuples(BlockFunction[int, Any]):
        def __call__(self, prepared: Any, data: int, steps: BlockSteps) -> Any:
            return {"x": (data, 2.5)}

    keep = make_store(tmp_path).of(dict[str, Any])
    blocks = [Block("a", 1)]
    assert run(blocks, Tuples(), executor, keep=keep) == [{"x": [1, 2.5]}]
    assert run(blocks, Tuples(), executor, keep=keep) == [{"x": [1, 2.5]}]


def test_steps_of_a_block_are_kept_until_the_block_is_done(tmp_path, executor):
    kept: list[int | None] = []

    class InSteps(BlockFunction[int, int]):
        def __call__(self, prepared: Any, data: int, steps: BlockSteps) -> int:
            assert steps.store is not None
            kept.append(steps.store.get("step", int))
            steps.store.put("step", data)
            if len(kept) == 1:
                raise KeyboardInterrupt
            return data + 1

    keep = make_store(tmp_path).of(int)
    with pytest.raises(KeyboardInterrupt):
        run([Block("a", 1)], InSteps(), executor, keep=keep)
    assert run([Block("a", 1)], InSteps(), executor, keep=keep) == [2]
    assert kept == [None, 1]
    assert keep.steps_of("a").get("step", int) is None


def test_progress_within_a_block_is_reported_with_the_block(executor):
    reports = []
    run(BLOCKS[:1], AddUp(), executor, on_step=lambda *report: reports.append(report))
    assert reports == [(BLOCKS[0], 0.5, 1, "adding up"), (BLOCKS[0], 1.0, 2, "adding up")]


def test_a_function_is_prepared_once(executor):
    class Counted(AddUp):
        times = 0

        def prepare(self, model: Any) -> Any:
            Counted.times += 1
            return super().prepare(model)

    function = Counted()
    run(BLOCKS, function, executor)
    run(BLOCKS, function, executor)
    assert Counted.times == 1


def test_without_a_rule_of_its_own_a_stage_ends_when_workers_keep_dying():
    function: BlockFunction[int, int] = BlockFunction()
    assert function.split(5) == [5]
    assert function.join(5, [7]) == 7
    with pytest.raises(WorkerError, match=r"3 workers died on the same block.*--num-workers"):
        function.give_up(5, 3)
