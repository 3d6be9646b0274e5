"""Divides the work of one stage among processes that torchrun or `accelerate launch` has started.

All processes run the same stage on the same questions, each on its own device. Only the first
process reads and writes files. The work is divided into jobs. Each job runs in one process, and
every process gets the results of all jobs.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from drllm.errors import DrllmError

T = TypeVar("T")

PATIENCE = datetime.timedelta(weeks=52)
"""How long a process waits for the other processes.

It is long, because the other processes may have much more to do. If one of them dies, the wait ends
earlier.
"""
divides = False
"""Whether the processes share one stage; the command line sets it for verbs that divide work."""


def count_launched() -> int:
    """Return the number of processes that a launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def count() -> int:
    """Return the number of processes that share this stage; 1 if the stage isn't divided."""
    return count_launched() if divides else 1


def is_first() -> bool:
    """Tell whether this process is the first, which reads, writes and prints."""
    return count() == 1 or os.environ.get("RANK") == "0"


def from_first(make: Callable[[], T]) -> T:
    """Run a function in the first process, and return its result in all processes.

    A DrllmError is raised in all processes.
    """
    if count() == 1:
        return make()
    outcomes: list[Any] = [None]
    if is_first():
        outcomes[0] = _run_job(make)
    _connect().broadcast_object_list(outcomes)  # fills the list in the other processes
    return _unpack_result(outcomes[0])  # type: ignore[no-any-return]


def share(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run each job in one of the processes, and return all results in every process.

    All processes must call `share` with the same jobs. A DrllmError of a job is raised in all
    processes. A job must not call `share` itself.
    """
    if count() == 1:
        return [job() for job in jobs]
    rank = int(os.environ["RANK"])
    own_outcomes = {}  # by the index of the job
    for index in range(rank, len(jobs), count()):
        own_outcomes[index] = _run_job(jobs[index])
    outcomes_by_process: list[Any] = [None] * count()
    _connect().all_gather_object(outcomes_by_process, own_outcomes)
    outcomes: dict[int, Any] = {}
    for process_outcomes in outcomes_by_process:
        outcomes.update(process_outcomes)
    return [_unpack_result(outcomes[index]) for index in range(len(jobs))]


def _connect() -> Any:
    """Connect the processes on the first call, and return `torch.distributed`.

    The backend is gloo, which works without a GPU. Only Python objects are sent.
    """
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    return distributed


def _run_job(job: Callable[[], Any]) -> tuple[Any, DrllmError | None]:
    """Return the result of a job and None, or None and the DrllmError that it raised."""
    try:
        return job(), None
    except DrllmError as error:
        return None, error


def _unpack_result(outcome: Any) -> Any:
    """Return the result of a job, or raise its error."""
    value, error = outcome
    if error is not None:
        raise error
    return value
