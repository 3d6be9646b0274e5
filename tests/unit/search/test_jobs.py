"""Which jobs are done again when workers die, and what becomes of them."""

import pytest

from drllm.records.search import FailedQuestion
from drllm.search.batch import BatchRecords
from drllm.search.questions import Batch, build_question
from drllm.search.ray import MAX_LOSSES, Jobs


@pytest.fixture
def batches(facts):
    """Three batches, of four questions, of four, and of one."""
    examples = facts.examples("search")
    questions = tuple(
        build_question(facts, example, "loglikelihood", n) for n, example in enumerate(examples)
    )
    parts = questions[:4], questions[4:8], questions[8:9]
    return [Batch(number, part) for number, part in enumerate(parts)]


def num_of(result):
    return len(result.records) + len(result.failed), len(result.failed)


def carry_out(jobs, is_deadly):
    """Do all jobs, one after the other; return the finished batches and what each death was of."""
    finished, deaths = [], []
    while (job := jobs.next_job()) is not None:
        ids = ids_of(job)
        if is_deadly(ids):
            deaths.append(ids)
            ended = jobs.lose(job)
        else:
            ended = jobs.finish(job, BatchRecords(tuple(ids)))  # a result that says what it is of
        if ended is not None:
            finished.append(ended)
    return finished, deaths


def ids_of(batch):
    return [question.example.id for question in batch.questions]


def test_a_question_that_kills_its_workers_is_set_aside_alone(batches):
    whole = ids_of(batches[0])
    bad = whole[1]
    finished, deaths = carry_out(Jobs(batches), lambda ids: bad in ids)
    assert deaths == [whole, *[[bad]] * MAX_LOSSES]
    assert sorted(batch.number for batch, _ in finished) == [0, 1, 2], "each batch ends once"
    [result] = [result for batch, result in finished if batch is batches[0]]
    assert list(result.records) == [id for id in whole if id != bad], "in the order of the batch"
    assert result.failed == (
        FailedQuestion(
            id=bad,
            task="builtin_facts",
            question=batches[0].questions[1].example.question,
            error="its worker process died",
            attempts=MAX_LOSSES,
        ),
    )


def test_a_question_may_kill_fewer_workers_than_that(batches):
    bad = ids_of(batches[1])[0]
    left = [MAX_LOSSES]  # one of them with the whole batch

    def is_deadly(ids):
        if bad in ids and left[0]:
            left[0] -= 1
            return True
        return False

    finished, _ = carry_out(Jobs(batches), is_deadly)
    assert left == [0]
    assert [len(result.failed) for _, result in finished] == [0, 0, 0]


def test_every_question_may_be_given_up(batches):
    finished, deaths = carry_out(Jobs(batches), lambda ids: True)
    assert sum(len(result.failed) for _, result in finished) == 9
    assert len(deaths) == 2 + 9 * MAX_LOSSES


def test_questions_with_the_same_id_are_told_apart(facts):
    example = facts.examples("search")[0]
    batch = Batch(
        0, tuple(build_question(facts, example, "loglikelihood", place) for place in (0, 1))
    )
    jobs = Jobs([batch])
    jobs.lose(jobs.next_job())
    [(ended, result)], _ = carry_out(jobs, lambda ids: False)
    assert ended is batch
    assert num_of(result) == (2, 0)


def test_what_is_done_again_comes_before_batches_that_nobody_has_seen(batches):
    fresh = iter(batches)
    jobs = Jobs(fresh)
    first, second = jobs.next_job(), jobs.next_job()
    assert not jobs.retries
    jobs.retries.append(second)
    assert jobs.lose(first) is None
    again = [jobs.next_job() for _ in range(5)]
    assert again[0] is second
    assert [job.questions for job in again[1:]] == [(q,) for q in batches[0].questions]
    assert not jobs.retries
    assert jobs.next_job() is batches[2]
    assert jobs.next_job() is None
