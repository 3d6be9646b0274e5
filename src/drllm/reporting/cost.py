"""The part of a report about what the systems cost, and the measured time in one line.

Nothing derived is called measured. `drllm show` prints `measured_line`.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.records.results import BASE, DECODE, PREFILL, ROUTED, Evaluation, Latency, Timings
from drllm.reporting.blocks import Section, Tile
from drllm.reporting.numbers import count, plain

PHASES = {PREFILL: "reading", DECODE: "decoding"}


def section(evaluations: Sequence[Evaluation], measured: Latency | None) -> Section:
    """Return the section on cost, of every task and of the machine."""
    timed = [] if measured is None else _timed(measured.measured)
    values = {"evaluations": evaluations, "measured": measured, "timed": timed}
    return Section("Cost", folded=True, template="cost.j2", values=values)


def _timed(found: Timings) -> list[list[str]]:
    """Return a row for each phase and batch size, with what the times show."""
    rows = []
    for (phase, size), label in found.labels().items():
        base, routed = (found.of(system, phase, size) for system in (BASE, ROUTED))
        ratio, own = found.ratio(ROUTED, BASE, phase, size), found.router_seconds(size)
        ratios = [plain(each, 2) for each in (ratio.median, ratio.lowest, ratio.highest)]
        # In some round they took less than nothing: noise. In decoding they don't run.
        alone = _ms(own.median) if own.lowest > 0 else "too noisy"
        rows.append(
            [
                f"{PHASES[phase]}, {count(size)}",
                _ms(base.median),
                _ms(routed.median),
                f"{ratios[0]} ({ratios[1]} to {ratios[2]})",
                label,
                count(round(routed.tokens_per_second)),
                plain(routed.executions, 2),
                alone if phase == PREFILL else "none",
            ]
        )
    return rows


def _ms(seconds: float) -> str:
    """Write a time in milliseconds with three digits that say something, where it has them."""
    ms = 1e3 * seconds
    return count(round(ms)) if ms >= 100 else plain(ms, 1 if abs(ms) >= 10 else 2)


def tile(measured: Latency | None) -> Tile:
    """Return what the measured times show, in a tile."""
    if measured is None:
        return Tile("Measured time", "not measured", "--latency-rounds 0")
    rows = _timed(measured.measured)
    labels = [row[4] for row in rows]
    most = max(labels, key=labels.count)
    value = most if len({*labels}) == 1 else f"{most} in {labels.count(most)} of {len(rows)}"
    ratios = sorted(row[3].split()[0] for row in rows)
    note = f"{ratios[0]} to {ratios[-1]} times base's, by phase and batch"
    return Tile("Measured time", value, note)


def measured_line(measured: Latency) -> str:
    """Say in one line what the measured times show."""
    found = measured.measured
    shown: dict[str, list[str]] = {}
    for row in _timed(found):
        shown.setdefault(row[4], []).append(f"{row[0].replace(',', '')} ({row[3].split()[0]})")
    said = "; ".join(f"{label}: {', '.join(where)}" for label, where in shown.items())
    return (
        f"Measured time, routed / base by rows of a batch, {found.num_rounds} rounds of "
        f"{found.prompt_tokens} tokens: {said}."
    )
