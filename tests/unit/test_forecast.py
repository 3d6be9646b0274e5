"""A forecast counts what a stage does, from the model's shape alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drllm.cli import main
from drllm.config import ModelConfig, TrainConfig, TuneConfig
from drllm.evaluation.flops import ModelShape, prompt_flops
from drllm.models.base.load import load
from drllm.pipeline.forecast import flops_a_second, of_training, of_tuning
from drllm.records.supervision import read_supervision
from drllm.tuning import run as tuning
from drllm.tuning.parts import parts_of_tasks


@pytest.fixture
def shape_alone(model_folder: Callable[..., Path], tmp_path: Path) -> ModelConfig:
    """A model's folder without its weights."""
    folder = tmp_path / "shape"
    shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return ModelConfig(model=str(folder), device="cpu")


@pytest.fixture(scope="module")
def finished_targets(
    model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Targets of a few questions."""
    folder = tmp_path_factory.mktemp("searched")
    words = ["--limit", "6", "--num-simulations", "4", "--output-dir", str(folder)]
    assert main(["search", "--model", str(model_folder()), "--device", "cpu", *words]) == 0
    return folder / "supervision.jsonl"


@pytest.mark.parametrize("edits", ["sublayers", "repeats"])
def test_a_tuning_with_other_edits_is_forecast_too(edits, shape_alone):
    config = TuneConfig(num_fit=30, num_judged=8, max_skipped=1, edits=edits)
    layers = TuneConfig(num_fit=30, num_judged=8, max_skipped=1)
    divided = parts_of_tasks(config)
    more, fewer = (of_tuning(shape_alone, each, divided) for each in (config, layers))
    assert more.work["fit"].flops > fewer.work["fit"].flops > 0


@pytest.mark.parametrize("tasks", ["builtin_facts", "builtin_facts,builtin_arithmetic"])
def test_a_tuning_scores_as_many_paths_as_was_forecast(
    tasks, shape_alone, model_folder, monkeypatch, tmp_path
):
    config = TuneConfig(tasks=tasks, num_fit=30, num_judged=8, max_skipped=2, max_loss=1e3)
    forecast = of_tuning(shape_alone, config, parts_of_tasks(config))
    scored = {"texts": 0, "others": 0}
    scores = tuning.Judge.scores

    def counted(judge, paths, places=None):
        is_text = all(len(item.question.context) == 1 for item in judge.items)
        scored["texts" if is_text else "others"] += len(paths) * len(places)
        return scores(judge, paths, places)

    monkeypatch.setattr(tuning.Judge, "scores", counted)
    model = ModelConfig(model=str(model_folder()), device="cpu")
    tuning.tune(model, None, config, tmp_path / "out")
    work = {name: part.passes for name, part in forecast.work.items()}
    assert scored["texts"] == work.pop("texts")
    work.pop("answers", None)
    assert scored["others"] == sum(work.values())


def test_a_feature_pass_costs_the_flops_of_its_targets(shape_alone, model_folder, finished_targets):
    targets = read_supervision(finished_targets)
    work = of_training(shape_alone, TrainConfig(), targets).work["features"]
    base = load(ModelConfig(model=str(model_folder()), device="cpu"))
    shape, lengths = ModelShape.of(base.model), []
    total = 0.0
    for target in targets:
        lengths.append(len(base.tokenizer(target.prompt, add_special_tokens=False)["input_ids"]))
        found = prompt_flops(shape, target.optimal_layer_config, lengths[-1])
        total += found.weights + found.attention
    assert work.passes == len(targets)
    assert work.tokens == pytest.approx(sum(lengths), rel=0.05)
    assert work.flops == pytest.approx(total, rel=0.05)


def test_memory_and_disk_follow_from_the_shape(shape_alone, finished_targets):
    targets = read_supervision(finished_targets)
    full, half = (
        of_training(shape_alone, TrainConfig(feature_dtype=dtype), targets)
        for dtype in ("float32", "bfloat16")
    )
    config = full.base.model.config
    a_target = config.num_hidden_layers * config.hidden_size * 8
    assert full.disk - half.disk == len(targets) * a_target * 2
    assert full.base.model.device.type == "meta"
    held = full.memory["features, held where memory allows"]
    assert held == half.memory["features, held where memory allows"] == len(targets) * a_target * 4


def test_the_speed_is_that_of_layers_of_the_same_shape(shape_alone, finished_targets):
    base = of_training(shape_alone, TrainConfig(), read_supervision(finished_targets)).base
    assert flops_a_second(base, torch.device("cpu")) > 1e6


@pytest.mark.parametrize("verb", ["tune", "train"])
def test_a_dry_run_needs_no_weights_and_writes_nothing(
    verb, shape_alone, finished_targets, monkeypatch, tmp_path, capsys
):
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)
    words = {
        "tune": [
            "--num-fit",
            "8",
            "--num-judged",
            "4",
            "--max-skipped",
            "1",
            "--output-dir",
            "out",
        ],
        "train": ["--supervision", str(finished_targets), "--output", "out"],
    }[verb]
    assert main([verb, "--model", shape_alone.model, "--device", "cpu", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "derived from the model's shape" in said
    assert "GB weights" in said
    assert not any(place.iterdir())


def test_a_tuning_that_makes_no_sense_is_refused_by_its_dry_run_too(shape_alone, capsys):
    words = ["tune", "--model", shape_alone.model, "--dry-run", "--max-skipped", "60"]
    assert main(words) == 2
    assert "--max-skipped 60 leaves nothing" in capsys.readouterr().err
