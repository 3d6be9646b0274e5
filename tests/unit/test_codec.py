"""One reader and writer of JSON: what is refused, and that a message names file, line and place."""

import json
import math
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm.errors import RecordError
from drllm.records import codec
from drllm.records.codec import (
    SCHEMA_VERSION,
    decode,
    encode,
    read_json,
    read_json_lines,
    read_text,
    sha256,
    write_atomically,
    write_json,
)


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    layer: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"layer {self.layer} is below 0")


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    steps: tuple[Step, ...] = ()
    notes: dict[str, Any] = {}


PLAN = Plan(name="a", steps=(Step(layer=1), Step(layer=2, scale=1e-5)), notes={"b": None})
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('ab"\\:é'), inner),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param('{"steps": []}', "`name`", id="a missing field"),
        pytest.param('{"name": "a", "nam": 1}', "`nam`", id="an unknown field"),
        pytest.param('{"name": "a", "steps": [{"layer": "x"}]}', "`steps[0].layer`", id="a type"),
        pytest.param('{"name": "a", "steps": [{"layer": true}]}', "`steps[0].layer`", id="bool"),
        pytest.param('{"name": "a", "steps": [{"layer": -1}]}', "`steps[0]`", id="a value"),
        pytest.param('{"name": "a", "name": "b"}', "'name'", id="a key given twice"),
        pytest.param('{"name": "a", "notes": {"x": 1, "x": 1}}', "'x'", id="twice in free notes"),
        pytest.param('{"name": "a", "notes": {"x": NaN}}', "NaN", id="NaN"),
        pytest.param(
            '{"name": "a", "notes": {"x": [1, NaN]}}', "(at `notes.x[1]`)", id="its place"
        ),
        pytest.param('{"name": "a", "notes": {"x": 1e999}}', "`notes", id="beyond the floats"),
        pytest.param(
            '{"name": "a", "steps": [{"layer": 1, "scale": %s}]}' % ("9" * 400),
            "`steps[0].scale`",
            id="an integer of 400 digits for a float",
        ),
        pytest.param('{"name": "a", "notes": {"x": %s}}' % ("9" * 5000), "`notes", id="5000"),
        pytest.param('{"name": "a", "steps": [{"layer": 1e2}]}', "`steps[0].layer`", id="float"),
        pytest.param('{"name": "\\ud800"}', "surrogate", id="half a surrogate pair"),
        pytest.param('{"name": "a", "notes": %s}' % ("[" * 100_000), "`notes`", id="type"),
        pytest.param('{"name": "a", "notes": {"x": %s' % ("[" * 100_000), "deep", id="deep"),
        pytest.param('{"name": "a"', "cut off", id="half a line"),
        pytest.param('{"name": "a"} {}', "not JSON", id="two values"),
        pytest.param("", "nothing", id="nothing"),
        pytest.param(b'{"name": "\xff"}', "UTF-8", id="not UTF-8"),
        pytest.param("[1]", "object", id="a list"),
    ],
)
def test_what_cannot_be_trusted_is_refused_with_its_place(text, named):
    with pytest.raises(RecordError) as refused:
        decode(text, Plan, "plan.jsonl, line 3")
    said = str(refused.value)
    assert said.startswith("plan.jsonl, line 3: ")
    assert named in said
    assert "\n" not in said
    assert len(said) < 300


def test_a_newer_version_is_refused_by_its_name():
    text = json.dumps({"schema_version": SCHEMA_VERSION + 1, "drllm_version": "9.1", "new": 1})
    for kind in (Plan, dict[str, Any]):
        with pytest.raises(RecordError, match=r"^plan\.json: written by drllm 9\.1"):
            decode(text, kind, "plan.json")


@given(JSON)
def test_values_come_back_as_written(value):
    assert decode(encode({"x": value}), dict[str, Any], "x") == {"x": value}
    assert decode(json.dumps({"x": value}), dict[str, Any], "x") == {"x": value}


@given(st.dictionaries(st.text('ab"\\:é'), JSON, min_size=1, max_size=3))
@settings(max_examples=50)
def test_a_key_given_twice_is_found_wherever_it_is(value):
    inner = encode(value)[:-1] + b"," + encode(min(value)) + b":0}"
    with pytest.raises(RecordError, match="twice"):
        decode(b'{"a":[1,' + inner + b"]}", dict[str, Any], "x")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, number):
    plan = msgspec.structs.replace(PLAN, steps=(Step(layer=1), Step(layer=2, scale=number)))
    with pytest.raises(RecordError, match=r"`steps\[1\]\.scale`"):
        write_json(tmp_path / "plan.json", plan)
    assert list(tmp_path.iterdir()) == []


def test_text_with_half_a_surrogate_pair_is_not_written():
    with pytest.raises(RecordError, match="UTF-8"):
        encode({"x": "\ud800"})


def test_files_come_back_and_name_the_line_that_is_wrong(tmp_path):
    write_json(tmp_path / "plan.json", PLAN)
    assert read_json(tmp_path / "plan.json", Plan) == PLAN
    assert read_json(str(tmp_path / "plan.json"), dict[str, Any])["name"] == "a"
    lines = tmp_path / "plans.jsonl"
    write_atomically(lines, encode(PLAN) + b"\r\n" + encode(PLAN) + b"\n")
    assert list(read_json_lines(lines, Plan)) == [(1, PLAN), (2, PLAN)]
    lines.write_bytes(encode(PLAN) + b"\n\n" + encode(PLAN)[:-1])
    with pytest.raises(RecordError, match=r"plans\.jsonl, line 3"):
        list(read_json_lines(lines, Plan))


def test_a_byte_order_mark_and_blank_lines_are_left_out(tmp_path):
    lines = tmp_path / "plans.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + encode(PLAN) + b"\n \r\n" + encode(PLAN) + b"\n\n")
    assert list(read_json_lines(lines, Plan)) == [(1, PLAN), (3, PLAN)]


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_line_is_empty(content, tmp_path):
    lines = tmp_path / "plans.jsonl"
    lines.write_bytes(content)
    with pytest.raises(RecordError, match="empty"):
        list(read_json_lines(lines, Plan))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


ODD = {
    "folder": Path.mkdir,
    "FIFO": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/null"),
    "link to a missing file": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_ordinary_file_is_neither_read_nor_replaced(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    path = Path("odd.json")
    ODD[kind](path)
    before = path.lstat()
    for read in (lambda: read_json(path, Plan), lambda: list(read_json_lines(path, Plan))):
        with pytest.raises(RecordError, match=rf"odd\.json.* {kind}"):
            read()
    for use in (read_text, sha256, lambda path: write_atomically(path, "x")):
        with pytest.raises(RecordError, match=rf"odd\.json.* {kind}"):
            use(path)
    assert path.lstat().st_ino == before.st_ino
    assert list(tmp_path.iterdir()) == [tmp_path / "odd.json"]


def test_a_missing_file_and_one_in_a_file_are_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file" / "inside"):
        with pytest.raises(RecordError, match=path.name):
            read_text(path)
    for write in (tmp_path / "file" / "inside", tmp_path / "file" / "a" / "b"):
        with pytest.raises(RecordError, match="can't write"):
            write_atomically(write, "x")


def test_only_what_killed_processes_left_half_written_is_cleared(tmp_path):
    path = tmp_path / "a[1].json"
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = codec._host()
    left = [tmp_path / f".{name}.json.{host}-{ended.pid}-01234567" for name in ("a[1]", "b")]
    kept = [
        path,
        tmp_path / ".a[1].json.bak",
        tmp_path / f".a[1].json.{host}-{os.getpid()}-01234567",  # one that is at it
        tmp_path / f".a[1].json.{'0' * 8}-{ended.pid}-01234567",  # another machine's
    ]
    for file in (*left, *kept):
        file.write_text("x")
    write_atomically(path, "y")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
