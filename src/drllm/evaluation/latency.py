"""Measured time: base and routed model reading prompts and decoding, taking turns.

Models under comparison share their weights and are timed in interleaved rounds, each round in
another order, so that whatever else the machine does hits all of them alike; what is reported are
medians, and ratios of one round.

Axes: B rows, T tokens, L layers.
"""

import copy
import os
import platform
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from drllm.config import EvaluateConfig
from drllm.cost import mean_executions
from drllm.models.base.layers import find_layers
from drllm.models.base.load import BaseModel
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import Policy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.paths import full_decisions
from drllm.records.codec import sha256, write_json
from drllm.records.manifest import new_manifest
from drllm.records.results import BASE, LATENCY_FILE, ROUTED, Latency, Timing, Timings

Clock: TypeAlias = Callable[[], float]
Rounds: TypeAlias = list[dict[str, float]]  # seconds by what was timed, for every round
Prepare: TypeAlias = Callable[[], Callable[[], Any]]  # returns what is timed, ready to be called

BATCH_SIZES = (1, 4, 16)
DESCRIPTIONS = {BASE: "the untouched model", ROUTED: "the routers decide"}


@torch.no_grad()
def measure(
    model: Any,
    systems: Mapping[str, Policy | None],
    prompts: Sequence[Sequence[int]],
    rounds: int,
    num_read: int,
    num_written: int,
) -> Timings:
    """Time systems, each a policy or None for base, while they read prompts and while they decode.

    Prompts are cut to one length, the shortest one's or `num_read`, so that no padding is timed; a
    batch of more rows than there are prompts holds some several times. A round that isn't measured
    comes first. RoutingError for a model that is routed already.
    """
    T = min(num_read, *map(len, prompts))
    models = {name: twin(model) for name in systems}
    routed: dict[str, RoutedModel] = {}
    for name, policy in systems.items():
        if policy is not None:
            routed[name] = RoutedModel(models[name], policy=policy)
    full = full_decisions(len(find_layers(model)[1]))
    clock = device_clock(model.device)
    ways: list[tuple[Literal["prefill", "decode"], Callable[..., Any], int]] = [
        ("prefill", reading, T),
        ("decode", partial(decoding, num_tokens=num_written), num_written),
    ]
    timings = []
    for size in BATCH_SIZES:
        rows = [list(prompts[row % len(prompts)])[:T] for row in range(size)]
        ids = torch.tensor(rows, device=model.device)  # [B, T]
        for phase, way, num_tokens in ways:
            calls = {name: way(twin_model, ids) for name, twin_model in models.items()}
            take_turns(calls, 1, clock)  # forgotten
            seconds = take_turns(calls, rounds, clock)
            for name in systems:
                routes = [full]
                if name in routed:
                    routes = routed[name].last_route.tolist()  # [B, L]
                timings.append(
                    Timing(
                        system=name,
                        phase=phase,
                        batch_size=size,
                        num_tokens=size * num_tokens,
                        executions=mean_executions(routes),
                        seconds=tuple(times[name] for times in seconds),
                    )
                )
    return Timings(prompt_tokens=T, new_tokens=num_written, timings=tuple(timings))


def take_turns(calls: Mapping[str, Prepare], repeats: int, clock: Clock) -> Rounds:
    """Time calls in turn, each prepared before its clock starts, every round in another order.

    In a fixed order one call would always follow the same other one, and find its weights and code
    in the processor's caches, or not.
    """
    rounds = []
    for number in range(repeats):
        times = {}
        for name in random.Random(number).sample(list(calls), len(calls)):
            call = calls[name]()
            started = clock()
            call()
            times[name] = clock() - started
        rounds.append(times)
    return rounds


def twin(model: Any) -> Any:
    """Return a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def empty_cache(model: Any) -> dict[str, Cache]:
    """Return a cache, by the name under which the model takes it."""
    return {cache_argument(model): DynamicCache(config=model.config)}


def reading(model: Any, ids: Tensor) -> Prepare:
    """Prepare to read prompts `[B, T]` into a new cache."""
    return lambda: partial(model, ids, logits_to_keep=1, **empty_cache(model))


def decoding(model: Any, ids: Tensor, num_tokens: int = 1) -> Prepare:
    """Prepare to read more tokens, one by one, after prompts `[B, T]`, read once here.

    Each has its own copy of the cache. Whichever tokens they are, the time is the same.
    """
    cache = empty_cache(model)
    model(ids, logits_to_keep=1, **cache)

    def decode(own: Mapping[str, Cache]) -> None:
        for _ in range(num_tokens):
            model(ids[:, :1], logits_to_keep=1, **own)

    return lambda: partial(decode, copy.deepcopy(cache))


def device_clock(device: torch.device) -> Clock:
    """Return a clock that tells the time when the device has done all that it was asked to do."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now


def write_latency(
    base: BaseModel,
    folder: Path | None,
    routers: RouterStack | None,
    prompts: Sequence[Sequence[int]],
    config: EvaluateConfig,
    output: Path,
) -> None:
    """Time the base model, not routed yet, and the routed one, and write `latency.json`.

    Without `latency` or routers nothing is measured, and a file of an earlier evaluation is
    removed, so that no result is shown with another one's times.
    """
    path = output / LATENCY_FILE
    if not config.latency or folder is None or routers is None:
        path.unlink(missing_ok=True)
        return
    timed = choose_prompts(prompts, config.latency_read, config.seed)
    systems = {BASE: None, ROUTED: RouterPolicy(routers)}
    weights = folder / WEIGHTS_FILE
    lengths = (config.latency_rounds, config.latency_read, config.latency_written)
    latency = Latency(
        **new_manifest("latency", model=base.identity, config=config.to_dict(), inputs=[weights]),
        runtime={**base.runtime, "num_threads": torch.get_num_threads()},
        machine=machine(base.model.device),
        routers=str(folder),
        routers_sha256=sha256(weights),
        num_prompts=len(timed),
        systems=DESCRIPTIONS,
        measured=measure(base.model, systems, timed, *lengths),
    )
    write_json(path, latency)


def timed_tokens(config: EvaluateConfig) -> int:
    """Return how many tokens a measurement runs at most; 0 where no time is measured."""
    if not config.latency:
        return 0
    a_row = config.latency_read + config.latency_written
    return config.latency_rounds * len(DESCRIPTIONS) * sum(BATCH_SIZES) * a_row


def choose_prompts(prompts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
    """Draw the prompts that are timed: one a row of the largest batch, if there are so many.

    Those that are long enough are drawn first, then the longest of the others. Of each its last
    tokens are kept: with worked examples or a chat template all prompts of a task begin alike.
    """
    drawn = random.Random(seed).sample(list(prompts), len(prompts))
    drawn.sort(key=lambda ids: -min(len(ids), length))  # stable: else as drawn
    chosen = drawn[: max(BATCH_SIZES)]
    T = min(length, *map(len, chosen))
    return [list(ids[-T:]) for ids in chosen]


def machine(device: torch.device) -> str:
    """Say in words on what a model on this device runs: accelerator, system, processor, cores."""
    listed = Path("/proc/cpuinfo")  # Python itself doesn't know the processor's name on Linux
    text = listed.read_text(encoding="utf-8") if listed.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    processor = " ".join(named[1].split()) if named else platform.processor()
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    system = f"{platform.system()} {platform.machine()}"
    return ", ".join(filter(None, (accelerator, system, processor, f"{cores} cores")))
