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

import math
from collections.abc import Sequence
from statistics import fmean

import msgspec
from msgspec.structs import replace

from drllm.errors import ConfigError
from drllm.statistics.intervals import accuracy_interval, upper_bound
from drllm.statistics.paired import Outcomes, maximum_loss, won_lost
from drllm.statistics.power import questions_to_certify, rounded_up, smallest_certifiable
from drllm.statistics.verdicts import lower, signed

MAX_LOSS_INCREASE = 0.05
"""Nats a token that the next-token loss may rise, unless another limit is given."""
FEWEST_TEXTS = 30
"""On fewer, the bound is exceeded too often where some texts lose far more than the rest: with one
in ten of them, of 20 texts in 17 % of the cases instead of 5, of 30 in 8 %."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a setting may lose.

    Less than `epsilon` points of accuracy, and less than `max_loss_increase` nats a token of
    next-token loss on each set of texts, each shown with this one-sided confidence.
    """

    epsilon: float
    max_loss_increase: float
    confidence: float = 0.95


class LossBound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much higher a next-token loss is than base's on so many texts, in nats a token.

    The mean `increase` doesn't exceed `maximum` with the confidence asked for; None where so few
    texts bound it nowhere.
    """

    num_texts: int
    increase: float
    maximum: float | None

    def written(self, unit: str = "") -> str:
        """Write the numbers of a bound that there is."""
        most = signed(self.maximum or 0.0, 3)
        return f"{signed(self.increase, 3)}{unit}, at most {most}, on {self.num_texts}"


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting tested against base; `docs/formats.md` has the fields.

    `maximum_loss` is the loss of accuracy from which on every loss is excluded, in points: negative
    where a gain is shown. `failures` say why it doesn't pass.
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
        excluded = "every loss of accuracy is excluded"
        if self.maximum_loss > 0:
            excluded = f"losses of accuracy from {self.maximum_loss:.2f} points on are excluded"
        said = (
            f"{self.name} passes: won {self.won}, lost {self.lost} of {self.num_questions}, "
            f"{excluded}; next-token loss {self.texts.written(' nats a token')} texts"
        )
        worked = f"; {self.worked.written()} worked answers" if self.worked else ""
        return f"{said}{worked}."


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was chosen, if anything, and why; `docs/formats.md` has the fields.

    `smallest` is the smallest ε in points that so many questions could certify, were as many won as
    lost under the setting that is tried first; `smallest_with_power` is that for a system which
    loses nothing, with a probability of 80 %. All `trials` but the last one passed. `obstacle` says
    why nothing was tried.
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
        return self.confirmation if self.confirmation and self.confirmation.passed else None

    @property
    def needed(self) -> int:
        """About how many questions would do for ε, with 80 % probability; two digits count."""
        limits = self.limits
        epsilon = limits.epsilon / 100
        return rounded_up(questions_to_certify(self.discordant or 0.0, epsilon, limits.confidence))

    def verdict(self) -> str:
        """Say in one sentence what is certified; "none" is an answer."""
        if kept := self.certified:
            return f"Certified: {kept.name} ({kept.executions:.2f} layers a forward pass)."
        if self.obstacle is not None:
            return f"None is certified: {lower(self.obstacle)}."
        if self.chosen is None:
            return "None is certified: the first setting tried fails already."
        how = "wasn't tested on" if self.confirmation is None else "fails on"
        return f"None is certified: what was chosen, {self.chosen.name}, {how} other questions."

    def sentences(self) -> list[str]:
        """Say what could be certified at all, what was tried, and what is certified."""
        said = []
        if self.smallest is not None:
            whose = "" if self.chosen_on is None else f" of {self.chosen_on}"
            said.append(
                f"{self.num_questions} questions{whose}, {100 * (self.discordant or 0):.1f} % of "
                f"them answered differently, can certify a loss below {self.smallest:.2f} points "
                f"at best, were no difference seen, and below {self.smallest_with_power:.2f} "
                f"points with 80 % probability, were there none."
            )
            if (needed := self.needed) > self.num_questions:
                said.append(
                    f"Certifying {self.limits.epsilon:g} points would take about {needed:,} "
                    f"questions."
                )
        if self.not_cheaper:
            said.append(f"No layers saved, so not tried: {'; '.join(self.not_cheaper)}.")
        if self.trials:
            where = " (worked answers weren't looked at)"
            if self.worked_answers is not None:
                where = f" and on worked answers of {self.worked_answers}"
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

    Settings, of one system or several, have base's questions and texts, answered once (else it is
    a ValueError); of equal executions the one given first is tried first. `chance` is the accuracy
    of guessing, `worked_answers` the task whose `worked_loss` is looked at, if any, `chosen_on` the
    questions' task and split. Too few held-out texts are a ConfigError.

    Nothing is tried where base isn't shown to be above chance (who guesses has nothing to lose),
    or where ε is below what so many questions could certify were no difference seen.
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
    losses = smallest_certifiable(n, discordant, limits.confidence)
    smallest, with_power = (100 * loss for loss in losses)
    too_little = f"Less than {limits.epsilon:g} points is too little at n = {n}"
    choice = replace(
        choice,
        smallest=smallest,
        smallest_with_power=with_power,
        discordant=discordant,
        obstacle=_guessing(base, chance) or (too_little if limits.epsilon <= smallest else None),
    )
    if choice.obstacle is not None:
        return choice
    trials: list[Trial] = []
    for each in cheaper:
        trials.append(_try(base, each, choice, seed))
        if not trials[-1].passed:
            break
    left = cheaper[len(trials) :]
    return replace(choice, trials=tuple(trials), untried=tuple(each.name for each in left))


def confirm(
    choice: Choice, base: Outcomes, tested: Outcomes, *, chance: float, seed: int
) -> Choice:
    """Test what was chosen, once, on questions and texts that nothing was chosen on."""
    trial = _try(base, tested, choice, seed)
    if guessing := _guessing(base, chance):
        trial = replace(trial, failures=(lower(guessing), *trial.failures))
    return replace(choice, confirmation=trial)


def _guessing(base: Outcomes, chance: float) -> str | None:
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
        increases = [a - b for a, b in zip(one, other, strict=True)]
        if len(increases) < FEWEST_TEXTS:
            raise ConfigError(
                f"{len(increases)} {texts} are too few to certify a depth; accuracy alone "
                f"certifies broken models, so give the next-token loss on at least {FEWEST_TEXTS}"
            )
        found = upper_bound(increases, seed, confidence=limits.confidence)
        maximum = None if found == math.inf else found
        rise = f"next-token loss{where}"
        if maximum is None:
            failures.append(f"no rise of the {rise} is excluded by so few texts that differ")
        elif not maximum < limits.max_loss_increase:
            failures.append(f"a {rise} up to {maximum:.3f} nats a token higher is not excluded")
        return LossBound(num_texts=len(increases), increase=fmean(increases), maximum=maximum)

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
