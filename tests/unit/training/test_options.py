"""What each setting of the training changes, and that it does nothing else."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.training.examples import moments
from drllm.training.fit import Fit
from drllm.training.plans import Plan, new_stack, objective

QUICK = TrainConfig(
    num_epochs=4,
    gradient_accumulation=4,
    num_windows=4,
    router_width=5,
    warmup_steps=2,
    learning_rate=0.02,
)


def config_of(**changes) -> TrainConfig:
    return replace(QUICK, **changes)


def fitted(features, identity, config, soft=None) -> Fit:
    fit = Fit(features, identity, [Plan.of(features, config, soft)])
    while fit.active:
        fit.epoch()
    return fit


def loss_of(features, config, logits, rows, soft=None) -> float:
    """A batch's loss under settings, logits `[B, L, C]`."""
    plan = Plan.of(features, config, soft)
    goal = objective([plan], torch.float64, "cpu")
    shares = torch.full((1, len(rows)), 1 / len(rows), dtype=torch.float64)
    return float(goal(logits[None], plan.targets[rows][None], shares))


@pytest.fixture
def features(features_of):
    return features_of(40)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 3, 3, dtype=torch.float64, generator=generator)


def slow_loss(logits, labels, weight_of, gamma) -> float:
    losses = []
    for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        for layer, (three, label) in enumerate(zip(row_logits, row_labels, strict=True)):
            p = math.exp(three[label]) / sum(map(math.exp, three))
            losses.append(-weight_of(layer, label) * (1 - p) ** gamma * math.log(p))
    return sum(losses) / len(losses)


# --- the loss ----------------------------------------------------------------------------------


def weights_by_frequency(features, beta):
    labels = features.labels.flatten().tolist()
    inverse = [(1 - beta) / (1 - beta ** labels.count(decision)) for decision in range(3)]
    return [3 * value / sum(inverse) for value in inverse]


@pytest.mark.parametrize(("gamma", "beta"), [(2.0, 0.999), (0.5, 0.9), (0.0, 0.999)])
def test_the_focal_loss_has_the_exponent_and_the_weights_that_are_set(
    features, logits, gamma, beta
):
    config = config_of(gamma=gamma, beta=beta, validation_fraction=0.0)
    weights = weights_by_frequency(features, beta)
    expected = slow_loss(logits, features.labels[:4], lambda _, label: weights[label], gamma)
    assert expected == pytest.approx(loss_of(features, config, logits, [0, 1, 2, 3]), rel=1e-9)


def test_cross_entropy_without_class_weights_is_that_of_torch(features, logits):
    config = config_of(loss="cross_entropy", class_weights="none")
    expected = F.cross_entropy(logits.flatten(0, 1), features.labels[:4].flatten())
    found = loss_of(features, config, logits, [0, 1, 2, 3])
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_class_weights_can_be_left_out_of_the_focal_loss(features, logits):
    expected = slow_loss(logits, features.labels[:4], lambda *_: 1.0, 2.0)
    found = loss_of(features, config_of(class_weights="none"), logits, [0, 1, 2, 3])
    assert found == pytest.approx(expected, rel=1e-12)
    assert Plan.of(features, config_of(class_weights="none")).class_weights == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_logit_adjustment_adds_the_log_frequency_of_each_layer(features_of, logits, tau):
    features = features_of(200)
    config = config_of(
        loss="cross_entropy", class_weights="none", logit_adjustment=tau, validation_fraction=0.0
    )
    counts = torch.stack([(features.labels == decision).sum(dim=0) for decision in range(3)], 1)
    assert (counts > 0).all()
    adjusted = logits + tau * (counts / 200).double().log()
    expected = F.cross_entropy(adjusted.flatten(0, 1), features.labels[:4].flatten())
    found = loss_of(features, config, logits, [0, 1, 2, 3])
    assert found == pytest.approx(float(expected), rel=1e-6)  # `expected` has float32 frequencies


def test_logit_adjustment_takes_the_label_frequencies_out_of_the_logits(features_of, identity):
    """On inputs that tell nothing, where plain training learns the frequencies alone."""
    features = features_of(200)
    blind = replace(features, means=torch.zeros_like(features.means))
    plain = config_of(
        loss="cross_entropy", class_weights="none", num_epochs=60, gradient_accumulation=50
    )

    def spread(config) -> float:
        """Mean standard deviation of the logits that the routers give to the three decisions."""
        routers = fitted(blind, identity, config).routers(0)
        return float(routers(blind.means, blind.filled).std(dim=-1).mean().detach())

    assert spread(replace(plain, logit_adjustment=1.0)) < 0.1 * spread(plain)


def test_a_decision_that_a_layer_lacks_does_not_stop_logit_adjustment(features, identity):
    labels = features.labels.clone()
    labels[:, 1] = 1
    rare = replace(features, labels=labels)
    fit = fitted(rare, identity, config_of(logit_adjustment=1.0, num_epochs=20))
    said = fit.routers(0)(rare.means, rare.filled)
    assert said.isfinite().all()
    assert (said[:, 1].argmax(dim=-1) == 1).all()


# --- soft targets ------------------------------------------------------------------------------


@pytest.fixture
def soft(features):
    mixed = F.one_hot(features.labels, 3).double()
    mixed[::2] = 0.6 * mixed[::2] + 0.4 * torch.tensor([0.0, 1.0, 0.0])
    return mixed


def test_soft_targets_replace_the_labels_in_the_loss(features, logits, soft):
    config = config_of(loss="cross_entropy", class_weights="none", soft_targets=True)
    expected = F.cross_entropy(logits.flatten(0, 1), soft[:4].flatten(0, 1))
    found = loss_of(features, config, logits, [0, 1, 2, 3], soft)
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_soft_targets_are_left_alone_where_they_are_not_wanted(features, logits, soft):
    found = loss_of(features, config_of(), logits, [0, 1, 2, 3], soft)
    assert found == loss_of(features, config_of(), logits, [0, 1, 2, 3])


def test_soft_targets_count_in_the_class_weights_by_their_shares(features, soft):
    plan = Plan.of(features, config_of(soft_targets=True, validation_fraction=0.0), soft)
    counts = soft.sum(dim=(0, 1)).tolist()
    inverse = [(1 - 0.999) / (1 - 0.999**count) for count in counts]
    assert plan.class_weights == pytest.approx([3 * value / sum(inverse) for value in inverse])
    assert plan.label_counts == Plan.of(features, config_of(validation_fraction=0.0)).label_counts


def test_routers_learn_the_shares_of_soft_targets(features, identity):
    """On inputs that tell nothing, routers end with the mean of the targets."""
    blind = replace(features, means=torch.zeros_like(features.means))
    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).expand(40, 3, 3)
    config = config_of(loss="cross_entropy", class_weights="none", soft_targets=True, num_epochs=60)
    said = fitted(blind, identity, config, shares).routers(0)(blind.means, blind.filled)
    torch.testing.assert_close(said.softmax(dim=-1), shares.float(), rtol=0, atol=0.01)


# --- the routers' inputs and units -------------------------------------------------------------


def test_dropout_leaves_out_the_share_of_units_and_scales_the_others(features, identity):
    fit = Fit(features, identity, [Plan.of(features, config_of(dropout=0.4))])
    batch = fit.reader.read([0], [[0, 1, 2, 3]])
    draws = [fit._kept_units(fit.plans, batch, epoch, 0) for epoch in range(1, 101)]
    kept = torch.cat(draws)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert float((kept == 0).double().mean()) == pytest.approx(0.4, abs=0.02)
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], fit._kept_units(fit.plans, batch, 1, 0))


def test_dropout_changes_what_is_learnt_and_not_how_it_is_measured(features, identity):
    plain = fitted(features, identity, config_of(learning_rate=1e-12))
    dropped = fitted(features, identity, config_of(learning_rate=1e-12, dropout=0.5))
    # Nothing is learnt, so the held-out loss, which is measured without dropout, is the same.
    losses = [[row["routers_loss"] for row in fit.rows[0]] for fit in (plain, dropped)]
    assert losses[1][1::2] == pytest.approx(losses[0][1::2], rel=1e-5)
    assert losses[1][0::2] != pytest.approx(losses[0][0::2], rel=1e-2)


def test_normalised_features_are_folded_into_the_weights(features, identity):
    """Routers that read features as they are say what those in training say of scaled ones."""
    shifted = replace(features, means=features.means * 3 + 2)
    fit = fitted(shifted, identity, config_of(normalise_features=True))
    [plan] = fit.plans
    mean, deviation = moments(shifted, plan.trained)
    scaled = ((shifted.means.double() - mean[:, None]) / deviation[:, None]).float()
    trained = new_stack(shifted, plan, identity)
    for name, weight in trained.named_parameters():
        value = fit.kept[0][name]
        weight.data.copy_(value if name.endswith("bias") else value.transpose(1, 2))
    torch.testing.assert_close(
        fit.routers(0)(shifted.means, shifted.filled),
        trained(scaled, shifted.filled),
        rtol=1e-4,
        atol=1e-5,
    )


def test_normalised_training_does_not_see_how_features_are_scaled(features, identity):
    moved = replace(features, means=torch.where(features.means != 0, features.means * 7 + 4, 0.0))
    config = config_of(normalise_features=True)
    one, other = fitted(features, identity, config), fitted(moved, identity, config)
    for name in one.kept[0]:
        torch.testing.assert_close(one.kept[0][name], other.kept[0][name], rtol=0, atol=1e-4)
    plain = fitted(moved, identity, config_of())
    assert (plain.kept[0]["hidden_weight"] - one.kept[0]["hidden_weight"]).abs().max() > 1e-2


def test_held_out_targets_have_no_part_in_the_scale(features, identity):
    config = config_of(normalise_features=True, validation_fraction=0.3)
    plan = Plan.of(features, config)
    means = features.means.clone()
    means[plan.held_out] *= 50
    one = fitted(features, identity, config)
    other = fitted(replace(features, means=means), identity, config)
    assert torch.equal(one.kept[0]["hidden_weight"], other.kept[0]["hidden_weight"])


# --- stopping early ----------------------------------------------------------------------------


STOPPING = config_of(
    num_epochs=40, learning_rate=0.3, validation_fraction=0.3, early_stopping=3, warmup_steps=0
)


def test_stopping_early_keeps_the_epoch_with_the_lowest_held_out_loss(features, identity):
    fit = fitted(features, identity, STOPPING)
    losses = [row["routers_loss"] for row in fit.rows[0] if row["split"] == "validation"]
    best = losses.index(min(losses)) + 1
    assert fit.best[0] == (best, min(losses))
    assert len(losses) == min(best + 3, 40) < 40
    goes_on = Fit(features, identity, [Plan.of(features, STOPPING)])
    for _ in range(best):
        goes_on.epoch()
    assert torch.equal(fit.kept[0]["hidden_weight"], goes_on.weights["hidden_weight"][0])


def test_a_run_that_never_waits_too_long_keeps_its_best_epoch_too(features, identity):
    fit = fitted(features, identity, replace(STOPPING, num_epochs=6, early_stopping=30))
    losses = [row["routers_loss"] for row in fit.rows[0] if row["split"] == "validation"]
    assert len(losses) == 6
    assert fit.best[0] == (losses.index(min(losses)) + 1, min(losses))


def test_stopping_early_needs_something_held_out(features_of):
    message = "--early-stopping 3 has no effect: of 9 targets none is held out"
    with pytest.raises(ConfigError, match=message):
        Plan.of(features_of(9), STOPPING)


# --- without effect ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"loss": "cross_entropy", "gamma": 1.0},
            "--gamma 1 has no effect with --loss cross_entropy; leave one of the two out",
        ),
        (
            {"class_weights": "none", "beta": 0.9},
            "--beta 0.9 has no effect with --class-weights none",
        ),
        (
            {"early_stopping": 2, "validation_fraction": 0.0},
            "--early-stopping 2 has no effect with --validation-fraction 0",
        ),
        ({"soft_targets": True}, "--soft-targets is on, but no soft targets are given"),
    ],
)
def test_a_setting_without_effect_is_refused(features, given, message):
    with pytest.raises(ConfigError, match=message):
        Plan.of(features, config_of(**given))


# --- what is told ------------------------------------------------------------------------------


def notes(features, **changes) -> list[str]:
    return Plan.of(features, config_of(**changes)).notes()


def test_a_usual_run_has_nothing_to_tell(features_of):
    assert notes(features_of(200)) == []


def test_a_warm_up_longer_than_the_run_is_told(features_of):
    assert notes(features_of(200), warmup_steps=500, validation_fraction=0.0) == [
        "--warmup-steps is 500, but the run has only 200 steps; warming up for 20 instead"
    ]


def test_targets_that_only_execute_are_told(features):
    full = replace(features, labels=torch.ones_like(features.labels))
    assert notes(full) == [
        "every target executes every layer, so the routers can only learn the full path"
    ]


def test_decisions_that_a_layer_lacks_are_told(features_of):
    features = features_of(200)
    labels = features.labels.clamp(max=1)
    labels[:, 2] = 1
    assert notes(replace(features, labels=labels)) == [
        "some decisions are no target at some layers, where they can't be learnt: skip at 1 of 3, "
        "repeat at all of 3 layers"
    ]


def test_a_single_target_is_told(features_of):
    told = notes(features_of(1), num_epochs=9)
    assert told[0] == "there is only 1 target to train on; the routers will repeat it for all"
