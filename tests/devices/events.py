"""What happens on pretended devices, counted by the line of the library that causes it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

import drllm

WAIT = "wait"
"""The host waits for a device, as for a copy from it, or to it out of memory that isn't pinned."""
COPY = "copy"
"""A tensor goes from one device to another."""
RUN = "run"
"""The host tells a device to compute, which takes it some microseconds for any amount of work."""

PACKAGE = "drllm"
"""Events are counted by the lines of this package; of other packages by the package."""
PACKAGE_FOLDER = Path(drllm.__file__).parent
TORCH_FOLDER = Path(torch.__file__).parent
THIS_FOLDER = Path(__file__).parent
TESTS_OF_DEVICES = "test_"


@dataclass(frozen=True)
class Event:
    """Something that a GPU would make the host wait for, a copy, or a run of an operation."""

    kind: str
    what: str  # the operation, or the way: "cpu to cuda:0"
    where: str  # "drllm/models/routing/driver.py:120", or another package's name


_events: list[Event] | None = None


@contextmanager
def recording(events: list[Event] | None) -> Iterator[None]:
    """Append the events of a block to a list; to none for None."""
    global _events
    before = _events
    _events = events
    try:
        yield
    finally:
        _events = before


def is_recording() -> bool:
    """Tell whether events are recorded now."""
    return _events is not None


def record(kind: str, what: str) -> None:
    """Record an event, with the line that caused it."""
    if _events is not None:
        _events.append(Event(kind, what, _find_cause()))


def record_copy(tensor: Tensor, device: torch.device, *, non_blocking: bool = False) -> None:
    """Record the copy of a tensor to a device, and the wait where the host waits for it."""
    if tensor.device == device or not tensor.numel():
        return
    way = f"{tensor.device} to {device}"
    record(COPY, way)
    is_pinned = getattr(tensor, "is_pretended_pinned", False)
    from_pageable = tensor.device.type == "cpu" and not (non_blocking and is_pinned)
    if device.type == "cpu" or from_pageable:
        record(WAIT, way)


def own_waits(events: Sequence[Event]) -> Counter[str]:
    """Return how often drllm waited, by its line and what it waited for."""
    waits = Counter[str]()
    for event in events:
        if event.kind == WAIT and event.where.startswith(f"{PACKAGE}/"):
            waits[f"{event.where}, {event.what}"] += 1
    return waits


def _find_cause() -> str:
    """Return the innermost line that is neither torch's nor of the pretended devices."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        place = _place_of(frame.f_code.co_filename)
        if place.startswith(f"{PACKAGE}/"):
            return f"{place}:{frame.f_lineno}"
        if place:
            return place
        frame = frame.f_back
    return "?"


@cache
def _place_of(file_name: str) -> str:
    """Return a file from the package on, or another package's name; empty for what is skipped."""
    file = Path(file_name)
    if file.is_relative_to(TORCH_FOLDER):
        return ""
    if file.parent == THIS_FOLDER and not file.name.startswith(TESTS_OF_DEVICES):
        return ""
    if file.is_relative_to(PACKAGE_FOLDER):  # not by its name: a checkout may be called like it
        return str(PACKAGE / file.relative_to(PACKAGE_FOLDER))
    if "site-packages" in file.parts:
        return file.parts[file.parts.index("site-packages") + 1]
    return file.name
