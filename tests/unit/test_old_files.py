"""What commit 3820ce17 wrote is read, and what this version no longer reads is refused in one line.

The files are those of `tests/fixtures/3820ce17/`, which that commit has written.
"""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from drllm.config import TrainConfig
from drllm.errors import DrllmError, PathError, RecordError
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routing.healed import install_path
from drllm.paths import StaticPath
from drllm.records.healed import read_healed
from drllm.records.latency import read_latency
from drllm.records.manifest import read_manifest
from drllm.records.removed import OLD_VERSION
from drllm.records.results import read_results
from drllm.records.search import read_search
from drllm.records.static_paths import load_path, read_path_list, read_paths
from drllm.records.supervision import read_supervision
from drllm.reporting.run import read_run
from drllm.supervision.select import supervise
from drllm.training.stage import train
from old_model import FIXTURES, load_old_model

OLD = FIXTURES / "3820ce17"
RUN = OLD / "run"
LOGITS_TOLERANCE = 1e-4  # the stored ones are rounded to five digits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The model of that commit, whose tokenizer a class of transformers 5 has written."""
    return load_old_model(tmp_path_factory.mktemp("old") / "model")


@pytest.fixture(scope="module")
def expected():
    """What that commit decided and computed on a prompt."""
    return json.loads((OLD / "expected.json").read_text())


def test_a_search_is_read_and_makes_the_same_targets(tmp_path):
    records = read_search(RUN / "search.jsonl")
    assert len(records) == 6
    assert records.model["class"] == "LlamaForCausalLM"
    assert all(record.full.executions == 4 for record in records)
    supervise([RUN / "search.jsonl"], output_dir=tmp_path, target="shortest")
    assert read_supervision(tmp_path / "supervision.jsonl") == targets()


def targets():
    return read_supervision(RUN / "supervision.jsonl")


def test_supervision_is_read_and_trained_on(base, tmp_path):
    assert [len(target.optimal_layer_config) for target in targets()] == [4] * 4
    assert read_manifest(RUN / "supervision.jsonl", "supervision")["summary"]["targets"] == 4
    train(base, [RUN / "supervision.jsonl"], TrainConfig(num_epochs=1), tmp_path / "routers")
    assert load_routers(tmp_path / "routers").config.num_layers == 4


def test_features_are_made_anew_only_where_the_old_ones_were_deleted(base, tmp_path):
    features = Path(shutil.copytree(OLD / "features", tmp_path / "features"))
    settings = TrainConfig(num_epochs=1)
    files = [RUN / "supervision.jsonl"]
    with pytest.raises(DrllmError, match="an older version of drllm; delete"):
        train(base, files, settings, tmp_path / "routers", features=features)
    shutil.rmtree(features)
    train(base, files, settings, tmp_path / "routers", features=features)


def test_routers_are_read_and_decide_as_they_did(base, expected):
    routers = load_routers(RUN / "routers")
    with pytest.warns(UserWarning, match="the weights are the same"):  # it was called "model"
        routed = RoutedModel(base.model, routers, tokenizer=base.tokenizer)
    with torch.no_grad():
        routed(**base.tokenizer(expected["prompt"], return_tensors="pt"))
        assert routed.last_route[0].tolist() == expected["decisions"]
        routed.detach()


def test_results_are_read_with_their_samples_and_times():
    [result] = read_results(RUN / "eval")
    assert (result.task, result.num_questions) == ("builtin_facts", 6)
    assert len(result.samples) == 6
    assert result.routed.executions == pytest.approx(2 + 1 / 6)
    assert read_latency(RUN / "eval").measured.num_rounds == 2


def test_a_run_folder_is_read_whole():
    run = read_run(RUN)
    assert run.absent == []
    assert run.num_layers == 4


@pytest.mark.parametrize(
    ("folder", "shortest", "named"),
    [("tuned", [0, 3], ["skip2"]), ("certified", [0, 1], ["skip1", "skip2"])],
)
def test_static_paths_are_read(base, folder, shortest, named):
    file = OLD / folder / "paths.json"
    assert [path.name for path in read_paths(file).paths] == ["full", "skip1", "skip2"]
    assert load_path(f"{file}:skip2").path_for(base.identity) == StaticPath(shortest)
    assert list(read_path_list(str(file))) == named  # skip1 of the first is dominated


def test_a_certificate_is_ignored_with_a_note(drllm):
    file = OLD / "certified" / "paths.json"
    [note] = read_paths(file).notes
    assert "certificate" in note
    assert "0.1.0.dev0" in note
    assert note in " ".join(drllm("show", file).out.split())
    assert read_paths(OLD / "tuned" / "paths.json").notes == []
    with pytest.raises(PathError, match="name one of them"):  # not the certified one
        load_path(str(file))


def test_a_healed_path_is_read_and_computes_what_it_did(base, expected):
    record = read_healed(OLD / "healed" / "path.json")
    assert record.rank == 2
    assert [step.layer for step in record.steps] == [0, 1, 3]
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    path = install_path(routed.injection, load_path(str(OLD / "healed")))
    with torch.no_grad(), routed.fixed(path):
        logits = routed(**base.tokenizer(expected["prompt"], return_tensors="pt")).logits[0, -1]
    healed_logits = torch.tensor(expected["healed_logits"])
    torch.testing.assert_close(logits, healed_logits, atol=LOGITS_TOLERANCE, rtol=0)
    routed.detach()


READERS = (
    "show {}",
    "generate --path {} hello",
    "heal --path {} --tasks builtin_facts",
    "evaluate --paths {} --tasks builtin_facts",
    "export --path {} --output smaller/",
)
REFUSED = {
    "menu": "is a menu of paths",
    "menu/menu.json": "is a menu of paths",
    "sublayers/paths.json": "is a path that runs the attention of layer 0 alone",
    "sublayers/paths.json:skip1": "is a path that runs the attention of layer 0 alone",
    "damped/paths.json": "is a path that runs layer 2 at weight 0.25",
    "damped/paths.json:skip1": "is a path that runs layer 2 at weight 0.25",
    "healed_routes": "is a healed path with an adapter for 2 routes",
    "plan.json": "is a menu of paths",  # by its content
}


@pytest.fixture
def old_copies(tmp_path, monkeypatch):
    """Copies of what is refused, in the current folder."""
    for folder in ("menu", "sublayers", "damped", "healed_routes"):
        shutil.copytree(OLD / folder, tmp_path / folder)
    shutil.copyfile(OLD / "menu" / "menu.json", tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)


def is_for_show(place):
    """Whether `show`, which goes by the names of files, takes the place for what it is."""
    return ":" not in place and place != "plan.json"


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (command, place)
        for command, place in itertools.product(READERS, REFUSED)
        if command != "show {}" or is_for_show(place)
    ],
)
def test_what_was_removed_is_refused_in_one_line_that_names_the_version(
    drllm, old_copies, command, place
):
    [line] = drllm(command.format(place), status=2).err.splitlines()
    assert OLD_VERSION in line
    assert REFUSED[place] in line


def test_a_menu_is_no_routed_model():
    with pytest.raises(RecordError, match="is a menu"):
        RoutedModel.from_pretrained(OLD / "menu")
