"""The times that an evaluation measured: `eval/latency.json`.

Owns its reading and checking. Leaves what is said of it to `cost`, and the seconds that the
evaluation itself took to `results`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drllm.errors import RecordError
from drllm.records import sha256
from drllm.reporting.fields import Fields, read_of_schema
from drllm.reporting.samples import BASE, ROUTED, Source

LATENCY_FILE = "latency.json"
LATENCY_SCHEMA = "drllm.latency"
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One system reading (`prefill`) or decoding a batch, over all rounds.

    Attributes:
        num_tokens: Read in one timing, over all rows of the batch.
        executions: Mean layer executions a forward pass of the routes timed.
        seconds: Of each round.
    """

    system: str
    phase: str
    batch_size: int
    num_tokens: int
    executions: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return self.num_tokens / self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What was compared round by round: the rounds' median, lowest and highest."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One `eval/latency.json`.

    Attributes:
        machine: In words.
        device: Type of the device.
        dtype: Of the weights.
        num_threads: Of torch, on a CPU.
        num_prompts: Different prompts that were timed.
        prompt_tokens: Of every prompt.
        new_tokens: Decoded in one timing, each row.
        systems: System → what it is.
        timings: One for each system, phase and batch size.
        ratios: By phase and batch size, how many times as long routed took as base.
        router_seconds: By batch size, what the routers themselves took while a batch was read.
    """

    machine: str
    device: str
    dtype: str
    num_threads: int
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    systems: Mapping[str, str]
    timings: tuple[Timing, ...]
    ratios: Mapping[tuple[str, int], Spread]
    router_seconds: Mapping[int, Spread]

    @property
    def num_rounds(self) -> int:
        """Turns that every system had."""
        return len(self.timings[0].seconds)

    def of(self, system: str, phase: str, batch_size: int) -> Timing:
        """Return one timing; those of base and routed are there for every ratio.

        Raises:
            KeyError: It wasn't measured.
        """
        for timing in self.timings:
            if (timing.system, timing.phase, timing.batch_size) == (system, phase, batch_size):
                return timing
        raise KeyError((system, phase, batch_size))


def read_measured(folder: Path, sources: list[Source], prefix: str = "eval/") -> Measured | None:
    """Read the measured times beside the results of an evaluation.

    Args:
        folder: The results'; it may hold no times: of an older drllm, or of an evaluation that
            was told to measure none.
        sources: Receives the file, if it is there.
        prefix: Of its name in the list.

    Raises:
        RecordError: A file that can't be trusted.
    """
    path = folder / LATENCY_FILE
    if not path.is_file():
        return None
    fields = read_of_schema(path, LATENCY_SCHEMA)
    runtime = Fields(fields.values.get("runtime"), f"{path}, 'runtime'")
    systems = Fields(fields.values.get("systems"), f"{path}, 'systems'")
    measured = Measured(
        machine=fields.text("machine"),
        device=runtime.text("device"),
        dtype=runtime.text("dtype"),
        num_threads=runtime.whole("num_threads"),
        num_prompts=fields.whole("num_prompts"),
        prompt_tokens=fields.whole("prompt_tokens"),
        new_tokens=fields.whole("new_tokens"),
        systems={name: systems.text(name) for name in systems.values},
        timings=tuple(_timing(row) for row in fields.objects("timings")),
        ratios={
            (row.text("phase"), row.whole("batch_size")): _spread(row)
            for row in fields.objects("routed_to_base")
        },
        router_seconds={
            row.whole("batch_size"): _spread(row) for row in fields.objects("router_seconds")
        },
    )
    _check(path, measured)
    sources.append(Source(name=f"{prefix}{path.name}", sha256=sha256(path), manifest=fields.values))
    return measured


def _timing(fields: Fields) -> Timing:
    seconds = [Fields({"seconds": value}, fields.where) for value in fields.items("seconds")]
    timing = Timing(
        system=fields.text("system"),
        phase=fields.text("phase"),
        batch_size=fields.whole("batch_size"),
        num_tokens=fields.whole("num_tokens"),
        executions=fields.number("executions"),
        seconds=tuple(each.number("seconds") for each in seconds),
    )
    if not timing.seconds or min(timing.seconds) <= 0:
        raise RecordError(
            f"{fields.where}: 'seconds' is {list(timing.seconds)}; expected a positive number a "
            f"round"
        )
    return timing


def _spread(fields: Fields) -> Spread:
    found = Spread(
        median=fields.number("median"),
        lowest=fields.number("lowest"),
        highest=fields.number("highest"),
    )
    if not found.lowest <= found.median <= found.highest:
        raise RecordError(
            f"{fields.where}: median {found.median}, lowest {found.lowest}, highest "
            f"{found.highest}; expected them in order"
        )
    return found


def _check(path: Path, measured: Measured) -> None:
    """Refuse a file in which base or routed, or a number of rounds, is missing."""
    timed = {(each.system, each.phase, each.batch_size) for each in measured.timings}
    for phase, size in measured.ratios:
        for system in (BASE, ROUTED):
            if (system, phase, size) not in timed:
                raise RecordError(
                    f"{path} compares {BASE} and {ROUTED} in {phase} at batch size {size}, but "
                    f"has no times of {system}; evaluate again"
                )
    if not measured.ratios or len({len(each.seconds) for each in measured.timings}) != 1:
        raise RecordError(
            f"{path} doesn't hold as many rounds of every system, or compares none; evaluate again"
        )
