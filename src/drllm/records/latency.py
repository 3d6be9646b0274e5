"""The measured times of an evaluation: `eval/latency.json`."""

import itertools
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from drllm.records.manifest import Executions, check_runtime
from drllm.records.results import (
    BASE,
    LATENCY_FILE,
    ROUTED,
    Header,
    read_result_file,
    refuse_duplicates,
)
from drllm.statistics.ranges import Count
from drllm.statistics.verdicts import judge_times

PREFILL = "prefill"
DECODE = "decode"
LATENCY_SCHEMA = "drllm.latency"
MAX_SECONDS = 1e9  # 30 years; no measured time is longer


class Timing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The times of one system in one phase at one batch size: one time for each round.

    In the phase `prefill` the system reads a batch of prompts, in `decode` it generates tokens.
    `num_tokens` counts the tokens of all rows of the batch in one round, and `executions` is the
    mean over forward passes.
    """

    system: str
    phase: Literal["prefill", "decode"]
    batch_size: Count
    num_tokens: Count
    executions: Executions
    seconds: Annotated[
        tuple[Annotated[float, msgspec.Meta(gt=0, le=MAX_SECONDS)], ...], msgspec.Meta(min_length=1)
    ]

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def place(self) -> tuple[str, int]:
        """The phase and the batch size."""
        return self.phase, self.batch_size


class Timings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured times of several systems. The systems take turns in every round.

    Every prompt has `prompt_tokens` tokens, and a timing decodes `new_tokens` for each row.
    """

    prompt_tokens: Count
    new_tokens: Count
    timings: tuple[Timing, ...]

    def __post_init__(self) -> None:
        names = [f"{timing.system}, {timing.phase}, {timing.batch_size}" for timing in self.timings]
        refuse_duplicates("timing", names)
        if len({len(timing.seconds) for timing in self.timings}) > 1:
            raise ValueError("`timings` have different numbers of rounds; expected the same number")

    @property
    def num_rounds(self) -> int:
        """The number of rounds."""
        return len(self.timings[0].seconds)

    def find_timing(self, system: str, phase: str, batch_size: int) -> Timing:
        """Return one timing; raise KeyError if it wasn't measured."""
        for timing in self.timings:
            if timing.system == system and timing.place == (phase, batch_size):
                return timing
        raise KeyError((system, phase, batch_size))

    def compute_ratios(self, above: str, below: str, phase: str, batch_size: int) -> list[float]:
        """Return the time of the system `above` divided by the time of `below`, round by round."""
        numerators = self.find_timing(above, phase, batch_size).seconds
        denominators = self.find_timing(below, phase, batch_size).seconds
        pairs = zip(numerators, denominators, strict=True)
        return [numerator / denominator for numerator, denominator in pairs]

    def judge(self) -> dict[tuple[str, int], str]:
        """Return the verdict on the routed model's time, for each measured phase and batch size."""
        measured_places = {timing.place for timing in self.timings}
        sizes = sorted({size for _, size in measured_places})
        possible_places = itertools.product((PREFILL, DECODE), sizes)
        places = [place for place in possible_places if place in measured_places]
        labels = judge_times([self.compute_ratios(ROUTED, BASE, *place) for place in places])
        return dict(zip(places, labels, strict=True))


class Latency(Header, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `eval/latency.json`. Base and the routed model are always measured."""

    runtime: dict[str, Any]
    machine: str
    routers: str
    routers_sha256: str
    num_prompts: Count
    systems: dict[str, str]
    measured: Timings

    def __post_init__(self) -> None:
        check_runtime(self.runtime)
        timings = self.measured.timings
        places = {timing.place for timing in timings}
        for name in (BASE, ROUTED):
            measured_places = {timing.place for timing in timings if timing.system == name}
            if not measured_places or measured_places != places:
                raise ValueError(f"the times of {name!r} at some phase or batch size are missing")


def read_latency(folder: Path) -> Latency | None:
    """Read the measured times in an `eval` folder; return None if there are none."""
    path = folder / LATENCY_FILE
    return read_result_file(path, Latency, LATENCY_SCHEMA) if path.is_file() else None
