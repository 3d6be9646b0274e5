"""Everything that the log claims, measured on one device in an hour at most.

First how fast: the benchmarks beside this one that take a model, in their quick form on a CPU.
Then what is kept: a path is tuned, healed and compared with the full one, and routers are searched
for, trained and compared with the baselines. Each step is a process of its own with what is left of
the time; what it writes stays in the output folder, and the same command goes on with the steps
that aren't there. Steps that failed or were not reached are named in the figures, and the exit
status is 1 if any failed.

    python benchmarks/all.py [--output-dir DIR] [--minutes 60] [--only NAMES] [--quick]
        [--json FILE] [--model MODEL] [--device DEVICE] [--dtype DTYPE] [--task TASK]
        [--data-dir DIR]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
SPEED = ("generate", "search", "tune", "evaluation")
"""Benchmarks that run on any device."""
ON_CPU = ("training", "precision", "search_quality")
"""Benchmarks that run on a CPU alone."""
PATHS, HEALED, SEARCH, ROUTERS = "tuned", "healed", "search", "routers"
LEAST_S = 20.0
"""With less time left no further step is begun."""


class Steps:
    """The steps of a run in their order, each a command, and what it leaves when it is done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output_dir
        self.model = ["--model", options.model, "--device", options.device]
        self.model += ["--dtype", options.dtype]
        self.data = ["--data-dir", options.data_dir] if options.data_dir else []
        few = options.quick
        self.sizes = {
            "tune": ["--num-fit", "8" if few else "60", "--num-judged", "8" if few else "100"],
            "heal": ["--steps", "2"] if few else ["--minutes", str(options.minutes / 6)],
            "limit": ["--limit", "6" if few else "60"],
            "judged": ["--limit", "8" if few else "100"],
            "simulations": ["--num-simulations", "4" if few else "50"],
        }

    def all(self) -> dict[str, tuple[Callable[[], Sequence[str]], Path]]:
        """Return by name what makes the command of each step, and the file that it leaves."""
        found: dict[str, tuple[Callable[[], Sequence[str]], Path]] = {}
        for name in (*SPEED, *(ON_CPU if self.options.device == "cpu" else ())):
            file = self.folder / f"{name}.json"
            found[name] = partial(self._benchmark, name, file), file
        found["path"] = self._tune, self.folder / PATHS / "paths.json"
        found["healing"] = self._heal, self.folder / HEALED / "path.json"
        found["paths"] = self._compare, self.folder / "paths.json"
        found["targets"] = self._search, self.folder / SEARCH / "supervision.manifest.json"
        found["routers"] = self._train, self.folder / ROUTERS / "router_config.json"
        found["routing"] = self._evaluate, self.folder / "eval" / f"{self.options.task}.json"
        return found

    def _benchmark(self, name: str, file: Path) -> Sequence[str]:
        quick = ["--quick"] if self.options.quick or self.options.device == "cpu" else []
        model = ["--model", self.options.model] if name in ON_CPU else self.model
        return [str(HERE / f"{name}.py"), *quick, "--json", str(file), *model]

    def _shortest(self) -> str:
        file = self.folder / PATHS / "paths.json"
        *_, last = json.loads(file.read_text(encoding="utf-8"))["paths"]
        return f"{file}:{last['name']}"

    def _verb(self, name: str, *words: str) -> Sequence[str]:
        return ["-m", "drllm", name, *self.model, *self.data, *words]

    def _tune(self) -> Sequence[str]:
        wanted = ["--tasks", self.options.task, "--max-loss", "5", *self.sizes["tune"]]
        return self._verb("tune", *wanted, "--output-dir", str(self.folder / PATHS))

    def _heal(self) -> Sequence[str]:
        wanted = ["--path", self._shortest(), "--tasks", self.options.task, *self.sizes["heal"]]
        return self._verb("heal", *wanted, "--output-dir", str(self.folder / HEALED))

    def _compare(self) -> Sequence[str]:
        paths = f"{self._shortest()},{self.folder / HEALED}"
        words = ["--paths", paths, "--tasks", self.options.task, *self.model, *self.data]
        quick = ["--quick"] if self.options.quick else []
        return [str(HERE / "healed.py"), *words, *quick, "--json", str(self.folder / "paths.json")]

    def _search(self) -> Sequence[str]:
        wanted = ["--dataset", self.options.task, *self.sizes["limit"], *self.sizes["simulations"]]
        return self._verb("search", *wanted, "--output-dir", str(self.folder / SEARCH))

    def _train(self) -> Sequence[str]:
        supervision = str(self.folder / SEARCH / "supervision.jsonl")
        words = ["--supervision", supervision, "--output", str(self.folder / ROUTERS)]
        return ["-m", "drllm", "train", *self.model, *words]

    def _evaluate(self) -> Sequence[str]:
        wanted = ["--tasks", self.options.task, *self.sizes["judged"]]
        wanted += ["--routers", str(self.folder / ROUTERS)]
        return self._verb("evaluate", *wanted, "--output-dir", str(self.folder / "eval"))


def carried_out(command: Sequence[str], log: Path, seconds: float) -> str:
    """Run a step, its output into a log, and say how it ended."""
    with log.open("w", encoding="utf-8") as said:
        try:
            words = [sys.executable, *command]
            status = subprocess.run(words, stdout=said, stderr=said, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return "out of time"
    return "done" if status == 0 else f"failed, see {log}"


def main() -> None:
    """Run it from the command line."""
    parser = common.parser_of(__doc__ or "")
    common.add_model(parser, devices=True, dtypes=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no step goes on")
    parser.add_argument("--only", help="comma list of steps")
    parser.add_argument("--task", default="builtin_facts", help="with options")
    parser.add_argument("--data-dir", help="folder with SPLIT.jsonl[.gz] files by task")
    options = parser.parse_args()
    steps = Steps(options).all()
    wanted = [*steps] if options.only is None else options.only.split(",")
    if unknown := [name for name in wanted if name not in steps]:
        parser.error(f"there is no step {unknown[0]!r}; there are {', '.join(steps)}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    same = ("model", "device", "dtype", "task", "data_dir", "quick")
    settings = {name: getattr(options, name) for name in same}
    begun = options.output_dir / "settings.json"
    if begun.exists() and json.loads(begun.read_text(encoding="utf-8")) != settings:
        parser.error(f"{options.output_dir} holds figures of other settings; give another folder")
    begun.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    end = time.monotonic() + 60 * options.minutes
    figures: dict[str, Any] = {"drllm": importlib.metadata.version("drllm"), "steps": {}}
    figures |= {"model": options.model, "device": options.device, "dtype": options.dtype}
    for name in wanted:
        command, file = steps[name]
        started, ended = time.monotonic(), "done before"
        if not file.exists():
            ended = "not reached"
            if end - started >= LEAST_S:
                try:
                    words = command()
                except FileNotFoundError as error:
                    ended = f"failed, {error.filename} isn't there"
                else:
                    ended = carried_out(words, options.output_dir / f"{name}.log", end - started)
        seconds = time.monotonic() - started
        print(f"{name:12} {ended:12} {seconds:7.1f} s", flush=True)
        row: dict[str, Any] = {"ended": ended, "seconds": seconds}
        if file.exists() and file.suffix == ".json":
            row["figures"] = json.loads(file.read_text(encoding="utf-8"))
        figures["steps"][name] = row
        common.write_figures(options, figures)
    if any(row["ended"].startswith("failed") for row in figures["steps"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
