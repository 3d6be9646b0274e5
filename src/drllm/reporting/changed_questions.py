"""The section of a report on the questions that are won and lost by routing."""

from collections.abc import Sequence

from drllm.records import results
from drllm.reporting.document import Section
from drllm.reporting.markdown import Markdown, write_paragraph, write_table
from drllm.reporting.numbers import NONE, write_count, write_number

LONGEST = 120  # characters; longer questions and answers are cut off
ROWS = 5
"""Maximum number of won and of lost questions that are shown.

They are the first in the file, so that nobody chooses them.
"""


def changed_questions_section(
    evaluation: results.Result, samples: Sequence[results.Sample]
) -> Section:
    """Build the section on questions that both base and the routed model answered."""
    won = [sample for sample in samples if _grade_change(sample) > 0]
    lost = [sample for sample in samples if _grade_change(sample) < 0]
    same = [sample for sample in samples if _grade_change(sample) == 0]
    summary = (
        f"Of {write_count(len(samples))} questions {write_count(len(won))} are won (better with "
        f"routing) and {write_count(len(lost))} lost; {_describe_unchanged(evaluation, same)}."
    )
    blocks = [write_paragraph(summary)]
    if won or lost:
        blocks.append(_changed_table(won, lost))
    return Section("Questions won and lost", blocks)


def _describe_unchanged(evaluation: results.Result, samples: Sequence[results.Sample]) -> str:
    """Say how many questions have the same grade with routing as without."""
    if evaluation.is_graded:
        return f"{write_count(len(samples))} keep their grade"
    num_right = sum(sample.systems[results.BASE].correct >= 1 for sample in samples)
    return (
        f"{write_count(num_right)} stay right, {write_count(len(samples) - num_right)} stay wrong"
    )


def _changed_table(won: Sequence[results.Sample], lost: Sequence[results.Sample]) -> Markdown:
    """Write the table of the first questions won and lost, with the answers of both models."""
    shown = [*won[:ROWS], *lost[:ROWS]]
    caption = f"The first questions won and lost, at most {ROWS} of each."
    num_others = len(won) + len(lost) - len(shown)
    if num_others:
        caption += f" The others ({write_count(num_others)}) are in eval/samples.jsonl."
    words = "with routing|right answer|base|routed"
    rows = [_build_changed_row(sample) for sample in shown]
    return write_table(caption, f"question|{words}", rows, words)


def _grade_change(sample: results.Sample) -> float:
    """Return how routing changes the grade of a question: above 0 it is won, below 0 it is lost."""
    return sample.systems[results.ROUTED].correct - sample.systems[results.BASE].correct


def _build_changed_row(sample: results.Sample) -> list[str]:
    """Return the cells of a question that is won or lost."""
    right_answer = NONE
    if sample.gold is not None:
        right_answer = _shorten(sample.choices[sample.gold])
    return [
        _shorten(sample.question),
        "won" if _grade_change(sample) > 0 else "lost",
        right_answer,
        _describe_answer(sample, results.BASE),
        _describe_answer(sample, results.ROUTED),
    ]


def _describe_answer(sample: results.Sample, system: str) -> str:
    """Write the answer of a system; if the answer isn't known, write its grade.

    An answer that is neither right nor wrong has its grade in brackets.
    """
    outcome = sample.systems[system]
    grade = _write_grade(outcome.correct)
    if outcome.answer is None:
        return grade
    text = outcome.answer
    if isinstance(text, int):
        text = sample.choices[text]
    answer = _shorten(text) or "nothing"
    is_between = 0 < outcome.correct < 1
    return f"{answer} ({grade})" if is_between else answer


def _write_grade(grade: float) -> str:
    if grade >= 1:
        return "right"
    if grade <= 0:
        return "wrong"
    return f"graded {write_number(grade, 2)}"


def _shorten(text: str) -> str:
    """Write a text on one line; cut a long text between words."""
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    return line[: LONGEST - 1].rsplit(" ", 1)[0] + " …"
