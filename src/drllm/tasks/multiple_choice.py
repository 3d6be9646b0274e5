"""Multiple-choice questions: the two ways of asking them, and ARC from files or the hub.

Owns the prompt of `loglikelihood` (byte for byte what lm-evaluation-harness renders for
`arc_easy` and `arc_challenge`) and of `letter`, the other templates of the re-test, and the ARC
schema. Leaves grading to `grading` and which question is in which split to `records`. Loads no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from drllm.errors import TaskError
from drllm.records import question_key, split_of
from drllm.tasks.base import Example, Prompt, Task, check_split
from drllm.tasks.rows import read_rows, text_of, texts_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = "Question: {question}\nAnswer:"
OTHER_TEMPLATES = (
    "Q: {question}\nA:",
    "{question}\nThe correct answer is:",
    "Answer the following question.\n\n{question}\n\nAnswer:",
)
LETTER_TEMPLATE = (
    "Answer the following multiple-choice question with the letter of the right option only.\n\n"
    "Question: {question}\n{options}\nAnswer:"
)
LETTER_TOKENS = 10
"""Most tokens of a letter answer (Dr.LLM section 4)."""

ORIGINS = {"search": "train", "fit": "train", "select": "train", "test": "validation"}
"""Which file of ARC holds the questions of a split."""


class MultipleChoiceTask(Task):
    """A task whose questions have options; a subclass says where the questions come from."""

    rewards: tuple[str, ...] = ("loglikelihood", "letter")

    def prompt(self, example: Example, reward: str) -> Prompt:
        """Return how the question is asked.

        Args:
            example: A question with options.
            reward: `loglikelihood` shows the question and scores the options' texts; `letter`
                shows lettered options and asks for a letter.

        Raises:
            TaskError: Another reward.
        """
        if self.check_reward(reward) == "letter":
            return letter_prompt(example, rotation=0)
        return choices_prompt(example, TEMPLATE)

    def retests(self, example: Example, reward: str) -> tuple[Prompt, ...]:
        """Return the other ways of asking the same question.

        For `loglikelihood` three other templates and the first one scored by character; for
        `letter` every other rotation of the options, so that the right letter moves.

        Raises:
            TaskError: Another reward.

        Source: ours (docs/differences.md, D-05).
        """
        if self.check_reward(reward) == "letter":
            return tuple(
                letter_prompt(example, rotation) for rotation in range(1, len(example.choices))
            )
        return (
            *(choices_prompt(example, template) for template in OTHER_TEMPLATES),
            choices_prompt(example, TEMPLATE, normalised=True),
        )


def choices_prompt(example: Example, template: str, *, normalised: bool = False) -> Prompt:
    """Return a prompt whose continuations are the options' texts, each after a space."""
    return Prompt(
        text=template.format(question=example.question),
        reward="loglikelihood",
        answer=example.answer,
        continuations=tuple(f" {choice}" for choice in example.choices),
        gold=example.gold,
        normalised=normalised,
    )


def letter_prompt(example: Example, rotation: int) -> Prompt:
    """Return a prompt that lists the options, lettered, and asks for a letter.

    Args:
        example: A question with options.
        rotation: How many options move from the front to the end.
    """
    assert example.gold is not None
    count = len(example.choices)
    order = [(index + rotation) % count for index in range(count)]
    letters = LETTERS[:count]
    options = "\n".join(
        f"{letter}. {example.choices[index]}" for letter, index in zip(letters, order, strict=True)
    )
    return Prompt(
        text=LETTER_TEMPLATE.format(question=example.question, options=options),
        reward="letter",
        answer=letters[order.index(example.gold)],
        chat=True,
        max_new_tokens=LETTER_TOKENS,
        letters=letters,
    )


def example_of(row: Mapping[str, Any], task: str) -> Example:
    """Read one row of the ARC schema.

    Args:
        row: `id`, `question`, `choices` (`text` and `label` of each) and `answerKey`. Labels may
            be letters or numbers, of any count from 2.
        task: The task's name.

    Returns:
        The question; the right option is where the answer key stands among the labels.

    Raises:
        TaskError: What is missing or wrong, without file and line.
    """
    options = row.get("choices")
    if not isinstance(options, Mapping):
        raise TaskError(f"'choices' is {options!r}; expected an object with 'text' and 'label'")
    choices = texts_of(options, "text", minimum=2)
    labels = texts_of(options, "label", minimum=2)
    if len(choices) != len(labels) or len(set(labels)) != len(labels):
        raise TaskError(f"{len(choices)} options have the labels {', '.join(labels)}")
    if len(choices) > len(LETTERS):
        raise TaskError(f"'choices' has {len(choices)} options; at most {len(LETTERS)} are usable")
    key = text_of(row, "answerKey")
    if key not in labels:
        raise TaskError(f"'answerKey' is {key!r}; expected one of {', '.join(labels)}")
    gold = labels.index(key)
    return Example(
        id=text_of(row, "id"),
        task=task,
        question=text_of(row, "question"),
        choices=choices,
        gold=gold,
        answer=choices[gold],
    )


class ArcTask(MultipleChoiceTask):
    """The AI2 Reasoning Challenge: grade-school science questions.

    The published training file gives the search, fit and select questions, the validation file is
    the test. A training question that stands in a validation file too, of either ARC set, is left
    out, so that it can't be trained on and reported on.

    Args:
        name: Our name of the task, and of its folder below the data folder.
        config: The set's name on the hub.
        description: One line for `drllm ls tasks`.
    """

    repository = "allenai/ai2_arc"

    def __init__(self, name: str, config: str, description: str) -> None:
        self.name = name
        self.config = config
        self.description = description

    def examples(self, split: str, data_dir: Path | None = None) -> list[Example]:
        """Return the questions of one split, in the file's order.

        Of questions with the same text the first is kept.

        Args:
            split: `search`, `fit`, `select` or `test`.
            data_dir: Folder with `arc_easy/train.jsonl[.gz]` and so on; None asks the hub.

        Raises:
            TaskError: A missing folder or file (naming where it was looked for), no network, or a
                line that can't be used (with its number).
        """
        origin = ORIGINS[check_split(split)]
        taken = self._reported(data_dir) if origin == "train" else set()
        questions: list[Example] = []
        for where, row in self._rows(origin, data_dir):
            try:
                example = example_of(row, self.name)
            except TaskError as error:
                raise TaskError(f"{where}: {error}") from error
            key = question_key(example.question)
            if key not in taken and split_of(example.question, origin) == split:
                questions.append(example)
            taken.add(key)
        return questions

    def _reported(self, data_dir: Path | None) -> set[str]:
        """Return the keys of the validation questions of both sets, as far as they are there."""
        keys: set[str] = set()
        for task in (ARC_EASY, ARC_CHALLENGE):
            if data_dir is None or find_file(data_dir / task.name, "validation") is not None:
                rows = task._rows("validation", data_dir)
                keys.update(question_key(str(row.get("question"))) for _, row in rows)
        return keys

    def _rows(self, origin: str, data_dir: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if data_dir is None:
            yield from self._hub_rows(origin)
            return
        if not data_dir.is_dir():
            raise TaskError(f"--data-dir {data_dir} is not a folder; give the folder of task data")
        path = find_file(data_dir / self.name, origin)
        if path is None:
            raise TaskError(
                f"task {self.name!r} found no {data_dir / self.name / origin}.jsonl or .jsonl.gz; "
                f"put the file there, or leave out --data-dir to fetch {self.repository} "
                f"from the hub"
            )
        for line, row in read_rows(path):
            yield f"{path}, line {line}", row

    def _hub_rows(self, origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        import datasets

        try:
            rows = datasets.load_dataset(self.repository, self.config, split=origin)
        except OSError as error:
            cause = str(error).splitlines()[0]
            raise TaskError(
                f"task {self.name!r} can't fetch {self.repository} from the hub ({cause}); "
                f"connect, or give --data-dir with {self.name}/{origin}.jsonl"
            ) from error
        for number, row in enumerate(rows, start=1):
            yield f"{self.repository} {self.config} {origin}, row {number}", row


def find_file(folder: Path, stem: str) -> Path | None:
    """Return `FOLDER/STEM.jsonl` or else `FOLDER/STEM.jsonl.gz`, or None where neither is."""
    for suffix in (".jsonl", ".jsonl.gz"):
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path
    return None


ARC_EASY = ArcTask(
    "arc_easy", "ARC-Easy", "grade-school science, the easy set (ARC; needs --data-dir or the hub)"
)
ARC_CHALLENGE = ArcTask(
    "arc_challenge",
    "ARC-Challenge",
    "grade-school science, the hard set (ARC; needs --data-dir or the hub)",
)
