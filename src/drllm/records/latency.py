"""`eval/latency.json`: measured times of base and routed on one machine."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from drllm.records.results import BASE, LATENCY_FILE, ROUTED, Header, read_form, refuse_twice

PREFILL, DECODE = "prefill", "decode"
ATTACHED, ROUTERS_EXECUTE = "attached", "routers that execute"
SCHEMA = "drllm.latency"


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system reading (`prefill`) or decoding a batch, once a round.

    Attributes:
        num_tokens: Read in one timing, over all rows.
        executions: Mean layer executions a forward pass, by the routes taken.
    """

    system: str
    phase: Literal["prefill", "decode"]
    batch_size: int
    num_tokens: int
    executions: float
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) <= 0:
            raise ValueError(f"`seconds` is {list(self.seconds)}; expected a positive number each")

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return self.num_tokens / self.median


class Rounds(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared round by round: the rounds' median, lowest and highest."""

    median: float
    lowest: float
    highest: float


class Timings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured times of several systems, which took turns in every round.

    Every prompt has `prompt_tokens`, and `new_tokens` are decoded in one timing, each row.
    """

    prompt_tokens: int
    new_tokens: int
    timings: tuple[Timing, ...]

    def __post_init__(self) -> None:
        names = [f"{each.system}, {each.phase}, {each.batch_size}" for each in self.timings]
        refuse_twice("timing", names)
        if len({len(each.seconds) for each in self.timings}) > 1:
            raise ValueError("`timings` don't hold as many rounds of every system")

    @property
    def num_rounds(self) -> int:
        """Turns that every system had."""
        return len(self.timings[0].seconds)

    @property
    def batch_sizes(self) -> list[int]:
        """All that were timed."""
        return sorted({each.batch_size for each in self.timings})

    def of(self, system: str, phase: str, batch_size: int) -> Timing:
        """Return one timing; KeyError if it wasn't measured."""
        wanted = (system, phase, batch_size)
        for timing in self.timings:
            if (timing.system, timing.phase, timing.batch_size) == wanted:
                return timing
        raise KeyError(f"no timing of {wanted}")

    def ratio(self, above: str, below: str, phase: str, batch_size: int) -> Rounds:
        """Return how many times as long one system took as another in the same round."""
        return self._compared(operator.truediv, above, below, phase, batch_size)

    def router_seconds(self, batch_size: int) -> Rounds:
        """Return what the routers take while a batch is read: differences within a round.

        Between routers whose every answer is to execute and a routed model without routers. Noise
        can make it negative. In decode routers don't run.
        """
        return self._compared(operator.sub, ROUTERS_EXECUTE, ATTACHED, PREFILL, batch_size)

    def _compared(
        self, how: Callable[[float, float], float], one: str, other: str, phase: str, size: int
    ) -> Rounds:
        ours, theirs = self.of(one, phase, size).seconds, self.of(other, phase, size).seconds
        found = list(map(how, ours, theirs))
        return Rounds(median=statistics.median(found), lowest=min(found), highest=max(found))


class Latency(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `eval/latency.json`; base and routed are always among what was measured."""

    runtime: dict[str, Any]
    machine: str
    routers: str
    routers_sha256: str
    num_prompts: int
    systems: dict[str, str]
    measured: Timings

    def __post_init__(self) -> None:
        timed = {(each.system, each.phase, each.batch_size) for each in self.measured.timings}
        needed = {(each.phase, each.batch_size) for each in self.measured.timings}
        for name in (BASE, ROUTED, ATTACHED, ROUTERS_EXECUTE):
            if not timed or any((name, *each) not in timed for each in needed):
                raise ValueError(f"no times of {name!r} in some phase or batch size")


def read_latency(folder: Path) -> Latency | None:
    """Read the measured times of an `eval` folder, None where there are none."""
    path = folder / LATENCY_FILE
    return read_form(path, Latency, SCHEMA) if path.is_file() else None
