"""Measured time: reading prompts and decoding, systems taking turns.

Owns the clock, the turns and what is timed. Leaves what an evaluation times and writes to
`measured_cost`. Everything here is a measurement of this machine; nothing is derived from counts.
Models under comparison share their weights and are timed in interleaved rounds, each round in
another order, so that whatever else the machine does hits all of them alike; reported are medians,
and ratios of one round.

Axes: B rows, T tokens, L layers.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from drllm.cost import mean_executions
from drllm.errors import ConfigError
from drllm.models.base.layers import find_layers
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import FullPolicy, Policy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel

Clock: TypeAlias = Callable[[], float]
Rounds: TypeAlias = list[dict[str, float]]
"""Seconds by what was timed, for every round."""

PREFILL, DECODE = "prefill", "decode"
BASE, ROUTED = "base", "routed"
ATTACHED, ROUTERS = "attached", "routers that execute"
ALWAYS = 1e3
"""Logits that no router's own answer comes near to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is timed; small enough for a model of 135 million parameters on two cores.

    Attributes:
        batch_sizes: Each from 1.
        prompt_tokens: Most tokens of a prompt.
        new_tokens: Decoded in one timing.
        rounds: Turns of every system.

    Raises:
        ConfigError: A size below 1.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: int = 16
    new_tokens: int = 1
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give a value of at least 1")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(
                f"batch_sizes is {list(self.batch_sizes)}; give one or more values of at least 1"
            )


@dataclass(frozen=True, slots=True)
class Timing:
    """One system doing one thing, over all rounds.

    Attributes:
        system: Its name.
        phase: `prefill` or `decode`.
        batch_size: B.
        num_tokens: Tokens read in one timing, over all rows.
        executions: Mean layer executions a forward pass over the rows, by the routes they took.
        seconds: Of each round.
    """

    system: str
    phase: str
    batch_size: int
    num_tokens: int
    executions: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return self.num_tokens / self.median


@dataclass(frozen=True, slots=True)
class Spread:
    """What was compared round by round: the rounds' median, lowest and highest."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Sum up one value a round, at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Latency:
    """What was measured, and on what.

    Attributes:
        timings: One for each system, phase and batch size.
        prompt_tokens: T of every prompt.
        new_tokens: Decoded in one timing.
        device: Type of the device.
        dtype: Of the weights.
        num_threads: Of torch, on a CPU.
    """

    timings: tuple[Timing, ...]
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str
    num_threads: int

    def of(self, system: str, phase: str, batch_size: int) -> Timing:
        """Return one timing.

        Raises:
            KeyError: It wasn't measured.
        """
        wanted = (system, phase, batch_size)
        for timing in self.timings:
            if (timing.system, timing.phase, timing.batch_size) == wanted:
                return timing
        raise KeyError(f"no timing of {wanted}")

    def ratio(self, above: str, below: str, phase: str, batch_size: int) -> Spread:
        """Return how many times as long one system took as another in the same round."""
        return Spread.of([a / b for a, b in self._pairs(above, below, phase, batch_size)])

    def router_seconds(self, batch_size: int) -> Spread:
        """Return what the routers take while a batch is read: differences within a round.

        Between routers whose every answer is to execute and a routed model without routers. Noise
        can make it negative. In decode routers don't run.
        """
        return Spread.of([a - b for a, b in self._pairs(ROUTERS, ATTACHED, PREFILL, batch_size)])

    def _pairs(
        self, first: str, second: str, phase: str, batch_size: int
    ) -> list[tuple[float, float]]:
        ours, theirs = (self.of(system, phase, batch_size) for system in (first, second))
        return list(zip(ours.seconds, theirs.seconds, strict=True))


def with_router_time(
    routers: RouterStack, routed: Policy | None = None
) -> dict[str, Policy | None]:
    """Return the systems of the usual comparison, the routers' own time told apart.

    Args:
        routers: Of the model.
        routed: The policy that is in use, with its dial; None for the routers alone.

    Returns:
        For `measure`: the untouched model, the routed one, one that is routed without routers, and
        one whose routers run but always say to execute.
    """
    return {
        BASE: None,
        ROUTED: routed or RouterPolicy(routers),
        ATTACHED: FullPolicy(),
        ROUTERS: RouterPolicy(that_execute(routers)),
    }


def that_execute(routers: RouterStack) -> RouterStack:
    """Return a copy of routers that compute all they do, and whose every answer is to execute."""
    copied = copy.deepcopy(routers)
    with torch.no_grad():
        copied.decision_bias[:, 1] += ALWAYS
    return copied


@torch.no_grad()
def measure(
    model: Any,
    systems: Mapping[str, Policy | None],
    prompts: Sequence[Sequence[int]],
    sizes: Sizes | None = None,
    clock: Clock | None = None,
) -> Latency:
    """Time systems on one model while they read prompts and while they decode.

    Prompts are real ones, since a router's route depends on them. All are cut to one length, the
    shortest one's or `prompt_tokens`, so that no padding is timed; a batch of more rows than there
    are prompts holds some several times.

    Args:
        model: The untouched model; copies that share its weights are timed.
        systems: By name, the policy that decides; None for the model as it is.
        prompts: Token ids.
        sizes: How much is timed.
        clock: Gives the time in seconds; None for a clock that waits for the device.

    Returns:
        Seconds of every round. One turn of each, which isn't measured, comes first.

    Raises:
        ConfigError: No prompts, or one without tokens.
        RoutingError: A model that is routed already.

    Example:
        >>> found = measure(model, with_router_time(routers), prompts)  # doctest: +SKIP
        >>> found.ratio("routed", "base", "prefill", 16)  # doctest: +SKIP
        Spread(median=0.91, lowest=0.9, highest=0.93)
    """
    sizes = sizes or Sizes()
    if not prompts or not min(map(len, prompts)):
        raise ConfigError("time is measured on prompts; give at least one, each with tokens")
    device = model.device
    T = min(sizes.prompt_tokens, *map(len, prompts))
    if clock is None:
        clock = device_clock(device)
    models, attached = {}, {}
    for name, policy in systems.items():
        models[name] = twin(model)
        if policy is not None:
            attached[name] = RoutedModel(models[name], policy=policy)
    num_layers = len(find_layers(model)[1])
    timings = []
    for size in sizes.batch_sizes:
        rows = [list(prompts[row % len(prompts)])[:T] for row in range(size)]
        ids = torch.tensor(rows, device=device)  # [B, T]
        ways = {
            PREFILL: {name: reading(each, ids) for name, each in models.items()},
            DECODE: {name: decoding(each, ids, sizes.new_tokens) for name, each in models.items()},
        }
        take_turns(ways[DECODE], 1, clock)  # forgotten; prompts were read by `decoding` already
        executions = dict.fromkeys(systems, float(num_layers))
        for name, routed in attached.items():
            executions[name] = mean_executions(routed.last_route.tolist())  # of [B, L]
        for phase, calls in ways.items():
            rounds = take_turns(calls, sizes.rounds, clock)
            num_tokens = size * (T if phase == PREFILL else sizes.new_tokens)
            for name in calls:
                seconds = tuple(times[name] for times in rounds)
                timings.append(Timing(name, phase, size, num_tokens, executions[name], seconds))
    dtype = str(model.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return Latency(tuple(timings), T, sizes.new_tokens, device.type, dtype, threads)


# --- what is timed -----------------------------------------------------------------------------


def take_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Clock) -> Rounds:
    """Time calls in turn, every round in another order.

    In a fixed order one call would always follow the same other one, and find its weights and code
    in the processor's caches, or not.
    """
    rounds = []
    for number in range(repeats):
        times = {}
        for name in random.Random(number).sample(list(calls), len(calls)):
            started = clock()
            calls[name]()
            times[name] = clock() - started
        rounds.append(times)
    return rounds


def twin(model: Any) -> Any:
    """Return a copy of a model that shares its weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def empty_cache(model: Any) -> dict[str, Cache]:
    """Return a cache, by the name under which the model takes it."""
    return {cache_argument(model): DynamicCache(config=model.config)}


def reading(model: Any, ids: Tensor) -> Callable[[], Any]:
    """Return a call that reads prompts into a new cache.

    Args:
        model: Routed or not.
        ids: `[B, T]` tokens.
    """
    return lambda: model(ids, logits_to_keep=1, **empty_cache(model))


def decoding(model: Any, ids: Tensor, num_tokens: int = 1) -> Callable[[], Any]:
    """Return a call that reads more tokens, one a pass, behind prompts that were read before.

    What is read stays in the cache, so the next call finds it longer. Which tokens they are
    doesn't change the time, as decisions hold since the prompt.

    Args:
        model: Routed or not.
        ids: `[B, T]` tokens of the prompts, read once here.
        num_tokens: How many a call.
    """
    cache = empty_cache(model)
    model(ids, logits_to_keep=1, **cache)

    def decode() -> None:
        for _ in range(num_tokens):
            model(ids[:, :1], logits_to_keep=1, **cache)

    return decode


def device_clock(device: torch.device) -> Clock:
    """Return a clock that tells the time when the device has done all that it was asked to do."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now
