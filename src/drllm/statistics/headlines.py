"""Says what to do with a system that runs fewer layers: the headline of an evaluation.

A headline has at most three sentences. The first says what to do with the system, the second what
becomes of its text, and the third whether routing gains anything over a static path. All other
numbers are in tables.
"""

from dataclasses import dataclass

from drllm.config.constants import MAX_DROP
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.exclusion import DropTest
from drllm.statistics.power import round_up

ROUTING = "routing"
"""The name of the routed model in a headline."""

_TEXT = "Text like these questions"  # the loss is that of questions with their right answers


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A system that may replace base.

    Attributes:
        name: The name of a static path in a sentence ("path skip2"), or `ROUTING`.
        executions: The mean number of layers that a forward pass runs.
        num_layers: The number of layers that base runs.
        against_base: The system minus base.
    """

    name: str
    executions: float
    num_layers: int
    against_base: Differences

    @property
    def full_name(self) -> str:
        """The name with the number of layers: "path skip2 (28 of 30 layers)"."""
        executions = f"{self.executions:.2f}".rstrip("0").rstrip(".")
        return f"{self.name} ({executions} of {self.num_layers} layers)"

    @property
    def name_with_use(self) -> str:
        """The full name, and what the candidate may be used for if its text gets worse."""
        if self.is_text_worse:
            return f"{self.full_name} for short answers"
        return self.full_name

    @property
    def base_name(self) -> str:
        """What the candidate is compared with, in a sentence."""
        return f"all {self.num_layers}"

    @property
    def saves_layers(self) -> bool:
        """Whether the candidate runs fewer layers than base."""
        return self.executions < self.num_layers

    @property
    def is_text_worse(self) -> bool:
        """Whether the next-token loss is shown to be higher than base's."""
        text_loss = self.against_base.text_loss
        return text_loss is not None and text_loss.is_better is False

    @property
    def loses_little(self) -> bool:
        """Whether the answers are shown to be worse, but by fewer than `MAX_DROP` points."""
        accuracy = self.against_base.accuracy
        if accuracy.is_better is not False or accuracy.excluded_loss is None:
            return False
        return 100 * accuracy.excluded_loss < MAX_DROP

    @property
    def is_refused(self) -> bool:
        """Whether the candidate shouldn't be used, whatever it is used for."""
        accuracy = self.against_base.accuracy
        if accuracy.shown == "guessing" or accuracy.is_better:
            return False
        if not self.saves_layers:
            return True
        return accuracy.is_better is False and not self.loses_little

    @property
    def rank(self) -> tuple[int, bool]:
        """How well the candidate does, for a comparison: its answers, then its text."""
        accuracy = self.against_base.accuracy
        answers = 2
        if accuracy.is_better is False:
            answers = 0
        elif accuracy.shown in ("too few", "guessing"):
            answers = 1
        return answers, not self.is_text_worse


def write_headline(candidate: Candidate) -> str:
    """Return one or two sentences: what to do with a candidate, and what becomes of its text."""
    text = _describe_text(candidate)
    if candidate.is_text_worse and not candidate.is_refused:
        text = _advise_against_text(candidate)
    return f"{advise(candidate)} {text}".rstrip()


def write_headline_after_test(drop_test: DropTest, candidate: Candidate | None) -> str:
    """Return one or two sentences: what to do after a test, and what becomes of the text.

    Args:
        drop_test: The test of a loss that the user doesn't allow.
        candidate: The candidate that passed last or, if none passed, that was tested last. None if
            only its name is known.
    """
    advice = _advise_after_test(drop_test, candidate)
    if candidate is None:
        return advice
    text = _describe_text(candidate)
    is_text_tested = drop_test.limits.max_loss_increase is not None
    if candidate.is_text_worse and drop_test.chosen is not None and not is_text_tested:
        text = _advise_against_text(candidate)
    return f"{advice} {text}".rstrip()


def write_headline_of_two(
    path: Candidate, routing: Candidate, routing_minus_path: Differences
) -> str:
    """Return up to three sentences: what to do with the better of two, and how the other compares.

    Args:
        path: The static path.
        routing: The routed model.
        routing_minus_path: How they differ.
    """
    if prefers_routing(path, routing, routing_minus_path):
        return f"{write_headline(routing)} {_compare_with_path(path, routing_minus_path)}"
    return f"{write_headline(path)} {_compare_with_routing(routing_minus_path)}"


def prefers_routing(path: Candidate, routing: Candidate, routing_minus_path: Differences) -> bool:
    """Tell whether a headline is about routing, and not about the static path.

    The path is preferred unless routing is shown to do better, since a path needs no routers.
    """
    if routing.rank != path.rank:
        return routing.rank > path.rank
    return routing_minus_path.accuracy.is_better is True


def advise(candidate: Candidate) -> str:
    """Say in one sentence what to do with a candidate."""
    name = candidate.full_name
    base = candidate.base_name
    accuracy = candidate.against_base.accuracy
    if accuracy.shown == "guessing":
        return (
            f"Choose a task that the model can do, or evaluate on more questions: here {base} "
            f"layers may be guessing, so {name} can't be judged."
        )
    if candidate.saves_layers and candidate.loses_little:
        return (
            f"Use {candidate.name_with_use} only where {accuracy.write_excluded()} points may be "
            f"lost: it answers worse than {base}, by {accuracy.size}."
        )
    if accuracy.is_better is False:
        return f"Don't use {name}: it answers worse than {base}, by {accuracy.size}."
    if not candidate.saves_layers and not accuracy.is_better:
        return f"Don't use {name}: it saves no layers, and isn't shown to answer better."
    if accuracy.shown == "too few":
        needed = round_up(accuracy.needed or 0)
        return (
            f"Evaluate on about {needed} questions before you use {candidate.name_with_use}: "
            f"{accuracy.n} are too few to tell whether it answers as well as {base}."
        )
    if accuracy.is_better:
        return f"Use {candidate.name_with_use}: it answers better than {base}, by {accuracy.size}."
    return f"Use {candidate.name_with_use}{_describe_excluded_loss(accuracy)}."


def _describe_excluded_loss(accuracy: Verdict) -> str:
    """Say up to which loss a candidate may be used, where no loss of accuracy is shown."""
    if not accuracy.excluded_loss:
        return f": {accuracy.n} questions show no loss of accuracy"
    excluded = accuracy.write_excluded()
    return (
        f" if a loss of up to {excluded} points is acceptable: {accuracy.n} questions show no loss "
        f"of accuracy, and exclude a larger one"
    )


def _advise_after_test(drop_test: DropTest, candidate: Candidate | None) -> str:
    """Say in one sentence what to do; the arguments are those of `write_headline_after_test`."""
    limits = drop_test.limits
    last = drop_test.trials[-1]
    name = drop_test.chosen or last.name
    if candidate is not None:
        name = candidate.full_name
    if drop_test.chosen is None:
        sentence = f"Don't use {name}: it isn't shown to lose less than {limits}"
        remedy = drop_test.remedy()
        if remedy:
            sentence += f"; {remedy}"
        return f"{sentence}."
    return f"Use {name}: it is shown to lose less than {limits}."


def _advise_against_text(candidate: Candidate) -> str:
    """Say that a candidate whose text gets worse shouldn't write text."""
    text_loss = candidate.against_base.text_loss
    assert text_loss is not None
    return f"Don't use it to write text, which gets worse by {text_loss.size}."


def _describe_text(candidate: Candidate) -> str:
    """Say in one sentence what becomes of a candidate's text; empty if that wasn't measured."""
    text_loss = candidate.against_base.text_loss
    if text_loss is None:
        return ""
    if text_loss.is_better is False:
        return f"{_TEXT} gets worse, by {text_loss.size}."
    if text_loss.is_better:
        return f"{_TEXT} gets better, by {text_loss.size}."
    if text_loss.shown == "too few":
        needed = round_up(text_loss.needed or 0)
        return (
            f"These {text_loss.n} texts are too few to tell whether {_TEXT.lower()} gets worse; "
            f"about {needed} would do."
        )
    if not text_loss.excluded_loss:
        return f"{_TEXT} isn't shown to get worse by {text_loss.n} texts; other text may."
    return (
        f"{_TEXT} gets worse by at most {text_loss.write_excluded()} nats a token; other text may "
        f"lose more."
    )


def _compare_with_routing(routing_minus_path: Differences) -> str:
    """Say in one sentence what routing gains over the static path that the headline is about."""
    accuracy = routing_minus_path.accuracy
    if accuracy.is_better is False:
        return f"Routing per question answers worse than that, by {accuracy.size}."
    if accuracy.is_better:
        return f"Routing per question answers better than that, by {accuracy.size}."
    text_loss = routing_minus_path.text_loss
    if text_loss is not None and text_loss.is_better:
        return (
            f"Routing per question writes better text (by {text_loss.size}), and isn't shown to "
            f"answer better."
        )
    if accuracy.shown == "none shown":
        return "Routing per question gains nothing over that."
    return (
        f"These {accuracy.n} questions are too few to tell whether routing per question gains "
        f"anything."
    )


def _compare_with_path(path: Candidate, routing_minus_path: Differences) -> str:
    """Say in one sentence what routing, which the headline is about, gains over a static path."""
    accuracy = routing_minus_path.accuracy
    if accuracy.is_better:
        return f"It answers better than {path.full_name}, by {accuracy.size}."
    text_loss = routing_minus_path.text_loss
    if text_loss is not None and text_loss.is_better:
        return f"Its text is better than that of {path.full_name}, by {text_loss.size}."
    return f"It isn't shown to do better than {path.full_name}."
