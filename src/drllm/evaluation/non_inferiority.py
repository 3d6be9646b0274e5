"""The certified choice: the cheapest setting that is shown to lose less than what is allowed.

Owns the rule, the order in which settings are tried, and the sentences that say what came of it.
Leaves the curve's points to `curve`, the tests to `statistics` and `rises`, and what is run for a
choice to `choosing`. Losses of accuracy are points here, as on the command line.

A setting passes where all of this is shown, each with the same confidence: its loss of accuracy is
below ε, and its next-token loss rises by less than a bound of its own, on texts made of the
questions and, where a set of them is named, on worked answers too. Accuracy alone certifies broken
models, since short multiple choice forgives much. As all have to hold, no correction is due for
their being several (Berger 1982, Technometrics 24 (4)).

Settings are tried from the most executions to the fewest until one fails. In such a fixed order
each may be tested at the full level, and the chance that any setting is passed wrongly stays what
it is for one; nothing behind the first failure is looked at (Maurer, Hothorn, Lehmacher 1995;
Westfall and Krishen 2001, Journal of Statistical Planning and Inference 99). Taking the cheapest of
all that pass would need a correction. What is chosen on one split is then tested once on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from drllm.errors import ConfigError
from drllm.evaluation.curve import Point, won_lost
from drllm.evaluation.loss_bound import Rise
from drllm.statistics.paired import maximum_loss
from drllm.statistics.power import smallest_certifiable


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a setting may lose.

    Attributes:
        epsilon: Loss of accuracy that isn't accepted any more, in points; in (0, 100].
        max_loss_increase: Rise of the next-token loss that isn't accepted any more, in nats a
            token, on each set of texts; above 0.
        confidence: With which each is to be shown, one-sided; in (0.5, 1).

    Raises:
        ConfigError: A value out of range.
    """

    epsilon: float
    max_loss_increase: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 100:
            raise ConfigError(
                f"epsilon is {self.epsilon}; give points of accuracy above 0 and up to 100, e.g. 2"
            )
        if not 0 < self.max_loss_increase < math.inf:
            raise ConfigError(
                f"max_loss_increase is {self.max_loss_increase}; give nats a token above 0, "
                f"e.g. 0.05"
            )
        if not 0.5 < self.confidence < 1:
            raise ConfigError(
                f"confidence is {self.confidence}; give a value between 0.5 and 1, e.g. 0.95"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting tested against base.

    Attributes:
        name: System and setting.
        executions: Mean a forward pass, in layer equivalents.
        num_questions: Questions asked of both.
        won: Questions that the setting has right and base wrong.
        lost: The other way round.
        greatest_loss: Points of accuracy above which every loss is excluded.
        num_texts: Held-out texts read by both, as for `Rise`.
        loss_increase: On them.
        greatest_increase: On them.
        worked: The rise on worked answers; None where none are asked for.
        failures: Why it doesn't pass, in words; empty where it does.
    """

    name: str
    executions: float
    num_questions: int
    won: int
    lost: int
    greatest_loss: float
    num_texts: int
    loss_increase: float
    greatest_increase: float | None
    worked: Rise | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all losses are shown to be within their limits."""
        return not self.failures

    def __str__(self) -> str:
        if self.failures:
            return f"{self.name} fails: {', and '.join(self.failures)}"
        assert self.greatest_increase is not None
        excluded = (
            f"losses of accuracy from {self.greatest_loss:.2f} points are excluded"
            if self.greatest_loss > 0
            else "every loss of accuracy is excluded"
        )
        said = (
            f"{self.name} passes: won {self.won}, lost {self.lost} of {self.num_questions}, "
            f"{excluded}; next-token loss {self.loss_increase:+.3f} nats a token, at most "
            f"{self.greatest_increase:+.3f}, on {self.num_texts} texts"
        )
        if self.worked is None:
            return said
        assert self.worked.greatest_increase is not None
        return (
            f"{said}; {self.worked.loss_increase:+.3f}, at most "
            f"{self.worked.greatest_increase:+.3f}, on {self.worked.num_texts} worked answers"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen, if anything, and why.

    Attributes:
        limits: What a setting may lose.
        num_questions: Questions that it was chosen on.
        smallest: The smallest ε in points that so many questions could certify, were as many won
            as lost under the setting that is tried first; None where there is none to try.
        smallest_with_power: The same with a probability of 80 %, for a system that loses nothing.
        discordant: Share of the questions that this setting and base answer differently.
        trials: Settings in the order tried; all but the last one passed.
        untried: Cheaper settings, behind one that failed.
        not_cheaper: Settings that run as many layers as base or more, and can't be a choice.
        obstacle: Why nothing was tried, in words; None where something was.
        worked_answers: The task whose worked answers a setting has to pass too; None where they
            aren't looked at.
        chosen_on: Task and split of the questions that it was chosen on; None where nobody said.
        confirmation: The test of what was chosen, on other questions; None if there was none.
    """

    limits: Limits
    num_questions: int
    smallest: float | None
    smallest_with_power: float | None
    discordant: float | None
    trials: tuple[Trial, ...]
    untried: tuple[str, ...]
    not_cheaper: tuple[str, ...]
    obstacle: str | None
    worked_answers: str | None = None
    chosen_on: str | None = None
    confirmation: Trial | None = None

    @property
    def chosen(self) -> Trial | None:
        """The cheapest setting that passed, on the questions that it was chosen on."""
        return next((trial for trial in reversed(self.trials) if trial.passed), None)

    @property
    def is_certified(self) -> bool:
        """Whether a setting was chosen and confirmed."""
        return self.confirmation is not None and self.confirmation.passed

    def sentences(self) -> list[str]:
        """Say what could be certified at all, what was tried, and what is certified."""
        said = []
        whose = "" if self.chosen_on is None else f" of {self.chosen_on}"
        if self.smallest is not None:
            assert self.smallest_with_power is not None
            assert self.discordant is not None
            said.append(
                f"{self.num_questions} questions{whose}, {100 * self.discordant:.1f} % of them "
                f"answered differently, can certify a loss below {self.smallest:.2f} points at "
                f"best, were no difference seen, and below {self.smallest_with_power:.2f} points "
                f"with 80 % probability, were there none."
            )
        if self.not_cheaper:
            said.append(f"No layers saved, so not tried: {'; '.join(self.not_cheaper)}.")
        if self.obstacle is not None:
            return [*said, f"{self.obstacle}: none can be certified."]
        confidence = f"{100 * self.limits.confidence:g} % confidence"
        said.append(
            f"Asked for with {confidence}: less than {self.limits.epsilon:g} points of accuracy "
            f"lost, and a next-token loss less than {self.limits.max_loss_increase:g} nats a token "
            f"higher{self._where()}. Tried from the most layers to the fewest, up to the first "
            f"that fails:"
        )
        said += [f"{trial}." for trial in self.trials]
        if self.untried:
            said.append(f"Behind a failure, so not tried: {'; '.join(self.untried)}.")
        if self.chosen is None:
            return [*said, "None is certified."]
        if self.confirmation is None:
            return [*said, f"Chosen: {self._of_chosen()}; still to be tested on other questions."]
        said.append(f"Tested once on other questions: {self.confirmation}.")
        last = f"Certified: {self._of_chosen()}." if self.is_certified else "None is certified."
        return [*said, last]

    def _where(self) -> str:
        """Say on what the next-token loss is looked at."""
        if self.worked_answers is None:
            return " on the questions' own texts (worked answers weren't looked at)"
        return f" on the questions' own texts and on worked answers of {self.worked_answers}"

    def _of_chosen(self) -> str:
        assert self.chosen is not None
        return f"{self.chosen.name} ({self.chosen.executions:.2f} layers a forward pass)"


def choose(
    base: Point,
    points: Sequence[Point],
    limits: Limits,
    *,
    chance: float,
    seed: int,
    worked_answers: str | None = None,
    chosen_on: str | None = None,
) -> Choice:
    """Choose the cheapest setting within the limits, on the questions that settings are chosen on.

    Nothing is tried where base isn't shown to be above chance (who guesses has nothing to lose),
    or where ε is below what so many questions could certify were no difference seen.

    Args:
        base: The untouched model; right or wrong on each question, and its next-token losses.
        points: Settings of one system or several, on the same questions and texts. The order in
            which they are tried follows from their executions, those given first coming first
            where these are equal, and from nothing that was answered.
        limits: What a setting may lose.
        chance: Accuracy of guessing.
        seed: Of the resampling of texts.
        worked_answers: The task that the points' `worked_loss` is of; None where there is none.
        chosen_on: Task and split of the questions, for whoever reads the choice.

    Returns:
        The choice, to be confirmed by `confirm`; "none" is one too.

    Raises:
        ConfigError: No held-out texts, or too few.
        ValueError: Points on other questions or texts than base, or with several draws a question.

    Source: ours; for the order of the tests see the module's docstring.
    """
    cheaper = sorted(
        (point for point in points if point.executions < base.executions),
        key=lambda point: -point.executions,
    )
    n = len(base.outcomes.correct)
    choice = Choice(
        limits=limits,
        num_questions=n,
        smallest=None,
        smallest_with_power=None,
        discordant=None,
        trials=(),
        untried=(),
        not_cheaper=tuple(p.name for p in points if p.executions >= base.executions),
        obstacle=None,
        worked_answers=worked_answers,
        chosen_on=chosen_on,
    )
    if not cheaper:
        return replace(choice, obstacle="There is no setting that runs fewer layers than base")
    discordant = sum(won_lost(cheaper[0].outcomes, base.outcomes)) / n
    certifiable = smallest_certifiable(n, discordant, limits.confidence)
    choice = replace(
        choice,
        smallest=100 * certifiable.if_equal,
        smallest_with_power=100 * certifiable.with_power,
        discordant=discordant,
    )
    guessing = _guessing(base, chance)
    if guessing is not None:
        return replace(choice, obstacle=guessing)
    if limits.epsilon <= 100 * certifiable.if_equal:
        asked = f"Less than {limits.epsilon:g} points is too little at n = {n}"
        return replace(choice, obstacle=asked)
    trials: list[Trial] = []
    for point in cheaper:
        trials.append(_try(base, point, choice, seed))
        if not trials[-1].passed:
            break
    untried = tuple(point.name for point in cheaper[len(trials) :])
    return replace(choice, trials=tuple(trials), untried=untried)


def confirm(choice: Choice, base: Point, point: Point, *, chance: float, seed: int) -> Choice:
    """Test what was chosen, once, on questions and texts that nothing was chosen on.

    Args:
        choice: With something chosen.
        base: The untouched model on the other questions.
        point: The chosen setting on them.
        chance: Accuracy of guessing on them.
        seed: Of the resampling of texts.

    Returns:
        The choice with its confirmation.

    Raises:
        ConfigError: No held-out texts, or too few.
        ValueError: Nothing was chosen, it was confirmed before, or `point` isn't the chosen one.
    """
    if choice.chosen is None or choice.confirmation is not None:
        raise ValueError("only what was chosen is confirmed, and only once")
    if point.name != choice.chosen.name:
        raise ValueError(f"{choice.chosen.name!r} was chosen, not {point.name!r}")
    trial = _try(base, point, choice, seed)
    guessing = _guessing(base, chance)
    if guessing is not None:
        trial = replace(trial, failures=(guessing[0].lower() + guessing[1:], *trial.failures))
    return replace(choice, confirmation=trial)


def _guessing(base: Point, chance: float) -> str | None:
    """Say so where base may be guessing."""
    if base.interval[0] > chance:
        return None
    return f"The base model is not shown to be above chance ({100 * chance:.1f} %)"


def _try(base: Point, point: Point, choice: Choice, seed: int) -> Trial:
    limits, ours, theirs = choice.limits, point.outcomes, base.outcomes
    won, lost = won_lost(ours, theirs)
    n = len(theirs.correct)
    loss = 100 * maximum_loss(won, lost, n, limits.confidence)
    failures: list[str | None] = []
    if not loss < limits.epsilon:
        failures.append(f"a loss of up to {loss:.2f} points of accuracy is not excluded")
    bound = partial(Rise.of, confidence=limits.confidence, seed=seed)
    texts = bound(ours.text_loss, theirs.text_loss, texts="held-out texts")
    failures.append(texts.failure(limits.max_loss_increase))
    worked = None
    if choice.worked_answers is not None:
        named = f"worked answers of {choice.worked_answers}"
        worked = bound(ours.worked_loss, theirs.worked_loss, texts=named)
        failures.append(worked.failure(limits.max_loss_increase, f" on {named}"))
    return Trial(
        name=point.name,
        executions=point.executions,
        num_questions=n,
        won=won,
        lost=lost,
        greatest_loss=loss,
        num_texts=texts.num_texts,
        loss_increase=texts.loss_increase,
        greatest_increase=texts.greatest_increase,
        worked=worked,
        failures=tuple(failure for failure in failures if failure is not None),
    )
