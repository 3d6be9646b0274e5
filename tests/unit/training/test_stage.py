import json
from dataclasses import replace

import pytest
import torch
from watching import Watching

from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.metrics import ratios, verdict
from drllm.models.routers.checkpoint import load_routers
from drllm.records.layers import read_layers
from drllm.training.checkpoint import is_finished
from drllm.training.split import hold_out
from drllm.training.stage import train_on
from drllm.training.trainer import Trainer, count, count_labels

QUICK = TrainConfig(
    num_epochs=3, gradient_accumulation=4, num_windows=4, router_width=5, warmup_steps=2
)


def config_of(**changes) -> TrainConfig:
    return replace(QUICK, **changes)


def test_training_learns_labels_that_the_features_determine(features_of, identity, tmp_path):
    settings = config_of(
        num_epochs=20, gradient_accumulation=8, learning_rate=0.03, validation_fraction=0.3
    )
    rows = train_on(features_of(100), identity, settings, tmp_path)
    first, last = rows[1], rows[-1]
    assert first["split"] == last["split"] == "validation"
    assert last["macro_f1"] > 0.9 > first["macro_f1"]
    assert last["routers_loss"] < 0.5 * first["routers_loss"]


def test_the_folder_holds_exactly_the_finished_routers(features_of, identity, tmp_path):
    train_on(features_of(), identity, QUICK, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "layers.json",
        "metrics.jsonl",
        "router_config.json",
        "routers.safetensors",
    ]


def test_the_saved_config_says_what_was_trained_for_which_model(features_of, identity, tmp_path):
    features = features_of(40)
    rows = train_on(features, identity, QUICK, tmp_path, rewards=["letter"])
    trained, held_out = hold_out(features.questions, QUICK.validation_fraction, QUICK.seed)
    config = load_routers(tmp_path).config
    assert config.label_counts == count_labels(features.labels[trained])
    assert config.training["num_trained"] == len(trained)
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
    } == identity


def test_label_counts_are_counted_layer_by_layer():
    labels = torch.tensor([[1, 0, 2], [1, 1, 2], [0, 1, 1]])
    assert count_labels(labels) == ((1, 2, 0), (1, 2, 0), (0, 1, 2))


def test_metrics_have_a_line_for_each_epoch_and_part(features_of, identity, tmp_path):
    rows = train_on(features_of(40), identity, QUICK, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == rows
    assert [(row["epoch"], row["split"]) for row in rows] == [
        (epoch, split) for epoch in (1, 2, 3) for split in ("train", "validation")
    ]
    names = {"routers_loss", "accuracy", "macro_f1", "f1_skip", "f1_execute", "f1_repeat"}
    names |= {"acc_skip", "acc_repeat", "avg_layers", "epoch", "split"}
    assert set(rows[0]) == names | {"learning_rate"}
    assert set(rows[1]) == names


def test_the_layers_file_counts_what_the_saved_routers_say_of_both_parts(
    features_of, identity, tmp_path
):
    features = features_of(60)
    settings = config_of(num_epochs=30, learning_rate=0.3, early_stopping=2, warmup_steps=0)
    rows = train_on(features, identity, settings, tmp_path)
    agreement, stack = read_layers(tmp_path / "layers.json"), load_routers(tmp_path)
    best = stack.config.training["best_epoch"]
    assert agreement.epoch == best < rows[-1]["epoch"]
    said = stack.double()(features.means.double(), features.filled)  # [N, L, C]
    trained, held_out = hold_out(features.questions, settings.validation_fraction, settings.seed)
    for part, index in (("train", trained), ("validation", held_out)):
        expected = count(said[index], features.labels[index], loss=0.0)
        counted = agreement.parts[part]["routers"]
        assert counted.confusion == expected.confusion
        assert counted.executions == expected.executions
        assert counted.examples == len(index)
    [line] = [row for row in rows if (row["epoch"], row["split"]) == (best, "validation")]
    kept = {name: line[name] for name in line if name not in ("epoch", "split")}
    assert ratios(agreement.parts["validation"]["routers"]) == kept


def test_config_and_card_tell_how_routers_stand_beside_decisions_that_ignore_the_question(
    features_of, identity, tmp_path
):
    train_on(features_of(60), identity, QUICK, tmp_path)
    agreement = read_layers(tmp_path / "layers.json")
    told = load_routers(tmp_path).config.training["against_baselines"]
    systems = agreement.parts["validation"]
    assert told["systems"] == {name: ratios(counts) for name, counts in systems.items()}
    assert told["verdict"] == verdict(agreement.parts)
    card = (tmp_path / "README.md").read_text()
    for name, scores in told["systems"].items():
        assert f"| {name.replace('_', ' ')} | {scores['macro_f1']:.4g} |" in card
    assert told["verdict"] in card


class InterruptedRunError(Exception):
    pass


def stop_after(steps: int) -> Watching:
    def stop(done: int, total: int) -> None:
        if done > steps:
            raise InterruptedRunError

    return Watching(stop)


def test_who_is_told_of_a_training_decides_nothing_when_it_resumes(features_of, identity, tmp_path):
    features, told = features_of(), config_of(report_to="tensorboard")
    with pytest.raises(InterruptedRunError):
        train_on(features, identity, told, tmp_path, listener=stop_after(4))
    train_on(features, identity, QUICK, tmp_path)
    assert not (tmp_path / "trackers.json").exists()


def test_a_training_that_diverges_leaves_no_routers_and_can_be_started_again(
    features_of, identity, tmp_path
):
    with pytest.raises(ConfigError, match="lower --learning-rate"):
        train_on(features_of(), identity, config_of(learning_rate=9e18, warmup_steps=0), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.jsonl"}
    train_on(features_of(), identity, QUICK, tmp_path)
    assert is_finished(tmp_path)


def test_validation_lines_are_absent_when_nothing_is_held_out(features_of, identity, tmp_path):
    rows = train_on(features_of(40), identity, config_of(validation_fraction=0.0), tmp_path)
    assert [row["split"] for row in rows] == ["train"] * 3


def test_the_weights_do_not_depend_on_the_held_out_labels(features_of, identity, tmp_path):
    features = features_of(40)
    _, held_out = hold_out(features.questions, QUICK.validation_fraction, QUICK.seed)
    labels = features.labels.clone()
    labels[held_out] = 2
    train_on(features, identity, QUICK, tmp_path / "one")
    train_on(replace(features, labels=labels), identity, QUICK, tmp_path / "two")
    one, two = (tmp_path / name / "routers.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_another_seed_gives_other_routers(features_of, identity, tmp_path):
    train_on(features_of(), identity, QUICK, tmp_path / "one")
    train_on(features_of(), identity, config_of(seed=1), tmp_path / "two")
    one, two = (load_routers(tmp_path / name) for name in ("one", "two"))
    assert not torch.equal(one.hidden_weight, two.hidden_weight)


def test_progress_counts_every_step_once(features_of, identity, tmp_path):
    seen = []
    train_on(
        features_of(9),
        identity,
        config_of(num_epochs=2, warmup_steps=0),
        tmp_path,
        listener=Watching(lambda done, total: seen.append((done, total))),
    )
    assert seen == [(done, 6) for done in range(7)]


@pytest.mark.parametrize("num_targets", [1, 2])
def test_a_single_target_and_a_single_epoch_are_enough(
    features_of, identity, tmp_path, num_targets
):
    settings = config_of(num_epochs=1, warmup_steps=0)
    rows = train_on(features_of(num_targets), identity, settings, tmp_path)
    assert len(rows) == 1
    untrained = Trainer(features_of(1), identity, settings).stack
    assert not torch.equal(load_routers(tmp_path).hidden_weight, untrained.hidden_weight)


def test_targets_that_only_execute_train_routers_that_only_execute(features_of, identity, tmp_path):
    features = features_of(30)
    features = replace(features, labels=torch.ones_like(features.labels))
    rows = train_on(features, identity, config_of(num_epochs=10, learning_rate=0.05), tmp_path)
    assert rows[-1]["avg_layers"] == 3.0
    assert rows[-1]["f1_execute"] == 1.0
    assert rows[-1]["f1_skip"] is rows[-1]["acc_skip"] is rows[-1]["f1_repeat"] is None
    assert "| F1 skip | – | – |" in (tmp_path / "README.md").read_text()


def test_the_card_tells_model_data_metrics_and_use(features_of, identity, tmp_path):
    rows = train_on(features_of(40), identity, QUICK, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: drllm\nbase_model: org/tiny\n")
    for text in (
        "`org/tiny`, revision `main`: LlamaForCausalLM, 3 layers, hidden size 6",
        "even (20), odd (20)",
        "RoutedModel.from_pretrained",
        f"| loss | {rows[-2]['routers_loss']:.4g} | {rows[-1]['routers_loss']:.4g} |",
        "- gamma: 2.0",
        "licence",
    ):
        assert text in card


def test_a_local_name_is_not_given_to_the_hub_as_a_base_model(features_of, identity, tmp_path):
    train_on(features_of(), {**identity, "id": "smollm2-135m", "revision": None}, QUICK, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model:" not in card
    assert "`smollm2-135m`: LlamaForCausalLM" in card


def test_features_of_another_number_of_windows_are_refused(features_of, identity, tmp_path):
    with pytest.raises(ConfigError, match="--num-windows is 8, but the features were pooled in 4"):
        train_on(features_of(), identity, config_of(num_windows=8), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_early_end_is_told_with_the_epoch_whose_weights_are_kept(
    features_of, identity, tmp_path
):
    settings = config_of(
        num_epochs=40, learning_rate=0.3, validation_fraction=0.3, early_stopping=3, warmup_steps=0
    )
    seen = []
    rows = train_on(
        features_of(40),
        identity,
        settings,
        tmp_path,
        listener=Watching(lambda *progress: seen.append(progress)),
    )
    losses = [row["routers_loss"] for row in rows if row["split"] == "validation"]
    best = losses.index(min(losses)) + 1
    told = load_routers(tmp_path).config.training
    assert (told["best_epoch"], told["last_epoch"]) == (best, len(losses))
    assert told["metrics"] == [row for row in rows if row["epoch"] == best]
    card = (tmp_path / "README.md").read_text()
    assert f"## Metrics after epoch {best}, the best of {len(losses)} on the held-out" in card
    assert seen[-1][0] == seen[-1][1] > told["steps"]


def test_what_is_unusual_about_a_run_is_logged(features_of, identity, tmp_path, caplog):
    full = replace(features_of(8), labels=torch.ones(8, 3, dtype=torch.int64))
    train_on(full, identity, config_of(warmup_steps=90), tmp_path)
    unbroken, all_full = caplog.messages
    assert "--warmup-steps is 90" in unbroken
    assert "every target executes every layer" in all_full
