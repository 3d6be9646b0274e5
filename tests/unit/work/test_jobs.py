"""Which jobs are run again when workers die, and what becomes of them."""

from collections.abc import Callable, Sequence
from typing import Any

from toys import AddUp

from drllm.work.ray import MAX_LOSSES, Jobs
from drllm.work.run import Block

BLOCKS = [Block("a", [0, 1, 2, 3]), Block("b", [4, 5, 6, 7]), Block("c", [8])]


def make_jobs(blocks: Sequence[Block[Any]] = BLOCKS) -> Jobs:
    return Jobs(blocks, AddUp())


def carry_out(
    jobs: Jobs, is_deadly: Callable[[Sequence[int]], bool]
) -> tuple[dict[str, list[int]], list[Sequence[int]]]:
    """Do all jobs, one after the other; return the blocks' results and what each death was of."""
    results: dict[str, list[int]] = {}
    deaths = []
    while (job := jobs.next_job(is_worker_idle=True)) is not None:
        if is_deadly(job.data):
            deaths.append(job.data)
            finished = jobs.lose(job)
        else:
            finished = jobs.finish(job, list(job.data))
        if finished is not None:
            block, result = finished
            assert block.key not in results, "each block ends once"
            results[block.key] = result
    return results, deaths


def test_a_part_that_kills_its_workers_is_given_up_alone():
    results, deaths = carry_out(make_jobs(), lambda data: 1 in data)
    assert deaths == [[0, 1, 2, 3], *[[1]] * MAX_LOSSES]
    assert results == {"a": [0, -MAX_LOSSES, 2, 3], "b": [4, 5, 6, 7], "c": [8]}


def test_a_part_may_kill_fewer_workers_than_that():
    left = [MAX_LOSSES]  # one of them with the whole block

    def is_deadly(data: Sequence[int]) -> bool:
        if 4 in data and left[0]:
            left[0] -= 1
            return True
        return False

    results, _ = carry_out(make_jobs(), is_deadly)
    assert left == [0]
    assert results == {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7], "c": [8]}


def test_every_part_may_be_given_up():
    results, deaths = carry_out(make_jobs(), lambda data: True)
    assert results == {"a": 4 * [-MAX_LOSSES], "b": 4 * [-MAX_LOSSES], "c": [-MAX_LOSSES]}
    assert len(deaths) == len(BLOCKS) + 9 * MAX_LOSSES  # of each block whole, and of each part


def test_equal_parts_are_told_apart():
    jobs = make_jobs([Block("a", [5, 5])])
    first = jobs.next_job(is_worker_idle=True)
    assert first is not None
    jobs.lose(first)
    results, _ = carry_out(jobs, lambda data: False)
    assert results == {"a": [5, 5]}


def test_jobs_of_lost_workers_come_before_new_blocks():
    jobs = make_jobs()
    first = jobs.next_job(is_worker_idle=True)
    second = jobs.next_job(is_worker_idle=True)
    assert first is not None
    assert second is not None
    jobs.retries.append(second)
    assert jobs.lose(first) is None
    again = [jobs.next_job(is_worker_idle=True) for _ in range(5)]
    assert again[0] is second
    assert [job.data for job in again[1:] if job is not None] == [[0], [1], [2], [3]]
    last = jobs.next_job(is_worker_idle=True)
    assert last is not None
    assert last.block is BLOCKS[2]
    assert jobs.next_job(is_worker_idle=True) is None


def test_a_part_goes_only_to_an_idle_worker():
    jobs = make_jobs()
    first = jobs.next_job(is_worker_idle=True)
    assert first is not None
    jobs.lose(first)
    assert jobs.next_job(is_worker_idle=False) is None
    part = jobs.next_job(is_worker_idle=True)
    assert part is not None
    assert part.data == [0]


def test_jobs_are_handed_out_when_no_block_and_no_part_is_left():
    assert make_jobs([]).are_handed_out
    jobs = make_jobs(BLOCKS[:1])
    assert not jobs.are_handed_out
    first = jobs.next_job(is_worker_idle=True)
    assert first is not None
    assert jobs.are_handed_out
    assert jobs.next_job(is_worker_idle=True) is None
    jobs.lose(first)
    assert not jobs.are_handed_out
