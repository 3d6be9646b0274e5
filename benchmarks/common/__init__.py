"""What every benchmark here shares: its flags, its clock, and the file of its figures."""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from common import shapes
from common.comparison import Comparison
from drllm.config import ModelConfig
from drllm.model.load import BaseModel, load
from drllm.models.routers.stack import RouterStack
from drllm.records.gaps import parse_layers

Clock = Callable[[], float]
Result = TypeVar("Result")

ALWAYS = 1e3
"""Logits that no router's own answer comes near to."""


def parser_of(doc: str, quick: str = "a small sample, under a minute") -> argparse.ArgumentParser:
    """Return a parser with the flags of every benchmark: `--quick` and `--json`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses what is measured."""
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time of a single thread, for a machine that is used by others too",
    )


def add_model(parser: argparse.ArgumentParser, devices: bool = False, dtypes: bool = False) -> None:
    """Add the flags of the model that is measured."""
    parser.add_argument("--model", default=ModelConfig().model, help="alias, hub id or folder")
    if devices:
        parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    if dtypes:
        parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")


def add_skip(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the layers that the shorter model lacks."""
    parser.add_argument("--skip", help="layers to leave out; a sixth, from the middle, by default")


def list_skipped(options: argparse.Namespace, base: BaseModel) -> list[int]:
    """Return the layers that `--skip` names, or a sixth of them, from the middle."""
    if options.skip is not None:
        return sorted(parse_layers(options.skip))
    first = base.num_layers // 2
    return list(range(first, first + max(1, base.num_layers // 6)))


def leave_out(skip: Sequence[int], num_layers: int) -> list[int]:
    """Return a decision for each layer, 0 for those that are left out."""
    return [0 if layer in skip else 1 for layer in range(num_layers)]


def sizes_of(
    options: argparse.Namespace, quick: Mapping[str, int], whole: Mapping[str, int]
) -> dict[str, int]:
    """Return the sizes of the quick or the whole form, with those given as flags in their place."""
    sizes = quick if options.quick else whole
    given = {name: getattr(options, name, None) for name in sizes}
    return {name: size if given[name] is None else given[name] for name, size in sizes.items()}


def clock_of(options: argparse.Namespace) -> Clock:
    """Return the clock that `--clock` names; on a GPU it waits for what that was asked to do."""
    clock: Clock = time.perf_counter
    if options.clock == "cpu":
        torch.set_num_threads(1)  # of several threads it would add up those that wait as well
        clock = time.process_time
    device = getattr(options, "device", "cpu")
    if not device.startswith("cuda"):
        return clock

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read


def run_in_turns(ways: Mapping[str, Callable[[], Result]], repeats: int) -> list[dict[str, Result]]:
    """Run all ways so many times, after once to warm up, in an order that turns round each time."""
    runs = []
    for repeat in range(repeats + 1):
        order = sorted(ways, reverse=repeat % 2 == 1)
        runs.append({name: ways[name]() for name in order})
    return runs[1:]


def base_of(options: argparse.Namespace) -> BaseModel:
    """Load the model that the flags name, in float32 on the CPU where they don't say more.

    `random:SHAPE` makes a model of random weights; see `shapes`.
    """
    dtype = getattr(options, "dtype", "float32")
    device = getattr(options, "device", "cpu")
    if options.model.startswith(shapes.PREFIX):
        return shapes.make_base(options.model.removeprefix(shapes.PREFIX), device, dtype)
    return load(ModelConfig(model=options.model, dtype=dtype, device=device))


def make_executing(routers: RouterStack) -> RouterStack:
    """Return a copy of routers that compute all they do, and whose every answer is to execute."""
    copied = copy.deepcopy(routers)
    with torch.no_grad():
        copied.decision_bias[:, 1] += ALWAYS
    return copied


def describe_machine(device: torch.device) -> str:
    """Say what is measured on, and with which versions."""
    words = [platform.machine(), str(device), f"{torch.get_num_threads()} threads"]
    if device.type == "cuda":
        words.append(torch.cuda.get_device_name(device))
    words += [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    return ", ".join(words)


def describe_run(base: BaseModel, options: argparse.Namespace) -> dict[str, str]:
    """Say which model was measured, with which clock and on what machine."""
    machine = f"{base.model.dtype}, {describe_machine(base.model.device)}"
    return {"model": base.name, "clock": options.clock, "machine": machine}


def refuse_differences(base: BaseModel, what: str, differ: int) -> None:
    """End without figures where two ways that are compared came to different results.

    In float32 they never may; a dtype of fewer digits decides near ties by chance, so there the
    number is a figure itself.
    """
    if differ and base.model.dtype == torch.float32:
        raise SystemExit(f"{what}: {differ} differ between the two ways; no figures are written")


def commit_of(checkout: Path = Path(__file__).parent) -> str:
    """Return the commit of a checkout, by default of this one, and whether it was changed."""
    if shutil.which("git") is None:
        return "an unknown commit"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    return found.stdout.strip() or "an unknown commit"


def describe_version() -> str:
    """Say which version and commit of drllm is measured."""
    return f"{importlib.metadata.version('drllm')} at {commit_of()}"


@contextmanager
def measurement_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder that measurements are kept in: `--output-dir`, or a temporary one.

    The quick form uses a temporary one, so that it measures anew whatever was measured before.
    """
    if not options.quick:
        yield options.output_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write_figures(
    options: argparse.Namespace,
    figures: Mapping[str, Any],
    comparisons: Sequence[Comparison] = (),
) -> None:
    """Write the figures as JSON if `--json` asks for it.

    Args:
        options: The flags.
        figures: What this benchmark alone writes.
        comparisons: What every benchmark of two ways writes, and the table of all of them shows.
    """
    if options.json:
        whole = {"drllm": describe_version(), **figures}
        if comparisons:
            whole["comparisons"] = [comparison.to_json() for comparison in comparisons]
        options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
