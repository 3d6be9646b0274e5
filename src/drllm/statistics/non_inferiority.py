"""The certified choice: the cheapest setting that is shown to lose less than what is allowed.

A setting passes where all of this is shown, each with the same confidence: its loss of accuracy is
below ε, and its next-token loss rises by less than a bound of its own, on texts made of the
questions and, where a set of them is named, on worked answers too. Accuracy alone certifies broken
models, since short multiple choice forgives much. As all have to hold, no correction is due for
their being several (Berger 1982, Technometrics 24 (4)).

Settings are tried from the most executions to the fewest until one fails. In such a fixed order
each may be tested at the full level, and the chance that any setting is passed wrongly stays what
it is for one; nothing after the first failure is looked at (Maurer, Hothorn, Lehmacher 1995;
Westfall and Krishen 2001, Journal of Statistical Planning and Inference 99). Taking the cheapest of
all that pass would need a correction. What is chosen on one split is then tested once on another.

Losses of accuracy are points here, as on the command line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import msgspec
from msgspec.structs import replace

from drllm.errors import ConfigError
from drllm.statistics.intervals import accuracy_interval, upper_bound
from drllm.statistics.paired import Outcomes, maximum_loss, won_lost
from drllm.statistics.power import smallest_certifiable

FEWEST_TEXTS = 30
"""On fewer, the bound is exceeded too often where some texts lose far more than the rest: with one
in ten of them, of 20 texts in 17 % of the cases instead of 5, of 30 in 8 %."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a setting may lose.

    Attributes:
        epsilon: Loss of accuracy that isn't accepted any more, in points.
        max_loss_increase: Rise of the next-token loss that isn't accepted any more, in nats a
            token, on each set of texts.
        confidence: With which each is to be shown, one-sided.

    Raises:
        ConfigError: A value out of range.
    """

    epsilon: float
    max_loss_increase: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        ranges = {"epsilon": (0, 100), "max_loss_increase": (0, 100), "confidence": (0.5, 0.999)}
        for name, (low, high) in ranges.items():
            if not low < getattr(self, name) <= high:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; give more than {low} and at most {high}"
                )


class LossBound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much higher a next-token loss is than base's on the same texts, and at most.

    Attributes:
        num_texts: Texts read by both.
        increase: Mean increase, in nats a token.
        maximum: What the increase doesn't exceed with the confidence asked for; None where so few
            texts bound it nowhere.
    """

    num_texts: int
    increase: float
    maximum: float | None


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting tested against base.

    Attributes:
        name: System and setting.
        executions: Mean a forward pass, in layer equivalents.
        num_questions: Questions asked of both.
        won: Questions that the setting has right and base wrong.
        lost: The other way round.
        maximum_loss: Loss of accuracy from which on every loss is excluded, in points; negative
            where a gain is shown.
        texts: The bound of the next-token loss on the questions' own texts.
        worked: The same on worked answers; None where none are asked for.
        failures: Why it doesn't pass, in words; empty where it does.
    """

    name: str
    executions: float
    num_questions: int
    won: int
    lost: int
    maximum_loss: float
    texts: LossBound
    worked: LossBound | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all losses are shown to be within their limits."""
        return not self.failures

    def sentence(self) -> str:
        """Say whether it passes, and by which numbers."""
        if self.failures:
            return f"{self.name} fails: {', and '.join(self.failures)}."
        excluded = (
            f"losses of accuracy from {self.maximum_loss:.2f} points on are excluded"
            if self.maximum_loss > 0
            else "every loss of accuracy is excluded"
        )
        said = (
            f"{self.name} passes: won {self.won}, lost {self.lost} of {self.num_questions}, "
            f"{excluded}; next-token loss {self.texts.increase:+.3f} nats a token, at most "
            f"{self.texts.maximum:+.3f}, on {self.texts.num_texts} texts"
        )
        if self.worked is not None:
            said += (
                f"; {self.worked.increase:+.3f}, at most {self.worked.maximum:+.3f}, on "
                f"{self.worked.num_texts} worked answers"
            )
        return f"{said}."


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was chosen, if anything, and why.

    Attributes:
        limits: What a setting may lose.
        num_questions: Questions that it was chosen on.
        smallest: The smallest ε in points that so many questions could certify, were as many won
            as lost under the setting that is tried first; None where there is none to try.
        smallest_with_power: The same with a probability of 80 %, for a system that loses nothing.
        discordant: Share of the questions that this setting and base answer differently.
        trials: Settings in the order tried; all but the last one passed.
        untried: Cheaper settings than one that failed.
        not_cheaper: Settings that run as many layers as base or more, and can't be a choice.
        obstacle: Why nothing was tried, in words; None where something was.
        worked_answers: The task whose worked answers a setting has to pass too; None where they
            aren't looked at.
        chosen_on: Task and split of the questions that it was chosen on.
        confirmation: The test of what was chosen, on other questions; None if there was none.
    """

    limits: Limits
    num_questions: int
    smallest: float | None = None
    smallest_with_power: float | None = None
    discordant: float | None = None
    trials: tuple[Trial, ...] = ()
    untried: tuple[str, ...] = ()
    not_cheaper: tuple[str, ...] = ()
    obstacle: str | None = None
    worked_answers: str | None = None
    chosen_on: str | None = None
    confirmation: Trial | None = None

    @property
    def chosen(self) -> Trial | None:
        """The cheapest setting that passed, on the questions that it was chosen on."""
        return next((trial for trial in reversed(self.trials) if trial.passed), None)

    @property
    def certified(self) -> Trial | None:
        """The test of what was chosen, where it passed that too."""
        tested = self.confirmation
        return tested if tested is not None and tested.passed else None

    def verdict(self) -> str:
        """Say in one sentence what is certified; "none" is an answer."""
        kept = self.certified
        if kept is not None:
            return f"Certified: {kept.name} ({kept.executions:.2f} layers a forward pass)."
        if self.obstacle is not None:
            return f"None is certified: {self.obstacle[0].lower()}{self.obstacle[1:]}."
        if self.chosen is None:
            return "None is certified: the first setting tried fails already."
        how = "wasn't tested on" if self.confirmation is None else "fails on"
        return f"None is certified: what was chosen, {self.chosen.name}, {how} other questions."

    def sentences(self) -> list[str]:
        """Say what could be certified at all, what was tried, and what is certified."""
        said = []
        if self.smallest is not None:
            assert self.smallest_with_power is not None
            assert self.discordant is not None
            whose = "" if self.chosen_on is None else f" of {self.chosen_on}"
            said.append(
                f"{self.num_questions} questions{whose}, {100 * self.discordant:.1f} % of them "
                f"answered differently, can certify a loss below {self.smallest:.2f} points at "
                f"best, were no difference seen, and below {self.smallest_with_power:.2f} points "
                f"with 80 % probability, were there none."
            )
        if self.not_cheaper:
            said.append(f"No layers saved, so not tried: {'; '.join(self.not_cheaper)}.")
        if self.trials:
            worked = self.worked_answers
            where = (
                " (worked answers weren't looked at)"
                if worked is None
                else f" and on worked answers of {worked}"
            )
            said.append(
                f"Asked for with {100 * self.limits.confidence:g} % confidence: less than "
                f"{self.limits.epsilon:g} points of accuracy lost, and a next-token loss less than "
                f"{self.limits.max_loss_increase:g} nats a token higher on the questions' own "
                f"texts{where}. Tried from the most layers to the fewest, up to the first that "
                f"fails:"
            )
        said += [trial.sentence() for trial in self.trials]
        if self.untried:
            said.append(f"Not tried after a failure: {'; '.join(self.untried)}.")
        if self.confirmation is not None:
            said.append(f"Tested once on other questions: {self.confirmation.sentence()}")
        return [*said, self.verdict()]


def choose(
    base: Outcomes,
    settings: Sequence[Outcomes],
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
        settings: Of one system or several, on the same questions and texts. The order in which
            they are tried follows from their executions, those given first coming first where
            these are equal, and from nothing that was answered.
        limits: What a setting may lose.
        chance: Accuracy of guessing.
        seed: Of the resampling of texts.
        worked_answers: The task that `worked_loss` is of; None where there is none.
        chosen_on: Task and split of the questions, for whoever reads the choice.

    Returns:
        The choice, to be confirmed by `confirm`; "none" is one too.

    Raises:
        ConfigError: No held-out texts, or too few.
        ValueError: Other questions or texts than base's, or several draws a question.

    Source: ours; for the order of the tests see the module's docstring.
    """
    cheaper = sorted(
        (each for each in settings if each.executions < base.executions),
        key=lambda each: -each.executions,
    )
    n = len(base.correct)
    choice = Choice(
        limits=limits,
        num_questions=n,
        not_cheaper=tuple(e.name for e in settings if e.executions >= base.executions),
        worked_answers=worked_answers,
        chosen_on=chosen_on,
    )
    if not cheaper:
        return replace(choice, obstacle="There is no setting that runs fewer layers than base")
    discordant = sum(won_lost(cheaper[0].correct, base.correct)) / n
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
    for each in cheaper:
        trials.append(_try(base, each, choice, seed))
        if not trials[-1].passed:
            break
    untried = tuple(each.name for each in cheaper[len(trials) :])
    return replace(choice, trials=tuple(trials), untried=untried)


def confirm(
    choice: Choice, base: Outcomes, tested: Outcomes, *, chance: float, seed: int
) -> Choice:
    """Test what was chosen, once, on questions and texts that nothing was chosen on.

    Args:
        choice: With something chosen.
        base: The untouched model on the other questions.
        tested: The chosen setting on them.
        chance: Accuracy of guessing on them.
        seed: Of the resampling of texts.

    Raises:
        ConfigError: No held-out texts, or too few.
        ValueError: Nothing was chosen, it was confirmed before, or `tested` isn't the chosen one.
    """
    if choice.chosen is None or choice.confirmation is not None:
        raise ValueError("only what was chosen is confirmed, and only once")
    if tested.name != choice.chosen.name:
        raise ValueError(f"{choice.chosen.name!r} was chosen, not {tested.name!r}")
    trial = _try(base, tested, choice, seed)
    guessing = _guessing(base, chance)
    if guessing is not None:
        trial = replace(trial, failures=(guessing[0].lower() + guessing[1:], *trial.failures))
    return replace(choice, confirmation=trial)


def _guessing(base: Outcomes, chance: float) -> str | None:
    """Say so where base may be guessing."""
    if accuracy_interval(base.correct)[0] > chance:
        return None
    return f"The base model is not shown to be above chance ({100 * chance:.1f} %)"


def _try(base: Outcomes, ours: Outcomes, choice: Choice, seed: int) -> Trial:
    limits = choice.limits
    won, lost = won_lost(ours.correct, base.correct)
    n = len(base.correct)
    loss = 100 * maximum_loss(won, lost, n, limits.confidence)
    failures = []
    if not loss < limits.epsilon:
        failures.append(f"a loss of up to {loss:.2f} points of accuracy is not excluded")

    def bound(one: Sequence[float], other: Sequence[float], texts: str, where: str) -> LossBound:
        found = _bound(one, other, limits.confidence, seed, texts)
        if found.maximum is None:
            failures.append(
                f"no rise of the next-token loss{where} is excluded by so few texts that differ"
            )
        elif not found.maximum < limits.max_loss_increase:
            failures.append(
                f"a next-token loss{where} up to {found.maximum:.3f} nats a token higher is not "
                f"excluded"
            )
        return found

    texts, worked = bound(ours.text_loss, base.text_loss, "held-out texts", ""), None
    if choice.worked_answers is not None:
        named = f"worked answers of {choice.worked_answers}"
        worked = bound(ours.worked_loss, base.worked_loss, named, f" on {named}")
    return Trial(
        name=ours.name,
        executions=ours.executions,
        num_questions=n,
        won=won,
        lost=lost,
        maximum_loss=loss,
        texts=texts,
        worked=worked,
        failures=tuple(failures),
    )


def _bound(
    ours: Sequence[float], theirs: Sequence[float], confidence: float, seed: int, texts: str
) -> LossBound:
    """Bound the increase from one set of losses to another.

    Raises:
        ConfigError: Fewer than `FEWEST_TEXTS`.
    """
    increases = [one - other for one, other in zip(ours, theirs, strict=True)]
    if len(increases) < FEWEST_TEXTS:
        raise ConfigError(
            f"{len(increases)} {texts} are too few to certify a depth; accuracy alone certifies "
            f"broken models, so give the next-token loss on at least {FEWEST_TEXTS}"
        )
    found = upper_bound(increases, seed, confidence=confidence)
    return LossBound(
        num_texts=len(increases),
        increase=fmean(increases),
        maximum=None if found == math.inf else found,
    )
