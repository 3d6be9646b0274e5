"""Whether drllm is exact on a GPU, when it waits for it, and how fast it is, in nine minutes.

It needs no network: the models have random weights and the shapes of Llama 3.2 1B and 3B and of
Llama 3.1 8B.

1. Exactness, in float32 and bfloat16: with every layer executed the routed model's logits are those
   of the plain model, and along a plan they are those of a model whose list of layers is the plan's
   path, bit for bit.
2. Waits: how often the host waits for the GPU in a routed prefill and in a decode step. The bounds
   are those of `tests/devices/test_stages.py`: at most one wait a layer, and none.
3. Times: the benchmarks beside this one, in their quick form, each against the obvious way and the
   bound. Each is a process of its own, and stops when its time is over.

    python benchmarks/gpu.py [--device cuda] [--shapes 1b,3b,8b] [--minutes 9]
        [--output-dir runs/gpu]

The figures are written to `gpu.json`, and as a page to `gpu.md`. The exit status is 1 if something
isn't exact, a bound of waits is broken, or a benchmark came to its end on no shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from common import shapes
from common.page import HEADER, RULE, write_rows
from common.process import DONE, run_python

from drllm.model.load import BaseModel
from drllm.models.check import replace_layers
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.kv_cache import cache_argument

HERE = Path(__file__).parent
EXACT_SHAPE = "1b"  # is compared in both dtypes
BATCH_SIZES = (1, 32)
NUM_TOKENS = 64
BENCHMARKS = {
    "generate": ["--quick", "--rows", str(max(BATCH_SIZES))],
    "search": ["--quick", "--rewards", "loglikelihood"],
    "features": ["--quick"],
    "evaluation": ["--quick"],
}
"""Benchmarks that run on any device, with their arguments."""


def make_plan(num_layers: int) -> list[int]:
    """Return a plan that skips a layer, repeats another, and executes the rest."""
    plan = [1] * num_layers
    plan[num_layers // 2] = 0
    plan[num_layers // 3] = 2
    return plan


def draw_ids(base: BaseModel, num_rows: int) -> torch.Tensor:
    """Return random tokens, `[B, T]`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 40_000, (num_rows, NUM_TOKENS), generator=generator)
    return ids.to(base.model.device)


@torch.no_grad()
def check_exactness(base: BaseModel) -> list[dict[str, Any]]:
    """Compare routed logits with those of the plain model and of a listed path, bit for bit."""
    rows = []
    plan = make_plan(base.num_layers)
    for batch_size in BATCH_SIZES:
        ids = draw_ids(base, batch_size)
        expected = base.model(ids, use_cache=False).logits
        with replace_layers(base.model, plan):
            expected_along_plan = base.model(ids, use_cache=False).logits
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        try:
            with routed.fixed([1] * base.num_layers):
                logits = routed(ids, use_cache=False).logits
            with routed.fixed(plan):
                logits_along_plan = routed(ids, use_cache=False).logits
        finally:
            routed.detach()
        rows.append(
            {
                "dtype": str(base.model.dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "every_layer": bool(torch.equal(logits, expected)),
                "plan": bool(torch.equal(logits_along_plan, expected_along_plan)),
            }
        )
    return rows


@contextmanager
def count_waits(device: torch.device) -> Iterator[list[str]]:
    """Record the operations inside a `with` block that make the host wait for the GPU."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message)
    ]


@torch.no_grad()
def measure_waits(base: BaseModel) -> dict[str, Any]:
    """Count the waits of a routed prefill and of decode steps, by routers that nobody trained."""
    config = RouterConfig(
        num_layers=base.num_layers, hidden_size=int(base.model.config.hidden_size)
    )
    routers = RouterStack(config, torch.Generator().manual_seed(0)).to(base.model.device)
    routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
    device = base.model.device
    ids = draw_ids(base, 2)
    cache_name = cache_argument(type(base.model))
    try:
        routed(ids[:, :4])  # warm up
        with count_waits(device) as in_prefill:
            output = routed(ids, use_cache=True)
        cache = {cache_name: output[cache_name]}
        token = ids[:, :1]
        routed(token, **cache, use_cache=True)
        with count_waits(device) as in_step:
            routed(token, **cache, use_cache=True)
    finally:
        routed.detach()
    return {
        "counted": device.type == "cuda",
        "prefill": len(in_prefill),
        "prefill_bound": base.num_layers,
        "step": len(in_step),
        "step_bound": 0,
        "places": sorted({*in_prefill, *in_step}),
    }


def run_benchmark(
    name: str, shape: str, options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Run one benchmark on a shape in a process of its own, within some seconds."""
    file = options.output_dir / f"{name}-{shape}.json"
    log = options.output_dir / f"{name}-{shape}.log"
    arguments = [str(HERE / f"{name}.py"), *BENCHMARKS[name]]
    arguments += ["--model", f"{shapes.PREFIX}{shape}", "--device", options.device]
    arguments += ["--dtype", options.dtype, "--json", str(file)]
    file.unlink(missing_ok=True)
    started = time.monotonic()
    ended = run_python(arguments, log, seconds)
    row: dict[str, Any] = {"ended": ended, "seconds": time.monotonic() - started}
    if file.exists():
        row["figures"] = json.loads(file.read_text(encoding="utf-8"))
    return row


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Check and measure everything, and print each result as soon as it is there."""
    deadline = time.monotonic() + 60 * options.minutes
    machine = common.describe_machine(torch.device(options.device))
    figures: dict[str, Any] = {"machine": machine, "exactness": [], "times": {}}
    for dtype in ("float32", "bfloat16"):
        base = shapes.make_base(options.exact_shape, options.device, dtype)
        rows = check_exactness(base)
        figures["exactness"] += rows
        for row in rows:
            print(
                f"exact with every layer: {row['every_layer']}, along a plan: {row['plan']} "
                f"({row['dtype']}, {row['batch_size']} rows)",
                flush=True,
            )
    figures["waits"] = measure_waits(base)
    print(f"waits: {figures['waits']}", flush=True)
    del base
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
    for shape in options.shapes.split(","):
        for name in BENCHMARKS:
            left = deadline - time.monotonic()
            row = {"ended": "not reached", "seconds": 0.0}
            if left > 0:
                row = run_benchmark(name, shape, options, left)
            figures["times"][f"{name}, {shape}"] = row
            print(f"{name}, {shape}: {row['ended']}, {row['seconds']:.0f} s", flush=True)
    return figures


def write_page(figures: dict[str, Any]) -> str:
    """Return the figures as a page of Markdown."""
    lines = ["# drllm on this machine", "", figures["machine"], ""]
    lines += ["| dtype | rows | every layer | plan |", "|---|--:|---|---|"]
    for row in figures["exactness"]:
        words = ["equal" if row[key] else "**differs**" for key in ("every_layer", "plan")]
        lines.append(f"| {row['dtype']} | {row['batch_size']} | {words[0]} | {words[1]} |")
    waits = figures["waits"]
    if waits["counted"]:
        lines += [
            "",
            f"A routed prefill waits {waits['prefill']} times (bound {waits['prefill_bound']}), a "
            f"decode step {waits['step']} times (bound {waits['step_bound']}).",
        ]
    lines += ["", "| benchmark | ended | seconds |", "|---|---|--:|"]
    for name, row in figures["times"].items():
        lines.append(f"| {name} | {row['ended']} | {row['seconds']:.0f} |")
    lines += ["", HEADER, RULE]
    for name, row in figures["times"].items():
        _, shape = name.split(", ")
        lines += write_rows(row.get("figures", {}), prefix=f"{shape}: ")
    return "\n".join(lines) + "\n"


def passes(figures: dict[str, Any]) -> bool:
    """Tell whether everything is exact, no bound of waits is broken, and nothing failed."""
    is_exact = all(row["every_layer"] and row["plan"] for row in figures["exactness"])
    waits = figures["waits"]
    is_quick = waits["prefill"] <= waits["prefill_bound"] and waits["step"] <= waits["step_bound"]
    has_failed = any(row["ended"].startswith("failed") for row in figures["times"].values())
    return is_exact and is_quick and not has_failed


def list_untimed(figures: dict[str, Any]) -> list[str]:
    """Return the benchmarks that came to their end on no shape."""
    timed = set()
    names = set()
    for key, row in figures["times"].items():
        name, _ = key.split(", ")
        names.add(name)
        if row["ended"] == DONE:
            timed.add(name)
    return sorted(names - timed)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a try")
    parser.add_argument("--dtype", default="bfloat16", help="of the models that are timed")
    parser.add_argument("--shapes", default="1b,3b,8b", help="that are timed")
    parser.add_argument("--exact-shape", default=EXACT_SHAPE, help="that is checked")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing goes on")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; --device cpu tries it on the processor")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    figures = measure_all(options)
    (options.output_dir / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
    (options.output_dir / "gpu.md").write_text(write_page(figures), encoding="utf-8")
    print(f"figures: {options.output_dir}/gpu.json, page: {options.output_dir}/gpu.md")
    untimed = list_untimed(figures)
    if untimed:
        print(f"incomplete: {', '.join(untimed)} weren't timed on any shape; give more --minutes")
    if untimed or not passes(figures):
        sys.exit(1)


if __name__ == "__main__":
    main()
