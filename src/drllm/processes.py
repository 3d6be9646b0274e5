"""One stage in several processes, one a device, as torchrun or `accelerate launch` starts them.

All run the same stage on the same questions. The first alone reads and writes what the stage keeps;
work is divided piece by piece, and every process gets all results, so that all end alike.
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from drllm.errors import DrllmError

T = TypeVar("T")

PATIENCE = datetime.timedelta(weeks=52)
"""How long a process waits for the others: some have much more to do. One that died is noticed."""
divides = False
"""Whether all work on one stage: the command line says so; in a script each may do its own."""


def launched() -> int:
    """Return how many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def count() -> int:
    """Return how many processes run this stage."""
    return launched() if divides else 1


def is_first() -> bool:
    """Tell whether this process is the one that reads, writes and speaks."""
    return count() == 1 or os.environ.get("RANK") == "0"


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes, in all of them; an error of ours is raised in all."""
    if count() == 1:
        return make()
    outcomes = [_run_job(make) if is_first() else None]
    _connected().broadcast_object_list(outcomes)
    return _value_of(outcomes[0])  # type: ignore[no-any-return]


def share(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Return the results of all jobs, each done by one of the processes; all must call it alike.

    An error of ours in a job is raised in all processes. A job may not share in turn.
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
    return [_value_of(gathered[place]) for place in range(len(jobs))]


def _connected() -> Any:
    """Return torch's collectives, by gloo: only Python's objects are sent, whatever the devices."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    return distributed


def _run_job(job: Callable[[], Any]) -> tuple[Any, DrllmError | None]:
    """Return a job's result, or the error of ours that it raised."""
    try:
        return job(), None
    except DrllmError as error:
        return None, error


def _value_of(outcome: Any) -> Any:
    """Return the result of a job, or raise its error."""
    value, error = outcome
    if error is not None:
        raise error
    return value
