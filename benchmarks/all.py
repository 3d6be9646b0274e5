"""What the results claim, measured on one device in an hour at most.

First how fast: the benchmarks beside this one that take a model, in their quick form on a CPU.
Then what is kept: a model is shrunk for a task, and routers are searched for, trained and compared
with the baselines. Each step is a process of its own with what is left of the time; what it writes
stays in the output folder, and the same command resumes with the steps that aren't there. Steps
that failed or were not reached are named in the figures, and the exit status is 1 if any failed.

    python benchmarks/all.py [--output-dir DIR] [--minutes 60] [--only NAMES] [--quick]
        [--json FILE] [--model MODEL] [--device DEVICE] [--dtype DTYPE] [--task TASK]
        [--data-dir DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
from common.process import run_python

HERE = Path(__file__).parent
ON_ANY_DEVICE = ("generate", "search", "features", "evaluation")
ON_CPU_ALONE = ("training", "precision", "search_quality")
"""Benchmarks of this folder, by the devices that they run on."""
MIN_SECONDS = 20.0  # with less time left, no further step is begun
SETTINGS = ("model", "device", "dtype", "task", "data_dir", "quick")
"""The options that the figures of a folder depend on."""


@dataclass(frozen=True)
class Step:
    """One step of the run.

    Attributes:
        make_command: Returns the arguments of Python. It raises FileNotFoundError if an earlier
            step has left nothing.
        file: What the step leaves when it is done.
    """

    make_command: Callable[[], Sequence[str]]
    file: Path


@dataclass(frozen=True)
class Sizes:
    """How much each step does, as arguments of its command."""

    shrink: Sequence[str]
    search: Sequence[str]
    evaluate: Sequence[str]


def choose_sizes(options: argparse.Namespace) -> Sizes:
    """Return the sizes of the quick or the whole form."""
    if options.quick:
        return Sizes(
            shrink=("--minutes", "0.2", "--save", "17%"),
            search=("--limit", "6", "--num-simulations", "4"),
            evaluate=("--limit", "8"),
        )
    return Sizes(
        shrink=("--minutes", str(options.minutes / 4), "--save", "17%"),
        search=("--limit", "60", "--num-simulations", "50"),
        evaluate=("--limit", "100"),
    )


class Steps:
    """Makes the commands of all steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sizes = choose_sizes(options)
        self.model = ["--model", options.model, "--device", options.device]
        self.model += ["--dtype", options.dtype]
        self.data = ["--data-dir", options.data_dir] if options.data_dir else []
        folder = options.output_dir
        self.shrunk_folder = folder / "shrunk"
        self.supervision_file = folder / "search" / "supervision.jsonl"
        self.routers_folder = folder / "routers"
        self.eval_folder = folder / "eval"

    def list_all(self) -> dict[str, Step]:
        """Return the steps by name, in order."""
        steps = {}
        benchmarks = list(ON_ANY_DEVICE)
        if self.options.device == "cpu":
            benchmarks += ON_CPU_ALONE
        for name in benchmarks:
            file = self.options.output_dir / f"{name}.json"
            steps[name] = Step(partial(self._run_benchmark, name, file), file)
        targets = self.supervision_file.with_name("supervision.manifest.json")
        result = self.eval_folder / f"{self.options.task}.json"
        steps["shrinking"] = Step(self._shrink, self.shrunk_folder / "shrink.json")
        steps["targets"] = Step(self._search, targets)
        steps["routers"] = Step(self._train, self.routers_folder / "router_config.json")
        steps["routing"] = Step(self._evaluate, result)
        return steps

    def _run_benchmark(self, name: str, file: Path) -> list[str]:
        command = [str(HERE / f"{name}.py"), "--json", str(file)]
        if name in ON_CPU_ALONE:
            command += ["--model", self.options.model]
        else:
            command += self.model
        if self.options.quick or self.options.device == "cpu":
            command.append("--quick")
        return command

    def _run_verb(self, name: str, *words: str) -> list[str]:
        return ["-m", "drllm", name, *self.model, *self.data, *words]

    def _shrink(self) -> list[str]:
        _, model, *device = self.model
        words = [model, self.options.task, str(self.shrunk_folder), *self.sizes.shrink]
        return ["-m", "drllm", "shrink", *device, *self.data, *words]

    def _search(self) -> list[str]:
        words = ["--tasks", self.options.task, *self.sizes.search]
        return self._run_verb("search", *words, "--output-dir", str(self.supervision_file.parent))

    def _train(self) -> list[str]:
        words = ["--supervision", str(self.supervision_file)]
        words += ["--output-dir", str(self.routers_folder)]
        return ["-m", "drllm", "train", *self.model, *words]

    def _evaluate(self) -> list[str]:
        words = ["--tasks", self.options.task, "--routers", str(self.routers_folder)]
        words += [*self.sizes.evaluate, "--output-dir", str(self.eval_folder)]
        return self._run_verb("evaluate", *words)


def run_step(step: Step, log: Path, seconds: float) -> str:
    """Run a step within some seconds, with its output in a log, and say how it ended."""
    if step.file.exists():
        return "already done"
    if seconds < MIN_SECONDS:
        return "not reached"
    try:
        arguments = step.make_command()
    except FileNotFoundError as error:
        return f"failed, {error.filename} isn't there"
    return run_python(arguments, log, seconds)


def check_folder(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse a folder with figures of other settings, and write the settings into a new one."""
    settings = {name: getattr(options, name) for name in SETTINGS}
    file = options.output_dir / "settings.json"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings:
        parser.error(f"{options.output_dir} holds figures of other settings; give another folder")
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def run_steps(
    steps: dict[str, Step], names: Sequence[str], options: argparse.Namespace
) -> list[str]:
    """Run the named steps, write the figures after each, and return how each ended."""
    deadline = time.monotonic() + 60 * options.minutes
    rows: dict[str, dict[str, Any]] = {}
    figures = {
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "quick": options.quick,
        "steps": rows,
    }
    for name in names:
        step = steps[name]
        started = time.monotonic()
        ended = run_step(step, options.output_dir / f"{name}.log", deadline - started)
        seconds = time.monotonic() - started
        print(f"{name:12} {ended:12} {seconds:7.1f} s", flush=True)
        rows[name] = {"ended": ended, "seconds": seconds}
        if step.file.exists() and step.file.suffix == ".json":
            rows[name]["figures"] = json.loads(step.file.read_text(encoding="utf-8"))
        common.write_figures(options, figures)
    return [row["ended"] for row in rows.values()]


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
    steps = Steps(options).list_all()
    names = list(steps) if options.only is None else options.only.split(",")
    for name in names:
        if name not in steps:
            parser.error(f"there is no step {name!r}; there are {', '.join(steps)}")
    check_folder(options, parser)
    ended = run_steps(steps, names, options)
    if any(text.startswith("failed") for text in ended):
        sys.exit(1)


if __name__ == "__main__":
    main()
