import pytest
import torch

from drllm.evaluation.baselines.layer_dropping import mixture
from drllm.evaluation.baselines.program import PRIOR_TRIES, best_program, rates_in

FULL, L = (1, 1, 1, 1), 4


@pytest.fixture
def log(searched):
    """A search log of four questions."""
    short, other = (1, 0, 1, 1), (1, 1, 0, 1)
    return [
        searched(0, [(FULL, 1), (short, 1), (other, 0)]),
        searched(1, [(FULL, 1), (short, 1), ((1, 1, 1, 0), 1)]),
        searched(2, [(FULL, 0), (short, 0), (other, 0), ((2, 1, 1, 1), 1)]),
        searched(3, [(FULL, 1), (short, 1), ((0, 0, 1, 1), 1)]),
    ]


def test_rates_are_shrunk_towards_programs_of_as_many_executions(log):
    found = rates_in(log)
    assert len(found) == 6
    kind = 4 / 7  # of the seven tries of three executions four were valid
    often, lucky = found[1, 0, 1, 1], found[1, 1, 1, 0]  # right on 3 of 4, on 1 of 1
    assert often == pytest.approx((3 + PRIOR_TRIES * kind) / (4 + PRIOR_TRIES))
    assert lucky == pytest.approx((1 + PRIOR_TRIES * kind) / (1 + PRIOR_TRIES))
    assert found[0, 0, 1, 1] == pytest.approx(1.0)  # alone of its kind
    assert often > lucky


VALUES = {FULL: -1.0, (1, 0, 1, 1): -1.5, (1, 1, 0, 1): -1.2, (1, 1, 1, 0): -3.0}
VALUES |= {(0, 0, 1, 1): -1.3, (2, 1, 1, 1): -0.9}


def measure(plans):
    return [VALUES[plan] for plan in plans]


@pytest.mark.parametrize("executions", [2.0, 2.5, 3.0, 3.4, 4.0, 4.5])
def test_the_best_mixture_equals_that_of_trying_each_by_hand(log, executions):
    by_hand = {}
    for decisions, value in VALUES.items():
        cost = sum(decisions)
        if decisions != FULL and min(cost, 4) <= executions <= max(cost, 4):
            share = 0.0 if cost == 4 else (executions - cost) / (4 - cost)
            by_hand[decisions] = (1 - share) * value + share * VALUES[FULL]
    found, _ = best_program(log, measure, executions)
    assert by_hand[found] == pytest.approx(max(by_hand.values()))


@pytest.mark.parametrize("executions", [2.5, 3.4])
def test_the_mixture_runs_the_wanted_executions(log, executions):
    found, full_share = best_program(log, measure, executions)
    generator = torch.Generator().manual_seed(0)
    drawn = mixture(found, FULL, executions, 100, generator)
    assert float(drawn.sum(dim=1).double().mean()) == pytest.approx(executions, abs=0.01)
    share = float((drawn == 1).all(dim=1).double().mean())
    assert share == pytest.approx(full_share, abs=0.01)


def test_only_the_candidates_that_look_best_in_the_log_are_measured(log):
    measured = []

    def watching(plans):
        measured.extend(plans)
        return measure(plans)

    found, _ = best_program(log, watching, 3.0, num_candidates=2)
    # Mixed to three executions, half of the short program's questions run the full path.
    assert measured == [FULL, (0, 0, 1, 1), (1, 0, 1, 1)]
    assert found == (0, 0, 1, 1)
