"""Temperature and calibration error, against a grid of temperatures and sums done by hand."""

import math
from dataclasses import replace

import pytest
import torch
from small import IDENTITY, QUICK, make_features

from drllm.models.routers.checkpoint import load_routers
from drllm.training import temperature as temperature_module
from drllm.training.stage import train_on
from drllm.training.temperature import (
    BINS,
    HIGHEST,
    LOWEST,
    calibration_error,
    fit_temperature,
    measure,
)
from drllm.training.trainer import Trainer, hold_out

CONFIG = replace(QUICK, validation_fraction=0.3)
FEATURES = make_features(60)
FINE = 1e-3
"""Ratio of two temperatures of the grid, less 1."""


def slow_nll(logits, targets, temperature: float) -> float:
    """Mean over decisions of −Σ q log p, a decision at a time."""
    total = 0.0
    for said, wanted in zip(logits.tolist(), targets.tolist(), strict=True):
        powers = [math.exp(value / temperature) for value in said]
        total -= sum(
            q * math.log(power / sum(powers)) for q, power in zip(wanted, powers, strict=True)
        )
    return total / len(logits)


def drawn(number: int, sharpness: float, *, soft: bool = False):
    """Logits, and targets drawn from them; then the logits are taken too sharply."""
    generator = torch.Generator().manual_seed(number)
    logits = 2 * torch.randn(number, 3, generator=generator, dtype=torch.float64)
    targets = logits.softmax(dim=-1)
    if not soft:
        labels = torch.multinomial(targets, 1, generator=generator)[:, 0]
        targets = torch.nn.functional.one_hot(labels, 3).double()
    return logits * sharpness, targets


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_best_of_a_fine_grid(sharpness, soft):
    logits, targets = drawn(60, sharpness, soft=soft)
    found = fit_temperature(logits, targets)
    steps = range(round(math.log(LOWEST / 1) / FINE / 2), round(math.log(HIGHEST) / FINE / 2))
    grid = [math.exp(2 * FINE * step) for step in steps if step % 20 == 0]
    best = min(grid, key=lambda temperature: slow_nll(logits, targets, temperature))
    near = [best * math.exp(2 * FINE * step) for step in range(-20, 21)]
    best = min(near, key=lambda temperature: slow_nll(logits, targets, temperature))
    assert found == pytest.approx(best, rel=2 * FINE)


def test_soft_targets_that_are_the_probabilities_themselves_give_back_the_sharpness():
    logits, targets = drawn(50, 3.5, soft=True)
    assert fit_temperature(logits, targets) == pytest.approx(3.5, rel=1e-9)


def test_a_temperature_beyond_the_range_ends_at_its_edge():
    logits = torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.0, -1.0]]).double()
    right = torch.tensor([[0.0, 1.0, 0.0]] * 2).double()
    wrong = torch.tensor([[0.5, 0.0, 0.5]] * 2).double()
    assert fit_temperature(logits, right) == LOWEST
    assert fit_temperature(100 * logits, right) == LOWEST  # all but certain at any temperature
    assert fit_temperature(logits, wrong) == HIGHEST


def test_logits_that_say_nothing_keep_the_temperature_at_one():
    assert (
        fit_temperature(torch.full((4, 3), 7.0).double(), torch.eye(3).double()[[0, 1, 1, 2]]) == 1
    )


def test_the_calibration_error_of_a_small_table_done_by_hand(monkeypatch):
    """Two bins of three: |0.5 − 1/3| and |0.9 − 2/3|, in any order of the decisions."""
    monkeypatch.setattr(temperature_module, "BINS", 2)
    confidence = torch.tensor([0.95, 0.4, 0.9, 0.5, 0.85, 0.6]).double()
    hits = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    expected = (3 * (0.5 - 1 / 3) + 3 * (0.9 - 2 / 3)) / 6
    assert calibration_error(confidence, hits) == pytest.approx(expected)


def test_decisions_of_equal_confidence_may_come_in_any_order():
    confidence = torch.full((40,), 0.75)
    hits = torch.tensor([1.0] * 30 + [0.0] * 10)
    for order in (hits, hits.flip(0)):
        assert calibration_error(confidence, order) == pytest.approx(0.0, abs=1e-12)


def test_calibrated_probabilities_have_a_small_error_and_overconfident_ones_a_large_one():
    logits, targets = drawn(20_000, 1.0)
    sure, decided = logits.softmax(dim=-1).max(dim=-1)
    too_sure = (3 * logits).softmax(dim=-1).amax(dim=-1)
    hits = targets.gather(1, decided[:, None])[:, 0]
    assert calibration_error(sure, hits) < 0.02
    assert calibration_error(too_sure, hits) > 0.1


def told_of(folder, config=CONFIG, features=FEATURES):
    """Train; the routers, and what their config tells of the temperature."""
    train_on(features, IDENTITY, config, folder)
    routers = load_routers(folder)
    return routers, routers.config.training.get("calibration")


def test_training_tells_what_a_slow_loop_over_the_held_out_targets_finds(tmp_path):
    routers, told = told_of(tmp_path)
    _, held_out = hold_out(FEATURES.questions, 0.3, CONFIG.seed)
    said = routers(FEATURES.rows(held_out), FEATURES.filled[held_out]).detach()
    logits = said.double().flatten(0, 1)
    targets = torch.eye(3)[FEATURES.labels[held_out]].double().flatten(0, 1)
    assert told["num_decisions"] == len(logits) == 3 * len(held_out)

    found = told["temperature"]
    slow = {scale: slow_nll(logits, targets, found * scale) for scale in (1 / found, 1, 0.9, 1.1)}
    assert told["nll_before"] == pytest.approx(slow[1 / found], rel=1e-5)
    assert told["nll_after"] == pytest.approx(slow[1], rel=1e-5)
    assert slow[1] < min(slow[0.9], slow[1.1])
    assert told["nll_after"] <= told["nll_before"]
    assert 0 <= told["ece_after"] <= 1
    assert told["bins"] == BINS


def test_without_being_asked_for_the_temperature_is_told_and_the_weights_stay(tmp_path):
    """Calibrated weights are the others divided; so their decisions are the same."""
    plain, untold = told_of(tmp_path / "plain")
    calibrated, told = told_of(tmp_path / "calibrated", replace(CONFIG, calibrate=True))
    assert told == untold
    assert told["temperature"] != pytest.approx(1.0, abs=0.01)
    assert torch.equal(plain.hidden_weight, calibrated.hidden_weight)
    before, after = (each(FEATURES.means, FEATURES.filled) for each in (plain, calibrated))
    torch.testing.assert_close(after * told["temperature"], before, rtol=1e-5, atol=1e-6)
    assert torch.equal(after.argmax(dim=-1), before.argmax(dim=-1))
    assert "- calibrate: True" in (tmp_path / "calibrated" / "README.md").read_text()


def test_calibrated_routers_need_no_further_temperature(tmp_path):
    config = replace(CONFIG, calibrate=True)
    routers, told = told_of(tmp_path, config)
    again = measure(routers, Trainer(FEATURES, IDENTITY, config))
    assert again.temperature == pytest.approx(1.0, abs=1e-5)
    assert again.nll_before == pytest.approx(told["nll_after"], rel=1e-6)
    assert again.ece_before == pytest.approx(told["ece_after"], abs=1e-6)


def test_without_held_out_targets_nothing_is_told(tmp_path):
    assert told_of(tmp_path, features=make_features(9))[1] is None


def test_a_temperature_at_the_edge_is_said(caplog):
    features = replace(make_features(30), labels=torch.ones(30, 3, dtype=torch.int64))
    trainer = Trainer(features, IDENTITY, replace(CONFIG, calibrate=True))
    routers = trainer.routers()
    with torch.no_grad():
        routers.decision_weight.zero_()
        routers.decision_bias[:, 1] = 5.0
    assert measure(routers, trainer).temperature == LOWEST
    assert "lies beyond 0.05" in caplog.text
