"""Write the page of all benchmarks from the file that `benchmarks/all.py --json` wrote.

A row for each comparison of each benchmark, and what was compared. Further files are those of
single benchmarks that `all.py` doesn't run, since they need other packages.

    python benchmarks/page.py FILE [FILE ...] > docs/results/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.page import HEADER, RULE, write_rows, write_ways

TITLE = "How fast, beside the obvious way"
COMMAND = "python benchmarks/all.py --json all.json"
INTRODUCTION = (
    "Each row compares two ways in one run: ours and the obvious one. Both give the same result, "
    "except where layers are left out or the precision differs. The bound is how many times as "
    "fast as the obvious way any way could be, from measured times or from multiply-adds. The last "
    "column says what our time goes to beyond the bound, under a profiler: matrix products cost "
    "more than in the bound's pass where they have fewer rows, and outside of operations is "
    "Python, and the profiler itself."
)


def write_page(measured: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        measured: The content of the file of `benchmarks/all.py`.
        others: Name → the content of the file of a single benchmark.
    """
    steps = {
        name: row["figures"]
        for name, row in measured["steps"].items()
        if "comparisons" in row.get("figures", {})
    }
    steps |= others
    if not steps:
        raise SystemExit("no benchmark in the file has a comparison; run benchmarks/all.py again")
    first = next(iter(steps.values()))
    files = ["all.json", *[f"{name}.json" for name in others]]
    lines = [
        f"# {TITLE}",
        "",
        INTRODUCTION,
        "",
        f"{first['model']}, {first['machine']}; drllm {first['drllm']}.",
        "",
        "```",
        f"{COMMAND}{' --quick' if measured['quick'] else ''}",
        *[f"python benchmarks/{name}.py … --json {name}.json" for name in others],
        f"python benchmarks/page.py {' '.join(files)} > docs/results/benchmarks.md",
        "```",
        "",
        HEADER,
        RULE,
    ]
    for figures in steps.values():
        lines += write_rows(figures)
    lines += ["", "## What was compared", "", *write_ways(steps)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what benchmarks/all.py --json wrote")
    parser.add_argument("others", type=Path, nargs="*", help="what other benchmarks wrote")
    options = parser.parse_args()
    measured = read_figures(options.file)
    others = {file.stem: read_figures(file) for file in options.others}
    print(write_page(measured, others), end="")


def read_figures(file: Path) -> dict[str, Any]:
    """Read the figures of a benchmark."""
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


if __name__ == "__main__":
    main()
