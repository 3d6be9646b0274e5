"""A bypass goes with all stages, and what was made with it isn't used without it."""

from contextlib import contextmanager

import msgspec
import pytest
import torch

import drllm
from drllm.cost import mean_skips, path_skips
from drllm.errors import CheckpointError, ConfigError, RecordError
from drllm.evaluation.flops import ModelShape, count_bypass_cost, prompt_flops
from drllm.evaluation.latency import measure
from drllm.model.identity import describe
from drllm.models import workers
from drllm.models.routed_model import RoutedModel, attach
from drllm.models.routing.bypass import Bypass
from drllm.models.routing.bypass_file import BYPASS_FILE, BypassRecord, save_bypass
from drllm.models.routing.policies import FixedPolicy
from drllm.paths import StaticPath
from drllm.records.supervision import SupervisionRecord
from drllm.reporting.commands import evaluate_command
from drllm.work.listener import Listener

ROWS = [
    {"question": f"Is {number} even?", "choices": ["yes", "no"], "answer": number % 2}
    for number in range(24)
]
SEARCH = {"num_simulations": 12, "limit": 6, "block_size": 3}
TRAIN = {"num_epochs": 1, "warmup_steps": 0, "validation_fraction": 0.0}


def draw_bypass(model, seed=0):
    D = model.config.hidden_size
    L = model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    shapes = [(L, 2, D), (L, D, 2), (L, D), (L, D)]
    tensors = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
    return Bypass(*tensors, model=describe(model))


@pytest.fixture(scope="module")
def base(tiny_base):
    return tiny_base()


@pytest.fixture(scope="module")
def bypass(base):
    return draw_bypass(base.model)


def route(base, bypass, routers=None):
    """Return the routed model, in place of an earlier one."""
    return attach(base.model, routers, base.tokenizer, bypass=bypass)


@pytest.fixture(scope="module")
def records(base, bypass):
    return drllm.search_paths(route(base, bypass), ROWS, **SEARCH)


@pytest.fixture(scope="module")
def routers(base, bypass, records):
    targets = drllm.supervise(records)
    return drllm.train(route(base, bypass), targets, **TRAIN)


def test_records_and_routers_name_the_bypass(bypass, records, routers):
    assert records.model["bypass"] == bypass.sha256
    assert routers.config.bypass == bypass.sha256


@pytest.fixture(scope="module")
def plain(base):
    return drllm.search_paths(route(base, None), ROWS, **SEARCH)


def test_searches_with_and_without_a_bypass_are_refused_by_their_numbers(records, plain):
    with pytest.raises(RecordError, match=r"search 1 and search 3 were made with no bypass, and n"):
        drllm.supervise([plain, plain, records])


def test_a_search_with_a_bypass_finds_other_values(records, plain):
    assert "bypass" not in plain.model
    kls = [
        {path.decisions: path.kl for record in found for path in record.paths}
        for found in (records, plain)
    ]
    common = [plan for plan in kls[0].keys() & kls[1].keys() if 0 in plan]
    assert common
    assert any(kls[0][plan] != pytest.approx(kls[1][plan], abs=1e-4) for plan in common)


@pytest.mark.parametrize("seed", [None, 1])
def test_labels_of_another_bypass_are_not_trained_on(base, records, seed):
    other = None if seed is None else draw_bypass(base.model, seed)
    targets = drllm.supervise(records)
    with pytest.raises(RecordError, match=r"with the bypass [0-9a-f]{8}, and not "):
        drllm.train(route(base, other), targets, **TRAIN)


def make_targets():
    return [
        SupervisionRecord(
            question=row["question"], answer="yes", optimal_layer_config=(1, 1, 0, 1, 1, 1)
        )
        for row in ROWS
    ]


@pytest.mark.parametrize("seed", [None, 1])
def test_features_with_another_bypass_are_not_used_again(base, bypass, tmp_path, seed):
    other = None if seed is None else draw_bypass(base.model, seed)
    features = tmp_path / "features"
    targets = make_targets()
    drllm.train(route(base, other), targets, features=features, **TRAIN)
    with pytest.raises(ConfigError, match=r"the folder of features .* bypass"):
        drllm.train(route(base, bypass), targets, features=features, **TRAIN)


@pytest.mark.parametrize("seed", [None, 1])
def test_routers_with_another_bypass_are_not_returned_for_a_training(base, bypass, tmp_path, seed):
    other = None if seed is None else draw_bypass(base.model, seed)
    targets = make_targets()
    drllm.train(route(base, other), targets, output_dir=tmp_path, **TRAIN)
    with pytest.raises(CheckpointError, match=r"trained routers of another run, .* bypass"):
        drllm.train(route(base, bypass), targets, output_dir=tmp_path, **TRAIN)


@pytest.mark.parametrize("seed", [None, 1])
def test_routers_of_another_bypass_are_refused(base, routers, seed):
    other = None if seed is None else draw_bypass(base.model, seed)
    with pytest.raises(CheckpointError, match="trained with the bypass"):
        route(base, other, routers)


def test_routers_without_a_bypass_are_refused_with_one(base, bypass, routers):
    plain = drllm.search_paths(route(base, None), ROWS, **SEARCH)
    trained = drllm.train(route(base, None), drllm.supervise(plain), **TRAIN)
    with pytest.raises(CheckpointError, match="trained with no bypass, and not the bypass"):
        route(base, bypass, trained)


def test_an_evaluation_runs_with_the_bypass(base, bypass, routers):
    routed = route(base, bypass, routers)
    [result] = drllm.evaluate(routed, "builtin_facts", baselines="none", num_texts=4, limit=4)
    assert result.model["bypass"] == bypass.sha256
    assert result.routed is not None


def test_a_loaded_model_takes_its_bypass_from_the_settings(model_folder, tmp_path):
    folder = str(model_folder())
    base = drllm.load(folder, device="cpu")
    bypass = draw_bypass(base.model)
    file = tmp_path / "bypass.safetensors"
    save_bypass(file, bypass, BypassRecord(model=dict(bypass.model)))
    config = drllm.ModelConfig(model=folder, device="cpu", bypass=str(file))
    records = drllm.search_paths(config, ROWS, **SEARCH)
    assert records.model["bypass"] == bypass.sha256
    RoutedModel(base.model)


def test_an_evaluation_is_repeated_with_the_file_of_its_bypass(model_folder, tmp_path):
    folder = str(model_folder())
    base = drllm.load(folder, device="cpu")
    bypass = draw_bypass(base.model)
    save_bypass(tmp_path / BYPASS_FILE, bypass, BypassRecord(model=dict(bypass.model)))
    config = drllm.ModelConfig(model=folder, device="cpu", bypass=str(tmp_path))
    few = {"baselines": "none", "num_texts": 2, "limit": 2, "paths": "without:1"}
    [result] = drllm.evaluate(config, "builtin_facts", output_dir=tmp_path / "eval", **few)
    assert result.bypass == str(tmp_path / BYPASS_FILE)
    command = evaluate_command(msgspec.structs.asdict(result))
    assert f"--bypass {tmp_path / BYPASS_FILE}" in command


def test_executions_and_flops_count_what_the_bypass_costs(base, bypass):
    routed = route(base, bypass)
    shape = ModelShape.from_model(base.model, bypass=bypass)
    entries = 2 * bypass.rank * bypass.hidden_size
    assert count_bypass_cost(routed) == pytest.approx(entries / shape.layer_entries[0])
    assert count_bypass_cost(route(base, None)) == 0
    plan = (1, 0, 2, 0, 1, 1)
    plain = prompt_flops(ModelShape.from_model(base.model), plan, 7)
    assert prompt_flops(shape, plan, 7).weights == plain.weights + 2 * 7 * 2 * entries
    assert prompt_flops(shape, (1,) * 6, 7) == prompt_flops(
        ModelShape.from_model(base.model), (1,) * 6, 7
    )
    assert mean_skips([plan, (1,) * 6]) == 1
    assert path_skips(StaticPath([0, 1, 1, 5]), 6) == 3


def test_the_layers_run_of_a_system_hold_the_bypass(base, bypass):
    routed = route(base, bypass)
    [result] = drllm.evaluate(
        routed, "builtin_facts", paths="without:2,3", baselines="none", num_texts=4, limit=4
    )
    [path] = [system for system in result.systems if system.name != "base"]
    entries = 2 * bypass.rank * bypass.hidden_size
    share = entries / ModelShape.from_model(base.model).layer_entries[0]
    assert path.executions == pytest.approx(4 + 2 * share)


def test_a_model_whose_weights_are_in_workers_has_its_bypass_too(
    model_folder, tmp_path, monkeypatch
):
    folder = str(model_folder())
    base = drllm.load(folder, device="cpu")
    bypass = draw_bypass(base.model)
    file = tmp_path / "bypass.safetensors"
    save_bypass(file, bypass, BypassRecord(model=dict(bypass.model)))

    @contextmanager
    def start(*_args, **_options):
        yield

    executor = start()
    executor.identity = {**base.identity, "bypass": bypass.sha256}
    executor.runtime = base.runtime
    monkeypatch.setattr(workers, "RayExecutor", lambda *_args, **_options: executor)
    model = drllm.ModelConfig(model=folder, device="cpu", bypass=str(file))
    config = drllm.SearchConfig(executor="ray")
    with workers.open_workers(model, None, config, Listener()) as opened:
        assert opened.routed.bypass.sha256 == bypass.sha256
        assert count_bypass_cost(opened.routed) > 0
        with pytest.raises(ConfigError, match="learning repairs a model without a bypass"):
            opened.base.refuse_bypass("learning repairs a model")


def test_time_is_measured_with_the_bypass(base, bypass, monkeypatch):
    drllm.detach(base.model)
    skipped = []
    skip = Bypass.skip

    def record(self, layer, *args):
        skipped.append(layer)
        return skip(self, layer, *args)

    monkeypatch.setattr(Bypass, "skip", record)
    systems = {"base": None, "routed": FixedPolicy((1, 0, 1, 1, 1, 1), 6)}
    measure(base.model, systems, [[5, 6, 7]] * 2, 1, 3, 1, bypass=bypass)
    assert set(skipped) == {1}
