"""Write the page of all benchmarks from the file that `benchmarks/all.py --json` wrote.

A row for each comparison of each benchmark, and what was compared.

    python benchmarks/page.py FILE > docs/results/benchmarks.md
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


def write_page(measured: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        measured: The content of the file of `benchmarks/all.py`.
    """
    steps = {
        name: row["figures"]
        for name, row in measured["steps"].items()
        if "comparisons" in row.get("figures", {})
    }
    if not steps:
        raise SystemExit("no benchmark in the file has a comparison; run benchmarks/all.py again")
    first = next(iter(steps.values()))
    lines = [
        f"# {TITLE}",
        "",
        f"Each row compares two ways in one run: ours and the obvious one. Both give the same "
        f"result, except where layers are left out or the precision differs. The bound is how many "
        f"times as fast as the obvious way any way could be, from measured times or from "
        f"multiply-adds. {first['model']}, {first['machine']}; drllm {first['drllm']}.",
        "",
        "```",
        f"{COMMAND}{' --quick' if measured['quick'] else ''}",
        "python benchmarks/page.py all.json > docs/results/benchmarks.md",
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
    options = parser.parse_args()
    measured = json.loads(options.file.read_text(encoding="utf-8"))
    print(write_page(measured), end="")


if __name__ == "__main__":
    main()
