"""What each stage would make a GPU wait for, and that it computes on one and on two as on the CPU.

The devices are pretended: tests/devices/pretended.py says what can be seen so, and what can't.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drllm
from devices.events import own_waits
from devices.pretended import Devices, Pretended, place_model
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.config import RouterConfig
from drllm.models.routers.stack import RouterStack
from drllm.models.scoring import choices
from drllm.models.scoring.score import Request, score
from drllm.paths import StaticPath
from drllm.tuning.refit import join_weights, refit
from drllm.tuning.stand_in import fit_stand_in

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


HEALING = {"limit": 20, "num_held_out": 2, "steps": 3, "repair": "none"}
HEALED = drllm.StaticPath([0, 1, 3])


@pytest.fixture(scope="module")
def healed_on_cpu(tiny_llama, tiny_tokenizer):
    model = tiny_llama(num_layers=L, seed=3)
    return drllm.heal(model, HEALED, TASK, autocast=False, tokenizer=tiny_tokenizer, **HEALING)


def test_healing_waits_once_a_step_and_heals_as_on_the_cpu(
    model, healed_on_cpu, devices, tiny_tokenizer
):
    with devices.counting() as events:
        healed = drllm.heal(model, HEALED, TASK, tokenizer=tiny_tokenizer, **HEALING)
    kls, expected = ([p.held_out_kl for p in run.curve] for run in (healed, healed_on_cpu))
    assert kls == pytest.approx(expected, abs=1e-4)
    waits = own_waits(events)
    of_steps = [waits[line] for line in waits if "heal_training.py" in line and "item" in line]
    assert of_steps == [3]


def test_a_refit_is_solved_as_on_the_cpu(model, devices, tiny_llama, tiny_tokenizer, monkeypatch):
    # A pretended weight has a type of its own, as a quantised one has.
    monkeypatch.setattr("drllm.tuning.refit.check_module", lambda name, module: None)
    monkeypatch.setattr("drllm.models.routing.refits.check_module", lambda name, module: None)
    settings = {"limit": 20, "num_held_out": 2, "minutes": 0, "tokenizer": tiny_tokenizer}
    [losses] = drllm.heal(model, HEALED, TASK, **settings).held_out.values()
    on_cpu = tiny_llama(num_layers=L, seed=3)
    [expected] = drllm.heal(on_cpu, HEALED, TASK, **settings).held_out.values()
    assert losses.refit == pytest.approx(expected.refit, abs=1e-4)
    assert losses.path == pytest.approx(expected.path, abs=1e-4)


class RefuseFloat64(TorchDispatchMode):
    """Refuses float64 on pretended devices, as MPS does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Pretended) and tensor.dtype == torch.float64:
                raise TypeError(f"{func} makes float64 on {tensor.device}")
        return result


def solve_refit(routed):
    """Return the new weights of a path with two gaps, by the name of their module."""
    generator = torch.Generator().manual_seed(0)
    texts = [tuple(torch.randint(4, 90, (8,), generator=generator).tolist()) for _ in range(80)]
    return join_weights(refit(routed, StaticPath([0, 2]), texts))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_refit_is_solved_on_the_cpu_where_the_device_has_no_float64(
    family, tiny_model, devices, monkeypatch
):
    # As above: a pretended weight has a type of its own.
    monkeypatch.setattr("drllm.tuning.refit.check_module", lambda name, module: None)
    expected = solve_refit(RoutedModel(tiny_model(family, num_hidden_layers=L)))
    routed = RoutedModel(place_model(tiny_model(family, num_hidden_layers=L), 1))
    with RefuseFloat64():
        with pytest.raises(TypeError, match="makes float64 on cuda:0"):
            solve_refit(routed)
        monkeypatch.setattr("drllm.tuning.refit_memory.DEVICES_WITHOUT_FLOAT64", ("cuda",))
        weights = solve_refit(routed)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.device == torch.device("cuda:0")
        assert torch.allclose(weight.cpu(), expected[name], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_refit_is_solved_on_the_cpu_where_the_device_has_too_little_memory(
    family, tiny_model, devices, monkeypatch
):
    monkeypatch.setattr("drllm.tuning.refit.check_module", lambda name, module: None)
    expected = solve_refit(RoutedModel(tiny_model(family, num_hidden_layers=L)))
    free = {"cuda": 1000, "cpu": 10**9}
    monkeypatch.setattr(
        "drllm.tuning.refit_memory.free_bytes", lambda device: free[torch.device(device).type]
    )
    routed = RoutedModel(place_model(tiny_model(family, num_hidden_layers=L), 1))
    with RefuseFloat64():  # so nothing in float64 is on the device
        weights = solve_refit(routed)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.device == torch.device("cuda:0")
        assert torch.allclose(weight.cpu(), expected[name], atol=1e-3)


def tuned(model, tokenizer):
    options = {"num_fit": 4, "num_judged": 4, "max_skipped": 1, "tokenizer": tokenizer}
    return [path.steps for path in drllm.tune(model, TASK, **options).paths]


@pytest.fixture(scope="module")
def tuned_on_cpu(tiny_llama, tiny_tokenizer):
    return tuned(tiny_llama(num_layers=L, seed=3), tiny_tokenizer)


def score_with_stand_in(model):
    """Score two paths with maps in their gaps that are fitted on some texts."""
    generator = torch.Generator().manual_seed(0)
    texts = [tuple(torch.randint(4, 90, (8,), generator=generator).tolist()) for _ in range(30)]
    routed = RoutedModel(model)
    maps = fit_stand_in(routed, texts[:25])
    requests = [Request.from_text(text) for text in texts[25:]]
    paths = [StaticPath([0, 2, 3]), StaticPath([0, 1])]
    outcomes = score(routed, requests, paths, crossings=maps)
    return [[outcome.logprobs[0] for outcome in row] for row in outcomes]


def test_paths_with_a_stand_in_for_their_refit_are_scored_as_on_the_cpu(model, tiny_llama, devices):
    expected = score_with_stand_in(tiny_llama(num_layers=L, seed=3))
    scores = score_with_stand_in(model)
    for row, expected_row in zip(scores, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-3)


def test_static_paths_are_tuned_as_on_the_cpu(
    model, tuned_on_cpu, devices, tiny_tokenizer, monkeypatch
):
    # As for a refit: a pretended weight has a type of its own.
    monkeypatch.setattr("drllm.tuning.refit.check_module", lambda name, module: None)
    monkeypatch.setattr("drllm.models.routing.refits.check_module", lambda name, module: None)
    assert tuned(model, tiny_tokenizer) == tuned_on_cpu


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
