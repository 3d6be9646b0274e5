"""`drllm.train`: what it refuses before pooling, where routers and features go."""

from dataclasses import replace

import pytest
import torch
from killable import BASE, CONFIG, MODEL, N, make_model, make_records
from peft import LoraConfig, inject_adapter_in_model

import drllm
from drllm.errors import CheckpointError, ConfigError, RecordError
from drllm.models.routers.checkpoint import load_routers
from drllm.training import stage

ONCE = replace(CONFIG, num_seeds=1)


@pytest.fixture
def no_pass(monkeypatch):
    def collect(*_, **__):
        raise AssertionError("the base model ran")

    monkeypatch.setattr(stage, "collect_features", collect)


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({"loss": "cross_entropy", "gamma": 1.0}, N, "--gamma 1 has no effect"),
        ({"report_to": "tensorbord"}, N, "unknown tracker 'tensorbord'; did you mean 'tensorbo"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_anything_is_pooled_or_written(
    no_pass, tmp_path, changes, number, message
):
    with pytest.raises(ConfigError, match=message):
        drllm.train(BASE, make_records(number), replace(ONCE, **changes), tmp_path / "routers")
    assert not (tmp_path / "routers").exists()


def test_records_beside_files_of_targets_are_refused_and_not_left_out(no_pass, tmp_path):
    with pytest.raises(RecordError, match="both as files and as records"):
        drllm.train(BASE, [tmp_path / "supervision.jsonl", *make_records(N)], ONCE)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_pooled(no_pass, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"can't write to .*file/routers, since .*file is a"):
        drllm.train(BASE, make_records(N), ONCE, tmp_path / "file" / "routers")


def test_without_a_folder_the_routers_are_only_returned(tmp_path):
    routers = drllm.train(BASE, make_records(N), ONCE)
    drllm.train(BASE, make_records(N), ONCE, tmp_path)
    assert torch.equal(routers.hidden_weight, load_routers(tmp_path).hidden_weight)
    with pytest.raises(ConfigError, match="--num-seeds 2 needs a folder"):
        drllm.train(BASE, make_records(N), replace(ONCE, num_seeds=2))


def test_routers_are_not_returned_for_a_training_of_the_model_with_an_adapter(tmp_path):
    drllm.train(BASE, make_records(N), ONCE, tmp_path)
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make_model())
    with pytest.raises(CheckpointError, match="holds trained routers of another run"):
        drllm.train(replace(BASE, model=adapted), make_records(N), ONCE, tmp_path)


def test_a_model_of_transformers_needs_its_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer"):
        drllm.train(MODEL, make_records(N), ONCE)
