"""The section of a report on costs: first measured times, then counted and derived numbers."""

from collections.abc import Sequence
from statistics import median

from drllm.cost import share_saved
from drllm.records.latency import DECODE, PREFILL, Latency
from drllm.records.results import BASE, ROUTED, Evaluation, System
from drllm.reporting.document import Section
from drllm.reporting.markdown import Markdown, write_paragraph, write_table
from drllm.reporting.numbers import (
    NONE,
    write_count,
    write_milliseconds,
    write_number,
    write_percent,
)

PHASES = {PREFILL: "reading", DECODE: "decoding"}
TIME_HEADER = (
    "phase, batch size|base, ms|routed, ms|routed / base|verdict|routed, tokens/s|layers run"
)
COST_HEADER = (
    "system|layers run, reading|layers run, decoding|saved|GFLOPs, weights|GFLOPs, attention|"
    "K/V bytes a token"
)
COST_CAPTION = (
    "The layers run in a forward pass are counted. The FLOPs of reading a prompt and the bytes of "
    "K/V a token are derived from the model's shape and the routes, not measured."
)


def costs_section(evaluations: Sequence[Evaluation], latency: Latency | None) -> Section:
    """Build the section on the costs of all tasks' systems."""
    blocks: list[Markdown] = []
    if latency is None:
        sentence = "No time was measured; drllm evaluate --latency times a routed model."
        blocks.append(write_paragraph(sentence))
    else:
        blocks.append(_time_table(latency))
    rows: list[list[str]] = []
    has_several_tasks = len(evaluations) > 1
    for evaluation in evaluations:
        for system in evaluation.systems:
            name = f"{evaluation.task}: {system.name}" if has_several_tasks else system.name
            rows.append([name, *_cost_cells(system, evaluation.num_layers)])
    blocks.append(write_table(COST_CAPTION, COST_HEADER, rows, bold=ROUTED))
    return Section("Cost", blocks, folded=True)


def _time_table(latency: Latency) -> Markdown:
    """Build the table of measured times: a row for each phase and batch size."""
    runtime = latency.runtime
    timings = latency.measured
    threads = ""
    if runtime.get("num_threads") and runtime.get("device") == "cpu":
        threads = f", threads {runtime['num_threads']}"
    caption = (
        f"Measured on {latency.machine}; {runtime.get('device')}, {runtime.get('dtype')}{threads}: "
        f"medians of {timings.num_rounds} rounds on {latency.num_prompts} prompts of "
        f"{timings.prompt_tokens} tokens, {timings.new_tokens} decoded. Base and routed have a "
        f"turn in every round, and are compared within it."
    )
    rows: list[list[str]] = []
    for (phase, size), label in timings.judge().items():
        base = timings.find_timing(BASE, phase, size)
        routed = timings.find_timing(ROUTED, phase, size)
        ratios = timings.compute_ratios(ROUTED, BASE, phase, size)
        spread = f"{write_number(min(ratios), 2)} to {write_number(max(ratios), 2)}"
        row = [
            f"{PHASES[phase]}, {write_count(size)}",
            write_milliseconds(base.median),
            write_milliseconds(routed.median),
            f"{write_number(median(ratios), 2)} ({spread})",
            label,
            write_count(round(routed.num_tokens / routed.median)),
            write_number(routed.executions, 2),
        ]
        rows.append(row)
    return write_table(caption, TIME_HEADER, rows, "verdict")


def _cost_cells(system: System, num_layers: int) -> list[str]:
    """Return the cells of a system for `COST_HEADER`, without the first."""
    flops = system.prompt_flops
    kv_bytes = None
    if system.kv_bytes_per_token is not None:
        kv_bytes = round(system.kv_bytes_per_token)
    return [
        write_number(system.executions, 2),
        write_number(system.decode_executions, 2),
        write_percent(share_saved(system.executions, num_layers)),
        f"{flops.weights / 1e9:.3g}" if flops else NONE,
        f"{flops.attention / 1e9:.3g}" if flops else NONE,
        write_count(kv_bytes),
    ]
