"""What is said of a path's losses, and which losses are shown to be too large."""

import pytest

from drllm.config.constants import MAX_DROP
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.losses import describe_loss, list_excessive_losses
from drllm.statistics.power import questions_to_exclude, round_up
from drllm.statistics.verdicts import judge_counts, judge_means

DONT = "don't use it"
KEEPS = "keeps its answers"
CANT_TELL = "don't exclude a loss of"


def sentence_on(won: int, lost: int, n: int, *, above_chance: bool = True) -> str:
    """Return the sentence on a path that won and lost so many of n questions."""
    verdict = judge_counts(won, lost, n, above_chance=above_chance)
    return describe_loss("skip2", Differences(accuracy=verdict))


def text_verdict(increases: list[float]) -> Verdict:
    """Return the verdict on texts whose losses increase so much."""
    return judge_means("text_loss", increases, [0.0] * len(increases), seed=0)


@pytest.mark.parametrize(
    ("won", "lost", "n", "decision"),
    [
        (0, 12, 36, DONT),
        (0, 200, 10_000, "at most"),  # a loss of 2 points is shown, and one of 3 excluded
        (100, 380, 10_000, DONT),  # a loss of 2.8 points is shown, and one of 3 isn't excluded
        (30, 4, 120, "answers better"),
        (2, 3, 1000, KEEPS),
        (1, 1, 12, CANT_TELL),
        (2, 5, 60, CANT_TELL),
    ],
)
def test_a_path_is_refused_kept_or_not_judged_by_what_its_questions_exclude(won, lost, n, decision):
    sentence = sentence_on(won, lost, n)
    others = {DONT, "at most", "answers better", KEEPS, CANT_TELL} - {decision}
    assert decision in sentence
    assert not [other for other in others if other in sentence]


def test_too_few_questions_say_what_they_exclude_and_how_many_would_be_enough():
    verdict = judge_counts(0, 0, 12)
    needed = round_up(questions_to_exclude(12, 0.0, -verdict.interval[0], MAX_DROP / 100))
    bound = -100 * verdict.interval[0]
    assert sentence_on(0, 0, 12) == (
        f"skip2: 12 test questions don't exclude a loss of {bound:.0f} points; "
        f"about {needed:,} would exclude one of 3"
    )


def test_no_number_of_questions_is_promised_if_the_measured_loss_is_too_large():
    sentence = sentence_on(2, 5, 60)  # 5 points less, which isn't shown
    assert "would exclude" not in sentence
    needed = judge_counts(2, 5, 60).needed
    assert (
        f"the measured loss of 5.0 points may be chance; about {round_up(needed)} questions"
        in sentence
    )


def test_a_path_of_a_model_that_may_be_guessing_is_not_judged():
    assert "can't be judged" in sentence_on(0, 12, 36, above_chance=False)


@pytest.mark.parametrize(
    ("increases", "says"),
    [
        ([0.29] * 40, "gets worse by 0.29 nats"),
        ([-0.1, -0.2] * 20, "gets better by 0.15 nats"),
        ([0.1, -0.1] * 20, "at most 0.0"),
        ([0.1, -0.1] * 4, "8 texts are too few"),
    ],
)
def test_text_is_judged_apart_from_answers(increases, says):
    differences = Differences(accuracy=judge_counts(2, 3, 1000), text_loss=text_verdict(increases))
    answers, text = describe_loss("skip2", differences).split("; ")
    assert KEEPS in answers
    assert says in text


def test_a_loss_is_too_large_if_its_whole_interval_is_beyond_the_bound():
    accuracy = judge_counts(0, 40, 400)  # 10 points less
    differences = Differences(accuracy=accuracy, text_loss=text_verdict([0.8, 1.2] * 50))
    largest, smallest = (-100 * end for end in accuracy.interval)
    above = list(list_excessive_losses(differences, smallest - 0.01, 0.9))
    assert len(above) == 2
    assert f"(95 %: {smallest:.1f} to {largest:.0f}; " in above[0]
    assert not list(list_excessive_losses(differences, smallest + 0.01, 1.0))


def test_a_loss_that_is_not_shown_is_never_too_large():
    guessing = judge_counts(0, 40, 400, above_chance=False)
    few = text_verdict([9.0] * 3)  # too few texts to show any difference
    assert few.interval[0] > 1
    assert not list(list_excessive_losses(Differences(accuracy=guessing, text_loss=few), 3.0, 1.0))
