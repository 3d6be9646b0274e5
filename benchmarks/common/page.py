"""Figures of benchmarks as tables of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.operations import describe_rest

HEADER = (
    "| | times as fast as the obvious way | bound | share of the bound | the rest of our time |"
)
RULE = "|---|--:|--:|--:|---|"
UNKNOWN = "–"


def write_rows(figures: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a row for each comparison of a benchmark's file.

    Args:
        figures: The content of the file that `--json` writes.
        prefix: Is put before what was compared.
    """
    rows = []
    for comparison in figures.get("comparisons", []):
        bound = UNKNOWN
        share = UNKNOWN
        if comparison["bound"] is not None:
            bound = f"{comparison['bound']:.2f}"
            share = f"{comparison['share']:.0%}"
        what = f"{prefix}{comparison['what']}"
        rest = describe_rest(comparison.get("rest", {}))
        rows.append(f"| {what} | {comparison['speedup']:.2f} | {bound} | {share} | {rest} |")
    return rows


def write_ways(steps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return an item of a list for each benchmark, which says what was compared."""
    items = []
    for name, figures in steps.items():
        if "comparisons" in figures:
            items.append(f"- `{name}`: {figures['ours']}. The obvious way: {figures['theirs']}.")
    return items
