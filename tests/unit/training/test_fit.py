"""Several runs in one computation against each alone, and against plain torch."""

from dataclasses import replace

import pytest
import torch

from drllm.config import TrainConfig
from drllm.errors import ConfigError
from drllm.models.routers.stack import RouterStack
from drllm.training import fit as fit_module
from drllm.training.features import Features
from drllm.training.fit import Fit
from drllm.training.losses import class_weights
from drllm.training.plans import Plan, new_stack
from drllm.training.split import epoch_batches

EXACT = 1e-10
"""float64: only the order of additions differs."""
ROUNDING = 1e-5
"""float32, weights of size about 0.3: products of other shapes add in another order; 1e-6 was
measured after 3 epochs."""

QUICK = TrainConfig(
    num_epochs=3,
    gradient_accumulation=4,
    num_windows=4,
    router_width=5,
    warmup_steps=2,
    learning_rate=0.01,
)


def config_of(**changes) -> TrainConfig:
    return replace(QUICK, **changes)


MANY = [
    config_of(),
    config_of(seed=1),
    config_of(learning_rate=0.05, weight_decay=0.5),
    config_of(gradient_accumulation=7, num_epochs=2),
    config_of(gradient_accumulation=100, warmup_steps=0),
    config_of(loss="cross_entropy", class_weights="none", logit_adjustment=1.0),
    config_of(dropout=0.4, seed=2),
    config_of(normalise_features=True, gamma=0.5, beta=0.9),
    config_of(num_epochs=9, early_stopping=1, learning_rate=0.3, validation_fraction=0.3),
    config_of(soft_targets=True, validation_fraction=0.0),
]
NAMED = ("hidden_weight", "hidden_bias", "decision_weight", "decision_bias")
NAMES = [str(number) for number in range(len(MANY))]


def in_double(features):
    return replace(features, means=features.means.double())


def fitted(features, identity, configs, *, soft=None, dtype=torch.float64) -> Fit:
    plans = [Plan.of(features, config, soft) for config in configs]
    fit = Fit(features, identity, plans, dtype=dtype)
    while fit.active:
        fit.epoch()
    return fit


@pytest.fixture
def soft():
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(40, 3, 3, dtype=torch.float64, generator=generator)
    return drawn / drawn.sum(dim=-1, keepdim=True)


# --- against plain torch -----------------------------------------------------------------------


def slow_fit(features, identity, config) -> RouterStack:
    """One run, one example at a time, with torch's optimiser and the routers' own forward."""
    plan = Plan.of(features, config)
    stack = new_stack(features, plan, identity).double()
    weights = [weight for name, weight in stack.named_parameters() if not name.endswith("bias")]
    biases = [weight for name, weight in stack.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": config.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
    )
    labels = features.labels[plan.trained].flatten().tolist()
    weight = class_weights([labels.count(decision) for decision in range(3)], config.beta)
    step = 0
    for epoch in range(1, config.num_epochs + 1):
        for rows in epoch_batches(plan.trained, config.gradient_accumulation, config.seed, epoch):
            optimizer.zero_grad()
            for row in rows:
                logits = stack(features.means[row : row + 1], features.filled[row : row + 1])[0]
                p = logits.softmax(dim=-1).gather(1, features.labels[row][:, None])[:, 0]
                weighed = torch.tensor(weight, dtype=torch.float64)[features.labels[row]]
                loss = (weighed * (1 - p) ** config.gamma * -p.log()).mean()
                (loss / len(rows)).backward()
            for group in optimizer.param_groups:
                group["lr"] = plan.schedule.rate(step)
            optimizer.step()
            step += 1
    return stack


def test_runs_side_by_side_equal_one_example_at_a_time(features_of, identity):
    features = in_double(features_of(40))
    configs = [config_of(), config_of(seed=5, learning_rate=0.03, gradient_accumulation=7)]
    fit = fitted(features, identity, configs)
    for run, config in enumerate(configs):
        slow = slow_fit(features, identity, config)
        for name, weight in slow.named_parameters():
            found = fit.kept[run][name]
            expected = weight.data if name.endswith("bias") else weight.data.transpose(1, 2)
            torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


# --- in any company ----------------------------------------------------------------------------


@pytest.fixture
def together(features_of, identity, soft):
    return fitted(in_double(features_of(40)), identity, MANY, soft=soft)


@pytest.mark.parametrize("run", range(len(MANY)), ids=NAMES)
def test_a_run_does_not_depend_on_those_beside_it(features_of, identity, soft, together, run):
    alone = fitted(in_double(features_of(40)), identity, [MANY[run]], soft=soft)
    for name, expected in alone.kept[0].items():
        torch.testing.assert_close(together.kept[run][name], expected, rtol=0, atol=EXACT)
    assert [row["epoch"] for row in alone.rows[0]] == [row["epoch"] for row in together.rows[run]]
    for mine, theirs in zip(alone.rows[0], together.rows[run], strict=True):
        assert mine == pytest.approx(theirs, abs=EXACT)


def test_all_these_runs_differ(together):
    """Otherwise the test above could not tell a run from its neighbour."""
    weights = [together.kept[run]["hidden_weight"] for run in range(len(MANY))]
    for number, weight in enumerate(weights):
        assert all((weight - other).abs().max() > 1e-4 for other in weights[:number])


def test_in_single_precision_company_changes_last_bits_at_most(features_of, identity, soft):
    features = features_of(40)
    together = fitted(features, identity, MANY, soft=soft, dtype=torch.float32)
    for run, config in enumerate(MANY):
        alone = fitted(features, identity, [config], soft=soft, dtype=torch.float32)
        for name, expected in alone.kept[0].items():
            torch.testing.assert_close(together.kept[run][name], expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("runs_at_once", [1, 3])
def test_runs_computed_in_groups_are_those_computed_at_once(
    features_of, identity, soft, together, monkeypatch, runs_at_once
):
    one = 4 * 3 * 4 * 6 * 8  # bytes of 4 rows
    monkeypatch.setattr(fit_module, "AT_ONCE_ON_CPU", runs_at_once * one)
    grouped = fitted(in_double(features_of(40)), identity, MANY, soft=soft)
    for run in range(len(MANY)):
        for name, expected in together.kept[run].items():
            torch.testing.assert_close(grouped.kept[run][name], expected, rtol=0, atol=EXACT)


def test_runs_computed_one_after_the_other_have_the_bits_of_each_alone(
    features_of, identity, soft, monkeypatch
):
    monkeypatch.setattr(fit_module, "AT_ONCE_ON_CPU", 1)
    features = features_of(40)
    together = fitted(features, identity, MANY, soft=soft, dtype=torch.float32)
    for run, config in enumerate(MANY):
        alone = fitted(features, identity, [config], soft=soft, dtype=torch.float32)
        assert all(torch.equal(together.kept[run][name], alone.kept[0][name]) for name in NAMED)


def test_runs_of_other_shapes_are_not_mixed(features_of, identity):
    with pytest.raises(ConfigError, match="--router-width 5 and 6 can't be trained together"):
        fitted(features_of(), identity, [config_of(), config_of(router_width=6)])


def test_a_loss_that_is_not_finite_is_refused_with_run_and_rate(features_of, identity):
    features = features_of()
    configs = [config_of(validation_fraction=0.0), config_of(learning_rate=1e30, warmup_steps=0)]
    with pytest.raises(ConfigError, match=r"loss of run 2 of 2 became nan at a learning rate of"):
        fitted(features, identity, configs, dtype=torch.float32)


# --- what is read ------------------------------------------------------------------------------


class Watched:
    """Features that count how many rows are asked for at once."""

    def __init__(self, features) -> None:
        self.labels, self.filled = features.labels, features.filled
        self.questions, self.tasks = features.questions, features.tasks
        self.features, self.most = features, 0
        self.num_targets = features.num_targets

    def rows(self, index):
        self.most = max(self.most, len(index))
        return self.features.rows(index)


def test_rows_are_read_a_batch_at_a_time(features_of, identity):
    watched = Watched(features_of(200))
    configs = [config_of(num_epochs=1, normalise_features=True), config_of(num_epochs=1, seed=1)]
    fitted(watched, identity, configs, dtype=torch.float32)
    assert watched.most <= 32


@pytest.mark.parametrize("windows", [8, 16, 32])
def test_any_number_of_windows_is_trained_on(identity, windows):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60, 3), generator=generator)
    means = torch.randn(60, 3, windows, 6, generator=generator)
    means[..., 0] += 4 * (labels[..., None] - 1)
    features = Features(
        means=means,
        filled=torch.full((60,), windows),
        labels=labels,
        questions=tuple(str(row) for row in range(60)),
        tasks=("own",) * 60,
    )
    config = config_of(num_windows=windows, num_epochs=20)
    fit = fitted(features, identity, [config], dtype=torch.float32)
    first, last = fit.rows[0][1], fit.rows[0][-1]
    assert last["macro_f1"] > 0.9
    assert last["routers_loss"] < 0.5 * first["routers_loss"]
    logits = fit.routers(0)(features.means, features.filled)
    assert (logits.argmax(dim=-1) == labels).double().mean() > 0.9
