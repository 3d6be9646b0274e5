"""A verdict never says more than its numbers allow, and says it once."""

import itertools
import random

import numpy as np
import pytest

from drllm.statistics.intervals import mean_interval, upper_bound
from drllm.statistics.paired import Outcomes, mcnemar_exact, paired_interval
from drllm.statistics.power import FEWEST_DIFFERENT, chance_to_show
from drllm.statistics.verdicts import (
    EXCLUSION_CONFIDENCE,
    apply_bonferroni,
    apply_holm,
    compare,
    judge_counts,
    judge_means,
    judge_times,
)


@pytest.mark.parametrize(
    ("won", "lost", "n", "shown"),
    [
        (30, 10, 120, "higher"),
        (10, 30, 120, "lower"),
        (160, 150, 2000, "none shown"),
        (0, 0, 120, "none shown"),  # the interval excludes 5 points
        (12, 8, 120, "too few"),
        (0, 0, 8, "too few"),
        (5, 0, 5, "too few"),  # five questions can't show anything
        (6, 0, 6, "higher"),
    ],
)
def test_counts_are_judged_by_the_exact_test_and_the_interval(won, lost, n, shown):
    found = judge_counts(won, lost, n)
    assert found.shown == shown
    assert (found.won, found.lost, found.n) == (won, lost, n)
    assert found.p == mcnemar_exact(won, lost)
    assert found.interval == paired_interval(won, lost, n)
    assert found.mean == (won - lost) / n


def test_every_outcome_of_few_questions_is_claimed_only_where_test_and_interval_agree():
    for won, lost in itertools.product(range(8), repeat=2):
        if won + lost <= 7:
            found = judge_counts(won, lost, 7)
            by_test = mcnemar_exact(won, lost) < 0.05
            low, high = paired_interval(won, lost, 7)
            by_interval = low > 0 or high < 0
            assert (found.is_better is not None) == (by_test and by_interval)
            assert (found.reason is not None) == (by_test != by_interval)
            assert found.reason is None or found.reason in found.sentence()


def test_too_few_questions_come_with_the_number_that_would_do():
    found = judge_counts(4, 3, 60)
    assert found.needed is not None
    assert found.needed > 60
    assert found.target == 0.05  # smaller differences needn't be found
    assert chance_to_show(found.needed, 7 / 60, found.target) >= 0.8
    assert "inconclusive: about " in found.sentence()


@pytest.mark.parametrize("quantity", ["accuracy", "gold_logprob"])
def test_where_base_may_be_guessing_nothing_is_claimed(quantity):
    found = judge_means(quantity, [1.0] * 40, [0.0] * 20 + [0.1] * 20, 0, above_chance=False)
    assert (found.shown, found.is_better, found.label) == ("guessing", None, "no verdict")
    assert judge_counts(40, 0, 60, above_chance=False).shown == "guessing"


def test_a_mean_is_judged_by_its_bootstrap_interval():
    rng = random.Random(2)
    ours, theirs = [rng.gauss(0.4, 1) for _ in range(200)], [rng.gauss(0, 1) for _ in range(200)]
    found = judge_means("gold_logprob", ours, theirs, seed=3)
    assert found.interval == mean_interval(
        [a - b for a, b in zip(ours, theirs, strict=True)], seed=3
    )
    assert found.shown == "higher"
    assert (found.p, found.won) == (None, None)


def test_a_next_token_loss_that_rises_is_worse_and_judged_without_a_look_at_chance():
    theirs = [3.0, 3.1, 3.2, 3.5, 3.6, 3.7, 3.3]
    base = Outcomes(name="base", executions=30, correct=[0] * 7, text_loss=theirs)
    ours = Outcomes(
        name="routed", executions=27, correct=[0] * 7, text_loss=[5 + loss / 9 for loss in theirs]
    )
    found = compare(ours, base, 0, above_chance=False)
    assert found.accuracy.shown == "guessing"
    assert found.text_loss is not None
    assert (found.text_loss.shown, found.text_loss.is_better) == ("higher", False)
    assert "worse" in found.text_loss.sentence()
    assert found.gold_logprob is None  # not known of either


def test_differences_on_fewer_questions_than_can_show_anything_carry_no_verdict():
    few = FEWEST_DIFFERENT - 1
    ours, theirs = [1.0] * few + [0.0] * 200, [0.0] * (few + 200)
    found = judge_means("gold_logprob", ours, theirs, 0)
    assert found.interval[0] > 0
    assert found.is_better is None
    assert "excludes 0, but only 5 differ" in found.sentence()


def test_rounding_is_no_difference():
    ours, theirs = [1.0 + 1e-6] * 40, [1.0] * 40
    assert judge_means("text_loss", ours, theirs, 0).shown == "none shown"


def test_accuracies_averaged_over_draws_are_judged_as_means():
    ours = Outcomes(name="a", executions=1, correct=[0.3, 0.5] * 20)
    theirs = Outcomes(name="b", executions=1, correct=[0.1, 0.0] * 20)
    found = compare(ours, theirs, 0).accuracy
    assert (found.shown, found.won, found.p) == ("higher", None, None)


def test_other_questions_are_refused():
    one = Outcomes(name="a", executions=1, correct=[1, 0], text_loss=[1.0, 2.0])
    with pytest.raises(ValueError, match="argument 2"):
        compare(one, Outcomes(name="b", executions=1, correct=[1, 0, 1]), 0)
    with pytest.raises(ValueError, match="argument 2"):
        compare(one, Outcomes(name="b", executions=1, correct=[1, 0], text_loss=[1.0]), 0)


def test_several_tasks_are_corrected_for_each_other_and_the_corrected_value_decides():
    alone = [judge_counts(15, 4, 120), judge_counts(3, 2, 120), judge_counts(30, 3, 120)]
    means = judge_means("accuracy", [0.5] * 9, [0.25] * 9, 0)
    together = apply_holm([*alone, means])
    assert together[3] is means
    assert [each.p for each in together[:3]] == [each.p for each in alone]
    assert together[0].p_corrected == pytest.approx(2 * alone[0].p)
    assert all(each.num_tests == 3 for each in together[:3])
    assert [each.shown for each in together[:3]] == ["higher", "too few", "higher"]
    assert apply_holm([alone[0], means]) == [alone[0], means]
    taken_away = judge_counts(15, 4, 120, p_corrected=0.06, num_tests=3)
    assert taken_away.is_better is None
    assert "corrected" in taken_away.sentence()


@pytest.mark.parametrize(
    ("verdict", "parts"),
    [
        (
            judge_counts(10, 30, 120),
            ("−16.7 points", "−26.7 to −6.", "a loss of more than 26.", "shown to be worse"),
        ),
        (judge_counts(30, 10, 120), ("+16.7 points", "every loss is excluded", "to be better")),
        (judge_counts(12, 8, 120), ("+3.3 points", "won 12, lost 8", "more than", "inconclusive")),
        (judge_counts(8, 12, 120, above_chance=False), ("won 8, lost 12 of 120", "no verdict (")),
        (
            judge_means("text_loss", [1.0] * 30, [1.0] * 30, 0),
            ("same on all 30 texts", "an increase of more than 0.000 nats", "no difference"),
        ),
        (judge_means("text_loss", [1.0, 2.0], [1.0, 1.0], 0), ("+0.500", "inconclusive")),
    ],
)
def test_a_sentence_has_the_size_then_what_it_excludes_then_how_sure(verdict, parts):
    text = verdict.sentence("ours", "theirs")
    assert text.index("of ours minus theirs") < text.index(parts[0])
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count(". ") == 0


def test_where_base_may_be_guessing_no_loss_is_excluded():
    assert judge_counts(30, 10, 120, above_chance=False).excluded_loss is None


@pytest.mark.parametrize(("won", "lost", "n"), [(10, 30, 120), (12, 8, 120), (0, 0, 50)])
def test_the_excluded_loss_of_accuracy_is_the_lower_end_of_the_interval(won, lost, n):
    found = judge_counts(won, lost, n)
    assert found.excluded_loss == -found.interval[0]


def test_the_excluded_increase_of_a_loss_is_never_below_the_interval_and_needs_texts():
    rng = random.Random(4)
    heavy = [rng.gauss(0, 0.1) + (place % 10 == 0) * rng.expovariate(1) for place in range(100)]
    found = judge_means("text_loss", heavy, [0.0] * 100, 0)
    assert found.excluded_loss >= found.interval[1]
    assert judge_means("text_loss", heavy[:29], [0.0] * 29, 0).excluded_loss is None
    falling = [-1.0 + place % 7 / 100 for place in range(60)]
    assert judge_means("text_loss", falling, [0.0] * 60, 0).excluded_loss == 0


def test_a_skewed_loss_exceeds_what_is_excluded_seldom():
    """One text in ten loses far more: the interval's end alone would be exceeded far too often."""
    rng = np.random.default_rng(1)
    num_trials, n = 120, 60
    exceeded = {"excluded": 0, "interval": 0}
    for _ in range(num_trials):
        heavy = (rng.random(n) < 0.1) * 1.0
        increases = rng.normal(0, 0.1, n) + heavy  # 0.1 on average
        _, high = mean_interval(increases, 0, draws=400)
        bound = upper_bound(increases, 0, draws=400, confidence=EXCLUSION_CONFIDENCE)
        exceeded["interval"] += high < 0.1
        exceeded["excluded"] += max(high, bound) < 0.1
    assert exceeded["excluded"] < exceeded["interval"]
    assert exceeded["excluded"] / num_trials < 0.08


def test_grades_that_never_differ_exclude_no_more_than_right_and_wrong_answers():
    few = judge_means("accuracy", [0.5] * 20, [0.5] * 20, seed=0)
    assert few.excluded_loss == pytest.approx(-paired_interval(0, 0, 20)[0])


def test_a_rare_whole_loss_of_graded_answers_is_seldom_beyond_what_is_excluded():
    draw = random.Random(0)
    num_beyond = 0
    for trial in range(200):
        theirs = [draw.choice([0.5, 1.0]) for _ in range(20)]
        ours = [grade if draw.random() > 0.05 else 0.0 for grade in theirs]  # 3.75 points lost
        num_beyond += judge_means("accuracy", ours, theirs, trial).excluded_loss < 0.0375
    assert num_beyond <= 0.025 * 200


def test_a_fall_of_log_probability_is_excluded_by_no_few_questions():
    values = [0.1 * number for number in range(40)]
    assert judge_means("gold_logprob", values[:29], values[:29], 0).excluded_loss is None
    found = judge_means("gold_logprob", values, [value + 0.01 * value for value in values], 0)
    assert found.excluded_loss >= -found.interval[0]


def test_the_best_of_several_paths_excludes_less_and_its_true_loss_is_seldom_beyond_it():
    rng = np.random.default_rng(0)
    num_beyond = {1: 0, 5: 0}
    for _ in range(400):
        # Ten in a hundred answers differ, and two points are lost.
        counts = rng.multinomial(400, [0.04, 0.06, 0.9], size=5)
        won, lost, _ = max(counts.tolist(), key=lambda path: path[0] - path[1])
        alone = judge_counts(won, lost, 400)
        for number in num_beyond:
            num_beyond[number] += apply_bonferroni(alone, number).excluded_loss < 0.02
    assert num_beyond[1] > 0.05 * 400  # as if the path hadn't been picked
    assert num_beyond[5] <= 0.025 * 400


def test_times_are_told_apart_only_where_the_rounds_agree_whatever_else_was_timed():
    agree, split = [0.9] * 6, [0.9, 1.1] * 6
    assert judge_times([agree, split]) == ["too noisy to tell"] * 2  # one of two tests
    assert judge_times([agree]) == ["faster"]
    assert judge_times([[1.1] * 8, split, [0.5] * 3]) == ["slower", *["too noisy to tell"] * 2]
