"""Measures the time that base and the routed model take to read prompts and to decode.

The models share their weights. They take turns, in a new order each round, so that other work on
the machine affects both alike. `latency.json` has the seconds of every round; reports make medians
and ratios of them.

The measurement has a time limit. Small batches come first, and what doesn't fit is left out.

Axes: B rows, T tokens, L layers.
"""

import copy
import math
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from drllm.config import EvaluateConfig
from drllm.cost import mean_executions
from drllm.model.layers import find_layers
from drllm.model.load import BaseModel
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.places import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import Policy, RouterPolicy
from drllm.paths import Decisions, full_decisions
from drllm.records.codec import delete_file, sha256, write_json
from drllm.records.latency import DECODE, PREFILL, Latency, Timing, Timings
from drllm.records.manifest import new_manifest
from drllm.records.results import BASE, LATENCY_FILE, ROUTED
from drllm.work.listener import Listener

Clock: TypeAlias = Callable[[], float]  # tells the time in seconds
Phase: TypeAlias = Literal["prefill", "decode"]
Rounds: TypeAlias = list[dict[str, float]]  # for each round, name of a system → seconds
Prepare: TypeAlias = Callable[[], Callable[[], Any]]
"""Does the work that isn't timed, such as making an empty cache, and returns the call to time."""
PreparePhase: TypeAlias = Callable[[Any, Tensor], Prepare]
"""Takes a model and prompts `[B, T]`, and returns the function that prepares each timing."""

BATCH_SIZES = (1, 4, 16)
DEFAULT_ROUNDS = 8
"""The fewest rounds that can show a difference if both phases of all batch sizes are timed."""
DESCRIPTIONS = {BASE: "the untouched model", ROUTED: "the routers decide"}


@dataclass(frozen=True)
class _Workload:
    """What the systems are timed at: a phase with a batch of prompts.

    Attributes:
        phase: "prefill" or "decode".
        ids: The prompts `[B, T]`.
        prepare: Prepares a model's timings of this phase.
        num_tokens: How many tokens of each row are timed.
    """

    phase: Phase
    ids: Tensor
    prepare: PreparePhase
    num_tokens: int


@torch.no_grad()
def measure(
    model: Any,
    systems: Mapping[str, Policy | None],
    prompts: Sequence[Sequence[int]],
    rounds: int,
    num_read: int,
    num_written: int,
    max_seconds: float = math.inf,
    *,
    bypass: Bypass | None = None,
) -> Timings:
    """Time systems while they read prompts and while they decode, for each batch size.

    All prompts are cut to the same length, so that no padding is timed. The length is `num_read`,
    or that of the shortest prompt if this is smaller. If there are fewer prompts than rows in a
    batch, prompts are repeated.

    Args:
        model: The base model.
        systems: Name of a system → its policy; None for base.
        prompts: Tokens of the prompts.
        rounds: How often each system is timed. One more round comes first and isn't counted.
        num_read: Maximum number of tokens read of each prompt.
        num_written: Number of tokens decoded in one timing.
        max_seconds: Maximum time of the whole measurement. The smallest batch comes first. A phase
            with a batch that doesn't fit into the time is left out. If even the first doesn't fit,
            it has fewer rounds, but at least one.
        bypass: What runs in place of a skipped layer; None for nothing.

    Raises:
        RoutingError: The model is routed already.
    """
    deadline = time.monotonic() + max_seconds
    models = {name: copy_sharing_weights(model) for name in systems}
    routed: dict[str, RoutedModel] = {}
    for name, policy in systems.items():
        if policy is not None:
            routed[name] = RoutedModel(models[name], policy=policy, bypass=bypass)
    full = full_decisions(len(find_layers(model)[1]))
    clock = device_clock(model.device)
    T = min(num_read, *map(len, prompts))
    timings: list[Timing] = []
    seconds_needed: dict[Phase, float] = {}  # for the batch size before
    for workload in _list_workloads(prompts, T, num_written, model.device):
        started = time.monotonic()
        # A larger batch takes at least as long as the smaller one before it.
        if timings and started + seconds_needed.get(workload.phase, 0.0) >= deadline:
            break
        seconds_by_round = _time_workload(
            workload, models, rounds, clock, deadline, is_first=not timings
        )
        if not seconds_by_round:
            break
        seconds_needed[workload.phase] = time.monotonic() - started
        for name in systems:
            routes = [full]
            if name in routed:
                routes = routed[name].last_route.tolist()  # [B, L]
            seconds = [seconds_by_system[name] for seconds_by_system in seconds_by_round]
            timings.append(_make_timing(workload, name, routes, seconds))
    return Timings(prompt_tokens=T, new_tokens=num_written, timings=tuple(timings))


def _list_workloads(
    prompts: Sequence[Sequence[int]], num_read: int, num_written: int, device: torch.device
) -> Iterator[_Workload]:
    """Yield both phases of each batch size, the smallest batch first.

    The first `num_read` tokens of each prompt are read.
    """
    prepare_writing = partial(prepare_decoding, num_tokens=num_written)
    for batch_size in BATCH_SIZES:
        rows = [list(prompts[row % len(prompts)])[:num_read] for row in range(batch_size)]
        ids = torch.tensor(rows, device=device)  # [B, T]
        yield _Workload("prefill", ids, prepare_reading, ids.shape[1])
        yield _Workload("decode", ids, prepare_writing, num_written)


def _time_workload(
    workload: _Workload,
    models: Mapping[str, Any],
    num_rounds: int,
    clock: Clock,
    deadline: float,
    *,
    is_first: bool,
) -> Rounds:
    """Time all systems at a workload; return no rounds if they don't fit into the time.

    The first workload has as many rounds as fit, and at least one.
    """
    calls: dict[str, Prepare] = {}
    for name, model in models.items():
        calls[name] = workload.prepare(model, workload.ids)
    started = time.monotonic()
    time_in_turns(calls, 1, clock)  # not counted
    now = time.monotonic()
    seconds_a_round = now - started
    if not is_first and now + num_rounds * seconds_a_round > deadline:
        return []
    rounds = time_in_turns(calls, num_rounds, clock, deadline)
    if not is_first and len(rounds) < num_rounds:
        return []
    return rounds


def _make_timing(
    workload: _Workload, system: str, routes: Sequence[Decisions], seconds: Sequence[float]
) -> Timing:
    """Make the record of a system's times; `routes` are those of the last pass."""
    batch_size = len(workload.ids)
    return Timing(
        system=system,
        phase=workload.phase,
        batch_size=batch_size,
        num_tokens=batch_size * workload.num_tokens,
        executions=mean_executions(routes),
        seconds=tuple(seconds),
    )


def time_in_turns(
    calls: Mapping[str, Prepare], num_rounds: int, clock: Clock, deadline: float = math.inf
) -> Rounds:
    """Time the call of each system in every round, in a new order each round.

    In a fixed order a system would always follow the same system, whose weights and code may still
    be in the processor's caches.

    Args:
        calls: Name of a system → the function that prepares its call.
        num_rounds: How often each call is prepared and timed.
        clock: Tells the time.
        deadline: The moment of `time.monotonic()` after which no further round begins. The first
            round always takes place.
    """
    rounds: Rounds = []
    for number in range(num_rounds):
        if rounds and time.monotonic() >= deadline:
            break
        seconds = {}
        for name in random.Random(number).sample(list(calls), len(calls)):
            call = calls[name]()
            started = clock()
            call()
            seconds[name] = clock() - started
        rounds.append(seconds)
    return rounds


def copy_sharing_weights(model: Any) -> Any:
    """Return a copy of a model that shares its weights."""
    shared = {}  # deepcopy takes these tensors as copied already
    for tensor in [*model.parameters(), *model.buffers()]:
        shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)


def empty_cache(model: Any) -> dict[str, Cache]:
    """Return an empty cache as a keyword argument of the model."""
    return {cache_argument(model): DynamicCache(config=model.config)}


def prepare_reading(model: Any, ids: Tensor) -> Prepare:
    """Prepare to read prompts `[B, T]` into a new cache."""
    return lambda: partial(model, ids, logits_to_keep=1, **empty_cache(model))


def prepare_decoding(model: Any, ids: Tensor, num_tokens: int = 1) -> Prepare:
    """Prepare to decode tokens one by one after prompts `[B, T]`.

    The prompts are read once, here. Each timed call has its own copy of the cache. Every decoded
    token is the prompt's first token, since the time doesn't depend on which tokens are decoded.
    """
    cache = empty_cache(model)
    model(ids, logits_to_keep=1, **cache)

    def decode(cache_copy: Mapping[str, Cache]) -> None:
        for _ in range(num_tokens):
            model(ids[:, :1], logits_to_keep=1, **cache_copy)

    return lambda: partial(decode, copy.deepcopy(cache))


def device_clock(device: torch.device) -> Clock:
    """Return a clock that waits until the device has finished its work, and then tells the time."""

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
    listener: Listener,
) -> None:
    """Time the base model and the routed model, and write `latency.json`.

    Without `latency` or without routers, nothing is measured. The file of an earlier evaluation is
    removed then, so that no result is shown with the times of another evaluation.

    Args:
        base: The base model, which must not be routed yet.
        folder: The routers' folder; None without routers.
        routers: The routers; None without routers.
        prompts: Tokens of the prompts, from which the timed prompts are drawn.
        config: The settings.
        output: The folder of the evaluation.
        listener: Shows how long the measurement takes at most, and what doesn't fit into the time.
    """
    path = output / LATENCY_FILE
    if not config.latency or folder is None or routers is None:
        delete_file(path)
        return
    chosen_prompts = choose_prompts(prompts, config.latency_read, config.seed)
    with listener.busy(f"measuring time, at most {config.latency_seconds:g} s"):
        measured = measure(
            base.model,
            {BASE: None, ROUTED: RouterPolicy(routers)},
            chosen_prompts,
            config.latency_rounds or DEFAULT_ROUNDS,
            config.latency_read,
            config.latency_written,
            config.latency_seconds,
            bypass=base.bypass,
        )
    _note_missing(measured, config, listener)
    weights = folder / WEIGHTS_FILE
    latency = Latency(
        **new_manifest("latency", model=base.identity, config=config.to_dict(), inputs=[weights]),
        runtime={**base.runtime, "num_threads": torch.get_num_threads()},
        machine=describe_machine(base.model.device),
        routers=str(folder),
        routers_sha256=sha256(weights),
        num_prompts=len(chosen_prompts),
        systems=DESCRIPTIONS,
        measured=measured,
    )
    write_json(path, latency)


def _note_missing(measured: Timings, config: EvaluateConfig, listener: Listener) -> None:
    """Tell the user which phases and batch sizes didn't fit into the time."""
    places = {timing.place for timing in measured.timings}
    missing = []
    for batch_size in BATCH_SIZES:
        for phase, verb in ((PREFILL, "reading"), (DECODE, "decoding")):
            if (phase, batch_size) not in places:
                missing.append(f"{verb} {batch_size}")
    if missing:
        listener.note(
            f"not timed within {config.latency_seconds:g} s: {', '.join(missing)} (rows of a "
            f"batch); --latency-seconds allows more"
        )


def choose_prompts(prompts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
    """Draw the prompts to time: a prompt for each row of the largest batch, if there are enough.

    Prompts of at least `length` tokens come first, then the longest of the shorter prompts. All are
    cut to `length` or to the shortest drawn prompt. The last tokens of a prompt are kept, because
    with worked examples or a chat template all prompts of a task begin alike.
    """
    shuffled = random.Random(seed).sample(list(prompts), len(prompts))
    shuffled.sort(key=lambda ids: -min(len(ids), length))  # equal lengths stay shuffled
    chosen = shuffled[: max(BATCH_SIZES)]
    T = min(length, *map(len, chosen))
    return [list(ids[-T:]) for ids in chosen]


def describe_machine(device: torch.device) -> str:
    """Describe the machine in words: accelerator, operating system, processor, cores."""
    parts = []
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    parts.append(f"{platform.system()} {platform.machine()}")
    parts.append(_read_processor_name())
    parts.append(f"{_count_cores()} cores")
    return ", ".join(part for part in parts if part)


def _read_processor_name() -> str:
    """Return the name of the processor; an empty text if it is unknown."""
    file = Path("/proc/cpuinfo")  # on Linux `platform.processor` doesn't know the name
    if file.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", file.read_text("utf-8"), re.MULTILINE)
        if match is not None:
            return " ".join(match[1].split())
    return platform.processor()


def _count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # only on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
