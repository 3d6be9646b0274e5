"""Baselines that are drawn: permuted routes, random decisions, label frequency."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from drllm.errors import CheckpointError
from drllm.evaluation.baselines.random_routes import (
    RandomDecisions,
    draw_decisions,
    expected_executions,
    permute_routes,
    tilt_frequencies,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_like(routes, generator):
    return (
        RandomDecisions(SimpleNamespace(num_layers=8), lambda: None)
        .make_run(routes, generator)
        .routing
    )


def random_routes(questions=30):
    return torch.randint(3, (questions, 8), generator=rng())


def rows_of(decisions):
    return [tuple(row) for row in decisions.tolist()]


def mean_executions(drawn):
    return float(drawn.sum(dim=1).double().mean())


@pytest.mark.parametrize(
    "draw",
    [
        permute_routes,
        random_like,
        lambda _, generator: draw_decisions(tilt_frequencies([[3, 4, 3]] * 8, 7.5), 30, generator),
    ],
    ids=["permuted", "random_like", "label_frequency"],
)
def test_draws_follow_from_the_seed_and_leave_the_routes_alone(draw):
    routes = random_routes()
    assert torch.equal(draw(routes, rng(1)), draw(routes, rng(1)))
    assert not torch.equal(draw(routes, rng(1)), draw(routes, rng(2)))
    assert torch.equal(routes, random_routes())


@pytest.mark.parametrize("questions", [1, 2, 3, 30])
def test_permuted_routes_are_the_same_routes(questions):
    routes = random_routes(questions)
    assert Counter(rows_of(routes)) == Counter(rows_of(permute_routes(routes, rng())))


def test_every_order_without_a_fixed_place_is_equally_likely():
    routes, generator = torch.arange(4)[:, None], rng()
    wanted = {
        order
        for order in itertools.permutations(range(4))
        if all(place != value for place, value in enumerate(order))
    }
    counts = Counter(tuple(permute_routes(routes, generator)[:, 0].tolist()) for _ in range(4500))
    assert wanted == set(counts)
    # 9 derangements, 500 each expected, standard deviation 21.
    assert all(400 < number < 600 for number in counts.values())


def test_no_question_keeps_its_route_unless_another_has_the_same():
    different = torch.arange(6)[:, None].expand(6, 4)
    assert not (different == permute_routes(different, rng())).any()
    routes = torch.tensor([[1, 1]] * 9 + [[0, 1]])
    assert (routes == permute_routes(routes, rng())).all(dim=1).sum() == 8


def test_every_question_keeps_its_numbers_of_skips_and_repeats():
    routes = random_routes()
    drawn = random_like(routes, rng())
    assert [sorted(row) for row in rows_of(routes)] == [sorted(row) for row in rows_of(drawn)]
    assert rows_of(routes) != rows_of(drawn)


def test_every_placement_of_the_decisions_is_equally_likely():
    routes = torch.tensor([[0, 2, 1, 1]]).expand(6000, 4)
    counts = Counter(rows_of(random_like(routes, rng())))
    assert set(counts) == set(itertools.permutations([0, 2, 1, 1]))
    # 12 placements, 500 each expected, standard deviation 21.
    assert all(400 < number < 600 for number in counts.values())


LABELS = [[30, 60, 10], [1, 95, 4], [0, 5, 5], [0, 7, 0], [60, 30, 10], [10, 80, 10]]
"""Six layers; drawn as they are, 5.52 executions."""
COUNTS = torch.tensor(LABELS, dtype=torch.float64)


def test_decisions_follow_the_probabilities_of_their_layer_independently():
    probabilities = torch.tensor([[0.3, 0.6, 0.1], [0, 0.5, 0.5], [0, 1, 0], [0.9, 0.1, 0]])
    drawn = draw_decisions(probabilities, 20_000, rng())
    assert drawn.shape == (20_000, 4)
    shares = torch.stack([(drawn == decision).double().mean(dim=0) for decision in range(3)], dim=1)
    torch.testing.assert_close(shares, probabilities.double(), atol=0.015, rtol=0)
    both = float(((drawn[:, 0] == 0) & (drawn[:, 3] == 0)).double().mean())
    assert both == pytest.approx(0.27, abs=0.015)


def test_a_draw_that_skips_everything_executes_the_last_layer():
    probabilities = torch.tensor([[1.0, 0, 0]] * 3)
    assert rows_of(draw_decisions(probabilities, 200, rng())) == [(0, 0, 1)] * 200


@pytest.mark.parametrize("wanted", [3.0, 4.5, 5.52, 6.0, 7.4])
def test_tilted_labels_run_the_executions_wanted(wanted):
    drawn = draw_decisions(tilt_frequencies(LABELS, wanted), 20_000, rng())
    # The standard deviation of a row is below 1.3, that of the mean below 0.01.
    assert mean_executions(drawn) == pytest.approx(wanted, abs=0.04)


def test_labels_are_left_as_they_are_where_they_run_the_executions_wanted():
    frequencies = COUNTS / COUNTS.sum(dim=1, keepdim=True)
    probabilities = tilt_frequencies(LABELS, expected_executions(frequencies))
    assert torch.allclose(probabilities, frequencies, atol=1e-9)


def test_one_factor_tilts_all_layers_and_what_was_never_a_target_stays_impossible():
    probabilities = tilt_frequencies(LABELS, 4.5)
    ratios = (probabilities / COUNTS)[[0, 1, 4, 5]]  # layers with all three labels
    factors = ratios[:, 1:] / ratios[:, :-1]
    assert float(factors.max()) == pytest.approx(float(factors.min()))
    assert float(factors.max()) < 1
    assert bool((probabilities[COUNTS == 0] == 0).all())


@pytest.mark.parametrize("wanted", [4.0, 5.0, 7.0])
def test_layers_that_are_skipped_more_often_in_the_targets_still_are(wanted):
    skips = tilt_frequencies(LABELS, wanted)[:, 0].tolist()
    by_targets = sorted(range(6), key=lambda layer: LABELS[layer][0] / sum(LABELS[layer]))
    assert [skips[layer] for layer in by_targets] == sorted(skips)


@pytest.mark.parametrize(
    ("counts", "wanted", "nearest"),
    [
        ([[0, 9, 0]] * 4, 3.5, 4.0),  # labels with neither a skip nor a repeat
        ([[1, 9, 0], [0, 9, 0]], 2.5, 2.0),
        ([[1, 9, 0], [0, 9, 1]], 0.5, 1.0),
        ([[9, 0, 0], [9, 0, 0]], 2.0, 1.0),  # only the rule for empty draws executes anything
    ],
)
def test_labels_that_cannot_reach_the_executions_wanted_come_as_near_as_they_can(
    counts, wanted, nearest
):
    probabilities = tilt_frequencies(counts, wanted)
    assert expected_executions(probabilities) == pytest.approx(nearest, abs=1e-9)
    assert mean_executions(draw_decisions(probabilities, 500, rng())) == nearest


def test_expected_executions_count_the_layer_that_runs_where_all_were_skipped():
    probabilities = tilt_frequencies([[5, 3, 1], [4, 2, 2], [6, 1, 0]], 1.3)
    expected = sum(
        max(1, sum(decisions))
        * float(torch.stack([probabilities[i, d] for i, d in enumerate(decisions)]).prod())
        for decisions in itertools.product(range(3), repeat=3)
    )
    assert expected_executions(probabilities) == pytest.approx(expected)
    assert expected == pytest.approx(1.3)


@pytest.mark.parametrize("counts", [[], [[0, 1, 0], [0, 0, 0]]])
def test_routers_without_label_counts_are_refused(counts):
    with pytest.raises(CheckpointError, match="carry no label counts"):
        tilt_frequencies(counts, 3)
