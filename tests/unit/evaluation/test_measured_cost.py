"""What an evaluation writes of measured time; no times are checked, only what is made of them."""

from __future__ import annotations

import itertools
import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from drllm.config import EvaluateConfig
from drllm.evaluation.latency import Latency, Sizes, Timing
from drllm.evaluation.measured_cost import choose_prompts, contents, machine, write_measured
from drllm.evaluation.prompt_cost import PromptCost
from drllm.models.base.identity import fingerprint
from drllm.models.base.load import BaseModel
from drllm.models.routers.checkpoint import load_routers, save_routers
from drllm.models.routers.stack import RouterConfig, RouterStack
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import sha256
from drllm.reporting.measured import read_measured

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26]]
TEXTS = ["".join(map(chr, prompt)) for prompt in PROMPTS]
SYSTEMS = ("base", "routed", "attached", "routers that execute")


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer):
    return BaseModel(model=tiny_llama(), tokenizer=tiny_tokenizer, name="tiny", revision=None)


@pytest.fixture(scope="module")
def routers_dir(base, tmp_path_factory):
    config = RouterConfig(
        num_layers=6,
        hidden_size=32,
        base_model="tiny",
        base_fingerprint=fingerprint(base.model),
    )
    stack = RouterStack(config, torch.Generator().manual_seed(3))
    with torch.no_grad():
        stack.decision_weight.mul_(3)
    folder = tmp_path_factory.mktemp("routers")
    save_routers(stack, folder)
    return folder


def evaluated(prompts):
    """Return as much of an evaluated task as is looked at."""
    return SimpleNamespace(
        asked=SimpleNamespace(prompts=lambda: list(prompts)),
        cost=PromptCost(None, [len(prompt) for prompt in prompts]),
    )


def encode(text):
    return [ord(letter) for letter in text]


def write(base, routers_dir, folder, rounds, clock=None):
    config = EvaluateConfig(latency_rounds=rounds)
    return write_measured(base, routers_dir, [evaluated(TEXTS)], encode, config, folder, clock)


def test_the_file_holds_every_round_of_every_system_and_what_they_ran_on(
    base, routers_dir, tmp_path
):
    ticks = itertools.count()
    path = write(base, routers_dir, tmp_path, 2, lambda: 0.5 * next(ticks))
    values = json.loads(path.read_text())
    assert values["schema"] == "drllm.latency"
    assert values["model"] == base.identity
    assert values["routers_sha256"] == sha256(routers_dir / "routers.safetensors")
    assert values["config"]["latency_rounds"] == 2
    assert values["runtime"] == {**base.runtime, "num_threads": torch.get_num_threads()}
    timed = [(row["phase"], row["batch_size"], row["system"]) for row in values["timings"]]
    assert sorted(timed) == sorted(
        itertools.product(("prefill", "decode"), Sizes().batch_sizes, SYSTEMS)
    )
    assert all(row["seconds"] == [0.5, 0.5] for row in values["timings"])
    for row in values["timings"]:
        assert row["median"] == 0.5
        assert row["num_tokens"] == row["batch_size"] * (5 if row["phase"] == "prefill" else 1)
        assert row["tokens_per_second"] == 2 * row["num_tokens"]
    for row in values["routed_to_base"]:
        assert (row["lowest"], row["median"], row["highest"]) == (1.0, 1.0, 1.0)


def test_executions_are_those_of_the_routes_that_were_timed(base, routers_dir, tmp_path):
    write(base, routers_dir, tmp_path, 1)
    found = read_measured(tmp_path, [])
    routed = RoutedModel(base.model, load_routers(routers_dir))
    costs = []
    drawn = choose_prompts([evaluated(TEXTS)], encode, seed=0)
    assert sorted(drawn) == sorted(prompt[-5:] for prompt in PROMPTS)
    for prompt in drawn:  # one by one
        routed.model(torch.tensor([prompt]))
        costs.append(int(routed.last_route.sum()))
    routed.detach()
    assert len(set(costs)) > 1, "the prompts must take several routes"
    for phase, size in itertools.product(("prefill", "decode"), (1, 4, 16)):
        rows = [costs[row % 3] for row in range(size)]
        assert found.of("routed", phase, size).executions == statistics.mean(rows)
        for name in SYSTEMS:
            if name != "routed":
                assert found.of(name, phase, size).executions == 6.0


def test_the_report_reads_what_the_evaluation_writes(base, routers_dir, tmp_path):
    sources = []
    path = write(base, routers_dir, tmp_path, 3)
    found = read_measured(tmp_path, sources)
    values = json.loads(path.read_text())
    assert [source.sha256 for source in sources] == [sha256(path)]
    assert found.num_rounds == 3
    assert (found.prompt_tokens, found.new_tokens, found.num_prompts) == (5, 1, 3)
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert [(each.system, list(each.seconds)) for each in found.timings] == [
        (row["system"], row["seconds"]) for row in values["timings"]
    ]
    assert list(found.router_seconds) == [1, 4, 16]
    for (phase, size), spread in found.ratios.items():
        ours, theirs = (found.of(name, phase, size).seconds for name in ("routed", "base"))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        assert spread.median == pytest.approx(statistics.median(ratios))
        assert (spread.lowest, spread.highest) == pytest.approx((min(ratios), max(ratios)))


def test_without_rounds_nothing_is_measured_and_old_times_go(base, routers_dir, tmp_path):
    old = write(base, routers_dir, tmp_path, 1)
    assert old.is_file()
    assert write(base, routers_dir, tmp_path, 0, lambda: pytest.fail("measured")) is None
    assert not old.exists()
    assert read_measured(tmp_path, []) is None


def test_ratios_of_routed_and_the_time_of_routers_are_told_apart():
    seconds = {"base": 4.0, "routed": 3.0, "attached": 4.5, "routers that execute": 5.0}
    timings = [
        Timing(name, phase, 1, 8, 6.0, (value, 2 * value))
        for phase in ("prefill", "decode")
        for name, value in seconds.items()
    ]
    values = contents(Latency(tuple(timings), 8, 2, "cpu", "float32", 1))
    spread = {"median": 0.75, "lowest": 0.75, "highest": 0.75}
    assert values["routed_to_base"] == [
        {"phase": "prefill", "batch_size": 1, **spread},
        {"phase": "decode", "batch_size": 1, **spread},
    ]
    assert values["router_seconds"] == [
        {"batch_size": 1, "median": 0.75, "lowest": 0.5, "highest": 1.0}
    ]


# --- which prompts -----------------------------------------------------------------------------


def test_prompts_that_are_long_enough_are_drawn_first_and_keep_their_last_tokens():
    long = [f"all begin alike {number:02d}" for number in range(20)]
    short = [f"s{number}" for number in range(9)]
    asked = [evaluated(short), evaluated(long)]
    chosen = choose_prompts(asked, encode, seed=0)
    assert len(chosen) == 16
    texts = ["".join(map(chr, ids)) for ids in chosen]
    assert len(set(texts)) == 16
    assert all(text in [each[-16:] for each in long] for text in texts)
    assert choose_prompts(asked, encode, seed=0) == chosen
    assert choose_prompts(asked, encode, seed=1) != chosen


def test_of_short_prompts_the_longest_are_drawn_and_cut_to_the_shortest_of_them():
    asked = [evaluated([f"{length}abcdefghi"[-length:] for length in (3, 9, 5, 7)] * 4)]
    asked.append(evaluated(["-" * 2] * 4))
    chosen = choose_prompts(asked, encode, seed=0)
    assert chosen == [encode("ghi")] * 16


def test_fewer_prompts_than_rows_are_all_taken():
    assert sorted(choose_prompts([evaluated(["ab", "cd"])], encode, seed=0)) == [
        [97, 98],
        [99, 100],
    ]


# --- the machine -------------------------------------------------------------------------------


def test_a_machine_is_named_with_its_cores_and_its_accelerator(monkeypatch):
    words = machine(torch.device("cpu"))
    assert words.endswith(" cores")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    assert machine(torch.device("cuda:1")) == f"Card 1, {words}"
