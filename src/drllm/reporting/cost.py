"""The part of a report about what the systems cost: counted and derived, then measured.

Nothing derived is called measured. `drllm show` prints `measured_line`.
"""

from __future__ import annotations

from collections.abc import Sequence

from drllm.cost import share_saved
from drllm.records.results import BASE, DECODE, PREFILL, ROUTED, Evaluation, Latency, System
from drllm.reporting.blocks import Block, Section, Table, Text, Tile
from drllm.reporting.numbers import NONE, count, percent, plain

PHASES = {PREFILL: "reading", DECODE: "decoding"}
NOT_MEASURED = "No time was measured (--latency-rounds 0)."


def section(evaluations: Sequence[Evaluation], measured: Latency | None) -> Section:
    """Return the section on cost, of every task and of the machine."""
    pairs = [(each, system) for each in evaluations for system in each.systems]
    several = len(evaluations) > 1
    derived = Table.of(
        "Layers run a forward pass, counted; FLOPs of reading a prompt and bytes of K/V a token, "
        "derived from the model's shape and the routes, not measured; the evaluation's own time, "
        "in batches and once a system, which is neither a latency nor a throughput.",
        pairs,
        {
            "system": lambda p: f"{p[0].task}: {p[1].name}" if several else p[1].name,
            "reading": lambda p: plain(p[1].executions, 2),
            "decoding": lambda p: plain(p[1].decode_executions, 2),
            "saved": lambda p: percent(share_saved(p[1].executions, p[0].num_layers)),
            "GFLOPs, weights": lambda p: _giga(p[1], "weights"),
            "GFLOPs, attention": lambda p: _giga(p[1], "attention"),
            "K/V bytes a token": lambda p: _whole(p[1].kv_bytes_per_token),
            "evaluated in, seconds": lambda p: plain(p[1].seconds),
        },
        bold=ROUTED,
    )
    timed = [Text(NOT_MEASURED)] if measured is None else _timed(measured)
    return Section("Cost", [*timed, derived], folded=True)


def _giga(system: System, part: str) -> str:
    flops = system.prompt_flops
    return NONE if flops is None else f"{getattr(flops, part) / 1e9:.3g}"


def _whole(value: float | None) -> str:
    return count(None if value is None else round(value))


def _timed(measured: Latency) -> list[Block]:
    found = measured.measured
    ran, threads = measured.runtime, measured.runtime.get("num_threads")
    shown = f", {threads} thread{'s' * (threads != 1)}" if ran.get("device") == "cpu" else ""
    timed = [(phase, size) for phase in PHASES for size in found.batch_sizes]
    table = Table.of(
        f"Measured on {measured.machine}; {ran.get('device')}, {ran.get('dtype')}{shown}: medians "
        f"of {found.num_rounds} rounds on {count(measured.num_prompts)} prompts of "
        f"{count(found.prompt_tokens)} tokens, {count(found.new_tokens)} decoded. Base and routed "
        f"have a turn in every round, and are compared within it. The routers' own time is that of "
        f"routers that always execute, less that of the same model without any.",
        list(zip(timed, found.labels(), strict=True)),
        {
            "what, rows": lambda t: f"{PHASES[t[0][0]]}, {count(t[0][1])}",
            "base, ms": lambda t: _ms(found.of(BASE, *t[0]).median),
            "routed, ms": lambda t: _ms(found.of(ROUTED, *t[0]).median),
            "routed / base": lambda t: _ratio(measured, *t[0]),
            "routed is": lambda t: t[1],
            "routed, tokens/s": lambda t: count(round(found.of(ROUTED, *t[0]).tokens_per_second)),
            "layers run": lambda t: plain(found.of(ROUTED, *t[0]).executions, 2),
            "routers alone, ms": lambda t: _routers(measured, *t[0]),
        },
        words=("routed is",),
    )
    return [table]


def _ratio(measured: Latency, phase: str, size: int) -> str:
    each = measured.measured.ratio(ROUTED, BASE, phase, size)
    return f"{plain(each.median, 2)} ({plain(each.lowest, 2)} to {plain(each.highest, 2)})"


def _routers(measured: Latency, phase: str, size: int) -> str:
    each = measured.measured.router_seconds(size)
    if phase != PREFILL:
        return NONE  # they don't run then
    # In some round they took less than nothing: noise.
    return _ms(each.median) if each.lowest > 0 else "too noisy"


def _ms(seconds: float) -> str:
    """Write a time in milliseconds with three digits that say something, where it has them."""
    ms = 1e3 * seconds
    return count(round(ms)) if ms >= 100 else plain(ms, 1 if abs(ms) >= 10 else 2)


def _shown(measured: Latency) -> dict[str, list[str]]:
    """Return where the measured times show what: label → phase and rows, with the ratio."""
    found, shown = measured.measured, dict[str, list[str]]()
    timed = [(phase, size) for phase in PHASES for size in found.batch_sizes]
    for (phase, size), label in zip(timed, found.labels(), strict=True):
        ratio = plain(found.ratio(ROUTED, BASE, phase, size).median, 2)
        shown.setdefault(label, []).append(f"{PHASES[phase]} {size} ({ratio})")
    return shown


def tile(measured: Latency | None) -> Tile:
    """Return what the measured times show, in a tile."""
    title = "Measured time"
    if measured is None:
        return Tile(title, "not measured", "asked for with --latency-rounds 0")
    shown = _shown(measured)
    most = max(shown, key=lambda label: len(shown[label]))
    timed = [(phase, size) for phase in PHASES for size in measured.measured.batch_sizes]
    ratios = [measured.measured.ratio(ROUTED, BASE, *each).median for each in timed]
    value = most if len(shown) == 1 else f"{most} in {len(shown[most])} of {len(timed)}"
    note = f"{plain(min(ratios), 2)} to {plain(max(ratios), 2)} times base's, by phase and batch"
    return Tile(title, value, note)


def measured_line(measured: Latency) -> str:
    """Say in one line what the measured times show."""
    found = measured.measured
    said = "; ".join(f"{label}: {', '.join(where)}" for label, where in _shown(measured).items())
    return (
        f"Measured time, routed / base by rows of a batch, {found.num_rounds} rounds of "
        f"{found.prompt_tokens} tokens: {said}."
    )
