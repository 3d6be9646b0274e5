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
    outcomes = [_tried(make) if is_first() else None]
    _connected().broadcast_object_list(outcomes)
    return _result(outcomes[0])  # type: ignore[no-any-return]


def share(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Return what all jobs give, each done by one of the processes; all must call it alike.

    An error of ours that a job meets is raised in all processes. A job may not share in turn.
    """
    if count() == 1:
        return [job() for job in jobs]
    own = range(int(os.environ["RANK"]), len(jobs), count())
    parts: list[Any] = [None] * count()
    _connected().all_gather_object(parts, {place: _tried(jobs[place]) for place in own})
    outcomes = {place: outcome for part in parts for place, outcome in part.items()}
    return [_result(outcomes[place]) for place in range(len(jobs))]


def _connected() -> Any:
    """Return torch's collectives, by gloo: only Python's objects are sent, whatever the devices."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    return distributed


def _tried(make: Callable[[], Any]) -> tuple[Any, DrllmError | None]:
    try:
        return make(), None
    except DrllmError as error:
        return None, error


def _result(outcome: Any) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value
