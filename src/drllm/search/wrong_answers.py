"""Tell users that the full model answers no question of a task right.

Then usually the prompt or the grading is wrong, and the search has little to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import full_decisions
from drllm.records.search import SearchRecord
from drllm.search.evaluator import JudgedOutcome
from drllm.search.questions import SearchQuestion
from drllm.work.listener import Listener

MIN_QUESTIONS = 5
"""A task needs this many questions before users are told that the full model is never right."""
MAX_EXAMPLES = 3  # maximum questions that are shown at the start of a search
MAX_TEXT_CHARACTERS = 60  # maximum characters of a question or an answer that are shown


@dataclass(frozen=True)
class FullAnswer:
    """What the full model answers to a question.

    Attributes:
        question: The question.
        answer: The generated answer, or the option that the model prefers; None if unknown.
        right_answer: The right answer; empty if there is none, because a function grades.
        is_right: Whether the answer gets any reward.
    """

    question: str
    answer: str | None
    right_answer: str
    is_right: bool

    def describe(self) -> str:
        """Show the question and its answers in a line."""
        question = self.question[:MAX_TEXT_CHARACTERS]
        right_answer = self.right_answer[:MAX_TEXT_CHARACTERS]
        if self.answer is None:
            return f"to {question!r}, {right_answer!r} is right"
        answer = self.answer[:MAX_TEXT_CHARACTERS]
        sentence = f"to {question!r} it answers {answer!r}"
        if right_answer:
            sentence += f", and {right_answer!r} is right"
        return sentence


@dataclass
class FirstAnswers:
    """Tells users after the first round of a search if the first answers of a task are all wrong.

    The first round runs every question's full path, so this costs no run of its own.

    Attributes:
        listener: Gets a note, at most one for each task.
        answers: The answers of each task so far, until it has a right answer or a note.
        finished_tasks: The tasks that have a right answer or a note.
    """

    listener: Listener
    answers: dict[str, list[FullAnswer]] = field(default_factory=dict)
    finished_tasks: set[str] = field(default_factory=set)

    def add(
        self, questions: Sequence[SearchQuestion], outcomes: Mapping[Pair, JudgedOutcome]
    ) -> None:
        """Look at the first round of a batch.

        Args:
            questions: The questions of the batch, which have the same task.
            outcomes: The outcomes of the round.
        """
        task = questions[0].task
        if task in self.finished_tasks:
            return
        answers = self.answers.setdefault(task, [])
        answers += _read_full_answers(questions, outcomes)
        has_right_answer = any(answer.is_right for answer in answers)
        if not has_right_answer and len(answers) < MIN_QUESTIONS:
            return
        self.finished_tasks.add(task)
        if not has_right_answer:
            self.listener.note(_describe_first_answers(task, answers))


def _read_full_answers(
    questions: Sequence[SearchQuestion], outcomes: Mapping[Pair, JudgedOutcome]
) -> list[FullAnswer]:
    """Return what the full path answered to each question that it ran on."""
    answers: list[FullAnswer] = []
    for (place, decisions), outcome in outcomes.items():
        if decisions == full_decisions(len(decisions)):
            answers.append(_read_answer(questions[place], outcome))
    return answers


def _read_answer(question: SearchQuestion, outcome: JudgedOutcome) -> FullAnswer:
    """Return an answer: the generated text, or the likeliest option."""
    answer = outcome.answer
    right_answer = question.example.answer
    options = question.prompt.continuations
    if options and question.prompt.gold is not None:
        right_answer = options[question.prompt.gold].strip()
        if outcome.logprobs:
            best = outcome.logprobs.index(max(outcome.logprobs))
            answer = options[best].strip()
    return FullAnswer(question.example.question, answer, right_answer, outcome.reward > 0)


def _describe_first_answers(task: str, answers: Sequence[FullAnswer]) -> str:
    """Say that the first answers are wrong, with some of them."""
    lines = [
        f"the full model answers none of the first {len(answers)} questions of {task} right; the "
        f"search goes on, but check prompt and answers, or give another --reward"
    ]
    lines += [answer.describe() for answer in answers[:MAX_EXAMPLES]]
    return "\n  | ".join(lines)


def warn_of_no_right_answer(records: Sequence[SearchRecord], listener: Listener) -> None:
    """Warn, after a search, of each task on which the full path is never right."""
    by_task: dict[str, list[SearchRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    for task, task_records in by_task.items():
        is_ever_right = any(record.full.reward > 0 for record in task_records)
        if is_ever_right or len(task_records) < MIN_QUESTIONS:
            continue
        listener.note(
            f"the full model answers none of the {len(task_records)} questions of {task} "
            f"right: {_advise_on_wrong_answer(task_records[0])}"
        )


def _advise_on_wrong_answer(record: SearchRecord) -> str:
    """Say what to check about a question that the full path answers wrong."""
    if record.full.answer is None:  # options were scored
        return "check which option the rows name as right"
    answer = FullAnswer(record.question, record.full.answer, record.answer, is_right=False)
    return f"{answer.describe()}; check the answers, or give another --reward"
