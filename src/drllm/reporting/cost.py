"""The part of a report on what the systems cost, what was measured apart from what was not.

Owns these sections, and the words for measured time that `drllm show` prints too. Nothing derived
is called measured. Leaves reading the times to `measured`.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.cost import share_saved
from drllm.reporting.blocks import Block, Section, Table, Text
from drllm.reporting.measured import DECODE, PREFILL, Measured, Spread
from drllm.reporting.numbers import NONE, count, percent, plain
from drllm.reporting.results import Evaluation, System
from drllm.reporting.samples import BASE, ROUTED

MOST_ROWS = 20
"""Rows of a table of tasks and systems from which on it is shown on request only."""
PHASES = {PREFILL: "reading", DECODE: "decoding"}
NOT_MEASURED = (
    "Latency, throughput and the routers' own time were not measured: there is no latency.json, "
    "which an evaluation writes unless it is told --latency-rounds 0."
)


def sections(evaluations: Sequence[Evaluation], measured: Measured | None) -> list[Section]:
    """Return the sections on cost, of every task and of the machine."""
    return [
        Section(
            "Cost",
            [
                Text(
                    "What is counted and what follows from it stands first; only what a clock gave "
                    "is called measured."
                )
            ],
        ),
        Section("Counted and derived", _derived(evaluations), level=3),
        Section("Measured", [*_timed(measured), *_own_time(evaluations)], level=3),
    ]


def _derived(evaluations: Sequence[Evaluation]) -> list[Block]:
    rows = [_derived_row(each, system) for each in evaluations for system in each.systems]
    return [
        Table(
            caption="Layer executions a forward pass, counted; FLOPs of reading a prompt and bytes "
            "of K/V a token, derived",
            header=(
                "task",
                "system",
                "reading the prompt",
                "decoding a token",
                "saved",
                "GFLOPs with weights",
                "GFLOPs of attention",
                "K/V bytes a token",
            ),
            rows=rows,
            texts=(0, 1),
            folded=len(rows) > MOST_ROWS,
        ),
        Text(
            "FLOPs and bytes follow from the model's shape and the routes and were not measured; "
            "attention's share grows with the length of the prompt. Nothing is decoded where "
            "options are scored."
        ),
    ]


def _derived_row(evaluation: Evaluation, system: System) -> list[str]:
    weights, attention = system.flops or (None, None)
    return [
        evaluation.task,
        system.name,
        plain(system.executions, 2),
        plain(system.decode_executions, 2),
        percent(share_saved(system.executions, evaluation.num_layers)),
        _giga(weights),
        _giga(attention),
        NONE if system.kv_bytes is None else count(round(system.kv_bytes)),
    ]


def _giga(number: float | None) -> str:
    return NONE if number is None else f"{number / 1e9:.3g}"


def _own_time(evaluations: Sequence[Evaluation]) -> list[Block]:
    rows = [
        [
            each.task,
            system.name,
            plain(system.seconds),
            plain(system.seconds / each.num_questions, 3) if each.num_questions else NONE,
        ]
        for each in evaluations
        for system in each.systems
    ]
    return [
        Table(
            caption="The evaluation's own time, measured",
            header=("task", "system", "seconds, one draw", "seconds a question"),
            rows=rows,
            texts=(0, 1),
            folded=len(rows) > MOST_ROWS,
        ),
        Text(
            "These seconds are wall time of this evaluation: questions run in batches, options "
            "share what they have in common, and each system was timed once. They are neither a "
            "latency nor a throughput."
        ),
    ]


# --- latency -----------------------------------------------------------------------------------


def _timed(measured: Measured | None) -> list[Block]:
    if measured is None:
        return [Text(NOT_MEASURED)]
    passes = "" if measured.new_tokens == 1 else "es"
    return [
        Text(f"Measured on {machine_words(measured)}."),
        Table(
            caption=f"Time of base and routed, measured: {how_measured(measured)}",
            header=(
                "what, rows of the batch",
                "base, ms",
                "routed, ms",
                "routed / base",
                "lowest to highest",
                "base, tokens/s",
                "routed, tokens/s",
                "executions, routed",
                "routers alone, ms",
            ),
            rows=[_ratio_row(measured, *key) for key in measured.ratios],
        ),
        Text(
            f"Reading is one pass over {count(measured.prompt_tokens)} tokens of every prompt, "
            f"decoding {count(measured.new_tokens)} more pass{passes} of one token. All systems "
            "had a turn in every round; what is compared is compared within a round, and the "
            "median, the lowest and the highest are shown. Below 1 the routed model is faster. "
            "Executions are those of the routes that were timed; rows of a batch may have "
            "different ones. The routers' own time is that of routers which compute everything "
            "and always execute, "
            "less that of the same model without routers: noise can make it negative, and in "
            "decoding they don't run."
        ),
        Table(
            caption="All rounds of all systems, measured",
            header=(
                "system",
                "what it is",
                "what, rows of the batch",
                "executions",
                "median, ms",
                "tokens/s",
                "rounds, ms",
            ),
            rows=[
                [
                    each.system,
                    measured.systems.get(each.system, NONE),
                    f"{PHASES.get(each.phase, each.phase)}, {count(each.batch_size)}",
                    plain(each.executions, 2),
                    _ms(each.median),
                    _rate(each.tokens_per_second),
                    "; ".join(_ms(seconds) for seconds in each.seconds),
                ]
                for each in measured.timings
            ],
            texts=(0, 1, 2),
            folded=True,
        ),
    ]


def _ratio_row(measured: Measured, phase: str, size: int) -> list[str]:
    base, routed = (measured.of(system, phase, size) for system in (BASE, ROUTED))
    ratio = measured.ratios[phase, size]
    routers = measured.router_seconds.get(size) if phase == PREFILL else None
    return [
        f"{PHASES.get(phase, phase)}, {count(size)}",
        _ms(base.median),
        _ms(routed.median),
        plain(ratio.median, 3),
        f"{plain(ratio.lowest, 3)} to {plain(ratio.highest, 3)}",
        _rate(base.tokens_per_second),
        _rate(routed.tokens_per_second),
        plain(routed.executions, 2),
        NONE
        if routers is None
        else f"{_ms(routers.median)} ({_ms(routers.lowest)} to {_ms(routers.highest)})",
    ]


def _ms(seconds: float) -> str:
    """Write a time in milliseconds with three digits that say something, where it has them."""
    ms = 1e3 * seconds
    if ms >= 100:
        return count(round(ms))
    return plain(ms, 1 if abs(ms) >= 10 else 2)


def _rate(per_second: float) -> str:
    return count(round(per_second)) if per_second >= 100 else plain(per_second)


def machine_words(measured: Measured) -> str:
    """Say what the times were measured on."""
    threads = f", {measured.num_threads} thread{'s' * (measured.num_threads != 1)}"
    return (
        f"{measured.machine}; {measured.device}, {measured.dtype}"
        f"{threads if measured.device == 'cpu' else ''}"
    )


def how_measured(measured: Measured) -> str:
    """Say in a few words how the times were measured."""
    rounds = measured.num_rounds
    return (
        f"medians of {count(rounds)} interleaved round{'s' * (rounds != 1)} on "
        f"{count(measured.num_prompts)} prompts"
    )


def measured_lines(measured: Measured) -> list[str]:
    """Return the measured times in a few lines of plain text: ratios, speed, machine."""
    parts = []
    for phase, words in PHASES.items():
        spreads = {size: each for (which, size), each in measured.ratios.items() if which == phase}
        if spreads:
            times = ", ".join(f"{_shown(each)} at {size}" for size, each in spreads.items())
            parts.append(f"{words} {times}")
    routers = ", ".join(
        f"{_ms(each.median)} ({_ms(each.lowest)} to {_ms(each.highest)}) ms at {size}"
        for size, each in measured.router_seconds.items()
    )
    return [
        f"Measured time of routed / base by rows of a batch: {'; '.join(parts)}.",
        f"Measured time of the routers alone, while they read: {routers}.",
        f"Both are {how_measured(measured)} cut to {measured.prompt_tokens} tokens, on "
        f"{machine_words(measured)}.",
    ]


def _shown(spread: Spread) -> str:
    return f"{plain(spread.median, 2)} ({plain(spread.lowest, 2)} to {plain(spread.highest, 2)})"
