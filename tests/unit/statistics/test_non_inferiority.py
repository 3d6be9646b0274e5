"""The certified choice never passes more than its tests allow, and says what it did."""

import random

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from drllm.errors import ConfigError
from drllm.statistics.non_inferiority import Choice, Limits, choose, confirm
from drllm.statistics.paired import Outcomes, maximum_loss, won_lost
from drllm.statistics.power import smallest_certifiable

N = 400
LIMITS = Limits(epsilon=4, max_loss_increase=0.1)
TEXTS = [3.0 + place / 10 for place in range(40)]
RIGHT = [1] * 240 + [0] * 160  # 60 %


def base(correct=RIGHT, texts=TEXTS):
    return Outcomes(
        name="base", executions=30.0, correct=correct, text_loss=texts, worked_loss=texts
    )


def point(executions, won=3, lost=3, worse=0.01, worked=0.0):
    """Return a setting that wins and loses so many questions; its losses rise by about so much."""
    correct = [0] * lost + RIGHT[lost:]
    correct[-won or N :] = [1] * won
    rng = random.Random(executions)
    texts, answers = (
        [value + rise + rng.uniform(-0.005, 0.005) for value in TEXTS] for rise in (worse, worked)
    )
    return Outcomes(
        name=f"routed, {executions:g} layers",
        executions=executions,
        correct=correct,
        text_loss=texts,
        worked_loss=answers,
    )


def chosen(points, limits=LIMITS, reference=None, chance=0.25, **about):
    return choose(reference or base(), points, limits, chance=chance, seed=0, **about)


def confirmed(choice, tested, chance=0.25):
    return confirm(choice, base(), tested, chance=chance, seed=1)


def test_the_cheapest_setting_within_both_limits_is_chosen():
    choice = chosen([point(20, lost=60), point(27), point(24)])
    assert [(trial.name, trial.passed) for trial in choice.trials] == [
        ("routed, 27 layers", True),
        ("routed, 24 layers", True),
        ("routed, 20 layers", False),
    ]
    assert choice.chosen.executions == 24
    assert choice.trials[0].maximum_loss == pytest.approx(100 * maximum_loss(3, 3, N))


def test_nothing_behind_the_first_failure_is_looked_at():
    choice = chosen([point(27), point(24, lost=60), point(20)])
    assert choice.chosen.executions == 27
    assert choice.untried == ("routed, 20 layers",)
    assert "Not tried after a failure: routed, 20 layers." in choice.sentences()


FEW = base(texts=[3.0] * 30)
NO_RISE = "no rise of the next-token loss is excluded by so few texts that differ"
RISE = "a next-token loss{} up to {:.3f} nats a token higher is not excluded"
LOST = "a loss of up to {:.2f} points of accuracy is not excluded"
WORKED = " on worked answers of gsm8k"


@pytest.mark.parametrize(
    ("tested", "reference", "failure"),
    [
        (point(27, worse=0.2), None, lambda t: RISE.format("", t.texts.maximum)),
        (point(27, worked=0.2), None, lambda t: RISE.format(WORKED, t.worked.maximum)),
        (point(27, lost=18), None, lambda _: LOST.format(100 * maximum_loss(3, 18, N))),
        (
            replace(FEW, executions=27, text_loss=[3.0] * 29 + [3.01]),
            FEW,
            lambda _: NO_RISE,
        ),
    ],
    ids=["accuracy alone", "loss on texts alone", "losses alone", "texts that bound nothing"],
)
def test_nothing_is_certified_by(tested, reference, failure):
    choice = chosen([tested], reference=reference, worked_answers="gsm8k")
    [trial] = choice.trials
    assert trial.failures == (failure(trial),)
    assert (trial.maximum_loss < LIMITS.epsilon) == ("accuracy" not in trial.failures[0])
    assert (trial.texts.maximum is None) == (reference is FEW)
    assert choice.sentences()[-1] == "None is certified: the first setting tried fails already."


def test_worked_answers_have_a_bound_of_their_own():
    held = chosen([point(27, worked=0.02)], worked_answers="gsm8k").chosen
    assert held.worked.num_texts == len(TEXTS)
    assert held.worked.increase == pytest.approx(0.02, abs=0.005)
    assert f"at most {held.worked.maximum:+.3f}, on 40" in held.sentence()


def test_worked_answers_are_a_condition_when_the_choice_is_confirmed_too():
    choice = chosen([point(27)], worked_answers="gsm8k")
    failed = confirmed(choice, point(27, worked=0.2))
    assert failed.certified is None
    assert "worked answers of gsm8k" in failed.confirmation.failures[0]
    assert confirmed(choice, point(27)).certified is not None


def test_it_is_said_whether_worked_answers_were_looked_at_and_whose_questions_these_are():
    said = " ".join(chosen([point(27)]).sentences())
    assert "worked answers weren't looked at" in said
    about = {"worked_answers": "gsm8k", "chosen_on": "arc_easy (select)"}
    said = " ".join(chosen([point(27)], **about).sentences())
    assert said.startswith("400 questions of arc_easy (select), 1.5 % of them")
    assert "on worked answers of gsm8k" in said


def test_the_smallest_certifiable_loss_is_said_first():
    choice = chosen([point(24, won=20, lost=20), point(27)])
    if_equal, with_power = smallest_certifiable(
        N, 6 / N
    )  # that of the setting which is tried first
    assert choice.smallest == pytest.approx(100 * if_equal)
    first = choice.sentences()[0]
    assert first.startswith("400 questions, 1.5 % of them answered differently, can certify a loss")
    assert f"below {100 * if_equal:.2f} points at best" in first
    assert f"below {100 * with_power:.2f} points with 80 % probability" in first


def test_less_than_n_can_certify_is_not_tried():
    little = Limits(epsilon=0.5, max_loss_increase=0.1)
    choice = chosen([point(27)], little)
    assert choice.trials == ()
    assert choice.obstacle == "Less than 0.5 points is too little at n = 400"
    assert choice.obstacle[1:] in choice.sentences()[-1]
    # Even where more is won than lost, which the limit was not set for.
    assert chosen([point(27, won=9, lost=1)], little).chosen is None


def test_a_base_that_may_be_guessing_certifies_nothing():
    choice = chosen([point(27)], chance=0.58)
    assert choice.chosen is None
    assert choice.obstacle == "The base model is not shown to be above chance (58.0 %)"


def test_settings_that_save_nothing_are_no_choice():
    choice = chosen([point(30), point(33), point(27)])
    assert choice.not_cheaper == ("routed, 30 layers", "routed, 33 layers")
    assert choice.chosen.executions == 27
    assert chosen([point(30)]).sentences() == [
        "No layers saved, so not tried: routed, 30 layers.",
        "None is certified: there is no setting that runs fewer layers than base.",
    ]


def test_what_is_chosen_is_confirmed_on_other_questions_and_goes_into_a_file():
    choice = chosen([point(27)])
    assert choice.certified is None
    assert "wasn't tested on other questions" in choice.sentences()[-1]
    held = confirmed(choice, point(27, won=4, lost=2))
    assert held.certified == held.confirmation
    assert held.sentences()[-1] == "Certified: routed, 27 layers (27.00 layers a forward pass)."
    assert "won 4, lost 2 of 400" in held.sentences()[-2]
    assert msgspec.json.decode(msgspec.json.encode(held), type=Choice) == held
    failed = confirmed(choice, point(27, lost=30))
    assert failed.certified is None
    assert "routed, 27 layers, fails on" in failed.sentences()[-1]
    assert confirmed(choice, point(27), chance=0.58).confirmation.failures == (
        "the base model is not shown to be above chance (58.0 %)",
    )


@pytest.mark.parametrize(
    ("field", "texts", "message"),
    [
        ("text_loss", [], "0 held-out texts are too few"),
        ("text_loss", TEXTS[:29], "29 held-out texts are too few"),
        ("worked_loss", TEXTS[:29], "29 worked answers of gsm8k are too few"),
    ],
)
def test_a_choice_without_enough_texts_is_refused(field, texts, message):
    bare, reference = (replace(each, **{field: texts}) for each in (point(27), base()))
    with pytest.raises(ConfigError, match=message):
        chosen([bare], reference=reference, worked_answers="gsm8k")


@pytest.mark.thorough
def test_settings_that_all_lose_as_much_as_epsilon_are_rarely_passed_however_many_there_are():
    # Every setting loses exactly ε in truth, so every pass is wrong. In the fixed order that
    # happens as often as for one setting; taking any that passes would err several times as often.
    rng = np.random.default_rng(0)
    runs, settings, epsilon, discordant = 400, 6, 0.06, 0.12
    in_order = any_of_them = 0
    reference = base(correct=[1] * 150 + [0] * 50)
    for _ in range(runs):
        points = []
        for place in range(settings):
            lost, won = rng.multinomial(
                200, ((discordant + epsilon) / 2, (discordant - epsilon) / 2, 1 - discordant)
            )[:2]
            correct = [0] * lost + [1] * (150 - lost + won) + [0] * (50 - won)
            points.append(
                Outcomes(name=str(place), executions=29.0 - place, correct=correct, text_loss=TEXTS)
            )
            # Which questions are won and lost doesn't matter, only how many.
        limits = Limits(epsilon=100 * epsilon, max_loss_increase=0.1)
        in_order += choose(reference, points, limits, chance=0.25, seed=0).chosen is not None
        any_of_them += any(
            maximum_loss(*won_lost(each.correct, reference.correct), 200) < epsilon
            for each in points
        )
    assert in_order / runs < 0.08  # 0.05, two and a half standard deviations
    assert any_of_them / runs > 0.15
