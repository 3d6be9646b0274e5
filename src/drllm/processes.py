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


def count() -> int:
    """Return how many processes run this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Tell whether this process is the one that reads, writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes, in all of them; an error of ours is raised in all."""
    if count() == 1:
        return make()
    _connect()
    from accelerate.utils import broadcast_object_list

    outcomes: list[Any] = [_tried(make) if is_first() else None]
    return _result(broadcast_object_list(outcomes)[0])  # type: ignore[no-any-return]


def share(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Return what all jobs give, each done by one of the processes; all must call it alike.

    An error of ours that a job meets is raised in all processes. A job may not share in turn.
    """
    if count() == 1:
        return [job() for job in jobs]
    _connect()
    from accelerate.utils import gather_object

    own = range(int(os.environ["RANK"]), len(jobs), count())
    outcomes = dict(gather_object([(place, _tried(jobs[place])) for place in own]))
    return [_result(outcomes[place]) for place in range(len(jobs))]


def _connect() -> None:
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


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
