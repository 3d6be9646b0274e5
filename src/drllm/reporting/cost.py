"""The part of a report about what the systems cost: counted and derived, then measured.

Nothing derived is called measured. `drllm show` prints `measured_line`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from drllm.cost import share_saved
from drllm.records.results import (
    BASE,
    DECODE,
    PREFILL,
    ROUTED,
    Evaluation,
    Latency,
    System,
    Timings,
)
from drllm.reporting.blocks import Block, Section, Table, Text, row_of
from drllm.reporting.numbers import NONE, count, percent, plain

MOST_ROWS = 20
"""Rows of a table of tasks and systems from which on it is shown on request only."""
PHASES = {PREFILL: "reading", DECODE: "decoding"}
NOT_MEASURED = (
    "Latency, throughput and the routers' own time were not measured: there is no latency.json, "
    "which an evaluation writes unless it is told --latency-rounds 0."
)


def sections(evaluations: Sequence[Evaluation], measured: Latency | None) -> list[Section]:
    """Return the sections on cost, of every task and of the machine."""

    def by_system(caption: str, columns: dict[str, Callable[[Evaluation, System], str]]) -> Table:
        rows = [
            [each.task, system.name, *row_of(columns, each, system)]
            for each in evaluations
            for system in each.systems
        ]
        header, folded = ("task", "system", *columns), len(rows) > MOST_ROWS
        return Table(caption=caption, header=header, rows=rows, texts=(0, 1), folded=folded)

    derived = by_system(
        "Layer executions a forward pass, counted; FLOPs of reading a prompt and bytes of K/V a "
        "token, derived",
        {
            "reading the prompt": lambda _, s: plain(s.executions, 2),
            "decoding a token": lambda _, s: plain(s.decode_executions, 2),
            "saved": lambda e, s: percent(share_saved(s.executions, e.num_layers)),
            "GFLOPs with weights": lambda _, s: _giga(s, "weights"),
            "GFLOPs of attention": lambda _, s: _giga(s, "attention"),
            "K/V bytes a token": lambda _, s: count(
                None if s.kv_bytes_per_token is None else round(s.kv_bytes_per_token)
            ),
        },
    )
    how_derived = Text(
        "FLOPs and bytes follow from the model's shape and the routes and were not measured; "
        "attention's share grows with the length of the prompt. Nothing is decoded where options "
        "are scored."
    )
    own = by_system(
        "The evaluation's own time, measured",
        {
            "seconds, one draw": lambda _, s: plain(s.seconds),
            "seconds a question": lambda e, s: plain(
                s.seconds / e.num_questions if e.num_questions else None, 3
            ),
        },
    )
    how_own = Text(
        "These seconds are wall time of this evaluation: questions run in batches, options share "
        "what they have in common, and each system was timed once. They are neither a latency nor "
        "a throughput."
    )
    order = Text(
        "What is counted and what follows from it stands first; only what a clock gave is called "
        "measured."
    )
    timed = [Text(NOT_MEASURED)] if measured is None else _timed(measured)
    return [
        Section("Cost", [order]),
        Section("Counted and derived", [derived, how_derived], level=3),
        Section("Measured", [*timed, own, how_own], level=3),
    ]


def _giga(system: System, part: str) -> str:
    flops = system.prompt_flops
    return NONE if flops is None else f"{getattr(flops, part) / 1e9:.3g}"


def _timed(measured: Latency) -> list[Block]:
    found = measured.measured
    passes = "" if found.new_tokens == 1 else "es"
    times = ("base, ms", "routed, ms", "routed / base", "lowest to highest")
    rates = ("base, tokens/s", "routed, tokens/s", "executions, routed", "routers alone, ms")
    return [
        Text(f"Measured on {_machine(measured)}."),
        Table(
            caption=f"Time of base and routed, measured: {_how_measured(measured)}",
            header=("what, rows of the batch", *times, *rates),
            rows=[_ratio_row(found, phase, size) for phase in PHASES for size in found.batch_sizes],
        ),
        Text(
            f"Reading is one pass over {count(found.prompt_tokens)} tokens of every prompt, "
            f"decoding {count(found.new_tokens)} more pass{passes} of one token. All systems "
            "had a turn in every round; what is compared is compared within a round, and the "
            "median, the lowest and the highest are shown. Below 1 the routed model is faster. "
            "Executions are those of the routes that were timed; rows of a batch may have "
            "different ones. The routers' own time is that of routers which compute everything "
            "and always execute, less that of the same model without routers: noise can make it "
            "negative, and in decoding they don't run."
        ),
    ]


def _ratio_row(found: Timings, phase: str, size: int) -> list[str]:
    base, routed = (found.of(system, phase, size) for system in (BASE, ROUTED))
    ratio = found.ratio(ROUTED, BASE, phase, size)
    return [
        f"{PHASES[phase]}, {count(size)}",
        _ms(base.median),
        _ms(routed.median),
        plain(ratio.median, 3),
        f"{plain(ratio.lowest, 3)} to {plain(ratio.highest, 3)}",
        _rate(base.tokens_per_second),
        _rate(routed.tokens_per_second),
        plain(routed.executions, 2),
        _routers(found, size) if phase == PREFILL else NONE,
    ]


def _routers(found: Timings, size: int) -> str:
    each = found.router_seconds(size)
    ends = f"({_ms(each.lowest)} to {_ms(each.highest)})"
    # In some round they took less than nothing: noise.
    return f"not told from noise {ends}" if each.lowest <= 0 else f"{_ms(each.median)} {ends}"


def _ms(seconds: float) -> str:
    """Write a time in milliseconds with three digits that say something, where it has them."""
    ms = 1e3 * seconds
    return count(round(ms)) if ms >= 100 else plain(ms, 1 if abs(ms) >= 10 else 2)


def _rate(per_second: float) -> str:
    return count(round(per_second)) if per_second >= 100 else plain(per_second)


def _machine(measured: Latency) -> str:
    ran, threads = measured.runtime, measured.runtime.get("num_threads")
    shown = f", {threads} thread{'s' * (threads != 1)}" if ran.get("device") == "cpu" else ""
    return f"{measured.machine}; {ran.get('device')}, {ran.get('dtype')}{shown}"


def _how_measured(measured: Latency) -> str:
    rounds = measured.measured.num_rounds
    return (
        f"medians of {count(rounds)} interleaved round{'s' * (rounds != 1)} on "
        f"{count(measured.num_prompts)} prompts"
    )


def measured_line(measured: Latency) -> str:
    """Say in one line what the measured times show."""
    found = measured.measured
    timed = [(phase, size) for phase in PHASES for size in found.batch_sizes]
    ratios = [found.ratio(ROUTED, BASE, *each) for each in timed]
    shown: dict[str, list[str]] = {}
    for (phase, size), ratio, label in zip(timed, ratios, found.labels(), strict=True):
        shown.setdefault(label, []).append(f"{PHASES[phase]} {size} ({plain(ratio.median, 2)})")
    said = "; ".join(f"{label}: {', '.join(where)}" for label, where in shown.items())
    return (
        f"Measured time, routed / base by rows of a batch, {found.num_rounds} rounds of "
        f"{found.prompt_tokens} tokens: {said}."
    )
