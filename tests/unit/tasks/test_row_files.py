"""Question files in JSON, CSV, TSV and Parquet: what is read, and every file that can't be read."""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from drllm.config import SPLITS
from drllm.errors import ConfigError, TaskError
from drllm.records.results import refuse_duplicates
from drllm.tasks import row_files
from drllm.tasks.registry import get_task
from drllm.tasks.row_files import describe_place, read_rows

QUESTIONS = [
    {"question": "Which is cold, or colder?", "choices": ["fire", "ice, dry"], "answer": 1},
    {"question": "Which is\n3?", "choices": ["4", "3"], "answer": "B"},
    {"question": "Which is warm?", "choices": ['a "fire"', "ice"], "answer": 'a "fire"'},
]


def read(path: Path | str) -> list[tuple[Any, ...]]:
    """Return the question, choices and right answer of each example of a file."""
    task = get_task(str(path))
    examples = [example for split in SPLITS for example in task.examples(split)]
    return sorted((example.question, example.choices, example.answer) for example in examples)


@pytest.fixture
def expected(tmp_path: Path) -> list[tuple[Any, ...]]:
    file = tmp_path / "expected.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return read(file)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_json_list_is_read_like_json_lines(tmp_path, expected, indent, mark):
    file = tmp_path / "mine.json"
    file.write_text(mark + json.dumps(QUESTIONS, indent=indent), encoding="utf-8")
    assert read(file) == expected
    assert get_task(str(file)).name == "mine"


def test_json_lines_may_be_in_a_json_file(tmp_path, expected):
    file = tmp_path / "mine.json"
    file.write_text("\n" + "\n".join(map(json.dumps, QUESTIONS)))
    assert read(file) == expected


def test_json_lines_may_begin_with_a_byte_order_mark(tmp_path, expected):
    file = tmp_path / "mine.jsonl"
    file.write_text("\ufeff" + "\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    assert read(file) == expected


def write_table(file: Path, delimiter: str, dump) -> None:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(QUESTIONS[0])
        for row in QUESTIONS:
            writer.writerow([row["question"], dump(row["choices"]), row["answer"]])


@pytest.mark.parametrize("dump", [json.dumps, str], ids=["as in JSON", "as pandas writes a list"])
@pytest.mark.parametrize(
    ("name", "delimiter"), [("mine.csv", ","), ("mine.tsv", "\t"), ("MINE.CSV.gz", ",")]
)
def test_a_table_of_texts_is_read_like_json_lines(tmp_path, expected, dump, name, delimiter):
    write_table(tmp_path / name, delimiter, dump)
    assert read(tmp_path / name) == expected
    assert get_task(str(tmp_path / name)).name.lower() == "mine"


def test_the_columns_of_a_table_may_have_other_names(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("id,ticket,team\n1,Login fails,007\n")
    [(question, choices, answer)] = read(f"{file}?question=ticket&answer=team")
    assert (question, choices, answer) == ("Login fails", (), "007")


def test_options_may_be_in_columns_of_their_own(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("ask,A,B,C,answer\nWhich is cold?,fire,ice,3,B\n")
    columns = "question=ask&choices=A+B+C"
    assert read(f"{file}?{columns}") == [("Which is cold?", ("fire", "ice", "3"), "ice")]
    with pytest.raises(TaskError, match=r"line 2: column 'D' is missing \(the line has: ask, A"):
        read(f"{file}?{columns}+D")


def test_options_that_are_numbers_keep_their_digits(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text('question,choices,answer\nHalf?,"[0.50, 1, 2]",1\n')
    assert read(file) == [("Half?", ("0.50", "1", "2"), "1")]  # a text comes before an index


def test_parquet_is_read_like_json_lines(tmp_path, expected):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**row, "answer": str(row["answer"]), "grader": None} for row in QUESTIONS]
    rows[0]["answer"] = "ice, dry"
    file = tmp_path / "mine.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(file) == expected


def test_of_a_long_cell_a_message_shows_the_beginning(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(f"question,choices,answer\n1?,{'x' * 100_000},1\n")
    with pytest.raises(TaskError, match=r"'choices' is 'xxx.*…; expected a list") as caught:
        get_task(str(file))
    assert len(str(caught.value)) < 1000


def test_an_empty_cell_of_a_column_of_numbers_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"{n} + 0?", "answer": n, "grader": "exact"} for n in (4.0, float("nan"))]
    file = tmp_path / "mine.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(TaskError, match=r"mine\.parquet, row 2: 'answer' is nan; expected a text"):
        get_task(str(file))


def test_a_parquet_file_with_a_damaged_page_is_refused_in_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "mine.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(QUESTIONS[:1]), file)
    content = bytearray(file.read_bytes())
    content[4:12] = b"\xff" * 8  # the header of the first page, behind the file's mark
    file.write_bytes(content)
    with pytest.raises(TaskError, match=r"mine\.parquet can't be read") as refused:
        list(read_rows(file))
    assert "\n" not in str(refused.value)


def test_without_pyarrow_a_parquet_file_names_what_to_install(tmp_path, monkeypatch):
    file = tmp_path / "mine.parquet"
    file.write_bytes(b"PAR1")
    monkeypatch.setattr("drllm.extras.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"mine\.parquet needs pyarrow.*pip install .*pyarrow>="):
        get_task(str(file))


BROKEN = {
    "mine.json": {
        '[{"question": "1?"': "mine.json: cut off in the middle; give a file of JSON lines",
        '[{"question": "1?"}, 3]': "mine.json: expected `object`",
        '[{"question": "1?", "answer": "1"}]': "row 1: 'choices' or 'grader' is missing",
        "[]": "mine.json is empty",
        "{": "mine.json, row 1: cut off in the middle",
    },
    "mine.csv": {
        "question;answer\n1?;1\n": "has one column, 'question;answer'; separate columns by commas",
        "question,answer,answer\n1?,1,1\n": "the header names the column 'answer' twice",
        "question,answer\n1?,1,2\n": "line 2: the row has more cells than the header, which has 2",
        "question,answer\n1?\n": "line 2: the row has fewer cells than the header",
        'question,answer\n1?,"1" 2\n': "mine.csv, line 2: ",
        'question,answer\n1?,"1\n': "unexpected end of data",
        "question,answer\n": "mine.csv is empty",
        "question,answer\n1?,1\n": "--columns grader=exact grades the answers by their text",
        "question,choices,answer\n1?,1|2,1\n": "line 2: 'choices' is '1|2'; expected a list",
        'question,choices,answer\n1?,"[""1"", ""2""]",5\n': "'answer' is 5; expected an index",
        "ticket,grader,answer\n1?,exact,1\n": "name its column, as in --columns question=ticket",
        "question,q,answer\n1?,2,1\n": "as in --columns question=COLUMN,answer=COLUMN",
    },
    "mine.tsv": {
        "question,answer\n1?,1\n": "'choices' or 'grader' is missing",
        "question;answer\n1?;1\n": "separate columns by tabs",
    },
    "mine.jsonl": {
        '[{"question": "1?"}]\n': "one JSON list and not JSON lines; rename it to mine.json",
        '{"question": "1?"\n': "line 1: cut off in the middle; give a file of JSON lines",
        '{"q": "1?", "choices": ["1", "2"], "answer": 0}\n': "as in --columns question=q",
        '{"a": 1, "b": 2, "choices": ["1", "2"]}\n': "as in --columns question=COLUMN",
    },
    "mine.parquet": {"PAR": "mine.parquet is not a Parquet file ("},
}
CASES = [(name, text, message) for name in BROKEN for text, message in BROKEN[name].items()]


@pytest.mark.parametrize(("name", "text", "message"), CASES)
def test_a_file_that_cannot_be_read_says_where_and_what_to_give(tmp_path, name, text, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError) as caught:
        get_task(str(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class CountedName(str):
    """A name that counts how often it is compared."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedName.comparisons += 1
        return str.__eq__(self, other)


@pytest.mark.parametrize(
    "check",
    [
        lambda names: row_files._check_header(Path("mine.csv"), names, ","),
        lambda names: refuse_duplicates("point", names),
    ],
    ids=["columns", "results"],
)
def test_among_thousands_of_names_no_name_is_compared_with_all_others(monkeypatch, check):
    monkeypatch.setattr(CountedName, "comparisons", 0)
    check([CountedName(number) for number in range(2000)])
    assert CountedName.comparisons < 20_000


def test_of_a_file_that_does_not_exist_the_nearest_is_named(tmp_path):
    for name in ("questions.jsonl", "questions.txt", "answers.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        TaskError, match=r"question\.jsonl doesn't exist; did you mean .*ons\.jsonl"
    ):
        get_task(str(tmp_path / "question.jsonl"))
    with pytest.raises(TaskError, match=r"doesn't exist; give a file of questions \(\.jsonl, \."):
        get_task(str(tmp_path / "mine.csv"))
    with pytest.raises(TaskError, match="doesn't exist; give a file"):
        get_task(str(tmp_path / "nowhere" / "questions.csv"))


def test_a_table_in_another_encoding_is_refused(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_bytes("question,answer\nWhere?,Köln\n".encode("latin-1"))
    with pytest.raises(TaskError, match=r"mine\.csv is not UTF-8 text .*; save it as UTF-8"):
        list(read_rows(file))


def test_a_row_is_named_by_its_line_or_its_number():
    assert describe_place(Path("a.jsonl.gz"), 3) == "a.jsonl.gz, line 3"
    assert describe_place(Path("a.csv"), 3) == "a.csv, line 3"
    assert describe_place(Path("a.json"), 3) == "a.json, row 3"


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("mine.jsonl", "mine", "unknown task '{}'; did you mean '{}.jsonl'?"),
        ("mine.csv", "mine", "unknown task '{}'; did you mean '{}.csv'?"),
        ("mine", "mine", "the name of the file {} doesn't say what it holds; let it end in"),
        ("mine.xlsx", "mine.xlsx", "{} is an Excel file, which can't be read"),
    ],
)
def test_a_file_of_another_name_is_offered_or_is_to_be_renamed(tmp_path, file, name, message):
    (tmp_path / file).write_text("x")
    name = str(tmp_path / name)
    with pytest.raises(TaskError) as caught:
        get_task(name)
    assert message.format(name, name) in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("question,choices\nWhy?,so\n", "'choices' is 'so'; expected a list of texts"),
        (f"question,choices,answer\nWhy?,\"['a','b']\",{5000 * '9'}\n", "is not among the choices"),
    ],
    ids=["no answer", "a huge index"],
)
def test_a_row_of_a_table_without_a_right_option_is_named(tmp_path, table, message):
    file = tmp_path / "mine.csv"
    file.write_text(table)
    with pytest.raises(TaskError, match=message) as caught:
        get_task(str(file))
    assert str(caught.value).startswith(f"{file}, line 2: ")
