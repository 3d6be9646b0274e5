import json
from dataclasses import replace

import msgspec
import pytest
import torch
from small import IDENTITY, QUICK, BrokenOffError, Watching, files_of, make_features, stop_at

from drllm.agreement import compute_metrics, judge_routers
from drllm.errors import ConfigError
from drllm.models.routers.checkpoint import load_routers
from drllm.records.codec import read_json
from drllm.records.layers import Layers
from drllm.supervision.summary import class_counts
from drllm.training import is_finished
from drllm.training.stage import PromptInfo, train_seed
from drllm.training.trainer import Trainer, count_decisions, hold_out

LONGER = replace(
    QUICK,
    num_epochs=40,
    learning_rate=0.3,
    validation_fraction=0.3,
    warmup_steps=0,
)


def trained(folder, number=40, config=QUICK, **changes):
    """Train on some features, with some of their fields replaced; the lines of metrics."""
    return train_seed(replace(make_features(number), **changes), IDENTITY, config, folder)


@pytest.mark.parametrize("windows", [4, 8, 32])
def test_training_learns_labels_that_the_features_determine(tmp_path, windows):
    settings = replace(
        QUICK,
        num_epochs=20,
        gradient_accumulation=8,
        learning_rate=0.03,
        class_weights="effective_number",
        validation_fraction=0.3,
        num_windows=windows,
    )
    features = make_features(100, windows)
    rows = train_seed(features, IDENTITY, settings, tmp_path)
    first, last = rows[1], rows[-1]
    assert first["split"] == last["split"] == "validation"
    assert last["macro_f1"] > 0.9 > first["macro_f1"]
    assert last["routers_loss"] < 0.5 * first["routers_loss"]
    decided = load_routers(tmp_path)(features.means, features.filled).argmax(dim=-1)
    assert (decided == features.labels).double().mean() > 0.9


def test_the_saved_config_says_what_was_trained_for_which_model(tmp_path):
    features = make_features(40)
    rows = train_seed(features, IDENTITY, QUICK, tmp_path, prompts=PromptInfo(rewards=["letter"]))
    on, held_out = hold_out(features.questions, QUICK.validation_fraction, QUICK.seed)
    config = load_routers(tmp_path).config
    assert config.label_counts == class_counts(features.labels[on].tolist())
    assert config.training["num_trained"] == len(on)
    assert config.training["num_held_out"] == len(held_out) > 0
    assert config.training["tasks"] == {"even": 20, "odd": 20}
    assert config.training["rewards"] == ["letter"]
    assert config.training["settings"] == QUICK.decisive()
    assert config.training["metrics"] == rows[-2:]
    assert {
        "id": config.base_model,
        "revision": config.base_revision,
        "class": config.base_class,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "fingerprint": config.base_fingerprint,
    } == IDENTITY


def test_label_counts_are_counted_layer_by_layer():
    labels = [[1, 0, 2], [1, 1, 2], [0, 1, 1]]
    assert class_counts(labels) == ((1, 2, 0), (1, 2, 0), (0, 1, 2))


def test_metrics_have_a_line_for_each_epoch_and_part(tmp_path):
    rows = trained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == rows
    assert [(row["epoch"], row["split"]) for row in rows] == [
        (epoch, split) for epoch in (1, 2, 3) for split in ("train", "validation")
    ]
    names = {"routers_loss", "accuracy", "macro_f1", "f1_skip", "f1_execute", "f1_repeat"}
    names |= {"acc_skip", "acc_repeat", "avg_layers", "epoch", "split"}
    assert set(rows[0]) == names | {"learning_rate"}
    assert set(rows[1]) == names


def test_the_layers_file_counts_what_the_saved_routers_say_of_both_parts(tmp_path):
    features = make_features(60)
    settings = replace(LONGER, num_epochs=4)
    rows = train_seed(features, IDENTITY, settings, tmp_path)
    agreement, stack = read_json(tmp_path / "layers.json", Layers), load_routers(tmp_path)
    last = rows[-1]["epoch"]
    assert agreement.epoch == last
    logits = stack.double()(features.means.double(), features.filled)  # [N, L, C]
    on, held_out = hold_out(features.questions, settings.validation_fraction, settings.seed)
    for part, index in (("train", on), ("validation", held_out)):
        expected = count_decisions(logits[index].argmax(dim=-1), features.labels[index], loss=0.0)
        counted = agreement.parts[part]["routers"]
        assert msgspec.structs.replace(counted, loss=0.0) == expected
    [line] = [row for row in rows if (row["epoch"], row["split"]) == (last, "validation")]
    metrics = {name: line[name] for name in line if name not in ("epoch", "split")}
    assert compute_metrics(agreement.parts["validation"]["routers"]) == metrics


@pytest.mark.thorough
def test_config_and_card_tell_how_routers_stand_beside_decisions_that_ignore_the_question(tmp_path):
    trained(tmp_path, 60)
    agreement = read_json(tmp_path / "layers.json", Layers)
    training = load_routers(tmp_path).config.training["against_baselines"]
    systems = agreement.parts["validation"]
    assert training["systems"] == {
        name: compute_metrics(counts) for name, counts in systems.items()
    }
    assert training["verdict"] == judge_routers(agreement.parts)
    card = (tmp_path / "README.md").read_text()
    for name, scores in training["systems"].items():
        assert f"| {name.replace('_', ' ')} | {scores['macro_f1']:.4g} |" in card
    assert training["verdict"] in card


def test_who_is_told_of_a_training_decides_nothing_when_it_resumes(tmp_path):
    features, tracked = make_features(), replace(QUICK, report_to="tensorboard")
    with pytest.raises(BrokenOffError):
        train_seed(features, IDENTITY, tracked, tmp_path, listener=stop_at(5))
    train_seed(features, IDENTITY, QUICK, tmp_path)
    assert not (tmp_path / "trackers.json").exists()


def test_a_training_that_diverges_leaves_no_routers_and_can_be_started_again(tmp_path):
    with pytest.raises(ConfigError, match="lower --learning-rate"):
        trained(tmp_path, 12, replace(QUICK, learning_rate=9e18, warmup_steps=0))
    assert set(files_of(tmp_path)) <= {"metrics.jsonl"}
    trained(tmp_path, 12)
    assert is_finished(tmp_path)


def test_the_weights_do_not_depend_on_the_held_out_labels(tmp_path):
    features = make_features(40)
    _, held_out = hold_out(features.questions, QUICK.validation_fraction, QUICK.seed)
    labels = features.labels.clone()
    labels[held_out] = 2
    trained(tmp_path / "one")
    trained(tmp_path / "two", labels=labels)
    one, two = (tmp_path / name / "routers.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_progress_counts_every_step_once(tmp_path):
    seen = []
    watching = Watching(lambda done, total: seen.append((done, total)))
    config = replace(QUICK, num_epochs=2, warmup_steps=0)
    train_seed(make_features(9), IDENTITY, config, tmp_path, listener=watching)
    assert seen == [(done, 6) for done in range(7)]


@pytest.mark.parametrize("num_targets", [1, 2])
def test_a_single_target_and_a_single_epoch_are_enough(tmp_path, num_targets):
    settings = replace(QUICK, num_epochs=1, warmup_steps=0)
    assert len(trained(tmp_path, num_targets, settings)) == 1
    untrained = Trainer(make_features(1), IDENTITY, settings).stack
    assert not torch.equal(load_routers(tmp_path).hidden_weight, untrained.hidden_weight)


def test_targets_that_only_execute_train_routers_that_only_execute_and_are_logged(tmp_path, caplog):
    config = replace(QUICK, num_epochs=10, learning_rate=0.05)
    rows = trained(tmp_path, 30, config, labels=torch.ones(30, 3, dtype=torch.int64))
    assert (rows[-1]["avg_layers"], rows[-1]["f1_execute"]) == (3.0, 1.0)
    assert rows[-1]["f1_skip"] is rows[-1]["acc_skip"] is rows[-1]["f1_repeat"] is None
    assert "| F1 skip | – | – |" in (tmp_path / "README.md").read_text()
    assert "every target executes every layer" in caplog.text
