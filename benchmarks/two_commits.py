"""How fast this checkout is and how fast another one was: the same benchmarks, in turns.

Each benchmark runs in a process of its own with the checkout's own code, before and after by turns,
and compares with its obvious way there and then, so ratios are what is compared here. The bound is
that of this checkout's run, since an earlier one may not know it. What a run wrote stays in the
output folder, under the commit and the words of the run, and isn't run again.

    git worktree add --detach ../before COMMIT
    python benchmarks/two_commits.py --before ../before [--quick] [--repeats 3] [--clock cpu]
        [--only NAMES] [--data-dir DIR] [--output-dir DIR] [--json FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common

from drllm.records.codec import hash_values

HERE = Path(__file__).resolve().parents[1]
SIZES = {
    "search": "--questions 32 --paths 13 --sample 16 --repeats 1",
    "few": "--questions 5 --paths 25 --sample 16 --repeats 1 --rewards letter,boxed",
    "evaluation": "--questions 40 --repeats 1 --tasks arc_easy,hellaswag,commonsense_qa",
    "training": "--questions 40",
    "generate": "--quick",
}
"""What each is run with; `few` is the search of a few questions."""
SCRIPTS = {name: "search" if name == "few" else name for name in SIZES}
TAKE_DATA = ("search", "few", "evaluation", "training")
RATIOS = ("speedup", "overhead", "share_of_the_time")


def run(checkout: Path, name: str, options: Any, label: str) -> dict[str, Any]:
    """Run a benchmark of a checkout, unless its figures are there already; return them."""
    words = ["--quick"] if options.quick else SIZES[name].split()
    words += ["--clock", options.clock]
    if options.data_dir and name in TAKE_DATA:
        words += ["--data-dir", str(options.data_dir.resolve())]
    folder = options.output_dir.resolve() / hash_values([common.commit_of(checkout), words])[:12]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{label}.json"
    if not file.exists():
        script = checkout / "benchmarks" / f"{SCRIPTS[name]}.py"
        written = file.with_suffix(".part")
        words += ["--json", str(written)]
        paths = os.pathsep.join([str(checkout / "src"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, script, *words],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
        written.replace(file)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def figures_of(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the ratios of a benchmark, each under its name."""
    for kind in RATIOS:
        value = found.get(kind, {})
        for name, ratio in value.items() if isinstance(value, dict) else [("", value)]:
            yield f"{kind} {name}".strip(), ratio


def bounds_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the bounds that a benchmark knows of its speedups."""
    bounds = found.get("bound") or found.get("result", {}).get("bound")
    if isinstance(bounds, dict):
        return {f"speedup {name}": bound for name, bound in bounds.items()}
    return {} if bounds is None else {"speedup": bounds}


def main() -> None:
    """Run both in turns and print the medians."""
    parser = common.parser_of(__doc__, "the quick form of each")
    common.add_clock(parser)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--only", default=",".join(SIZES), help="comma list")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/two_commits"))
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if not (options.quick and name == "few")]
    if unknown := set(names) - set(SIZES):
        parser.error(f"--only takes {', '.join(SIZES)}; not {', '.join(sorted(unknown))}")
    places = {"before": options.before.resolve(), "after": HERE}
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    bounds: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        for name in names:
            for side in sorted(places, reverse=repeat % 2 == 0):
                found = run(places[side], name, options, f"{side}-{repeat}")
                for figure, ratio in figures_of(found):
                    by_side = values.setdefault(name, {}).setdefault(figure, {})
                    by_side.setdefault(side, []).append(ratio)
                if side == "after":
                    for figure, bound in bounds_of(found).items():
                        bounds.setdefault(f"{name} {figure}", []).append(bound)
    rows = []
    print(f"{'':<64} before  after  bound  reached")
    for name, figures in values.items():
        for figure, sides in figures.items():
            if sides.keys() != places.keys():
                continue  # the other checkout doesn't measure it
            before, after = (statistics.median(sides[side]) for side in places)
            bound = statistics.median(bounds.get(f"{name} {figure}", [float("nan")]))
            rows.append({"benchmark": name, "figure": figure, "before": before, "after": after})
            rows[-1] |= {"all": sides, "bound": None if bound != bound else bound}
            known = "" if bound != bound else f"  {bound:5.1f}  {after / bound:.0%}"
            print(f"{name + ': ' + figure:<64} {before:6.3f} {after:6.3f}{known}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
