"""Divides the work of one stage among processes that torchrun or `accelerate launch` has started.

All processes run the same stage on the same questions, each on its own device. Only the first
process reads and writes files. The work is divided job by job, and every process gets all results.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from drllm.errors import DrllmError

T = TypeVar("T")

PATIENCE = datetime.timedelta(weeks=52)
"""How long a process waits for the others, which may have much more to do.

A process that died is noticed earlier.
"""
divides = False
"""Whether the processes share one stage; the command line sets it for verbs that divide work."""


def count_launched() -> int:
    """Return the number of processes that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def count() -> int:
    """Return the number of processes that share this stage."""
    return count_launched() if divides else 1


def is_first() -> bool:
    """Say whether this process is the first, which reads, writes and prints."""
    return count() == 1 or os.environ.get("RANK") == "0"


def from_first(make: Callable[[], T]) -> T:
    """Run a function in the first process, and return its result in all processes.

    A DrllmError is raised in all processes.
    """
    if count() == 1:
        return make()
    outcomes = [_run_job(make) if is_first() else None]
    _connected().broadcast_object_list(outcomes)
    return _unpack_result(outcomes[0])  # type: ignore[no-any-return]


def share(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run each job in one of the processes, and return all results in every process.

    All processes must call `share` with the same jobs. A DrllmError of a job is raised in all
    processes. A job must not call `share` itself.
    """
    if count() == 1:
        return [job() for job in jobs]
    rank = int(os.environ["RANK"])
    outcomes = {}
    for place in range(rank, len(jobs), count()):
        outcomes[place] = _run_job(jobs[place])
    parts: list[Any] = [None] * count()
    _connected().all_gather_object(parts, outcomes)
    gathered: dict[int, Any] = {}
    for part in parts:
        gathered.update(part)
    return [_unpack_result(gathered[place]) for place in range(len(jobs))]


def _connected() -> Any:
    """Return torch's collectives. They use gloo, because only Python objects are sent."""
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
