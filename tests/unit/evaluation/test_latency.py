"""What is timed is what is said; no times are checked."""

import itertools
import statistics
from functools import partial

import pytest
import torch

from drllm.config import EvaluateConfig
from drllm.errors import RoutingError
from drllm.evaluation import latency
from drllm.evaluation.latency import (
    BATCH_SIZES,
    choose_prompts,
    copy_sharing_weights,
    describe_machine,
    measure,
    prepare_decoding,
    prepare_reading,
    time_in_turns,
    write_latency,
)
from drllm.model.identity import fingerprint
from drllm.model.load import BaseModel
from drllm.models.check import make_tiny
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import save_routers
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import FixedPolicy, RouterPolicy
from drllm.records.codec import sha256
from drllm.records.latency import read_latency
from drllm.work.listener import Listener
from slow_way import TORCH, tiny_routers

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26]]
PHASES = ("prefill", "decode")


class Recorder(Listener):
    """Keeps what is said before the time is measured, and the notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def busy(self, what: str):
        self.lines.append(what)
        return super().busy(what)


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer):
    return BaseModel(model=tiny_llama(), tokenizer=tiny_tokenizer, name="tiny", revision=None)


@pytest.fixture(scope="module")
def routers(base):
    return tiny_routers(
        3, num_windows=8, router_width=128, base_fingerprint=fingerprint(base.model)
    )


@pytest.fixture(scope="module")
def systems(routers):
    return {"base": None, "routed": RouterPolicy(routers)}


def test_systems_take_turns_in_another_order_every_round():
    called = []
    seconds = iter(range(100))

    def prepare(name):
        next(seconds)  # isn't timed
        return partial(called.append, name)

    calls = {name: partial(prepare, name) for name in "abc"}
    rounds = time_in_turns(calls, 8, lambda: float(next(seconds)))
    orders = ["".join(called[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert rounds == [dict.fromkeys("abc", 1.0)] * 8


def test_every_system_phase_and_batch_size_has_its_timing(base, systems, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(latency, "device_clock", lambda _: lambda: 0.5 * next(ticks))
    found = measure(base.model, systems, PROMPTS, 2, 16, 1)
    timed = [(each.phase, each.batch_size, each.system) for each in found.timings]
    assert sorted(timed) == sorted(itertools.product(PHASES, BATCH_SIZES, systems))
    for each in found.timings:
        assert each.seconds == (0.5, 0.5)  # the shortest prompt has five tokens
        assert each.num_tokens == each.batch_size * (5 if each.phase == "prefill" else 1)
    assert (found.prompt_tokens, found.new_tokens) == (5, 1)
    with pytest.raises(KeyError, match="base"):
        found.find_timing("base", "prefill", 2)


@pytest.mark.parametrize(
    ("seconds", "places", "num_rounds"),
    [
        (100, [(1, "prefill"), (1, "decode"), (4, "prefill"), (4, "decode")], 4),
        (40, [(1, "prefill"), (1, "decode")], 4),
        (5, [(1, "prefill")], 2),
    ],
)
def test_what_does_not_fit_into_the_time_is_left_out_and_larger_batches_first(
    base, systems, monkeypatch, seconds, places, num_rounds
):
    now = 0.0

    def take_time(model, ids, **_):
        def call():
            nonlocal now
            now += len(ids)  # a second for each row

        return lambda: call

    monkeypatch.setattr(latency, "prepare_reading", take_time)
    monkeypatch.setattr(latency, "prepare_decoding", take_time)
    monkeypatch.setattr(latency.time, "monotonic", lambda: now)
    monkeypatch.setattr(latency, "device_clock", lambda _: lambda: now)
    monkeypatch.setattr(latency, "copy_sharing_weights", lambda _: base.model)
    found = measure(base.model, {"base": None, "other": None}, PROMPTS, 4, 16, 1, seconds)
    assert [(t.batch_size, t.phase) for t in found.timings if t.system == "base"] == places
    assert found.num_rounds == num_rounds
    assert now < seconds + 2 * 4  # ends within a round


def test_the_model_is_left_untouched_and_its_weights_are_shared(tiny_llama, systems):
    model = tiny_llama()
    before = model(torch.tensor([PROMPTS[0]])).logits
    measure(model, systems, PROMPTS, 1, 16, 1)
    assert torch.equal(before, model(torch.tensor([PROMPTS[0]])).logits)
    weights = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in copy_sharing_weights(model).parameters()} == weights
    RoutedModel(model)  # would be refused if it were routed
    with pytest.raises(RoutingError, match="routed already"):
        measure(model, systems, PROMPTS, 1, 16, 1)


def test_executions_are_those_of_the_plans_and_routes_that_were_timed(base, routers, systems):
    systems = {**systems, "static": FixedPolicy([1, 0, 2, 1, 2, 1], 6)}
    found = measure(base.model, systems, PROMPTS, 1, 16, 1)
    routed = RoutedModel(base.model, routers)
    costs = []
    for prompt in PROMPTS:  # one by one
        routed.model(torch.tensor([prompt[:5]]))
        costs.append(int(routed.last_route.sum()))
    routed.detach()
    assert len(set(costs)) > 1, "the prompts must take several routes"
    for phase, size in itertools.product(PHASES, BATCH_SIZES):
        rows = [costs[row % 3] for row in range(size)]
        assert found.find_timing("routed", phase, size).executions == statistics.mean(rows)
        assert found.find_timing("static", phase, size).executions == 7.0
        assert found.find_timing("base", phase, size).executions == 6.0


def test_reading_starts_anew_and_decoding_starts_behind_the_prompt(tiny_llama):
    model = tiny_llama()
    lengths = []

    def note(_layer, args, kwargs):
        cache = kwargs[cache_argument(model)]
        lengths.append((args[0].shape[1], int(cache.get_seq_length())))

    model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.tensor([PROMPTS[1]])
    read = prepare_reading(model, ids)
    read()()
    read()()
    assert lengths == [(5, 0), (5, 0)]
    lengths.clear()
    decode = prepare_decoding(model, ids, 2)
    decode()()
    decode()()
    assert lengths == [(5, 0), (1, 5), (1, 6), (1, 5), (1, 6)]


def test_long_prompts_are_cut(base):
    found = measure(base.model, {"base": None}, [[5] * 20, [6] * 30], 1, 16, 1)
    assert found.find_timing("base", "prefill", 4).num_tokens == 4 * 16


def test_the_file_says_what_was_timed_and_on_what_and_goes_where_nothing_is_measured(
    base, routers, tmp_path
):
    save_routers(routers, tmp_path / "routers")
    weights = tmp_path / "routers" / "routers.safetensors"

    listener = Recorder()

    def write(config):
        write_latency(base, tmp_path / "routers", routers, PROMPTS, config, tmp_path, listener)

    write(EvaluateConfig(latency=True, latency_rounds=2, latency_read=8, latency_written=2))
    found = read_latency(tmp_path)
    assert found.model == base.identity
    assert (found.routers, found.routers_sha256) == (str(tmp_path / "routers"), sha256(weights))
    assert found.config["latency_rounds"] == found.measured.num_rounds == 2
    assert found.runtime == {**base.runtime, "num_threads": torch.get_num_threads()}
    assert found.num_prompts == 3
    assert listener.lines == ["measuring time, at most 20 s"]
    write(EvaluateConfig(latency_seconds=1e-9, latency_rounds=1, latency_written=2))
    assert "not timed within 1e-09 s: decoding 1, reading 4" in listener.lines[-1]
    assert len(read_latency(tmp_path).measured.judge()) == 1
    write(EvaluateConfig())
    assert not (tmp_path / "latency.json").exists()


def test_prompts_that_are_long_enough_are_drawn_first_and_keep_their_last_tokens():
    long = [[*range(100, 117), number] for number in range(20)]
    short = [[number, 1] for number in range(9)]
    chosen = choose_prompts([*short, *long], 16, seed=0)
    assert len(chosen) == 16
    assert len(set(map(tuple, chosen))) == 16
    assert all(ids in [each[-16:] for each in long] for ids in chosen)
    assert choose_prompts([*short, *long], 16, seed=0) == chosen
    assert choose_prompts([*short, *long], 16, seed=1) != chosen


def test_of_short_prompts_the_longest_are_drawn_and_of_few_all_cut_to_the_shortest_of_them():
    prompts = [list(range(10 - length, 10)) for length in (3, 9, 5, 7)] * 4 + [[0, 0]] * 4
    assert choose_prompts(prompts, 16, seed=0) == [[7, 8, 9]] * 16
    assert sorted(choose_prompts(PROMPTS, 16, seed=0)) == [prompt[-5:] for prompt in PROMPTS]


def test_a_machine_is_named_with_its_cores_and_its_accelerator(monkeypatch):
    words = describe_machine(torch.device("cpu"))
    assert words.endswith(" cores")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert describe_machine(torch.device("cuda:1")) == f"Card 1, {words}"


@pytest.mark.skipif(
    TORCH < (2, 5),
    reason="transformers 4.56 makes no mask of a sliding window for two rows with this torch",
)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_models_with_sliding_windows_are_timed_beyond_their_window(family):
    model = make_tiny(family)
    window = model.config.get_text_config().sliding_window
    found = measure(model, {"base": None}, [[5] * 3 * window], 1, 2 * window, window)
    assert found.find_timing("base", "decode", 1).num_tokens == window
