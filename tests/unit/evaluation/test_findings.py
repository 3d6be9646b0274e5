"""The sentences under the table never say more than the numbers allow."""

from __future__ import annotations

import pytest

from drllm.evaluation.findings import compare, findings
from drllm.statistics.intervals import mean_interval, wilson_interval
from drllm.statistics.paired import mcnemar_exact
from drllm.statistics.power import detectable, detectable_mean


def said(
    base,
    routed,
    permuted=None,
    *,
    chance=0.25,
    executions=27.0,
    logprobs=None,
    num_routes=7,
    unchanged=0.0,
    p_holm=None,
    num_tasks=1,
):
    """Return the findings for per-question outcomes of base, routed and permuted routes."""
    correct = {"base": base, "routed": routed}
    if permuted is not None:
        correct["permuted routes"] = permuted
    n = len(base)
    won = sum(r > b for r, b in zip(routed, base, strict=True))
    lost = sum(r < b for r, b in zip(routed, base, strict=True))
    rows = {
        name: {
            "accuracy": sum(values) / n,
            "interval": list(wilson_interval(round(sum(values)), n)),
            "executions": 30.0 if name == "base" else executions,
            "won": won,
            "lost": lost,
            "mcnemar_p": mcnemar_exact(won, lost),
            "mcnemar_p_holm": p_holm,
            "unchanged_routes": unchanged,
        }
        for name, values in correct.items()
    }
    gold = logprobs or {name: [-1.0] * n for name in correct}
    return findings(
        task="a_task",
        rows=rows,
        correct=correct,
        gold_logprob=gold,
        num_routes=num_routes,
        chance=chance,
        num_layers=30,
        seed=0,
        num_tasks=num_tasks,
    )


RIGHT_80 = [1.0] * 80 + [0.0] * 20
RIGHT_50 = [1.0] * 50 + [0.0] * 50


def test_a_clear_loss_is_called_a_loss():
    text = " ".join(said(RIGHT_80, RIGHT_50))
    assert "routing loses accuracy (-30.0 points" in text
    assert "won 0, lost 30" in text


def test_a_clear_gain_is_called_a_gain():
    assert "routing gains accuracy (+30.0 points" in " ".join(said(RIGHT_50, RIGHT_80))


def test_a_gain_that_the_paired_test_does_not_show_is_not_claimed():
    routed = RIGHT_50.copy()
    routed[-2:] = [1.0, 1.0]  # two more right of a hundred
    text = " ".join(said(RIGHT_50, routed))
    assert "no difference is shown" in text
    assert "gains" not in text


def test_no_difference_names_the_loss_that_is_not_excluded():
    routed = RIGHT_80.copy()
    routed[0:3], routed[-3:] = [0.0] * 3, [1.0] * 3
    text = " ".join(said(RIGHT_80, routed))
    # Tango's interval for 3 won and 3 lost of 100; symmetric, so also what may be gained.
    assert "95 % interval -5.9 to +5.9" in text
    assert "a loss of up to 5.9 points is not excluded" in text


def test_no_difference_names_the_one_that_could_have_been_shown():
    routed = RIGHT_80.copy()
    routed[0:3], routed[-3:] = [0.0] * 3, [1.0] * 3
    points = 100 * detectable(100, 0.06)
    assert f"; n = 100 could have shown {points:.1f} points, and a loss" in " ".join(
        said(RIGHT_80, routed)
    )
    # With several tasks the strictest of the corrected levels has to be met.
    more = 100 * detectable(100, 0.06, alpha=0.05 / 3)
    assert more > points
    text = " ".join(said(RIGHT_80, routed, p_holm=1.0, num_tasks=3))
    assert f"; n = 100 could have shown {more:.1f} points" in text


def test_too_few_questions_could_have_shown_nothing():
    text = " ".join(said([1.0] * 5, [1.0] * 4 + [0.0]))
    assert "; n = 5 couldn't have shown any, and a loss" in text


def test_a_difference_that_is_shown_is_not_said_to_be_one_that_could_have_been():
    assert "could have" not in " ".join(said(RIGHT_80, RIGHT_50))


def test_a_gain_too_small_for_the_exact_test_is_not_called_a_loss_of_nothing():
    text = " ".join(said([1.0] * 15 + [0.0] * 5, [1.0] * 20))
    assert "no difference is shown (+25.0 points, 95 % interval +4.9 to +46.9" in text
    assert "is not excluded" not in text


def test_few_questions_without_any_disagreement_leave_a_wide_interval():
    right = [1.0] * 6
    text = " ".join(said(right, right))
    assert "+0.0 points, 95 % interval -39.0 to +39.0, won 0, lost 0" in text
    assert "a loss of up to 39.0 points is not excluded" in text


def test_the_base_above_chance_is_not_mentioned():
    assert "chance" not in " ".join(said(RIGHT_50, RIGHT_50))


VERDICTS = (
    "routing gains",
    "routing loses",
    "no difference",
    "not excluded",
    "could have",
    "is lower",
    "is higher",
    "not shown to differ",
    "matters",
    "do better",
)


@pytest.mark.parametrize("routed_right", [10, 20, 40])
@pytest.mark.parametrize("permuted_right", [5, 40, 80])
@pytest.mark.parametrize("logprob", [-2.0, -1.0, -0.5])
def test_no_sentence_has_a_verdict_where_the_base_may_be_guessing(
    routed_right, permuted_right, logprob
):
    base, routed, permuted = (
        [1.0] * right + [0.0] * (100 - right) for right in (20, routed_right, permuted_right)
    )
    logprobs = {"base": [-1.0] * 100, "routed": [logprob + i / 1000 for i in range(100)]}
    first, *others = said(base, routed, permuted, logprobs=logprobs)
    assert "not shown to be above chance (25.0 %), so no gain" in first
    assert len(others) == 3
    for words in VERDICTS:
        assert words not in " ".join(others)
    assert f"{routed_right - 20:+.1f} points, 95 % interval" in others[0]


def test_with_several_tasks_the_corrected_p_value_decides():
    text = " ".join(said(RIGHT_50, RIGHT_80, p_holm=0.2))
    assert "no difference is shown (+30.0 points" in text
    assert "exact McNemar p = 1.86e-09, corrected for several tests 0.2)" in text
    assert "routing gains" in " ".join(said(RIGHT_50, RIGHT_80, p_holm=0.04))


@pytest.mark.parametrize(
    ("executions", "words"), [(27.0, "(10.0 % saved)"), (33.0, "(10.0 % more than the base)")]
)
def test_saved_and_spent_executions_are_told_apart(executions, words):
    assert words in " ".join(said(RIGHT_50, RIGHT_50, executions=executions))


@pytest.mark.parametrize(
    ("routed", "word"), [(-1.5, "lower"), (-0.5, "higher"), (-1.0, "not shown to differ")]
)
def test_the_gold_log_probability_is_compared_question_by_question(routed, word):
    logprobs = {"base": [-1.0] * 100, "routed": [routed] * 100}
    text = " ".join(said(RIGHT_50, RIGHT_50, logprobs=logprobs))
    assert f"options is {word} under routing" in text


@pytest.mark.parametrize(
    ("permuted", "words"),
    [
        ([0.5] * 50 + [0.0] * 50, "the match of route and question matters"),
        (RIGHT_50, "it is not shown that reading the question matters"),
        (RIGHT_80, "the routes do better on other questions than on their own"),
    ],
)
def test_routes_permuted_over_the_questions_decide_whether_reading_matters(permuted, words):
    assert words in " ".join(said(RIGHT_50, RIGHT_50, permuted))


def test_a_resampled_interval_without_width_is_not_given_as_one():
    logprobs = {"base": [-1.0] * 100, "routed": [-1.0 + 1e-6] * 100}
    text = " ".join(said(RIGHT_50, RIGHT_50, RIGHT_50, logprobs=logprobs))
    assert "+0.000 nats a question, the same on every question" in text
    assert "+0.0 points, the same on every question, so resampling gives no interval" in text
    assert "+0.000 to" not in text


@pytest.mark.parametrize(("different", "word"), [(5, "not shown to differ"), (6, "higher")])
def test_a_few_differing_questions_carry_no_verdict(different, word):
    # All of them in one direction, so that the resampled interval lies above nothing.
    logprobs = {
        "base": [-1.0] * different,
        "routed": [-0.5 + place / 10 for place in range(different)],
    }
    right = [1.0] * different
    text = " ".join(said(right, right, logprobs=logprobs))
    assert f"options is {word} under routing" in text


@pytest.mark.parametrize(
    ("unchanged", "words"),
    [
        (0.005, "reading the question matters."),
        (0.123, "matters; 12.3 % of the questions kept their route by chance."),
    ],
)
def test_routes_that_the_permutation_left_in_place_are_mentioned(unchanged, words):
    assert said(RIGHT_50, RIGHT_50, RIGHT_50, unchanged=unchanged)[-1].endswith(words)


def test_a_single_route_for_all_questions_makes_permuting_say_nothing():
    last = said(RIGHT_50, RIGHT_50, RIGHT_50, num_routes=1, unchanged=1.0)[-1]
    assert last == "All questions took one route, so permuting says nothing."


def test_routes_that_are_not_shown_to_matter_come_with_what_could_have_been_shown():
    routed = RIGHT_50.copy()
    routed[:6], routed[-6:] = [0.0] * 6, [1.0] * 6
    last = said(RIGHT_50, routed, RIGHT_50)[-1]
    differences = [100 * (a - b) for a, b in zip(routed, RIGHT_50, strict=True)]
    points = detectable_mean(differences)
    assert last.endswith(
        f"it is not shown that reading the question matters, where about {points:.1f} points "
        f"could have been shown."
    )


# --- any two systems ---------------------------------------------------------------------------


def between(first, second, **options):
    options = {"judged": True, **options}
    return compare("routed", "best static", {"routed": first, "best static": second}, **options)


def test_two_systems_are_compared_by_name():
    assert between(RIGHT_80, RIGHT_50).startswith(
        "routed against best static: routed is more accurate (+30.0 points, 95 % interval"
    )
    assert "best static: routed is less accurate (-30.0 points" in between(RIGHT_50, RIGHT_80)


def test_no_difference_between_two_systems_says_what_could_have_been_shown():
    routed = RIGHT_50.copy()
    routed[-2:] = [1.0, 1.0]
    text = between(routed, RIGHT_50)
    assert "routed against best static: no difference is shown (+2.0 points" in text
    assert f"won 2, lost 0, exact McNemar p = {mcnemar_exact(2, 0):.3g}); n = 100" in text
    assert f"could have shown {100 * detectable(100, 0.02):.1f} points" in text


def test_the_corrected_p_value_decides_between_two_systems():
    text = between(RIGHT_80, RIGHT_50, corrected=0.2, num_tests=4)
    assert "no difference is shown" in text
    assert f"could have shown {100 * detectable(100, 0.3, alpha=0.05 / 4):.1f} points" in text
    assert "more accurate" in between(RIGHT_80, RIGHT_50, corrected=0.04, num_tests=4)


def test_without_judging_two_systems_have_numbers_only():
    for second in (RIGHT_50, [0.5] * 50 + [0.25] * 50):
        text = between(RIGHT_80, second, judged=False)
        assert "points, 95 % interval" in text
        for words in ("accurate", "no difference", "could have", "excluded"):
            assert words not in text


def test_means_over_draws_are_compared_by_resampling():
    draws = [0.9] * 44 + [0.15] * 56
    text = between(RIGHT_50, draws)
    differences = [100 * (a - b) for a, b in zip(RIGHT_50, draws, strict=True)]
    lower, upper = mean_interval(differences, 0)
    assert f"95 % interval {lower:+.1f} to {upper:+.1f})" in text
    assert f"; n = 100 could have shown about {detectable_mean(differences):.1f} points." in text
    assert "routed is more accurate" in between(RIGHT_80, draws)
    assert "routed is less accurate" in between(draws, RIGHT_80)


def test_a_few_draws_that_differ_carry_neither_a_verdict_nor_a_promise():
    text = between([1.0] * 20, [0.5] * 3 + [1.0] * 17)
    assert "no difference is shown (+7.5 points" in text
    assert "could have" not in text


def test_an_exact_p_value_of_means_over_draws_is_refused():
    with pytest.raises(ValueError, match="no exact p-value"):
        between([0.5] * 10, [1.0] * 10, corrected=0.01)


def test_answers_that_are_graded_are_compared_by_their_means():
    base, routed = [0.5, 1.0, 0.75] * 10, [0.25, 0.5, 0.75] * 10
    rows = {
        name: {
            "accuracy": sum(values) / 30,
            "interval": [0.4, 0.8],
            "executions": 30.0 if name == "base" else 27.0,
            "won": None,
            "lost": None,
            "mcnemar_p": None,
            "mcnemar_p_holm": None,
        }
        for name, values in (("base", base), ("routed", routed))
    }
    [sentence] = findings(
        task="graded",
        rows=rows,
        correct={"base": base, "routed": routed},
        gold_logprob={},
        num_routes=3,
        chance=0.0,
        num_layers=30,
        seed=0,
    )
    assert "routing loses accuracy (-25.0 points, 95 % interval" in sentence
    assert "McNemar" not in sentence
