import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from drllm.config import TrainConfig
from drllm.errors import CheckpointError, ConfigError
from drllm.models.routers import RouterStack
from drllm.training.features import Features
from drllm.training.loop import (
    Objective,
    Schedule,
    count_labels,
    epoch_batches,
    evaluate,
    hold_out,
    new_objective,
    new_optimizer,
    new_stack,
    plan_schedule,
    take_step,
    train,
)

QUICK = TrainConfig(
    num_epochs=3, gradient_accumulation=4, num_windows=4, router_width=5, warmup_steps=2
)


def config_of(**changes) -> TrainConfig:
    return replace(QUICK, **changes)


def texts(number: int) -> list[str]:
    return [f"question {row}" for row in range(number)]


# --- the split -------------------------------------------------------------------------------


def test_the_parts_share_no_target_and_leave_none_out():
    trained, held_out = hold_out(texts(500), 0.1, seed=0)
    assert sorted(trained + held_out) == list(range(500))
    assert 25 < len(held_out) < 80


def test_more_targets_never_move_a_question_to_the_other_side():
    _, few = hold_out(texts(200), 0.1, seed=0)
    _, many = hold_out(texts(400), 0.1, seed=0)
    assert few == [row for row in many if row < 200]


def test_targets_of_one_question_stay_together():
    questions = [*texts(50), *(f"  Question   {row} " for row in range(50))]
    trained, held_out = hold_out(questions, 0.2, seed=0)
    assert held_out
    assert {row % 50 for row in held_out}.isdisjoint(row % 50 for row in trained)


def test_another_seed_holds_out_other_questions():
    assert hold_out(texts(200), 0.1, seed=0) != hold_out(texts(200), 0.1, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_ten_targets_are_enough_to_hold_out_one(seed):
    trained, held_out = hold_out(texts(10), 1e-9, seed=seed)
    assert len(held_out) == 1
    assert len(trained) == 9


@pytest.mark.parametrize(
    ("number", "fraction"), [(9, 0.5), (1, 0.5), (100, 0.0)], ids=["few", "one", "fraction 0"]
)
def test_nothing_is_held_out_of_few_targets_or_at_fraction_zero(number, fraction):
    assert hold_out(texts(number), fraction, seed=0) == (list(range(number)), [])


def test_targets_that_are_all_of_one_question_are_all_trained_on():
    assert hold_out(["the same"] * 20, 0.5, seed=0) == (list(range(20)), [])


# --- the order -------------------------------------------------------------------------------


def test_an_epoch_visits_every_target_once():
    batches = list(epoch_batches([3, 5, 8, 9, 11], 2, seed=0, epoch=1))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(row for batch in batches for row in batch) == [3, 5, 8, 9, 11]


def test_the_order_is_a_function_of_seed_and_epoch():
    rows = list(range(50))
    first = list(epoch_batches(rows, 8, seed=0, epoch=1))
    assert first == list(epoch_batches(rows, 8, seed=0, epoch=1))
    assert first != list(epoch_batches(rows, 8, seed=0, epoch=2))
    assert first != list(epoch_batches(rows, 8, seed=1, epoch=1))


# --- the schedule ----------------------------------------------------------------------------


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    schedule = Schedule(peak=8.0, warmup=3, steps=7)
    expected = [2.0, 4.0, 6.0, 8.0, 4 + 4 * math.cos(math.pi / 4), 4.0, 4 - 4 * math.sqrt(0.5)]
    assert expected == pytest.approx([schedule.rate(step) for step in range(7)])


def test_a_run_of_one_step_learns_at_the_peak():
    assert plan_schedule(config_of(warmup_steps=0), 1).rate(0) == QUICK.learning_rate


def test_a_warm_up_as_long_as_the_run_is_shortened_aloud(caplog):
    schedule = plan_schedule(config_of(warmup_steps=500), 250)
    assert (schedule.warmup, schedule.steps) == (25, 250)
    assert caplog.messages == [
        "--warmup-steps is 500, but the run has only 250 steps; warming up for 25 instead"
    ]


def test_a_warm_up_that_fits_is_kept_in_silence(caplog):
    assert plan_schedule(config_of(warmup_steps=249), 250).warmup == 249
    assert caplog.messages == []


# --- one step --------------------------------------------------------------------------------


def in_double(features: Features, identity, config: TrainConfig = QUICK):
    features = replace(features, means=features.means.double())
    stack = new_stack(features, features.labels, identity, config).double()
    return features, stack, new_optimizer(stack, config)


def test_a_step_equals_micro_batches_of_one_accumulated(features_of, identity):
    features, stack, optimizer = in_double(features_of(), identity)
    twin = copy.deepcopy(stack)
    twin_optimizer = new_optimizer(twin, QUICK)
    objective = new_objective(stack.config.label_counts, QUICK)
    for rows in ([4, 0, 7], [1, 2, 3]):
        take_step(stack, optimizer, features, rows, objective, rate=0.01)
        twin_optimizer.zero_grad()
        for row in rows:
            logits = twin(features.means[row : row + 1], features.filled[row : row + 1])
            loss = objective(logits, features.labels[row : row + 1])
            (loss / len(rows)).backward()
        for group in twin_optimizer.param_groups:
            group["lr"] = 0.01
        twin_optimizer.step()
    for weight, expected in zip(stack.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-12)


def test_a_step_counts_the_targets_before_learning_from_them(features_of, identity):
    features, stack, optimizer = in_double(features_of(), identity)
    objective = new_objective(stack.config.label_counts, QUICK)
    before = evaluate(stack, features, [0, 1, 2], objective)
    assert before == take_step(stack, optimizer, features, [0, 1, 2], objective, rate=0.1)
    assert evaluate(stack, features, [0, 1, 2], objective).loss < before.loss


def test_biases_do_not_decay(features_of, identity):
    features = features_of()
    stack = new_stack(features, features.labels, identity, QUICK)
    optimizer = new_optimizer(stack, config_of(weight_decay=0.3))
    decay = {
        id(weight): group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert {name: decay[id(weight)] for name, weight in stack.named_parameters()} == {
        "hidden_weight": 0.3,
        "hidden_bias": 0.0,
        "decision_weight": 0.3,
        "decision_bias": 0.0,
    }


def test_a_loss_that_is_not_finite_is_refused_with_the_rate(features_of, identity):
    features, stack, optimizer = in_double(features_of(), identity)
    objective = Objective(weights=torch.tensor([math.inf] * 3), gamma=2.0)
    with pytest.raises(ConfigError, match=r"learning rate of 0\.5; lower --learning-rate"):
        take_step(stack, optimizer, features, [0], objective, rate=0.5)


# --- the whole -------------------------------------------------------------------------------


def test_training_learns_labels_that_the_features_determine(features_of, identity, tmp_path):
    settings = config_of(
        num_epochs=20, gradient_accumulation=8, learning_rate=0.03, validation_fraction=0.3
    )
    rows = train(features_of(100), identity, settings, tmp_path)
    first, last = rows[1], rows[-1]
    assert first["split"] == last["split"] == "validation"
    assert last["macro_f1"] > 0.9 > first["macro_f1"]
    assert last["routers_loss"] < 0.5 * first["routers_loss"]


def test_the_folder_holds_exactly_the_finished_routers(features_of, identity, tmp_path):
    train(features_of(), identity, QUICK, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "README.md",
        "metrics.jsonl",
        "router_config.json",
        "routers.safetensors",
    ]


def test_the_saved_config_says_what_was_trained_for_which_model(features_of, identity, tmp_path):
    features = features_of(40)
    rows = train(features, identity, QUICK, tmp_path, rewards=["letter"])
    trained, held_out = hold_out(features.questions, QUICK.validation_fraction, QUICK.seed)
    config = RouterStack.load(tmp_path).config
    assert config.label_counts == count_labels(features.labels[trained])
    assert config.training["num_trained"] == len(trained)
    assert config.training["num_held_out"] == len(held_out) > 0
    assert config.training["tasks"] == {"even": 20, "odd": 20}
    assert config.training["rewards"] == ["letter"]
    assert config.training["settings"] == QUICK.to_dict()
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
    rows = train(features_of(40), identity, QUICK, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == rows
    assert [(row["epoch"], row["split"]) for row in rows] == [
        (epoch, split) for epoch in (1, 2, 3) for split in ("train", "validation")
    ]
    names = {"routers_loss", "macro_f1", "f1_skip", "f1_execute", "f1_repeat"}
    names |= {"acc_skip", "acc_repeat", "avg_layers", "epoch", "split"}
    assert set(rows[0]) == names | {"learning_rate"}
    assert set(rows[1]) == names


def test_validation_lines_are_absent_when_nothing_is_held_out(features_of, identity, tmp_path):
    rows = train(features_of(40), identity, config_of(validation_fraction=0.0), tmp_path)
    assert [row["split"] for row in rows] == ["train"] * 3


def test_the_weights_do_not_depend_on_the_held_out_labels(features_of, identity, tmp_path):
    features = features_of(40)
    _, held_out = hold_out(features.questions, QUICK.validation_fraction, QUICK.seed)
    labels = features.labels.clone()
    labels[held_out] = 2
    train(features, identity, QUICK, tmp_path / "one")
    train(replace(features, labels=labels), identity, QUICK, tmp_path / "two")
    one, two = (tmp_path / name / "routers.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_another_seed_gives_other_routers(features_of, identity, tmp_path):
    train(features_of(), identity, QUICK, tmp_path / "one")
    train(features_of(), identity, config_of(seed=1), tmp_path / "two")
    one, two = (RouterStack.load(tmp_path / name) for name in ("one", "two"))
    assert not torch.equal(one.hidden_weight, two.hidden_weight)


def test_progress_counts_every_step_once(features_of, identity, tmp_path):
    seen = []
    train(
        features_of(9),
        identity,
        config_of(num_epochs=2, warmup_steps=0),
        tmp_path,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(7)]


@pytest.mark.parametrize("num_targets", [1, 2])
def test_a_single_target_and_a_single_epoch_are_enough(
    features_of, identity, tmp_path, num_targets
):
    settings = config_of(num_epochs=1, warmup_steps=0)
    rows = train(features_of(num_targets), identity, settings, tmp_path)
    assert len(rows) == 1
    untrained = new_stack(features_of(1), features_of(1).labels, identity, settings)
    assert not torch.equal(RouterStack.load(tmp_path).hidden_weight, untrained.hidden_weight)


def test_targets_that_only_execute_train_routers_that_only_execute(features_of, identity, tmp_path):
    features = features_of(30)
    features = replace(features, labels=torch.ones_like(features.labels))
    rows = train(features, identity, config_of(num_epochs=10, learning_rate=0.05), tmp_path)
    assert rows[-1]["avg_layers"] == 3.0
    assert rows[-1]["f1_execute"] == 1.0
    assert rows[-1]["f1_skip"] is rows[-1]["acc_skip"] is rows[-1]["f1_repeat"] is None
    assert "| F1 skip | – | – |" in (tmp_path / "README.md").read_text()


def test_the_card_tells_model_data_metrics_and_use(features_of, identity, tmp_path):
    rows = train(features_of(40), identity, QUICK, tmp_path)
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
    train(features_of(), {**identity, "id": "smollm2-135m", "revision": None}, QUICK, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model:" not in card
    assert "`smollm2-135m`: LlamaForCausalLM" in card


def test_features_of_another_number_of_windows_are_refused(features_of, identity, tmp_path):
    with pytest.raises(ConfigError, match="--num-windows is 8, but the features were pooled in 4"):
        train(features_of(), identity, config_of(num_windows=8), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_before_training(features_of, identity, tmp_path):
    (tmp_path / "file").write_text("in the way")
    seen = []
    with pytest.raises(CheckpointError, match=r"can't write to .*file/routers"):
        train(
            features_of(),
            identity,
            QUICK,
            tmp_path / "file" / "routers",
            on_progress=lambda *progress: seen.append(progress),
        )
    assert seen == []
