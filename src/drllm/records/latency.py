"""`eval/latency.json`: measured times of base and routed on one machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from drllm.records.results import BASE, LATENCY_FILE, ROUTED, Header, read_form, refuse_twice

PREFILL, DECODE = "prefill", "decode"
ATTACHED, ROUTERS_EXECUTE = "attached", "routers that execute"
SCHEMA = "drllm.latency"


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One system reading (`prefill`) or decoding a batch.

    Attributes:
        system: Its name.
        phase: What it does.
        batch_size: Rows.
        num_tokens: Read in one timing, over all rows.
        executions: Mean layer executions a forward pass, by the routes taken.
        seconds: Of each round.
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

    @classmethod
    def of(cls, values: Sequence[float]) -> Rounds:
        """Sum up one value a round, at least one."""
        return cls(median=statistics.median(values), lowest=min(values), highest=max(values))


class Timings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured times of several systems, which took turns in every round.

    Attributes:
        prompt_tokens: Of every prompt.
        new_tokens: Decoded in one timing, each row.
        timings: One for each system, phase and batch size.
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
        """Return one timing.

        Raises:
            KeyError: It wasn't measured.
        """
        wanted = (system, phase, batch_size)
        for timing in self.timings:
            if (timing.system, timing.phase, timing.batch_size) == wanted:
                return timing
        raise KeyError(f"no timing of {wanted}")

    def ratio(self, above: str, below: str, phase: str, batch_size: int) -> Rounds:
        """Return how many times as long one system took as another in the same round."""
        return Rounds.of([a / b for a, b in self._pairs(above, below, phase, batch_size)])

    def router_seconds(self, batch_size: int) -> Rounds:
        """Return what the routers take while a batch is read: differences within a round.

        Between routers whose every answer is to execute and a routed model without routers. Noise
        can make it negative. In decode routers don't run.
        """
        pairs = self._pairs(ROUTERS_EXECUTE, ATTACHED, PREFILL, batch_size)
        return Rounds.of([a - b for a, b in pairs])

    def _pairs(
        self, first: str, second: str, phase: str, batch_size: int
    ) -> Iterator[tuple[float, float]]:
        ours, theirs = (self.of(system, phase, batch_size) for system in (first, second))
        return zip(ours.seconds, theirs.seconds, strict=True)


class Latency(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `eval/latency.json`.

    Attributes:
        runtime: How the base model ran: dtype, device, attention, num_threads.
        machine: In words.
        routers: Their folder.
        routers_sha256: Hash of their weights.
        num_prompts: Different prompts that were timed.
        systems: System → what it is.
        measured: The times; base and routed are always there.
    """

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
    """Read the measured times of an `eval` folder, None where there are none.

    Raises:
        RecordError: A file that can't be trusted.
    """
    path = folder / LATENCY_FILE
    return read_form(path, Latency, SCHEMA) if path.is_file() else None
