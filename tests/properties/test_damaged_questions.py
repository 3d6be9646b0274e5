"""A changed file of questions, texts or prompts is read as what it says now, or refused.

Changed is a value of a row, before the rows are written in each format, or single bytes of the
file.
"""

import csv
import functools
import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from meaning import Refusal, is_same_value, read_or_refuse
from mutations import change_bytes, change_document

from drllm.cli.generation_inputs import PromptRow, read_prompts
from drllm.models.routing.depth_control import read_calibration
from drllm.tasks import texts as text_files
from drllm.tasks.examples import Example
from drllm.tasks.files import load_source

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEEDS = range(4)  # of each kind of rows in each format; each seed changes another place
MORE_SEEDS = range(4, 100)

Rows = list[dict[str, Any]]
OPTIONS: Rows = [
    {"question": f"What is {number}, or 7?", "choices": ["a", "b b", "c"], "answer": number % 3}
    for number in range(8)
]
LETTERED: Rows = [{**row, "answer": LETTERS[row["answer"]]} for row in OPTIONS]
GRADED: Rows = [
    {"question": f"What is {number} + 1?", "answer": f"{number + 1}", "grader": "exact"}
    for number in range(8)
]
PROMPTS: Rows = [{"prompt": f"Write {number}, or 7."} for number in range(8)]
CONVERSATIONS: Rows = [
    {"messages": [{"role": "user", "content": f"Write {number}, or 7."}]} for number in range(8)
]
KINDS = {
    "options": OPTIONS,
    "letters": LETTERED,
    "graded": GRADED,
    "prompts": PROMPTS,
    "conversations": CONVERSATIONS,
}


def write_json_lines(file: Path, rows: Rows) -> None:
    """Write one row a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json_list(file: Path, rows: Rows) -> None:
    """Write a list of rows."""
    file.write_text(json.dumps(rows))


def write_table(file: Path, rows: Rows, delimiter: str) -> None:
    """Write a table of texts; lists are written as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(names)
        for row in rows:
            writer.writerow([write_cell(row[name]) for name in names if name in row])


def write_cell(value: Any) -> str:
    """Return the text of a cell."""
    return value if isinstance(value, str) else json.dumps(value)


def write_parquet(file: Path, rows: Rows) -> None:
    """Write a Parquet file; its columns have one type each."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_gzipped(file: Path, rows: Rows) -> None:
    """Write one row a line, gzipped."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


FORMATS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": write_json_lines,
    ".json": write_json_list,
    ".csv": functools.partial(write_table, delimiter=","),
    ".tsv": functools.partial(write_table, delimiter="\t"),
    ".parquet": write_parquet,
    ".jsonl.gz": write_gzipped,
}
TABLES = (".csv", ".tsv")


def find_gold(row: dict[str, Any]) -> int | None:
    """Return the index of the right option as a row gives it; None if it gives none."""
    answer = row.get("answer")
    choices = row["choices"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    if answer in choices:
        return int(choices.index(answer))
    letters = LETTERS[: len(choices)]
    return letters.index(answer) if len(answer) == 1 and answer in letters else None


def write_answer(answer: Any) -> str:
    """Return the text of a graded answer; 7.0 counts as 7."""
    assert not isinstance(answer, bool)
    is_whole = isinstance(answer, float) and answer.is_integer()
    return str(int(answer) if is_whole else answer).strip()


def assert_same_question(example: Example, row: dict[str, Any]) -> None:
    """Assert that a question says what its row says."""
    if "messages" in row:
        pairs = [(message["role"], message["content"]) for message in row["messages"]]
        assert example.messages == tuple(pairs[: len(example.messages)])
        assert all(role == "assistant" for role, _ in pairs[len(example.messages) :])
        return
    text = row["question"] if "choices" in row or "grader" in row else None
    if text is None:
        text = row["prompt"] if "prompt" in row else row["question"]
    assert is_same_value(text, example.question)
    if "choices" in row:
        assert list(example.choices) == row["choices"]
        assert example.gold == find_gold(row) is not None
        assert example.answer == row["choices"][example.gold]
    elif "grader" in row:
        assert example.answer == write_answer(row["answer"])


def read_back(file: Path, rows: Rows) -> Rows:
    """Return the rows that a file holds, given the rows that were written to it."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        table = parquet.read_table(file).to_pylist()
        return [{name: cell for name, cell in row.items() if cell is not None} for row in table]
    if file.suffix in TABLES:
        return [read_back_cells(row) for row in rows if row]  # a row without cells is a blank line
    return rows


def read_back_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a table, where numbers are texts, also those in lists."""
    cells: dict[str, Any] = {name: write_cell(value) for name, value in row.items()}
    for name in {"choices", "messages"} & cells.keys():
        if isinstance(row[name], list):
            cells[name] = json.loads(cells[name], parse_int=str, parse_float=str)
    choices = cells.get("choices")
    answer = cells.get("answer", "")
    if isinstance(choices, list) and answer not in choices and answer.isdecimal():
        cells["answer"] = int(answer)
    return cells


def read_questions(file: Path) -> list[Example]:
    """Read all questions of a file."""
    return load_source(str(file)).all_examples


def change_row(rows: Rows, draw: random.Random) -> tuple[Rows, int]:
    """Change a row at one place; return all rows, and the number of the changed one from 1."""
    number = draw.randrange(len(rows))
    changed, _ = change_document(rows[number], draw)
    return [*rows[:number], changed, *rows[number + 1 :]], number + 1


def read_with_a_changed_row(kind: str, ending: str, seed: int, folder: Path) -> None:
    """Change a value of a row, and read the questions of the file."""
    draw = random.Random(f"{kind} {ending} {seed}")
    rows, _ = change_row(KINDS[kind], draw)
    file = folder / f"{kind}-{seed}{ending}"
    try:
        FORMATS[ending](file, rows)
    except (ValueError, TypeError, OverflowError, AttributeError):
        assert ending == ".parquet"  # its columns can't hold values of several types
        return
    examples = read_or_refuse(read_questions, file)
    if isinstance(examples, Refusal):
        assert_names_place(examples)
        return
    rows_in_file = read_back(file, rows)
    assert len(examples) == len(rows_in_file)
    for example, row in zip(examples, rows_in_file, strict=True):
        assert_same_question(example, row)


def assert_names_place(message: str) -> None:
    """Assert that a refusal names a row, a place of the JSON, or what all rows have."""
    assert re.search(r"(line|row) \d+|\[\d+\]|header|column|empty", message), message


def read_with_changed_bytes(kind: str, ending: str, seed: int, folder: Path) -> None:
    """Change single bytes of a file, and read its questions."""
    draw = random.Random(f"bytes {kind} {ending} {seed}")
    file = folder / f"bytes-{kind}-{seed}{ending}"
    FORMATS[ending](file, KINDS[kind])
    file.write_bytes(change_bytes(file.read_bytes(), draw))
    examples = read_or_refuse(read_questions, file)
    for example in [] if isinstance(examples, Refusal) else examples:
        assert example.question.strip()
        assert example.gold is None or example.choices[example.gold] == example.answer


def read_texts(file: Path) -> list[str]:
    """Read the texts of a file, as `--text` does."""
    [found] = text_files.read_texts(str(file), None, 0).values()
    return sorted(found)


def read_changed_texts(ending: str, seed: int, folder: Path) -> None:
    """Change a row of texts, and read the texts of the file."""
    draw = random.Random(f"texts {ending} {seed}")
    rows, _ = change_row([{"text": f"A text, or {number}."} for number in range(6)], draw)
    file = folder / f"texts-{seed}{ending}"
    try:
        FORMATS[ending](file, rows)
    except (ValueError, TypeError, OverflowError, AttributeError):
        assert ending == ".parquet"
        return
    texts = read_or_refuse(read_texts, file)
    if not isinstance(texts, Refusal):
        assert texts == sorted(row["text"] for row in read_back(file, rows))


def read_changed_paragraphs(seed: int, folder: Path) -> None:
    """Change bytes of a file of paragraphs, and read the texts of the file."""
    draw = random.Random(f"paragraphs {seed}")
    file = folder / f"paragraphs-{seed}.txt"
    content = "\n\n".join(f"Größe {number}." for number in range(6)).encode()
    file.write_bytes(change_bytes(content, draw))
    texts = read_or_refuse(read_texts, file)
    if not isinstance(texts, Refusal):
        words = file.read_bytes().decode("utf-8-sig").split()
        assert sorted(" ".join(texts).split()) == sorted(words)


def read_changed_prompts(read: Callable[[Path], Any], seed: int, folder: Path) -> None:
    """Change a row of prompts, and read the prompts of the file."""
    draw = random.Random(f"prompts {seed}")
    rows, number = change_row(
        [{**row, "id": f"p{place}"} for place, row in enumerate(PROMPTS)], draw
    )
    file = folder / f"prompts-{seed}.jsonl"
    write_json_lines(file, rows)
    prompts = read_or_refuse(read, file)
    if isinstance(prompts, Refusal):
        assert f"line {number}" in prompts
        return
    for prompt, row in zip(prompts, rows, strict=True):
        text = prompt.prompt if isinstance(prompt, PromptRow) else prompt[0]
        assert text in (row.get("prompt"), row.get("question"), row.get("messages"))
        if isinstance(prompt, PromptRow) and "id" in row:
            assert is_same_value(row["id"], prompt.id)


PROMPT_READERS = {"generate": read_prompts, "calibration": read_calibration}


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_valid_questions_are_read_as_they_are_written(kind, ending, tmp_path):
    file = tmp_path / f"valid{ending}"
    FORMATS[ending](file, KINDS[kind])
    rows = read_back(file, KINDS[kind])
    for example, row in zip(read_questions(file), rows, strict=True):
        assert_same_question(example, row)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_questions_are_read_as_they_are_or_refused(kind, ending, tmp_path):
    for seed in SEEDS:
        read_with_a_changed_row(kind, ending, seed, tmp_path)
        read_with_changed_bytes(kind, ending, seed, tmp_path)


@pytest.mark.parametrize("ending", FORMATS)
def test_changed_texts_are_read_as_they_are_or_refused(ending, tmp_path):
    for seed in SEEDS:
        read_changed_texts(ending, seed, tmp_path)


def test_changed_paragraphs_are_read_as_they_are_or_refused(tmp_path):
    for seed in SEEDS:
        read_changed_paragraphs(seed, tmp_path)


@pytest.mark.parametrize("name", PROMPT_READERS)
def test_changed_prompts_are_read_as_they_are_or_refused(name, tmp_path):
    for seed in SEEDS:
        read_changed_prompts(PROMPT_READERS[name], seed, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_many_more_changed_questions_are_read_as_they_are_or_refused(kind, ending, tmp_path):
    for seed in MORE_SEEDS:
        read_with_a_changed_row(kind, ending, seed, tmp_path)
        read_with_changed_bytes(kind, ending, seed, tmp_path)


@pytest.mark.thorough
def test_many_more_changed_texts_and_prompts_are_read_as_they_are_or_refused(tmp_path):
    for seed in MORE_SEEDS:
        for ending in FORMATS:
            read_changed_texts(ending, seed, tmp_path)
        read_changed_paragraphs(seed, tmp_path)
        for read in PROMPT_READERS.values():
            read_changed_prompts(read, seed, tmp_path)
