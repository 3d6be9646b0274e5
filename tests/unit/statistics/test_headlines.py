"""A headline says what to do in its first sentence, and has at most three."""

import itertools
import re

import pytest

from drllm.statistics.differences import Differences
from drllm.statistics.exclusion import DropTest, Limits, TaskTest, Trial
from drllm.statistics.headlines import (
    ROUTING,
    Candidate,
    prefers_routing,
    write_headline,
    write_headline_after_test,
    write_headline_of_two,
)
from drllm.statistics.power import round_up
from drllm.statistics.verdicts import judge_counts, judge_means

BETTER = (30, 10)  # questions won and lost, of 120
WORSE = (10, 30)
SAME = (0, 0)
TOO_FEW = (12, 8)
COUNTS = (BETTER, WORSE, SAME, TOO_FEW)
INCREASES = (0.0, 0.5, -0.5, None)  # of the next-token loss


def differences(counts, increase=0.0, *, above_chance=True):
    text_loss = None
    if increase is not None:
        base = [3.0 + place % 5 / 100 for place in range(60)]
        text_loss = judge_means("text_loss", [loss + increase for loss in base], base, 0)
    accuracy = judge_counts(*counts, 120, above_chance=above_chance)
    return Differences(accuracy=accuracy, text_loss=text_loss)


def candidate(counts, increase=0.0, name="path skip2", executions=28.0, **options):
    return Candidate(
        name=name,
        executions=executions,
        num_layers=30,
        against_base=differences(counts, increase, **options),
    )


def count_sentences(text):
    return len(re.findall(r"[.](?= [A-Z]|$)", text))


@pytest.mark.parametrize(
    ("counts", "increase", "sentences"),
    [
        (
            BETTER,
            0.0,
            "Use path skip2 (28 of 30 layers): it answers better than all 30, by 16.7 points. "
            "Text like these questions isn't shown to get worse by 60 texts; other text may.",
        ),
        (
            SAME,
            0.5,
            "Use path skip2 (28 of 30 layers) for short answers if a loss of up to 3.1 points is "
            "acceptable: 120 questions show no loss of accuracy, and exclude a larger one. Don't "
            "use it to write text, which gets worse by 0.5 nats a token.",
        ),
        (
            WORSE,
            0.5,
            "Don't use path skip2 (28 of 30 layers): it answers worse than all 30, by 16.7 points. "
            "Text like these questions gets worse, by 0.5 nats a token.",
        ),
        (SAME, None, "Use path skip2 (28 of 30 layers) if a loss of up to 3.1 points is "),
        (
            SAME,
            -0.5,
            "exclude a larger one. Text like these questions gets better, by 0.5 nats a token.",
        ),
    ],
)
def test_a_headline_says_what_to_do_and_what_becomes_of_the_text(counts, increase, sentences):
    assert sentences in write_headline(candidate(counts, increase))


@pytest.mark.parametrize("increase", INCREASES)
def test_too_few_questions_are_a_verdict_of_their_own_with_how_many_would_do(increase):
    few = candidate(TOO_FEW, increase)
    needed = round_up(few.against_base.accuracy.needed)
    assert needed > 120
    text = write_headline(few)
    assert text.startswith(
        f"Evaluate on about {needed} questions before you use path skip2 (28 of 30 "
    )
    assert "120 are too few to tell whether it answers as well as all 30." in text
    assert "answers better" not in text


def test_too_few_texts_come_with_the_number_that_would_do():
    noisy = judge_means("text_loss", [1.0, 2.0, 1.0, 1.5], [1.0, 1.0, 1.5, 1.0], 0)
    against = Differences(accuracy=judge_counts(0, 0, 120), text_loss=noisy)
    found = Candidate(name="it", executions=2.5, num_layers=3, against_base=against)
    text = write_headline(found)
    needed = round_up(noisy.needed)
    assert text.startswith("Use it (2.5 of 3 layers) if a loss of up to ")
    sentence = (
        f"These 4 texts are too few to tell whether text like these questions gets worse; "
        f"about {needed} would do."
    )
    assert sentence in text


def test_what_saves_no_layers_and_is_not_better_is_not_to_be_used():
    assert write_headline(candidate(SAME, executions=30.0)).startswith("Don't use path skip2 (30 ")
    assert "to write text" not in write_headline(candidate(SAME, 0.5, executions=31.0))
    assert write_headline(candidate(BETTER, executions=31.0)).startswith("Use path skip2 (31 of")


def test_a_small_loss_that_is_shown_is_named_with_what_it_is_at_most():
    accuracy = judge_counts(20, 60, 4000)  # a point is lost, at most 1.5
    headline = write_headline(
        Candidate(
            name="path skip1",
            executions=29.0,
            num_layers=30,
            against_base=Differences(accuracy=accuracy),
        )
    )
    assert headline.startswith("Use path skip1 (29 of 30 layers) only where 1.5 points")


@pytest.mark.parametrize("counts", COUNTS)
def test_where_base_may_be_guessing_nothing_is_advised(counts):
    text = write_headline(candidate(counts, above_chance=False))
    assert text.startswith("Choose a task that the model can do, or evaluate on more questions:")
    assert "answers as well" not in text
    assert "better" not in text


@pytest.mark.parametrize(
    ("path", "routing", "difference", "is_routing_preferred"),
    [
        (SAME, SAME, SAME, False),  # a path needs no routers
        (SAME, SAME, BETTER, True),
        (SAME, TOO_FEW, BETTER, False),
        (WORSE, SAME, TOO_FEW, True),
        (WORSE, TOO_FEW, TOO_FEW, True),
        (WORSE, WORSE, WORSE, False),
    ],
)
def test_a_path_is_preferred_unless_routing_is_shown_to_do_better(
    path, routing, difference, is_routing_preferred
):
    rivals = candidate(path), candidate(routing, name=ROUTING), differences(difference)
    assert prefers_routing(*rivals) == is_routing_preferred
    first, *_, last = write_headline_of_two(*rivals).split(". ")
    assert ("routing (28 of 30 layers)" in first) == is_routing_preferred
    assert ("path skip2 (28 of 30 layers)" in first) != is_routing_preferred
    assert ("path skip2" in last) == is_routing_preferred


@pytest.mark.parametrize(
    ("difference", "increase", "sentence"),
    [
        (SAME, 0.0, "Routing per question gains nothing over that."),
        (
            TOO_FEW,
            0.0,
            "120 questions are too few to tell whether routing per question gains anything.",
        ),
        (WORSE, -0.5, "Routing per question answers worse than that, by 16.7 points."),
        (SAME, -0.5, "Routing per question writes better text (by 0.5 nats a token), and isn't "),
    ],
)
def test_what_routing_gains_over_a_path_is_the_last_sentence(difference, increase, sentence):
    rivals = candidate(SAME), candidate(SAME, name=ROUTING), differences(difference, increase)
    assert sentence in write_headline_of_two(*rivals)


def test_no_headline_has_more_than_three_sentences():
    for path, routing, difference in itertools.product(COUNTS, repeat=3):
        for increase in INCREASES:
            text = write_headline_of_two(
                candidate(path, increase),
                candidate(routing, increase, ROUTING, 28.48),
                differences(difference, increase),
            )
            assert 2 <= count_sentences(text) <= 3
            assert len(text.split()) <= 75


def trial(name, *failures, needed=None):
    return Trial(name=name, tasks=(TaskTest(task="t", failures=failures, needed=needed),))


def test_after_a_test_the_headline_says_whether_the_loss_is_excluded():
    limits = Limits(max_drop=2.0)
    passed = DropTest(limits=limits, trials=(trial("skip2"),))
    text = write_headline_after_test(passed, candidate(SAME, 0.5))
    assert text.startswith("Use path skip2 (28 of 30 layers): it is shown to lose less than 2 p")
    assert text.endswith("Don't use it to write text, which gets worse by 0.5 nats a token.")
    failed = DropTest(limits=limits, trials=(trial("skip2", "no", needed=900),))
    text = write_headline_after_test(failed, candidate(SAME))
    assert text.startswith("Don't use path skip2 (28 of 30 layers): it isn't shown to lose less")
    assert "about 900 questions would probably show it" in text
    assert write_headline_after_test(passed, None).startswith("Use skip2: it is shown to lose")


def test_a_loss_of_text_that_is_within_its_limit_is_no_reason_against_writing():
    limits = Limits(max_drop=2.0, max_loss_increase=1.0)
    text = write_headline_after_test(
        DropTest(limits=limits, trials=(trial("skip2"),)), candidate(SAME, 0.5)
    )
    assert text.endswith("Text like these questions gets worse, by 0.5 nats a token.")
