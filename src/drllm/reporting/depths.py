"""Systems at several depths as a result holds them: differences, the curve, the certified choice.

Owns reading and checking these parts of `eval/TASK.json`. Leaves the rest of the file to
`results`, and what is said of them to `depth`.
"""

from __future__ import annotations

from dataclasses import dataclass

from drllm.errors import RecordError
from drllm.reporting.fields import Fields

SHOWN = ("higher", "lower", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What one system has more than another, on the same questions or texts.

    Attributes:
        mean: Of the differences.
        interval: Its 95 % interval.
        shown: `higher` or `lower` where the evaluation's test shows it, else None.
    """

    mean: float
    interval: tuple[float, float]
    shown: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """The differences of two systems; None where either side doesn't know it.

    Attributes:
        accuracy: As a share of the questions.
        gold_logprob: In nats a question.
        text_loss: In nats a token; higher is worse.
    """

    accuracy: Difference | None
    gold_logprob: Difference | None
    text_loss: Difference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One system at one depth; base has neither a setting nor differences.

    `routed_against` is what the routed model of the same depth has more, None for that itself.
    """

    system: str
    setting: str
    executions: float
    accuracy: float
    interval: tuple[float, float]
    gold_logprob: float | None
    text_loss: float | None
    against_base: Differences | None
    routed_against: Differences | None

    @property
    def name(self) -> str:
        """System and setting, as the samples name it."""
        return f"{self.system}, {self.setting}" if self.setting else self.system


@dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """How much higher a next-token loss is than base's, in nats a token, and at most."""

    num_texts: int
    loss_increase: float
    greatest_increase: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting tested against base; losses of accuracy in points, `failures` empty if passed.

    `worked` is the rise on worked answers, None where they weren't looked at.
    """

    name: str
    executions: float
    num_questions: int
    won: int
    lost: int
    greatest_loss: float
    texts: Rise
    worked: Rise | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all losses are shown to be within their limits."""
        return not self.failures


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen on one split and tested once on another, if anything.

    Attributes:
        epsilon: Points of accuracy from which a loss isn't accepted.
        max_loss_increase: Nats a token from which a rise of the next-token loss isn't.
        confidence: With which each was to be shown.
        worked_answers: The task whose worked answers were looked at; None if they weren't.
        chosen_on: Task and split of the questions; None where an older drllm didn't say.
        trials: Settings in the order tried; all but the last one passed.
        confirmation: The test of what was chosen; None if nothing was chosen.
        obstacle: Why nothing was tried.
        sentences: The same in words, as the evaluation has them.
    """

    epsilon: float
    max_loss_increase: float
    confidence: float
    worked_answers: str | None
    chosen_on: str | None
    trials: tuple[Trial, ...]
    confirmation: Trial | None
    obstacle: str | None
    sentences: tuple[str, ...]

    @property
    def chosen(self) -> Trial | None:
        """The cheapest setting that passed, on the questions that it was chosen on."""
        return next((trial for trial in reversed(self.trials) if trial.passed), None)

    @property
    def certified(self) -> Trial | None:
        """The test of what was chosen, where it passed that too."""
        tested = self.confirmation
        return tested if tested is not None and tested.passed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """One number under several seeds; `deviation` None where it can't be told."""

    mean: float
    lowest: float
    highest: float
    deviation: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """What routers of several seeds did at one depth.

    Attributes:
        setting: The depth in words; empty for the one that they were trained for.
        num_seeds: How many could be had at it.
        accuracy: Between the seeds.
        executions: Likewise.
        against_base: Of the mean over the seeds.
        against_permuted: Of the mean over the seeds, to that of their own routes permuted.
    """

    setting: str
    num_seeds: int
    accuracy: Spread
    executions: Spread
    against_base: Differences | None
    against_permuted: Differences | None


def read_seeds(rows: list[Fields]) -> tuple[Seeds, ...]:
    """Read what routers of several seeds did, depth by depth; empty where there was one seed."""
    return tuple(
        Seeds(
            setting=row.text("setting"),
            num_seeds=row.whole("num_seeds"),
            accuracy=_spread(row, "accuracy"),
            executions=_spread(row, "executions"),
            against_base=read_differences(row.optional_object("against_base")),
            against_permuted=read_differences(row.optional_object("against_permuted")),
        )
        for row in rows
    )


def _spread(row: Fields, key: str) -> Spread:
    fields = row.optional_object(key) or Fields({}, f"{row.where}, {key!r}")
    return Spread(
        mean=fields.number("mean"),
        lowest=fields.number("lowest"),
        highest=fields.number("highest"),
        deviation=fields.optional_number("deviation"),
    )


def read_differences(fields: Fields | None) -> Differences | None:
    """Read two systems' differences; None where there are none."""
    if fields is None:
        return None
    return Differences(
        accuracy=_difference(fields.optional_object("accuracy")),
        gold_logprob=_difference(fields.optional_object("gold_logprob")),
        text_loss=_difference(fields.optional_object("text_loss")),
    )


def _difference(fields: Fields | None) -> Difference | None:
    if fields is None:
        return None
    shown = fields.optional_text("shown")
    if shown not in SHOWN:
        raise RecordError(f"{fields.where}: 'shown' is {shown!r}; expected 'higher' or 'lower'")
    return Difference(mean=fields.number("mean"), interval=fields.interval("interval"), shown=shown)


def read_curve(rows: list[Fields]) -> tuple[Point, ...]:
    """Read the rows of a depth curve.

    Raises:
        RecordError: A row that can't be, or one system at one depth twice.
    """
    points = tuple(_point(row) for row in rows)
    names = [point.name for point in points]
    for row, name in zip(rows, names, strict=True):
        if names.count(name) > 1:
            raise RecordError(f"{row.where}: {name!r} is there twice; evaluate again")
    return points


def _point(fields: Fields) -> Point:
    return Point(
        system=fields.text("system"),
        setting=fields.text("setting"),
        executions=fields.number("executions"),
        accuracy=fields.number("accuracy"),
        interval=fields.interval("interval"),
        gold_logprob=fields.optional_number("gold_logprob"),
        text_loss=fields.optional_number("text_loss"),
        against_base=read_differences(fields.optional_object("against_base")),
        routed_against=read_differences(fields.optional_object("routed_against")),
    )


def read_choice(fields: Fields | None) -> Choice | None:
    """Read a certified choice; None where none was asked for."""
    if fields is None:
        return None
    limits = fields.optional_object("limits") or Fields({}, f"{fields.where}, 'limits'")
    confirmation = fields.optional_object("confirmation")
    return Choice(
        epsilon=limits.number("epsilon"),
        max_loss_increase=limits.number("max_loss_increase"),
        confidence=limits.number("confidence"),
        worked_answers=fields.optional_text("worked_answers"),
        chosen_on=fields.optional_text("chosen_on"),
        trials=tuple(_trial(row) for row in fields.objects("trials")),
        confirmation=None if confirmation is None else _trial(confirmation),
        obstacle=fields.optional_text("obstacle"),
        sentences=fields.texts("sentences"),
    )


def _trial(fields: Fields) -> Trial:
    worked = fields.optional_object("worked")
    return Trial(
        name=fields.text("name"),
        executions=fields.number("executions"),
        num_questions=fields.whole("num_questions"),
        won=fields.whole("won"),
        lost=fields.whole("lost"),
        greatest_loss=fields.number("greatest_loss"),
        texts=_rise(fields),
        worked=None if worked is None else _rise(worked),
        failures=fields.texts("failures"),
    )


def _rise(fields: Fields) -> Rise:
    return Rise(
        num_texts=fields.whole("num_texts"),
        loss_increase=fields.number("loss_increase"),
        greatest_increase=fields.optional_number("greatest_increase"),
    )
