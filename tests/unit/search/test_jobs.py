"""Which jobs are done again when workers die, and what becomes of them."""

from __future__ import annotations

import json

import pytest

from drllm.search.counts import Tally
from drllm.search.jobs import MAX_LOSSES, Jobs
from drllm.search.questions import Block
from drllm.search.retry import Searched


@pytest.fixture
def blocks(facts):
    """Three blocks, of four questions, of four, and of one."""
    examples = tuple(facts.examples("search")[:9])
    parts = examples[:4], examples[4:8], examples[8:]
    return [Block(number, facts, part) for number, part in enumerate(parts)]


def result_of(job):
    """Return a result that says which questions it is of."""
    ids = [example.id for example in job.block.examples]
    lines = "".join(json.dumps({"id": id}) + "\n" for id in ids)
    return Searched(lines, Tally(questions=len(ids), paths=7 * len(ids)))


def carry_out(jobs, is_deadly):
    """Do all jobs, one after the other; return the finished blocks and what each death was of."""
    finished, deaths = [], []
    while (job := jobs.take()) is not None:
        ids = [example.id for example in job.block.examples]
        if is_deadly(ids):
            deaths.append(ids)
            ended = jobs.lost(job)
        else:
            ended = jobs.done(job, result_of(job))
        if ended is not None:
            finished.append(ended)
    return finished, deaths


def ids_of(block):
    return [example.id for example in block.examples]


def test_blocks_are_done_whole_and_in_order_while_nothing_dies(blocks):
    finished, deaths = carry_out(Jobs(blocks), lambda ids: False)
    assert [block for block, _ in finished] == blocks
    assert [result.tally.questions for _, result in finished] == [4, 4, 1]
    assert deaths == []


def test_a_question_that_kills_its_workers_is_set_aside_alone(blocks):
    whole = ids_of(blocks[0])
    bad = whole[1]
    finished, deaths = carry_out(Jobs(blocks), lambda ids: bad in ids)
    assert deaths == [whole, *[[bad]] * MAX_LOSSES]
    assert sorted(block.number for block, _ in finished) == [0, 1, 2], "each block ends once"
    [result] = [result for block, result in finished if block is blocks[0]]
    rows = [json.loads(line) for line in result.lines.splitlines()]
    assert [row["id"] for row in rows] == whole, "in the order of the block"
    assert [row for row in rows if "error" in row] == [
        {
            "id": bad,
            "task": "builtin_facts",
            "question": blocks[0].examples[1].question,
            "error": "its worker process died",
            "attempts": MAX_LOSSES,
        }
    ]
    assert result.tally == Tally(questions=4, failed=1, paths=21)


def test_a_question_may_kill_fewer_workers_than_that(blocks):
    bad = ids_of(blocks[1])[0]
    left = [MAX_LOSSES]  # one of them with the whole block

    def is_deadly(ids):
        if bad in ids and left[0]:
            left[0] -= 1
            return True
        return False

    finished, _ = carry_out(Jobs(blocks), is_deadly)
    assert left == [0]
    assert [result.tally.failed for _, result in finished] == [0, 0, 0]


def test_a_block_of_one_question_is_given_up_like_any_question(blocks):
    [only] = ids_of(blocks[2])
    finished, deaths = carry_out(Jobs(blocks), lambda ids: only in ids)
    assert deaths == [[only]] * MAX_LOSSES
    assert finished[-1][0] is blocks[2]
    assert finished[-1][1].tally == Tally(questions=1, failed=1)


def test_every_question_may_be_given_up(blocks):
    finished, deaths = carry_out(Jobs(blocks), lambda ids: True)
    assert sum(result.tally.failed for _, result in finished) == 9
    assert len(deaths) == 2 + 9 * MAX_LOSSES


def test_questions_with_the_same_id_are_told_apart(facts):
    example = facts.examples("search")[0]
    block = Block(0, facts, (example, example))
    jobs = Jobs([block])
    jobs.lost(jobs.take())
    [(ended, result)], _ = carry_out(jobs, lambda ids: False)
    assert ended is block
    assert result.tally.questions == 2


def test_what_is_done_again_comes_before_blocks_that_nobody_has_seen(blocks):
    taken = []

    def counted():
        for block in blocks:
            taken.append(block.number)
            yield block

    jobs = Jobs(counted())
    first, second = jobs.take(), jobs.take()
    assert not jobs.are_waiting
    jobs.put_back([second])
    assert jobs.lost(first) is None
    assert jobs.are_waiting
    again = [jobs.take() for _ in range(5)]
    assert again[0] is second
    assert [job.block.examples for job in again[1:]] == [(e,) for e in blocks[0].examples]
    assert taken == [0, 1]
    assert not jobs.are_waiting
    last = jobs.take()
    assert last is not None
    assert last.whole is blocks[2]
    assert jobs.take() is None
