"""Questions from a `.jsonl` file of the user's own, or from any data set of the hub.

Rows are `question`, `choices`, `answer`, or `question`, `answer`, `grader`, or `prompt` or
`messages` alone; a name such as `FILE.jsonl?question=query&answer=target` says their columns.
"""

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from drllm.errors import ConfigError, TaskError, unknown_name
from drllm.listener import logger
from drllm.records.splits import question_key, split_of
from drllm.tasks.base import (
    FILE_NAMES,
    KL_REWARD,
    Example,
    Messages,
    Row,
    Task,
    check_split,
    with_options,
)
from drllm.tasks.forms import BOXED, LETTER_TOKENS, LETTERS, OPTIONS, Form
from drllm.tasks.rewards import REWARDS, normalise
from drllm.tasks.rows import (
    HUB_ROWS,
    HUB_SET,
    index_of,
    messages_of,
    read_rows,
    rows_of_hub_set,
    text_of,
    texts_of,
)

FORMS = {
    "letter": Form(
        rewards=("letter",),
        templates=(
            "{question}\n\nAnswer with the letter of the right option only.",
            "Choose the right option and reply with its letter alone.\n\n{question}",
            "{question}\n\nWhich letter is right? Letter:",
        ),
        max_new_tokens=LETTER_TOKENS,
    ),
    "exact": Form(
        rewards=("exact",),
        templates=(
            "{question}\n\nGive the answer only, with no explanation.",
            "Answer the question in as few words as possible.\n\n{question}",
            "Question: {question}\nReply with the answer alone.",
        ),
    ),
    "boxed": replace(BOXED, max_new_tokens=None),
    "": Form(rewards=(KL_REWARD,), templates=("{question}",), max_new_tokens=1),
}
"""Grader → how its questions are asked; a reward that isn't here asks as `exact` does."""


CHOICES, PROMPT = "'choices'", "a prompt alone"
FIELDS = ("question", "choices", "answer", "grader", "prompt", "messages")


def is_source(name: str) -> bool:
    """Say whether a name is that of a file of questions, or of a data set of the hub."""
    source = name.partition("?")[0]
    if source.endswith(FILE_NAMES):
        return True
    return HUB_SET.fullmatch(source) is not None and not Path(source).exists()


def with_columns(names: str, columns: str) -> str:
    """Return a list of tasks whose files and hub sets have their columns named, behind a `?`."""
    given, said = [name.strip() for name in names.split(",")], columns.replace(",", "&")
    found = [f"{n}{'&' if '?' in n else '?'}{said}" if is_source(n) else n for n in given]
    if found == given:
        told = f"--columns {columns} has no effect on {names or 'no task'}"
        raise ConfigError(f"{told}, which is no file and no data set of the hub; leave it out")
    return ",".join(found)


def task_of_source(name: str, taken: tuple[str, ...] = ()) -> "FileTask":
    """Return the task of a file or of a hub set, which is read once unless the file changes.

    A hub set is `OWNER/NAME[:CONFIG[:SPLIT]]`, of which the first `HUB_ROWS` rows of `train`, or of
    the split, are asked. Behind a `?` stand the columns that the fields of `FIELDS` are in, with a
    `.` between those of a column within another; `grader` names the grader itself, and is `exact`
    where an answer has neither that nor choices. See `FileTask`.
    """
    source = name.partition("?")[0]
    state = Path(source).stat() if Path(source).is_file() else None
    return _kept(name, taken, state and (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=8)
def _kept(name: str, taken: tuple[str, ...], _state: tuple[int, int] | None) -> "FileTask":
    source, _, said = name.partition("?")
    columns = dict(each.partition("=")[::2] for each in said.split("&") if each)
    for field in columns:
        if field not in FIELDS or not columns[field]:
            what = unknown_name("field", field, FIELDS) if columns[field] else f"{field}= is empty"
            raise TaskError(f"columns of {source}: {what}; give FIELD=COLUMN")
    if source.endswith(FILE_NAMES):
        return FileTask(Path(source), taken, read_rows(Path(source)), columns)
    rows = enumerate(itertools.islice(rows_of_hub_set(source, "task"), HUB_ROWS), 1)
    return FileTask(Path(source), taken, rows, columns, skips=True)


class FileTask(Task):
    """The questions of one file; which rewards fit depends on the rows.

    Every question belongs to one of the four splits by its text, so that one file serves search,
    training and evaluation, and no question is trained on and reported on.

    A row has `question`, `choices` and `answer` (the right option's index from 0, its text, or its
    letter), or `question`, `answer` and `grader` (a reward that grades text, the same for all), or
    `prompt` (or `question`) without an answer, or `messages`, a conversation, of which an answer at
    the end is left out; `columns` says where rows have them under other names. With `skips`, rows
    that can't be asked are left out with a warning, else they are a TaskError. A file that is
    called like one of the `taken` names is `NAME_file`.
    """

    def __init__(
        self,
        path: Path,
        taken: Collection[str],
        rows: Iterable[tuple[int, Row]],
        columns: Mapping[str, str] | None = None,
        *,
        skips: bool = False,
    ) -> None:
        self.path, self._skips = path, skips
        stem = path.name.removesuffix(".gz").removesuffix(".jsonl").replace(":", "_")
        self.name = f"{stem}_file" if stem in taken else stem
        self.description = f"the questions of {path}"
        self.all, grader = self._read(rows, columns or {})
        last = max(LETTERS.find(example.answer) for example in self.all)
        letters = LETTERS[: max(5, last + 1)]  # the options stand in the questions' texts
        form, reward = FORMS.get(grader or "", FORMS["exact"]), grader or KL_REWARD
        self.form = OPTIONS if grader is None else replace(form, rewards=(reward,), letters=letters)

    def examples(self, split: str, data_dir: Path | str | None = None) -> list[Example]:
        """Return the questions of one split, in the file's order.

        They are half of the questions for `search`, 10 % for `fit`, 15 % for `select` and 25 %
        for `test`; the last may have several of one text with other choices.
        """
        check_split(split)
        found: dict[str, Example] = {}
        for example in self.all:
            if split_of(example.question, "own") == split:
                key = example.id if split == "test" else question_key(example.question)
                found.setdefault(key, example)
        return list(found.values())

    def _read(
        self, rows: Iterable[tuple[int, Row]], columns: Mapping[str, str]
    ) -> tuple[list[Example], str | None]:
        """Return the questions and their grader: None with options, empty without answers."""
        examples: list[Example] = []
        found: dict[tuple[str, tuple[str, ...]], tuple[int, Example]] = {}
        first_kind = grader = reason = ""
        skipped = 0
        for line, own in rows:
            try:
                row = _with_columns(own, columns) if columns else own
                kind = _kind(row)
                first_kind = first_kind or kind
                if kind != first_kind:
                    raise TaskError(
                        f"a row with {kind}, but the first has {first_kind}; "
                        f"put them into files of their own"
                    )
                example = replace(_example(row), id=f"line-{line}", task=self.name)
                key = question_key(example.question), example.choices
                first, earlier = found.setdefault(key, (line, example))
                if earlier.answer != example.answer:
                    raise TaskError(
                        f"the question stands on line {first} with another answer; keep one of them"
                    )
            except TaskError as error:
                if not self._skips:
                    raise TaskError(f"{self.path}, line {line}: {error}") from error
                skipped, reason = skipped + 1, reason or f"row {line}: {error}"
                continue
            grader = str(row.get("grader", ""))
            if first == line:
                examples.append(example)
        if not examples:
            raise TaskError(f"{self.path} has no row that can be asked; {reason}")
        if skipped:
            logger.warning("%d rows of %s are left out, first %s", skipped, self.path, reason)
        return examples, None if first_kind == CHOICES else grader


def _with_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the fields of a row, from columns of other names where these are named."""
    found = {field: row[field] for field in FIELDS if field in row}
    found |= {f: c if f == "grader" else _value(row, c) for f, c in columns.items()}
    if "answer" in found and {"choices", "grader"}.isdisjoint(found):
        found["grader"] = "exact"
    return found


def _value(row: Row, column: str) -> Any:
    """Return what a row has in a column, or within one."""
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise TaskError(
                f"column {column!r} is missing (the line has: {', '.join(row) or 'nothing'})"
            )
    return value


def _kind(row: Row) -> str:
    """Say which kind of row this is, in the words of a message."""
    if "choices" in row and "grader" in row:
        raise TaskError("'choices' take no 'grader'; leave it out and choose by --reward")
    if "choices" in row:
        return CHOICES
    if "grader" not in row:
        if "answer" not in row and not {"prompt", "question", "messages"}.isdisjoint(row):
            return PROMPT
        raise TaskError(
            f"'choices' or 'grader' is missing (the line has: {', '.join(row) or 'nothing'}); give "
            f"question, choices, answer, or question, answer, grader, or prompt or messages alone"
        )
    grader = row["grader"]
    graders = [name for name in REWARDS if not REWARDS.get(name).scores_options]
    if grader not in graders:
        raise TaskError(unknown_name("grader", str(grader), graders))
    return f"grader {grader!r}"


def _example(row: Row) -> Example:
    if {"choices", "grader"}.isdisjoint(row):
        if "messages" in row:
            messages = _messages(row)
            text = "\n".join(f"{role}: {content}" for role, content in messages)
            return Example(question=text, answer="", messages=messages)
        text = text_of(row, "prompt" if "prompt" in row else "question")
        return Example(question=text, answer="")
    question = text_of(row, "question")
    if "choices" not in row:
        return Example(question=question, answer=_graded_answer(row))
    choices = texts_of(row, "choices", minimum=2)
    for choice in choices:
        if choices.count(choice) > 1:
            raise TaskError(f"'choices' holds {choice!r} twice; every choice must be another")
    if len(choices) > len(LETTERS):
        raise TaskError(f"'choices' has {len(choices)} entries; give at most {len(LETTERS)}")
    return with_options(question, choices, _gold(row, choices))


def _messages(row: Row) -> Messages:
    """Return a conversation up to the user's last message: an answer to it is left out."""
    found = messages_of(row)
    while found and found[-1][0] == "assistant":
        found.pop()
    if not found or found[-1][0] != "user":
        raise TaskError("'messages' has no message of the user to answer; give one with role user")
    return tuple(found)


def _gold(row: Row, choices: tuple[str, ...]) -> int:
    """Return the index of the right option, which may be given as index, text or letter."""
    last = len(choices) - 1
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return index_of(answer, len(choices), "answer")
    text = text_of(row, "answer")
    ways = (*choices, *LETTERS[: len(choices)])  # a choice's text comes before a letter
    if text not in ways:
        raise TaskError(
            f"'answer' {text!r} is not among the choices; give a choice's text, its index (0 to "
            f"{last}) or its letter (A to {LETTERS[last]})"
        )
    return ways.index(text) % len(choices)


def _graded_answer(row: Row) -> str:
    value, grader = row.get("answer"), row["grader"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        answer = str(value)
    else:
        answer = text_of(row, "answer").strip()
    if grader == "letter" and (len(answer) != 1 or answer not in LETTERS):
        raise TaskError(f"'answer' is {answer!r}; the grader 'letter' expects one of A to Z")
    if grader == "exact" and (not normalise(answer) or len(answer.splitlines()) > 1):
        raise TaskError(f"'answer' is {answer!r}; the grader 'exact' expects one line of words")
    return answer
