"""What drllm 0.1.0 wrote is read, and computes what it did.

The files are those of `tests/fixtures/0.1/`, which that version has written.
"""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import drllm as library
from drllm.cli.generation_inputs import read_prompts
from drllm.config import HealConfig, SearchConfig, TrainConfig
from drllm.errors import CheckpointError, ConfigError
from drllm.models.routed_model import RoutedModel
from drllm.models.routers.checkpoint import load_routers
from drllm.models.routing.bypass_file import load_bypass
from drllm.models.routing.depth_control import read_calibration
from drllm.models.routing.healed import install_path
from drllm.models.routing.policies import FixedPolicy
from drllm.pipeline.manifest import read_run_manifest
from drllm.pipeline.recipes import read_recipe
from drllm.records.codec import read_json_lines
from drllm.records.latency import read_latency
from drllm.records.results import read_results
from drllm.records.search import FailedQuestion, read_search
from drllm.records.shrink import read_shrink
from drllm.records.static_paths import load_path, read_paths
from drllm.records.supervision import RejectedQuestion, read_supervision
from drllm.reporting.run import read_run
from drllm.supervision.select import supervise
from drllm.training.stage import train
from drllm.tuning.heal_texts import read_sources
from drllm.work import store
from drllm.work.listener import Listener
from old_model import FIXTURES, load_old_model

FILES = FIXTURES / "0.1"
RUN = FILES / "run"
PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
LOGITS_TOLERANCE = 1e-4  # the stored ones are rounded to five digits
WEIGHTS_TOLERANCE = 1e-5  # a training elsewhere may end with other last bits
LAYERS = 4
SAME_WEIGHTS = "the weights are the same"  # the model of the files was called "model"
TRAINING = TrainConfig(num_epochs=2, warmup_steps=0, router_width=8)
SEARCH = SearchConfig(limit=6, num_simulations=6, block_size=3)


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
def last_logits(model, base, prompt):
    return model(**base.tokenizer(prompt, return_tensors="pt")).logits[0, -1]


def assert_close(logits, expected_logits):
    values = torch.tensor(expected_logits)
    torch.testing.assert_close(logits, values, atol=LOGITS_TOLERANCE, rtol=0)


def test_a_run_folder_is_read_whole():
    run = read_run(RUN)
    assert run.absent == []
    assert run.num_layers == LAYERS
    assert read_run_manifest(RUN).stages.keys() >= {"search", "supervise", "train", "evaluate"}
    assert read_recipe(RUN / "run.yaml").search.num_simulations == 6


@pytest.mark.parametrize(
    ("folder", "target", "num_questions"),
    [("run", "shortest", 6), ("bypassed", "least_kl", 6), ("failed", "least_kl", 3)],
)
def test_a_search_makes_the_same_targets(tmp_path, folder, target, num_questions):
    file = FILES / folder / "search.jsonl"
    assert len(read_search(file)) == num_questions
    supervise([file], output_dir=tmp_path, target=target)
    targets = read_supervision(FILES / folder / "supervision.jsonl")
    assert read_supervision(tmp_path / "supervision.jsonl") == targets


def test_a_question_that_could_not_be_searched_is_read():
    [(_, failed)] = read_json_lines(FILES / "failed" / "search.failed.jsonl", FailedQuestion)
    assert failed.id == "line-8"
    assert failed.attempts == 3
    assert "the model's context holds 1024" in failed.error


def test_a_question_that_could_not_be_searched_is_shown(drllm):
    assert "line-8" in drllm("show", FILES / "failed").out


@pytest.mark.parametrize(
    ("file", "reasons"),
    [
        ("run/supervision.rejected.jsonl", {"no valid path", "no path survived the re-test"}),
        ("seeds/routers/rejected.jsonl", {"longer than the base model's context"}),
    ],
)
def test_questions_without_a_target_are_read_with_the_reason(file, reasons):
    rows = read_json_lines(FILES / file, RejectedQuestion)
    assert {question.reason for _, question in rows} == reasons


def test_results_are_read_with_their_samples_and_times():
    [result] = read_results(RUN / "eval")
    assert result.num_questions == len(result.samples) == 6
    assert read_latency(RUN / "eval").measured.num_rounds == 2


def test_results_of_several_seeds_are_read():
    [result] = read_results(FILES / "seeds" / "eval")
    assert list(result.other_seeds) == ["seeds/routers/seed_1"]
    at_training, at_depth = result.seeds
    assert (at_training.setting, at_depth.setting) == ("", "10 % saved")
    assert at_training.num_seeds == 2
    assert at_training.executions.lowest < at_training.executions.highest


def test_results_at_other_depths_are_read():
    [result] = read_results(FILES / "seeds" / "eval")
    assert [point.name for point in result.curve] == [
        "base",
        "routed, 10 % saved",
        "permuted routes, 10 % saved",
        "without 3",
    ]


def test_a_test_against_a_bound_is_read():
    [result] = read_results(FILES / "seeds" / "eval")
    [trial] = result.drop_test.trials
    assert trial.name == "routed, 10 % saved"
    assert trial.tasks[0].failures == ("base is not shown to be above chance",)
    assert list(result.drop_test.untested) == ["without 3"]


@pytest.mark.parametrize("place", ["run/routers", "seeds/routers", "seeds/routers/seed_1"])
def test_routers_decide_as_they_did(base, expected, place):
    with pytest.warns(UserWarning, match=SAME_WEIGHTS):
        routed = RoutedModel(base.model, load_routers(FILES / place))
    last_logits(routed, base, expected["prompt"])
    assert routed.last_route[0].tolist() == expected["decisions"][place]
    routed.detach()


@pytest.mark.parametrize(
    ("place", "bypass"),
    [("bypassed/routers", "bypass"), ("published/routers", "published/bypass")],
)
def test_routers_with_a_bypass_decide_as_they_did(base, expected, place, bypass):
    routers = load_routers(FILES / place)
    with pytest.warns(UserWarning, match=SAME_WEIGHTS):
        routed = RoutedModel(base.model, routers, bypass=load_bypass(FILES / bypass))
    last_logits(routed, base, expected["prompt"])
    assert routed.last_route[0].tolist() == expected["decisions"][place]
    routed.detach()


def test_routers_are_refused_without_the_bypass_that_they_name(base):
    routers = load_routers(FILES / "bypassed" / "routers")
    assert routers.config.bypass == load_bypass(FILES / "bypass").sha256
    with pytest.raises(CheckpointError, match="bypass"):
        RoutedModel(base.model, routers)


def test_a_search_names_its_bypass():
    records = read_search(FILES / "bypassed" / "search.jsonl")
    assert records.model["bypass"] == load_bypass(FILES / "bypass").sha256


def test_stored_features_are_trained_on(base, tmp_path):
    features = Path(shutil.copytree(FILES / "features", tmp_path / "features"))
    before = sorted(path.read_bytes() for path in features.glob("*.safetensors"))
    files = [RUN / "supervision.jsonl"]
    train(base, files, TrainConfig(num_epochs=1), tmp_path / "routers", features=features)
    assert sorted(path.read_bytes() for path in features.glob("*.safetensors")) == before


class FirstProgress(Listener):
    """Keeps the first progress that is reported of a training."""

    def __init__(self):
        self.first = None

    @contextmanager
    def progress(self, title, unit):
        yield self.keep if title == "training" else super().progress

    def keep(self, done, total, note=""):
        if self.first is None:
            self.first = (done, total)


def test_an_interrupted_training_is_resumed_and_ends_with_the_same_routers(base, tmp_path):
    routers = Path(shutil.copytree(FILES / "interrupted" / "routers", tmp_path / "routers"))
    listener = FirstProgress()
    stack = train(base, RUN / "supervision.jsonl", TRAINING, routers, listener=listener)
    assert listener.first == (1, 2)  # one of two steps was done
    weights = load_routers(RUN / "routers").state_dict()
    torch.testing.assert_close(stack.state_dict(), weights, atol=WEIGHTS_TOLERANCE, rtol=0)


def test_an_interrupted_search_is_shown(drllm):
    assert "not finished: 1 batch" in drllm("show", FILES / "interrupted").out


def test_another_version_refuses_to_resume_an_interrupted_search(base, tmp_path, monkeypatch):
    partial = shutil.copytree(FILES / "interrupted" / "search.partial", tmp_path / "search.partial")
    before = {path.name: path.read_bytes() for path in partial.iterdir()}
    monkeypatch.setattr(store, "_VERSION", "later")
    with pytest.raises(ConfigError, match=r'drllm_version "0\.1\.0", now "later"'):
        library.search_paths(base, "builtin_facts", SEARCH, tmp_path)
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == before


def test_static_paths_are_read(base):
    file = RUN / "paths.json"
    assert [path.name for path in read_paths(file).paths] == ["full", "skip1", "skip2"]
    assert len(load_path(f"{file}:skip2").path_for(base.identity).layers) == LAYERS - 2


@pytest.mark.parametrize("name", ["healed", "refitted"])
def test_a_repaired_path_computes_what_it_did(base, routed, expected, name):
    path = install_path(routed.injection, load_path(str(FILES / name)))
    with routed.fixed(path):
        assert_close(last_logits(routed, base, expected["prompt"]), expected["logits"][name])


@pytest.mark.parametrize("name", ["bypass", "published/bypass"])
def test_a_bypass_computes_what_it_did(base, expected, name):
    routed = RoutedModel(base.model, bypass=load_bypass(FILES / name))
    with routed.using(FixedPolicy((1, 1, 0, 1), LAYERS)):
        assert_close(last_logits(routed, base, expected["prompt"]), expected["logits"]["bypass"])
    routed.detach()


@pytest.mark.parametrize("name", ["exported", "published/checkpoint"])
def test_a_checkpoint_computes_what_it_did(base, expected, name):
    model = AutoModelForCausalLM.from_pretrained(FILES / name)
    assert model.config.num_hidden_layers == LAYERS - 1
    assert_close(last_logits(model, base, expected["prompt"]), expected["logits"][name])


@pytest.mark.parametrize("name", ["smaller", "published/checkpoint"])
def test_what_a_shrink_found_is_read(name):
    record = read_shrink(FILES / name / "shrink.json")
    assert [len(model.layers) for model in record.models] == [LAYERS, LAYERS - 1]
    assert record.chosen == "skip1"


def test_a_published_log_of_a_search_has_the_records_of_the_search():
    published = read_search(FILES / "published" / "search-log" / "search.jsonl")
    assert published == read_search(FILES / "bypassed" / "search.jsonl")
    assert published.model["class"] == "LlamaForCausalLM"


def test_targets_with_the_needed_columns_alone_are_read():
    targets = read_supervision(FILES / "own" / "supervision.jsonl")
    assert len(targets) == 9
    assert targets[0].optimal_layer_config == (1, 1, 0, 1)
    assert (targets[0].task, targets[0].prompt, targets[0].executions) == ("own", "Is 0 even?", 3)


def test_prompts_are_read():
    rows = read_prompts(FILES / "own" / "prompts.jsonl")
    assert [row.id for row in rows] == ["sky", "line-2", 7]
    assert [row.prompt for row in rows[:2]] == ["Why is the sky blue?", "What is tin?"]
    assert [message["role"] for message in rows[2].prompt] == ["user", "assistant", "user"]


def test_a_calibration_set_is_read():
    prompts = read_calibration(FILES / "own" / "calibration.jsonl")
    assert [is_rendered for _, is_rendered in prompts] == [False, False, True]
    assert [text for text, _ in prompts[:2]] == ["Why is the sky blue?", "What is tin?"]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("texts.jsonl", ["Ice melts.", "Tin\n\nmelts later."]),
        ("texts.txt", ["Ice melts.", "Tin\nmelts later.\n"]),
    ],
)
def test_texts_are_read(name, texts):
    [source] = read_sources(HealConfig(), texts=str(FILES / "own" / name))
    assert sorted(source.texts) == texts


@pytest.mark.parametrize(
    ("name", "layers"), [("decisions.json", (0, 2, 2, 3)), ("order.json", (0, 3, 1, 3))]
)
def test_a_path_that_was_written_by_hand_is_read(base, name, layers):
    assert load_path(FILES / "own" / name).path_for(base.identity).layers == layers


FILE_NAME = re.compile(r"`(?:[\w.-]+/)*([\w-][\w.-]*\.(?:jsonl?|safetensors|yaml|html|md))`")
FOLDER_NAME = re.compile(r"`(?:[\w.-]+/)*([\w.-]+)/`")
PLACEHOLDER = re.compile("NAME|TASK|NUMBER|HASH")


def find_names(text):
    """Return the names of files and folders in Markdown, without the folders that they are in."""
    return {*FILE_NAME.findall(text), *FOLDER_NAME.findall(text)}


def is_kept(name):
    """Tell whether there is a file or folder of this name, where TASK stands for any task."""
    return any(FILES.rglob(PLACEHOLDER.sub("*", name)))


@pytest.fixture(scope="module")
def left_out():
    """The names that the table in README.md gives a reason for."""
    lines = (FILES / "README.md").read_text(encoding="utf-8").splitlines()
    table = lines[lines.index("## Left out") :]
    first_column = [line.split("|")[1] for line in table if line.startswith("|")]
    return find_names("\n".join(first_column))


def test_every_file_that_the_page_names_is_kept_or_left_out_for_a_reason(left_out):
    names = find_names(PAGE.read_text(encoding="utf-8"))
    missing = {name for name in names if not is_kept(name)}
    assert missing - left_out == set(), "keep them, or say in README.md why not"


def test_what_is_said_to_be_left_out_is_not_there(left_out):
    assert {name for name in left_out if is_kept(name)} == set()


def test_no_file_names_a_place_of_the_machine_that_made_it():
    place = re.compile(r'["\s](?:/\w[\w.-]*){2,}')
    files = [path for path in FILES.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")]
    assert len(files) > 40
    assert [file for file in files if place.search(file.read_text(encoding="utf-8"))] == []
