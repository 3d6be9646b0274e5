from __future__ import annotations

import pytest
import torch

from drllm.errors import ConfigError, RecordError
from drllm.evaluation.baselines.layer_dropping import mixture
from drllm.evaluation.baselines.program import PRIOR_TRIES, best_program, rates_in, reach
from drllm.records import SearchRecord, TriedPath

FULL = (1, 1, 1, 1)


def record(number, tried, num_layers=4):
    """One question's search: decisions and whether each was valid, the full path first."""
    return SearchRecord(
        id=str(number),
        task="own",
        question=f"question {number}",
        prompt=f"question {number}",
        answer="a",
        reward="loglikelihood",
        num_layers=num_layers,
        paths=tuple(
            TriedPath(
                decisions=decisions,
                simulation=place,
                reward=float(valid),
                margin=None,
                executions=float(sum(decisions)),
            )
            for place, (decisions, valid) in enumerate(tried)
        ),
        seconds=0.0,
    )


LOG = [
    record(0, [(FULL, True), ((1, 0, 1, 1), True), ((1, 1, 0, 1), False)]),
    record(1, [(FULL, True), ((1, 0, 1, 1), True), ((1, 1, 1, 0), True)]),
    record(2, [(FULL, False), ((1, 0, 1, 1), False), ((1, 1, 0, 1), False), ((2, 1, 1, 1), True)]),
    record(3, [(FULL, True), ((1, 0, 1, 1), True), ((0, 0, 1, 1), True)]),
]


def test_rates_are_shrunk_towards_programs_of_as_many_executions():
    found = rates_in(LOG)
    assert len(found) == 6
    kind = 4 / 7  # of the seven tries of three executions four were valid
    often, lucky = found[1, 0, 1, 1], found[1, 1, 1, 0]  # right on 3 of 4, on 1 of 1
    assert often == pytest.approx((3 + PRIOR_TRIES * kind) / (4 + PRIOR_TRIES))
    assert lucky == pytest.approx((1 + PRIOR_TRIES * kind) / (1 + PRIOR_TRIES))
    assert found[0, 0, 1, 1] == pytest.approx(1.0)  # alone of its kind
    assert often > lucky


def test_a_program_that_was_right_on_many_questions_beats_one_that_was_right_on_one():
    often = [record(i, [(FULL, True), ((1, 0, 1, 1), i < 8)]) for i in range(10)]
    others = [record(10 + i, [(FULL, True), ((1, 1, 0, 1), i == 0)]) for i in range(1)]
    misses = [record(20 + i, [(FULL, True), ((0, 1, 1, 1), False)]) for i in range(10)]
    rates = rates_in([*often, *others, *misses])
    assert rates[1, 0, 1, 1] > rates[1, 1, 0, 1] > rates[0, 1, 1, 1]


VALUES = {FULL: -1.0, (1, 0, 1, 1): -1.5, (1, 1, 0, 1): -1.2, (1, 1, 1, 0): -3.0}
VALUES |= {(0, 0, 1, 1): -1.3, (2, 1, 1, 1): -0.9}


def measure(plans):
    return [VALUES[plan] for plan in plans]


@pytest.mark.parametrize("executions", [2.0, 2.5, 3.0, 3.4, 4.0, 4.5])
def test_the_best_mixture_equals_that_of_trying_each_by_hand(executions):
    by_hand = {}
    for decisions, value in VALUES.items():
        cost = sum(decisions)
        if decisions != FULL and min(cost, 4) <= executions <= max(cost, 4):
            share = 0.0 if cost == 4 else (executions - cost) / (4 - cost)
            by_hand[decisions] = (1 - share) * value + share * VALUES[FULL]
    found, _ = best_program(LOG, measure, executions)
    assert by_hand[found] == pytest.approx(max(by_hand.values()))


@pytest.mark.parametrize("executions", [2.5, 3.4])
def test_the_mixture_runs_the_wanted_executions(executions):
    found, full_share = best_program(LOG, measure, executions)
    generator = torch.Generator().manual_seed(0)
    drawn = mixture(found, FULL, executions, 100, generator)
    assert float(drawn.sum(dim=1).double().mean()) == pytest.approx(executions, abs=0.01)
    share = float((drawn == 1).all(dim=1).double().mean())
    assert share == pytest.approx(full_share, abs=0.01)


def test_only_the_candidates_that_look_best_in_the_log_are_measured():
    measured = []

    def watching(plans):
        measured.extend(plans)
        return measure(plans)

    found, _ = best_program(LOG, watching, 3.0, num_candidates=2)
    # Mixed to three executions, half of the short program's questions run the full path.
    assert measured == [FULL, (0, 0, 1, 1), (1, 0, 1, 1)]
    assert found == (0, 0, 1, 1)


@pytest.mark.parametrize("executions", [1.9, 5.1])
def test_executions_that_no_mixture_reaches_are_refused(executions):
    with pytest.raises(ConfigError, match=r"they reach \(2, 5\)"):
        best_program(LOG, measure, executions)


def test_the_reach_of_a_log_includes_the_full_path():
    assert reach(LOG) == (2, 5)
    assert reach([record(0, [(FULL, True), ((2, 1, 1, 1), True)])]) == (4, 5)
    assert reach([record(0, [((1, 1, 1, 1), True)])]) is None


@pytest.mark.parametrize("records", [[], [LOG[0], record(9, [((1, 1), True)], num_layers=2)]])
def test_records_of_no_model_or_of_several_are_refused(records):
    with pytest.raises(RecordError, match="of one model"):
        rates_in(records)
