"""The re-test: who is asked again, in which ways, and who survives."""

import dataclasses

import pytest

import drllm
from drllm.config import SearchConfig
from drllm.search.evaluator import Evaluator, JudgedOutcome, tokenize_prompt
from drllm.search.retest import is_candidate, judge_retest, retest_paths


def test_every_candidate_is_retested_in_all_other_ways_and_nothing_else_is(routed, facts):
    examples = facts.examples("search")[:12]
    seen = set()
    for record, example in zip(
        drllm.search_paths(routed, examples, SearchConfig(num_simulations=8)),
        examples,
        strict=True,
    ):
        ways = facts.prompts(example, "loglikelihood")[1:]
        for path in record.paths:
            candidate = path.reward >= 1 and (
                record.full.reward < 1 or path.simulation == 0 or path.executions < 6
            )
            assert candidate == (path.retest is not None)
            if path.retest is None:
                continue
            passed = 0
            for prompt in ways:
                [outcome] = Evaluator(routed, [prompt], 1.0).evaluate([(0, path.decisions)])
                passed += outcome.reward >= 1
            assert (passed, len(ways)) == (path.retest.passed, path.retest.asked)
            seen.add(path.retest.survived)
    assert seen == {True, False}, "the sample must hold both outcomes"


def test_options_that_are_only_judged_by_character_run_no_layer_again(routed, facts):
    prompt, *_, by_character = facts.prompts(facts.examples("search")[0], "loglikelihood")
    evaluator, pairs = Evaluator(routed, [prompt], 1.0), [(0, (1,) * 6), (0, (1, 1, 0, 1, 1, 1))]
    found = dict(zip(pairs, evaluator.evaluate(pairs), strict=True))
    found = {pair: dataclasses.replace(outcome, reward=1.0) for pair, outcome in found.items()}
    run = evaluator.states.executions_run
    again = retest_paths(
        evaluator, [[tokenize_prompt(routed, by_character)]], SearchConfig(), found
    )
    assert evaluator.states.executions_run == run
    fresh = Evaluator(routed, [by_character], 1.0).evaluate(pairs)
    assert [again[pair].passed for pair in pairs] == [outcome.reward for outcome in fresh]
    margins = [again[pair].margin for pair in pairs]
    assert margins == pytest.approx([outcome.margin for outcome in fresh], abs=1e-5)


FULL, SHORTER, LONGER, AS_LONG = (1, 1, 1, 1), (1, 1, 0, 1), (1, 2, 1, 1), (1, 0, 2, 1)


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ({FULL, SHORTER, LONGER, AS_LONG}, {FULL, SHORTER}),  # as long as the full path: no gain
        ({SHORTER, LONGER, AS_LONG}, {SHORTER, LONGER, AS_LONG}),  # all of them improve
        ({FULL}, {FULL}),
        (set(), set()),
    ],
)
def test_candidates_improve_or_are_shorter_or_are_the_full_path(right, expected):
    paths = {
        decisions: JudgedOutcome(reward=float(decisions in right), margin=None)
        for decisions in (FULL, SHORTER, LONGER, AS_LONG)
    }
    assert {d for d in paths if is_candidate(d, paths[d], paths[FULL])} == expected


def outcomes(rewards, margins):
    return [
        JudgedOutcome(reward=reward, margin=margin)
        for reward, margin in zip(rewards, margins, strict=True)
    ]


@pytest.mark.parametrize(
    ("rewards", "margins", "full", "survived"),
    [
        ([1, 1, 1, 0], [1.0] * 4, [1.0] * 4, True),
        ([1, 1, 0, 0], [1.0] * 4, [1.0] * 4, False),  # half is not most
        ([1, 1, 1, 1], [1.0] * 4, [1.5] * 4, True),  # exactly the tolerance below
        ([1, 1, 1, 1], [1.0] * 4, [1.6] * 4, False),  # further below
        ([1, 1, 1, 1], [1.0] * 4, [-9.0] * 4, True),  # better than the full path
        ([1, 1], [None, 1.0], [9.0, 1.0], True),  # only where both have a margin
        ([1, 1], [None, None], [None, None], True),  # no margins: the rewards decide
    ],
)
def test_a_path_survives_if_right_in_most_ways_and_not_far_below_the_full_path(
    rewards, margins, full, survived
):
    retest = judge_retest(outcomes(rewards, margins), outcomes(rewards, full), tolerance=0.5)
    assert survived == retest.survived
    assert sum(rewards) == retest.passed
