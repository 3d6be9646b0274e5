"""What drllm 0.1.0 wrote is read, and computes what it did.

The files are those of `tests/fixtures/0.1/`, which that version has written.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from drllm.config import TrainConfig
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routing.bypass_file import load_bypass
from drllm.models.routing.healed import install_path
from drllm.models.routing.policies import FixedPolicy
from drllm.pipeline.manifest import read_run_manifest
from drllm.pipeline.recipes import read_recipe
from drllm.records.latency import read_latency
from drllm.records.results import read_results
from drllm.records.search import read_search
from drllm.records.shrink import read_shrink
from drllm.records.static_paths import load_path, read_paths
from drllm.records.supervision import read_supervision
from drllm.reporting.run import read_run
from drllm.supervision.select import supervise
from drllm.training.stage import train
from old_model import FIXTURES, load_old_model

FILES = FIXTURES / "0.1"
RUN = FILES / "run"
LOGITS_TOLERANCE = 1e-4  # the stored ones are rounded to five digits
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model of the files."""
    return load_old_model(tmp_path_factory.mktemp("old") / "model")


@pytest.fixture(scope="module")
def expected():
    """What 0.1.0 decided and computed on a prompt."""
    return json.loads((FILES / "expected.json").read_text())


@pytest.fixture
def routed(base):
    """The model, routed."""
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    yield routed
    routed.detach()


@torch.no_grad()
def last_logits(routed, base, prompt):
    return routed(**base.tokenizer(prompt, return_tensors="pt")).logits[0, -1]


def assert_close(logits, expected_logits):
    values = torch.tensor(expected_logits)
    torch.testing.assert_close(logits, values, atol=LOGITS_TOLERANCE, rtol=0)


def test_a_run_folder_is_read_whole():
    run = read_run(RUN)
    assert run.absent == []
    assert run.num_layers == LAYERS
    assert read_run_manifest(RUN).stages.keys() >= {"search", "supervise", "train", "evaluate"}
    assert read_recipe(RUN / "run.yaml").search.num_simulations == 6


def test_a_search_makes_the_same_targets(tmp_path):
    assert len(read_search(RUN / "search.jsonl")) == 6
    supervise([RUN / "search.jsonl"], output_dir=tmp_path, target="shortest")
    targets = read_supervision(RUN / "supervision.jsonl")
    assert read_supervision(tmp_path / "supervision.jsonl") == targets


def test_results_are_read_with_their_samples_and_times():
    [result] = read_results(RUN / "eval")
    assert result.num_questions == len(result.samples) == 6
    assert read_latency(RUN / "eval").measured.num_rounds == 2


def test_routers_decide_as_they_did(base, expected):
    routers = load_routers(RUN / "routers")
    with pytest.warns(UserWarning, match="the weights are the same"):  # it was called "model"
        routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
    last_logits(routed, base, expected["prompt"])
    assert routed.last_route[0].tolist() == expected["decisions"]
    routed.detach()


def test_stored_features_are_trained_on(base, tmp_path):
    features = Path(shutil.copytree(FILES / "features", tmp_path / "features"))
    before = sorted(path.read_bytes() for path in features.glob("*.safetensors"))
    files = [RUN / "supervision.jsonl"]
    train(base, files, TrainConfig(num_epochs=1), tmp_path / "routers", features=features)
    assert sorted(path.read_bytes() for path in features.glob("*.safetensors")) == before


def test_static_paths_are_read(base):
    file = RUN / "paths.json"
    assert [path.name for path in read_paths(file).paths] == ["full", "skip1", "skip2"]
    assert len(load_path(f"{file}:skip2").path_for(base.identity).layers) == LAYERS - 2


@pytest.mark.parametrize("name", ["healed", "refitted"])
def test_a_repaired_path_computes_what_it_did(base, routed, expected, name):
    path = install_path(routed.injection, load_path(str(FILES / name)))
    with routed.fixed(path):
        assert_close(last_logits(routed, base, expected["prompt"]), expected[f"{name}_logits"])


def test_a_bypass_computes_what_it_did(base, expected):
    routed = RoutedModel(base.model, bypass=load_bypass(FILES / "bypass"))
    with routed.using(FixedPolicy((1, 1, 0, 1), LAYERS)):
        assert_close(last_logits(routed, base, expected["prompt"]), expected["bypass_logits"])
    routed.detach()


def test_what_a_shrink_found_is_read():
    record = read_shrink(FILES / "smaller" / "shrink.json")
    assert [len(model.layers) for model in record.models] == [LAYERS, LAYERS - 1]
