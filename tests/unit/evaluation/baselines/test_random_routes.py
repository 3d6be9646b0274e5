import itertools
from collections import Counter

import pytest
import torch

from drllm.errors import CheckpointError
from drllm.evaluation.baselines.label_frequency import (
    expected_executions,
    label_frequency,
    tilted,
)
from drllm.evaluation.baselines.own_routes import permuted, random_like, share_unchanged


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_routes(questions: int = 30, layers: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, (questions, layers), generator=rng(seed))


def rows_of(decisions: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in decisions.tolist()]


# --- permuted routes -------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [2, 3, 30])
def test_permuted_routes_are_the_same_routes(questions):
    routes = random_routes(questions)
    assert Counter(rows_of(routes)) == Counter(rows_of(permuted(routes, rng())))


@pytest.mark.parametrize("seed", range(10))
def test_no_question_keeps_its_own_route_where_all_routes_differ(seed):
    routes = torch.arange(6)[:, None].expand(6, 4)
    assert share_unchanged(routes, permuted(routes, rng(seed))) == 0.0


def test_every_order_without_a_fixed_place_is_equally_likely():
    routes = torch.arange(4)[:, None]
    wanted = {
        order
        for order in itertools.permutations(range(4))
        if all(place != value for place, value in enumerate(order))
    }
    generator = rng()
    counts = Counter(tuple(permuted(routes, generator)[:, 0].tolist()) for _ in range(4500))
    assert wanted == set(counts)
    # 9 derangements, 500 each expected, standard deviation 21.
    assert all(400 < number < 600 for number in counts.values())


def test_equal_routes_stay_equal_and_are_counted_as_unchanged():
    routes = torch.tensor([[1, 1]] * 9 + [[0, 1]])
    assert share_unchanged(routes, permuted(routes, rng())) == 0.8
    constant = torch.ones(5, 3, dtype=torch.long)
    assert share_unchanged(constant, permuted(constant, rng())) == 1.0


def test_a_single_question_keeps_its_route():
    routes = torch.tensor([[1, 0, 2]])
    assert torch.equal(routes, permuted(routes, rng()))


# --- random decisions with the same counts ---------------------------------------------------


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


def test_questions_with_the_same_route_get_different_draws():
    routes = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]]).expand(20, 8)
    assert len(set(rows_of(random_like(routes, rng())))) > 15


# --- label frequency -------------------------------------------------------------------------


LABELS = [[30, 60, 10], [1, 95, 4], [0, 5, 5], [0, 7, 0], [60, 30, 10], [10, 80, 10]]
"""Six layers; drawn as they are, 5.52 executions."""


def test_decisions_follow_the_probabilities_of_their_layer():
    probabilities = torch.tensor([[0.3, 0.6, 0.1], [0, 0.5, 0.5], [0, 1, 0], [0.9, 0.1, 0]])
    drawn = label_frequency(probabilities, 20_000, rng())
    assert drawn.shape == (20_000, 4)
    for layer, row in enumerate(probabilities.tolist()):
        for decision, probability in enumerate(row):
            share = float((drawn[:, layer] == decision).double().mean())
            assert share == pytest.approx(probability, abs=0.015)


def test_layers_are_drawn_independently():
    probabilities = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 1, 0]])
    drawn = label_frequency(probabilities, 8000, rng())
    both = float(((drawn[:, 0] == 0) & (drawn[:, 1] == 0)).double().mean())
    assert both == pytest.approx(0.25, abs=0.02)


def test_a_draw_that_skips_everything_executes_the_last_layer():
    probabilities = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]])
    assert rows_of(label_frequency(probabilities, 200, rng())) == [(0, 0, 1)] * 200


@pytest.mark.parametrize("wanted", [3.0, 4.5, 5.52, 6.0, 7.4])
def test_tilted_labels_run_the_executions_wanted(wanted):
    drawn = label_frequency(tilted(LABELS, wanted), 20_000, rng())
    # The standard deviation of a row is below 1.3, that of the mean below 0.01.
    assert float(drawn.sum(dim=1).double().mean()) == pytest.approx(wanted, abs=0.04)


def test_labels_are_left_as_they_are_where_they_run_the_executions_wanted():
    counts = torch.tensor(LABELS, dtype=torch.float64)
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    probabilities = tilted(LABELS, expected_executions(frequencies))
    assert torch.allclose(probabilities, frequencies, atol=1e-9)


def test_one_factor_tilts_all_layers():
    probabilities = tilted(LABELS, 4.5)
    counts = torch.tensor(LABELS, dtype=torch.float64)
    ratios = (probabilities / counts)[[0, 1, 4, 5]]  # layers with all three labels
    factors = ratios[:, 1:] / ratios[:, :-1]
    assert float(factors.max()) == pytest.approx(float(factors.min()))
    assert float(factors.max()) < 1
    assert bool((probabilities[counts == 0] == 0).all())


@pytest.mark.parametrize("wanted", [4.0, 5.0, 7.0])
def test_layers_that_are_skipped_more_often_in_the_targets_still_are(wanted):
    skips = tilted(LABELS, wanted)[:, 0].tolist()
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
    probabilities = tilted(counts, wanted)
    assert expected_executions(probabilities) == pytest.approx(nearest, abs=1e-9)
    assert float(label_frequency(probabilities, 500, rng()).sum(dim=1).double().mean()) == nearest


def test_expected_executions_count_the_layer_that_runs_where_all_were_skipped():
    probabilities = tilted([[5, 3, 1], [4, 2, 2], [6, 1, 0]], 1.3)
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
        tilted(counts, 3)


# --- all -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: permuted(random_routes(), generator),
        lambda generator: random_like(random_routes(), generator),
        lambda generator: label_frequency(tilted([[3, 4, 3]] * 8, 7.5), 30, generator),
    ],
    ids=["permuted", "random_like", "label_frequency"],
)
def test_the_same_seed_gives_the_same_decisions_and_another_seed_others(draw):
    assert torch.equal(draw(rng(1)), draw(rng(1)))
    assert not torch.equal(draw(rng(1)), draw(rng(2)))


@pytest.mark.parametrize("draw", [permuted, random_like])
def test_the_routes_themselves_are_left_alone(draw):
    routes = random_routes()
    draw(routes, rng())
    assert torch.equal(random_routes(), routes)
