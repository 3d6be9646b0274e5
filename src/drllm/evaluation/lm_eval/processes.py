"""Several processes that share the requests of an evaluation.

Owns joining them, and telling requests from those that the harness repeats so that each process
has as many. Leaves splitting the requests and gathering results to the harness.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

PATIENCE = timedelta(weeks=52)
"""How long a process waits for the others: some have much more to do. As in the harness."""


def joined(device: str | None) -> Accelerator | None:
    """Return what joins this process with its like, or None where it is alone.

    Args:
        device: What was asked for; each process takes its own, or all the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=on_cpu, kwargs_handlers=[patient])


def without_padding(requests: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Return the requests without those that the harness repeats to fill a process up.

    Args:
        requests: Each as often as its `repeats` asks for, some more often.

    Returns:
        Those to answer, and for each request the place of its answer among theirs.

    Example:
        >>> from types import SimpleNamespace
        >>> one, twice = SimpleNamespace(repeats=1), SimpleNamespace(repeats=2)
        >>> wanted, places = without_padding([one, twice, twice, twice, twice])
        >>> len(wanted), places
        (3, [0, 1, 2, 2, 2])
    """
    wanted: list[Any] = []
    found: dict[int, list[int]] = {}
    places = []
    for request in requests:
        own = found.setdefault(id(request), [])
        if len(own) < (request.repeats or 1):  # None in a request made by hand
            own.append(len(wanted))
            wanted.append(request)
        places.append(own[-1])
    return wanted, places
