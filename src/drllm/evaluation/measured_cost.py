"""What an evaluation measures of the systems' time, once for all of its tasks: `latency.json`.

Owns which prompts are timed and what is written of it. Leaves the clock, the turns and the sizes to
`latency`, and what follows from routes without a clock to `prompt_cost`. Time belongs to the
machine as it is now, so an evaluation that goes on after an interruption measures anew.

Axes: B rows, T tokens.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import torch

from drllm.config import EvaluateConfig
from drllm.errors import ConfigError
from drllm.evaluation.latency import (
    ATTACHED,
    BASE,
    DECODE,
    PREFILL,
    ROUTED,
    ROUTERS,
    Clock,
    Latency,
    Sizes,
    measure,
    with_router_time,
)
from drllm.evaluation.results import Evaluated
from drllm.models.base.load import BaseModel
from drllm.models.routers.checkpoint import load_routers
from drllm.records import new_manifest, sha256, write_atomically
from drllm.tasks.base import Task

Encode: TypeAlias = Callable[[str], list[int]]

LATENCY_FILE = "latency.json"
DESCRIPTIONS = {
    BASE: "the untouched model",
    ROUTED: "the routers decide",
    ATTACHED: "ready for routing, without routers: every layer once",
    ROUTERS: "routers compute all that they do, and every layer runs once",
}


def check_name(tasks: Sequence[Task]) -> None:
    """Refuse a task whose result would lie where the measured times do.

    Raises:
        ConfigError: A task called `latency`.
    """
    if any(f"{task.name}.json" == LATENCY_FILE for task in tasks):
        raise ConfigError(
            f"a task is called {Path(LATENCY_FILE).stem!r}, but {LATENCY_FILE} holds the measured "
            f"times; rename its file"
        )


def write_measured(
    base: BaseModel,
    routers_dir: Path,
    tasks: Sequence[Evaluated],
    encode: Encode,
    config: EvaluateConfig,
    output_dir: Path,
    clock: Clock | None = None,
) -> Path | None:
    """Time base and routed model, and write `latency.json`.

    Without rounds nothing is measured, and a file of an earlier evaluation is removed, so that no
    result stands beside another one's times.

    Args:
        base: The base model, not routed.
        routers_dir: A folder of routers that belong to it.
        tasks: What was evaluated.
        encode: Gives a prompt's tokens.
        config: Rounds, and the seed of the draw.
        output_dir: Where the results lie.
        clock: See `measure`.

    Returns:
        The file; None where nothing is measured.
    """
    path = output_dir / LATENCY_FILE
    if not config.latency_rounds:
        path.unlink(missing_ok=True)
        return None
    prompts = choose_prompts(tasks, encode, config.seed)
    routers = load_routers(routers_dir).to(base.model.device)
    sizes = Sizes(rounds=config.latency_rounds)
    found = measure(base.model, with_router_time(routers), prompts, sizes, clock)
    weights = routers_dir / "routers.safetensors"
    values = {
        **new_manifest("latency", model=base.identity, config=config.to_dict(), inputs=[weights]),
        "runtime": {**base.runtime, "num_threads": found.num_threads},
        "machine": machine(base.model.device),
        "routers": str(routers_dir),
        "routers_sha256": sha256(weights),
        "num_prompts": len(prompts),
        **contents(found),
    }
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return path


def choose_prompts(tasks: Sequence[Evaluated], encode: Encode, seed: int) -> list[list[int]]:
    """Draw the prompts that are timed: one a row of the largest batch, if there are so many.

    All are read at one length, so those that are long enough are drawn first, then the longest of
    the others. Of each its last tokens are kept: with worked examples or a chat template all
    prompts of a task begin alike.

    Args:
        tasks: What was evaluated.
        encode: Gives a prompt's tokens.
        seed: Of the draw.
    """
    sizes = Sizes()
    asked = [
        pair
        for task in tasks
        for pair in zip(task.asked.prompts(), task.cost.num_tokens, strict=True)
    ]
    drawn = random.Random(seed).sample(asked, len(asked))
    drawn.sort(key=lambda each: -min(each[1], sizes.prompt_tokens))  # stable: else as drawn
    chosen = [encode(text) for text, _ in drawn[: max(sizes.batch_sizes)]]
    T = min(sizes.prompt_tokens, *map(len, chosen))
    return [ids[-T:] for ids in chosen]


def contents(found: Latency) -> dict[str, Any]:
    """Return what was measured as plain JSON types.

    Args:
        found: Of the systems of `with_router_time`.
    """
    sizes = sorted({timing.batch_size for timing in found.timings})
    return {
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "systems": DESCRIPTIONS,
        "timings": [
            {
                **asdict(timing),
                "seconds": list(timing.seconds),
                "median": timing.median,
                "tokens_per_second": timing.tokens_per_second,
            }
            for timing in found.timings
        ],
        "routed_to_base": [
            {
                "phase": phase,
                "batch_size": size,
                **asdict(found.ratio(ROUTED, BASE, phase, size)),
            }
            for phase in (PREFILL, DECODE)
            for size in sizes
        ],
        "router_seconds": [
            {"batch_size": size, **asdict(found.router_seconds(size))} for size in sizes
        ],
    }


def machine(device: torch.device) -> str:
    """Return what a reader needs to know of the machine, in words.

    Args:
        device: What the model runs on.
    """
    parts = [f"{platform.system()} {platform.machine()}", _processor(), f"{_cores()} cores"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    """Return the processor's name, which Python itself doesn't know on Linux."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(encoding="utf-8") if listed.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else platform.processor()


def _cores() -> int:
    """Return how many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1
