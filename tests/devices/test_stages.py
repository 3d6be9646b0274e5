"""What each stage would make a GPU wait for, and that it computes on one and on two as on the CPU.

The devices are pretended: tests/devices/pretended.py says what can be seen so, and what can't.
"""

from contextlib import nullcontext

import pytest
import torch

import drllm
from devices.events import own_waits
from devices.pretended import Devices, place_model
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.scoring import choices

L = 4
NUM_NEW = 6
IDS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [0, 0, 0, 0, 0, 20, 21, 22, 23, 24]]
MASK = [[1] * 10, [0] * 5 + [1] * 5]
MIXED = [[1, 0, 2, 1], [0, 1, 1, 2]]
TASK = "builtin_facts"


@pytest.fixture
def devices():
    with Devices() as found:
        yield found


@pytest.fixture(params=["one", "two"])
def model(request, tiny_llama, devices):
    return place_model(tiny_llama(num_layers=L, seed=3), {"one": 1, "two": 2}[request.param])


@pytest.fixture
def on_cpu(tiny_llama):
    return tiny_llama(num_layers=L, seed=3)


def routers():
    """Routers under which one row skips a layer that another one repeats."""
    config = RouterConfig(num_layers=L, hidden_size=32, label_counts=[(1, 2, 1)] * L)
    return RouterStack(config, torch.Generator().manual_seed(0))


def batch(device):
    ids, mask = torch.tensor(IDS, device=device), torch.tensor(MASK, device=device)
    return {"input_ids": ids, "attention_mask": mask}


def test_routers_wait_for_a_device_at_most_once_a_layer_and_route_as_on_the_cpu(
    model, on_cpu, devices
):
    there, here = drllm.attach(model, routers()), drllm.attach(on_cpu, routers())
    inputs = batch("cuda:0")
    with devices.counting() as events, torch.no_grad():
        logits = there(**inputs).logits
    with torch.no_grad():
        wanted = here(**batch("cpu")).logits
    assert len({tuple(row) for row in here.last_route.tolist()}) == 2
    assert torch.equal(there.last_route.cpu(), here.last_route)
    assert torch.allclose(logits.cpu(), wanted, atol=1e-5)
    assert sum(own_waits(events).values()) <= L


@pytest.mark.parametrize("plan", ["routers", "fixed", "full"])
def test_a_decode_step_never_waits(model, devices, plan):
    routed = drllm.attach(model, routers() if plan == "routers" else None)
    waits = []
    for num_new in (1, NUM_NEW):
        fixed = routed.fixed(MIXED) if plan == "fixed" else nullcontext()
        with fixed, devices.counting() as events:
            routed.generate(**batch("cuda:0"), max_new_tokens=num_new, min_new_tokens=num_new)
        waits.append(own_waits(events))
    assert waits[1] == waits[0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_text_is_that_of_the_cpu(model, on_cpu, options):
    options = {**options, "max_new_tokens": NUM_NEW, "do_sample": False}
    there, here = drllm.attach(model, routers()), drllm.attach(on_cpu, routers())
    said = there.generate(**batch("cuda:0"), **options)
    assert torch.equal(said.cpu(), here.generate(**batch("cpu"), **options))


def test_beams_are_read_once_a_step_for_all_layers(model, devices):
    routed = drllm.attach(model, routers())
    waits = []
    for num_new in (1, NUM_NEW):
        with devices.counting() as events:
            routed.generate(
                **batch("cuda:0"), num_beams=2, max_new_tokens=num_new, min_new_tokens=num_new
            )
        waits.append(sum(own_waits(events).values()))
    assert waits[1] - waits[0] <= NUM_NEW


def searched(model, tokenizer):
    return drllm.search_paths(model, TASK, limit=2, num_simulations=5, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def searched_on_cpu(tiny_llama, tiny_tokenizer):
    return searched(tiny_llama(num_layers=L, seed=3), tiny_tokenizer)


def test_a_search_waits_in_no_layer_and_finds_what_the_cpu_finds(
    model, searched_on_cpu, devices, tiny_tokenizer
):
    with devices.counting() as events:
        found = searched(model, tiny_tokenizer)
    for there, here in zip(found, searched_on_cpu, strict=True):
        assert [each.decisions for each in there.paths] == [each.decisions for each in here.paths]
        assert [each.reward for each in there.paths] == [each.reward for each in here.paths]
    waits = own_waits(events)
    in_a_layer = ("injection.py", "prefix_sharing.py", "driver.py", "packing.py")
    assert not [line for line in waits if any(file in line for file in in_a_layer)]
    assert {line.partition(":")[0] for line in waits} <= {
        "drllm/models/scoring/choices.py",
        "drllm/models/scoring/kl.py",
        "drllm/model/identity.py",  # once a run: is it the model that it was?
    }


def test_training_waits_once_a_step_and_ends_with_the_routers_of_the_cpu(
    model, on_cpu, searched_on_cpu, devices, tiny_tokenizer
):
    targets = drllm.supervise(searched_on_cpu)
    options = {"validation_fraction": 0.0, "gradient_accumulation": 1, "tokenizer": tiny_tokenizer}
    with devices.counting() as events:
        trained = drllm.train(model, targets, num_epochs=3, **options)
    waits = own_waits(events)
    weights = len(trained.state_dict())  # moved once before and once after the training
    of_steps = {
        line: num for line, num in waits.items() if "training/trainer.py" in line and num != weights
    }
    assert [*of_steps.values()] == [3 * len(targets) + 1]  # and to measure at the end
    expected = drllm.train(on_cpu, targets, num_epochs=3, **options)
    for name, weight in expected.state_dict().items():
        assert torch.allclose(trained.state_dict()[name].cpu(), weight, atol=1e-5), name


@pytest.mark.parametrize(
    ("model", "packs"),
    [
        ("one", True),
        ("two", False),
        pytest.param("one", False, marks=pytest.mark.thorough),
        pytest.param("two", True, marks=pytest.mark.thorough),
    ],
    indirect=["model"],
)
def test_an_evaluation_gives_the_outcomes_of_the_cpu(
    model, on_cpu, tiny_tokenizer, packs, monkeypatch
):
    monkeypatch.setattr(choices, "can_pack", lambda *_: packs)
    options = {"limit": 2, "baselines": "permuted-routes"}
    routed, on_cpu = (
        drllm.attach(each, routers(), tokenizer=tiny_tokenizer) for each in (model, on_cpu)
    )
    [here] = drllm.evaluate(on_cpu, TASK, **options)
    if not packs:  # time is measured in one of the two
        options |= {"latency": True, "latency_rounds": 1}
        options |= {"latency_read": 8, "latency_written": 2}
    [there] = drllm.evaluate(routed, TASK, **options)
    assert [each.name for each in there.systems] == [each.name for each in here.systems]
    for mine, theirs in zip(there.systems, here.systems, strict=True):
        assert (mine.accuracy, mine.executions) == (theirs.accuracy, theirs.executions), mine.name
        assert mine.gold_logprob == pytest.approx(theirs.gold_logprob, abs=1e-4)
