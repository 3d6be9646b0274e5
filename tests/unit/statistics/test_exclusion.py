"""What a candidate may lose: the limits, the fixed order, and how often it errs."""

import functools

import numpy as np
import pytest
from msgspec.structs import replace

from drllm.statistics.differences import Differences
from drllm.statistics.exclusion import DropTest, Limits, exclude_drop, pass_in_order
from drllm.statistics.paired import paired_interval
from drllm.statistics.power import round_up
from drllm.statistics.verdicts import judge_counts, judge_means

N = 1000
FLAT = [3.0 + place % 7 / 100 for place in range(40)]


def differences(won=30, lost=30, increase=0.0, n=N, above_chance=True):
    """One candidate's differences from base, the loss of its texts higher by about so much."""
    texts = [value + increase + place % 3 / 1000 for place, value in enumerate(FLAT)]
    return Differences(
        accuracy=judge_counts(won, lost, n, above_chance=above_chance),
        text_loss=judge_means("text_loss", texts, FLAT, 0),
    )


def result_of(*candidates, **limits):
    """Test candidates `c0`, `c1`, ... on one task."""
    named = {f"c{number}": {"facts": found} for number, found in enumerate(candidates)}
    return exclude_drop(named, Limits(**{"max_drop": 2.0, **limits}))


def test_a_candidate_passes_where_its_interval_excludes_the_loss():
    found = result_of(differences())
    assert paired_interval(30, 30, N)[0] > -0.02
    assert (found.chosen, found.untested) == ("c0", ())
    assert found.sentence() == (
        "Shown (95 %): c0 loses less than 2 points of accuracy (its text isn't tested without "
        "--max-loss-increase)."
    )
    both = result_of(differences(), max_loss_increase=0.05)
    assert both.sentence() == (
        "Shown (95 %): c0 loses less than 2 points of accuracy and 0.05 nats a token of text."
    )


def test_a_candidate_fails_where_it_does_not_and_the_number_of_questions_is_given():
    found = result_of(differences(60, 66), max_drop=2.0)
    assert found.chosen is None
    [trial] = found.trials
    [test] = trial.tasks
    assert test.needed > N
    assert "a loss of up to 2.8 points is not excluded" in found.sentence()
    assert "questions would probably show it" in found.sentence()
    assert found.sentence().count(". ") == 0


def test_a_bound_that_nearly_is_the_limit_has_as_many_digits_as_tell_them_apart():
    accuracy = judge_counts(36, 48, 1026)
    low, _ = accuracy.interval
    assert accuracy.write(low) == "−3.0"
    assert accuracy.write(low, 0.03) == "−2.97"
    assert accuracy.write(low, 0.02) == "−3.0"
    found = result_of(differences(36, 48, n=1026), max_drop=2.96)
    assert "a loss of up to 2.97 points is not excluded" in found.sentence()


@pytest.mark.parametrize(
    ("candidate", "limits", "reason"),
    [
        (differences(0, 191, n=253), {}, "a loss of 69.8 to 80.4 points is shown"),
        (
            differences(increase=0.2),
            {"max_loss_increase": 0.05},
            "an increase of the next-token loss by 0.201 to 0.201 nats is shown",
        ),
    ],
)
def test_a_loss_beyond_the_limit_is_said_as_shown_and_no_number_would_be_enough(
    candidate, limits, reason
):
    found = result_of(candidate, **limits)
    [test] = found.trials[0].tasks
    assert test.failures == (reason,)
    assert test.loses
    assert test.needed is None


def test_a_loss_that_is_shown_but_may_be_smaller_than_the_limit_is_not_said_as_beyond_it():
    found = result_of(differences(30, 60), max_drop=2.0)
    assert found.trials[0].tasks[0].failures == ("a loss of up to 4.9 points is not excluded",)
    assert not found.trials[0].tasks[0].loses


def test_where_text_is_tested_the_number_is_one_of_questions_whose_text_is_measured():
    texts = [loss + (place % 5) / 20 for place, loss in enumerate(FLAT)]
    wide = replace(differences(), text_loss=judge_means("text_loss", texts, FLAT, 0))
    found = result_of(wide, max_loss_increase=0.11)
    needed = round_up(found.trials[0].tasks[0].needed)
    assert len(FLAT) < needed < N  # more texts, but no more questions
    assert f"about {needed} questions and texts (--num-texts) would" in found.sentence()
    assert "--num-texts" not in result_of(differences(60, 66)).sentence()


def test_no_number_is_given_where_the_loss_itself_is_the_limit_or_more():
    found = result_of(differences(10, 60))
    assert found.trials[0].tasks[0].needed is None
    assert "questions would" not in found.sentence()


@pytest.mark.parametrize(
    ("increase", "limit", "passes"), [(0.0, 0.05, True), (0.1, 0.05, False), (0.1, 0.2, True)]
)
def test_both_limits_have_to_hold(increase, limit, passes):
    found = result_of(differences(increase=increase), max_loss_increase=limit)
    assert (found.chosen is not None) == passes
    assert passes or "next-token loss" in found.sentence()
    assert result_of(differences(increase=increase)).chosen == "c0"  # it has no limit of its own


def test_without_a_known_or_long_enough_text_no_increase_is_excluded():
    few = judge_means("text_loss", FLAT[:20], FLAT[:20], 0)
    unknown = differences().accuracy
    for text_loss in (None, few):
        found = result_of(Differences(accuracy=unknown, text_loss=text_loss), max_loss_increase=1.0)
        assert found.chosen is None


def test_a_base_that_may_be_guessing_has_nothing_to_lose():
    found = result_of(differences(above_chance=False))
    assert found.chosen is None
    assert "above chance" in found.sentence()


def test_candidates_are_tested_in_order_up_to_the_first_that_fails():
    good, bad = differences(), differences(10, 60)
    found = result_of(good, good, bad, good, good)
    assert [trial.passed for trial in found.trials] == [True, True, False]
    assert (found.chosen, found.untested) == ("c1", ("c3", "c4"))
    assert "c1 loses less" in found.sentence()
    assert "c2" in found.sentence()
    assert result_of(bad, good).chosen is None
    assert result_of(good, good).chosen == "c1"


def test_a_candidate_has_to_pass_on_every_task():
    good, bad = differences(), differences(10, 60)
    found = exclude_drop({"a": {"one": good, "two": bad}}, Limits(max_drop=2.0))
    assert found.chosen is None
    assert "on two" in found.sentence()
    missing = exclude_drop({"a": {"one": good, "two": None}}, Limits(max_drop=2.0))
    assert "it was not evaluated on two" in missing.sentence()
    with pytest.raises(ValueError, match="no candidate"):
        exclude_drop({}, Limits(max_drop=2.0))


def test_a_test_comes_back_from_a_file_as_it_was():
    from drllm.records.codec import decode, encode

    found = result_of(differences(), differences(10, 60), max_loss_increase=0.1)
    assert decode(encode(found), DropTest, "here") == found


def test_later_candidates_are_not_looked_at_after_a_failure():
    seen = []

    def passes(number):
        seen.append(number)
        return number < 2

    assert pass_in_order([0, 1, 2, 3], passes) == 2
    assert seen == [0, 1, 2]
    assert pass_in_order([], passes) == 0


DRAWS = 2000


@functools.cache
def passes(won, lost, n):
    return paired_interval(won, lost, n)[0] > -0.02


@pytest.mark.parametrize("losses", [(0.02,) * 5, (0.0, 0.02, 0.02, 0.0), (0.02, 0.0, 0.0)])
def test_any_candidate_passes_wrongly_as_seldom_as_one_alone(losses):
    """The familywise error: candidates that lose the limit, independent and in a fixed order."""
    rng = np.random.default_rng(3)
    n, discordant = 300, 0.1
    num_wrong = num_best_wrong = 0
    for _ in range(DRAWS):
        outcomes = []
        for loss in losses:
            shares = ((discordant - loss) / 2, (discordant + loss) / 2, 1 - discordant)
            won, lost, _ = rng.multinomial(n, shares)
            outcomes.append(passes(int(won), int(lost), n))
        num_passed = pass_in_order(outcomes, bool)
        num_wrong += any(loss >= 0.02 for loss in losses[:num_passed])
        is_wrong = [passed and loss >= 0.02 for passed, loss in zip(outcomes, losses, strict=True)]
        num_best_wrong += any(is_wrong)
    assert num_wrong / DRAWS < 0.04  # one-sided 2.5 %, and the noise of 2,000 draws
    if losses.count(0.02) > 2:  # what choosing among all that pass would do
        assert num_best_wrong / DRAWS > 0.05
