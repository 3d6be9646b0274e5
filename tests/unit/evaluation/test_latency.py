"""What is timed is what is said; no times are checked."""

from __future__ import annotations

import itertools

import pytest
import torch

from drllm.errors import ConfigError, RoutingError
from drllm.evaluation.latency import (
    Latency,
    Sizes,
    Spread,
    Timing,
    decoding,
    measure,
    reading,
    take_turns,
    that_execute,
    twin,
    with_router_time,
)
from drllm.models.routers.stack import RouterConfig, RouterStack
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import FixedPolicy, FullPolicy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26]]
SIZES = Sizes(batch_sizes=(1, 4), prompt_tokens=8, new_tokens=2, rounds=3)


@pytest.fixture
def routers():
    config = RouterConfig(num_layers=6, hidden_size=32)
    return RouterStack(config, torch.Generator().manual_seed(0))


def test_systems_take_turns_in_another_order_every_round():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = iter(range(100))
    rounds = take_turns(calls, 8, lambda: float(next(seconds)))
    orders = ["".join(called[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert rounds == [dict.fromkeys("abc", 1.0)] * 8


def test_every_system_phase_and_batch_size_has_its_timing(tiny_llama, routers):
    ticks = itertools.count()
    found = measure(
        tiny_llama(), with_router_time(routers), PROMPTS, SIZES, lambda: float(next(ticks))
    )
    names = ("base", "routed", "attached", "routers that execute")
    assert len(found.timings) == len(names) * 2 * 2
    for name, size in itertools.product(names, (1, 4)):
        prefill, decode = (found.of(name, phase, size) for phase in ("prefill", "decode"))
        assert prefill.num_tokens == size * 5  # the shortest prompt's length
        assert decode.num_tokens == size * 2
        assert prefill.seconds == decode.seconds == (1.0, 1.0, 1.0)
    assert found.prompt_tokens == 5
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.router_seconds(4) == Spread(median=0.0, lowest=0.0, highest=0.0)
    with pytest.raises(KeyError, match="no timing of"):
        found.of("base", "prefill", 16)


def test_real_time_passes(tiny_llama, routers):
    found = measure(tiny_llama(), with_router_time(routers), PROMPTS, SIZES)
    assert all(seconds > 0 for timing in found.timings for seconds in timing.seconds)


def test_long_prompts_are_cut(tiny_llama):
    sizes = Sizes(batch_sizes=(2,), prompt_tokens=3, new_tokens=1, rounds=1)
    found = measure(tiny_llama(), {"base": None}, PROMPTS, sizes)
    assert found.of("base", "prefill", 2).num_tokens == 6


def test_the_model_is_left_untouched_and_its_weights_are_shared(tiny_llama, routers):
    model = tiny_llama()
    before = model(torch.tensor([PROMPTS[0]])).logits
    measure(model, with_router_time(routers), PROMPTS, SIZES)
    assert torch.equal(before, model(torch.tensor([PROMPTS[0]])).logits)
    RoutedModel(model)  # would be refused if it were routed
    weights = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in twin(model).parameters()} == weights


def test_systems_run_the_plans_that_they_stand_for(tiny_llama, monkeypatch):
    made = {}
    original = RoutedModel.__init__

    def record(self, model, *args, policy=None, **options):
        original(self, model, *args, policy=policy, **options)
        made[policy] = self

    monkeypatch.setattr(RoutedModel, "__init__", record)
    plan = FixedPolicy([1, 0, 2, 1, 1, 1], 6)
    systems = {"base": None, "static": plan, "full": (full := FullPolicy())}
    found = measure(tiny_llama(), systems, PROMPTS, SIZES)
    for phase in ("prefill", "decode"):
        assert [found.of(name, phase, 4).executions for name in systems] == [6.0, 6.0, 6.0]
    assert made[plan].last_route.tolist() == [[1, 0, 2, 1, 1, 1]] * 4
    assert made[full].last_route.tolist() == [[1] * 6] * 4


def test_a_routed_model_is_refused(tiny_llama, routers):
    model = tiny_llama()
    RoutedModel(model)
    with pytest.raises(RoutingError, match="routed already"):
        measure(model, with_router_time(routers), PROMPTS, SIZES)


def test_routers_that_execute_do_so_and_compute_all_that_they_did(tiny_llama, routers):
    routed = RoutedModel(tiny_llama(), policy=RouterPolicy(that_execute(routers)))
    routed.model(torch.tensor(PROMPTS[0])[None])
    assert routed.last_route.tolist() == [[1] * 6]
    assert torch.equal(routers.decision_bias, torch.zeros(6, 3))  # the originals stay


def test_reading_starts_anew_and_decoding_goes_on(tiny_llama):
    model = tiny_llama()
    lengths = []

    def note(_layer, args, kwargs):
        cache = kwargs[cache_argument(model)]
        lengths.append((args[0].shape[1], int(cache.get_seq_length())))

    model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.tensor([PROMPTS[1]])
    read = reading(model, ids)
    read()
    read()
    assert lengths == [(5, 0), (5, 0)]
    lengths.clear()
    decode = decoding(model, ids, 2)
    decode()
    decode()
    assert lengths == [(5, 0), (1, 5), (1, 6), (1, 7), (1, 8)]


def test_ratios_and_differences_are_of_one_round():
    def timing(system, *seconds):
        return Timing(system, "prefill", 1, 10, 6.0, seconds)

    found = Latency(
        (timing("attached", 1.0, 2.0, 4.0), timing("routers that execute", 1.5, 3.0, 4.4)),
        prompt_tokens=10,
        new_tokens=1,
        device="cpu",
        dtype="float32",
        num_threads=1,
    )
    ratio = found.ratio("routers that execute", "attached", "prefill", 1)
    assert ratio == Spread(median=1.5, lowest=4.4 / 4.0, highest=1.5)
    assert found.router_seconds(1) == Spread(median=0.5, lowest=4.4 - 4.0, highest=1.0)
    assert found.of("attached", "prefill", 1).median == 2.0
    assert found.of("attached", "prefill", 1).tokens_per_second == 5.0


@pytest.mark.parametrize("prompts", [[], [[5, 6], []]])
def test_time_without_prompts_is_refused(tiny_llama, prompts):
    with pytest.raises(ConfigError, match="each with tokens"):
        measure(tiny_llama(), {"base": None}, prompts, SIZES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"prompt_tokens": -1}, "prompt_tokens is -1"),
        ({"batch_sizes": ()}, r"batch_sizes is \[\]"),
        ({"batch_sizes": (1, 0)}, r"batch_sizes is \[1, 0\]"),
    ],
)
def test_sizes_below_one_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sizes(**values)
