"""One training: against plain torch, what each setting changes, and when it ends."""

import math
from dataclasses import replace

import pytest
import torch
from small import IDENTITY, QUICK, make_features
from torch.nn import functional as F

from drllm.agreement import Counts, compute_metrics
from drllm.config import TrainConfig
from drllm.training.features import Features
from drllm.training.losses import compute_class_weights, compute_focal_losses
from drllm.training.trainer import DivergedError, Trainer, count_decisions

FEATURES = make_features(40)
ONE_HOT = F.one_hot(FEATURES.labels, 3).double()
PLAIN = {"loss": "cross_entropy", "class_weights": "none"}


def config_of(**changes) -> TrainConfig:
    return replace(QUICK, **{"num_epochs": 4, "learning_rate": 0.02, **changes})


def fitted(features, config, dtype=torch.float32) -> Trainer:
    trainer = Trainer(features, IDENTITY, config, dtype=dtype)
    while not trainer.is_over:
        trainer.train_epoch()
    return trainer


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.stack.state_dict())


def loss_of(trainer, logits, rows) -> float:
    """A batch's loss under a training's settings, logits `[B, L, C]`."""
    return float(trainer.compute_loss(logits, rows))


def prepared(features=FEATURES, **changes) -> Trainer:
    """A training of the features in float64, before its first step."""
    return Trainer(features, IDENTITY, config_of(**changes), dtype=torch.float64)


def test_routers_are_the_same_whether_or_not_memory_holds_all_features(monkeypatch):
    config = config_of()
    held = fitted(FEATURES, config)
    monkeypatch.setattr("drllm.training.trainer.free_bytes", lambda device: 0)
    read_anew = fitted(FEATURES, config)
    assert held.inputs is not None
    assert read_anew.inputs is None
    assert held.metrics == read_anew.metrics
    for name, weights in weights_of(held).items():
        assert torch.equal(weights, weights_of(read_anew)[name])


def test_rows_are_read_a_batch_at_a_time():
    sizes = []

    class Watched(Features):
        def rows(self, index):
            sizes.append(len(index))
            return Features.rows(self, index)

    config = config_of(num_epochs=1)
    rows = make_features(200)
    fitted(Watched(**{name: getattr(rows, name) for name in Features.__slots__}), config)
    assert max(sizes) <= 32


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 9e18, "warmup_steps": 0},
        {"learning_rate": 9e18, "warmup_steps": 0, "num_epochs": 1, "gradient_accumulation": 100},
    ],
    ids=["while training", "in the last step"],
)
def test_a_loss_that_is_not_finite_is_refused_with_the_rate(changes):
    with pytest.raises(DivergedError, match=r"loss became .* with --learning-rate 9e\+"):
        fitted(FEATURES, config_of(**changes)).evaluate()


def with_steps(steps: int, warmup: float) -> Trainer:
    rows = make_features(3)
    return prepared(rows, num_epochs=steps, warmup_steps=warmup, learning_rate=8.0)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    expected = [2.0, 4.0, 6.0, 8.0, 4 + 4 * math.cos(math.pi / 4), 4.0, 4 - 4 * math.sqrt(0.5)]
    assert expected == pytest.approx([with_steps(7, 3).schedule.rate(step) for step in range(7)])


@pytest.mark.parametrize("steps", [1, 2, 250, 500])
def test_a_warm_up_as_long_as_the_run_is_shortened_to_a_tenth(steps):
    trainer = with_steps(steps, 500)
    assert (trainer.schedule.num_warmup_steps, trainer.schedule.num_steps) == (steps // 10, steps)
    assert max(trainer.schedule.rate(step) for step in range(steps)) == 8.0


def test_a_warm_up_that_fits_is_kept_and_below_one_it_is_a_share_of_the_steps():
    settings = [249, 1, 0.1, 0.99, 0.0]
    assert [with_steps(250, value).schedule.num_warmup_steps for value in settings] == [
        249,
        1,
        25,
        247,
        0,
    ]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(4, 3, 3, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("gamma", "beta", "kind"),
    [(2.0, 0.999, "effective_number"), (0.5, 0.9, "effective_number"), (2.0, 0.0, "none")],
)
def test_the_focal_loss_has_the_exponent_and_the_weights_that_are_set(logits, gamma, beta, kind):
    counts = FEATURES.labels.flatten().bincount().tolist()
    weights = compute_class_weights(counts, beta)
    losses = compute_focal_losses(
        logits, FEATURES.labels[:4], torch.tensor(weights).double(), gamma
    )
    changes = {"beta": beta} if beta else {}
    trainer = prepared(gamma=gamma, class_weights=kind, validation_fraction=0.0, **changes)
    assert trainer.class_weights == weights
    assert loss_of(trainer, logits, range(4)) == pytest.approx(float(losses.mean()), rel=1e-7)


def test_cross_entropy_without_class_weights_is_that_of_torch(logits):
    expected = F.cross_entropy(logits.flatten(0, 1), FEATURES.labels[:4].flatten())
    result = loss_of(prepared(**PLAIN), logits, range(4))
    assert result == pytest.approx(float(expected), rel=1e-12)


def test_a_training_blind_to_the_input_learns_the_shares_of_the_decisions():
    blind = replace(FEATURES, means=torch.zeros_like(FEATURES.means))
    fit = {"num_epochs": 200, "gradient_accumulation": 40, "validation_fraction": 0.0}
    trainer = fitted(blind, config_of(**PLAIN, **fit))
    shares = trainer.build_routers()(blind.means, blind.filled).softmax(dim=-1)[0].double()
    expected = ONE_HOT.mean(dim=0)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)


def test_a_usual_run_has_nothing_to_tell():
    assert prepared(make_features(200)).notes() == []


@pytest.mark.parametrize(
    ("number", "labels_of", "changes", "note"),
    [
        (200, torch.ones_like, {}, "every target executes every layer"),
        (1, torch.clone, {"num_epochs": 9}, "only 1 target"),
        (
            200,
            torch.clone,
            {"warmup_steps": 500, "validation_fraction": 0.0},
            "--warmup-steps is 500, but the run has only 200 steps; warming up for 20",
        ),
    ],
)
def test_what_is_unusual_is_told(number, labels_of, changes, note):
    features = make_features(number)
    result = prepared(replace(features, labels=labels_of(features.labels)), **changes).notes()
    assert note in result[0]
    assert len(result) == 1 or number == 1


def batch(rows: int = 20, layers: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, layers, 3, generator=generator)
    labels = torch.randint(3, (rows, layers), generator=generator)
    return logits, labels


def pairs(logits, labels) -> list[tuple[int, int]]:
    """(label, decision) of every layer, one by one."""
    decided = [three.index(max(three)) for three in logits.flatten(end_dim=-2).tolist()]
    return list(zip(labels.flatten().tolist(), decided, strict=True))


def f1_of(pairs: list[tuple[int, int]], cls: int) -> float:
    hits = sum(label == decision == cls for label, decision in pairs)
    precision = hits / sum(decision == cls for _, decision in pairs)
    recall = hits / sum(label == cls for label, _ in pairs)
    return 2 * precision * recall / (precision + recall)


def test_each_layer_is_counted_by_itself_and_counts_of_parts_add_up():
    logits, labels = batch()
    decided = logits.argmax(dim=-1)
    counts = count_decisions(decided, labels, loss=2.0)
    for layer, confusion in enumerate(counts.confusion):
        result = pairs(logits[:, layer], labels[:, layer])
        expected = [[result.count((label, decided)) for decided in range(3)] for label in range(3)]
        assert [list(row) for row in confusion] == expected
    parts = [(slice(15), 1.0), (slice(15, 20), 5.0)]
    assert counts == sum(
        (count_decisions(decided[p], labels[p], loss) for p, loss in parts), Counts()
    )


def test_ratios_equal_their_definitions():
    logits, labels = batch(seed=1)
    result = pairs(logits, labels)
    measured = compute_metrics(count_decisions(logits.argmax(dim=-1), labels, loss=0.25))
    f1 = [f1_of(result, cls) for cls in range(3)]
    skips = [decision for label, decision in result if label == 0]
    repeats = [decision for label, decision in result if label == 2]
    assert measured == pytest.approx(
        {
            "routers_loss": 0.25,
            "accuracy": sum(label == decision for label, decision in result) / len(result),
            "macro_f1": sum(f1) / 3,
            "f1_skip": f1[0],
            "f1_execute": f1[1],
            "f1_repeat": f1[2],
            "acc_skip": skips.count(0) / len(skips),
            "acc_repeat": repeats.count(2) / len(repeats),
            "avg_layers": sum(decision for _, decision in result) / len(labels),
        }
    )


def test_a_class_decided_but_never_labelled_has_f1_zero():
    logits = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    measured = compute_metrics(
        count_decisions(logits.argmax(dim=-1), torch.tensor([[1, 1]]), loss=0.0)
    )
    assert measured["f1_repeat"] == 0.0
    assert measured["acc_repeat"] is None


def test_skipping_everything_still_costs_one_execution():
    logits = torch.tensor([[[1.0, 0.0, 0.0]] * 4, [[0.0, 0.0, 1.0]] * 4])
    assert (
        compute_metrics(
            count_decisions(logits.argmax(dim=-1), torch.ones(2, 4, dtype=torch.long), loss=0.0)
        )["avg_layers"]
        == 4.5
    )
