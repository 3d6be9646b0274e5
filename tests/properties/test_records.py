"""Records come back as they were written, and a damaged file never reads as a whole one."""

import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drllm.errors import RecordError
from drllm.paths import full_decisions
from drllm.records.codec import decode, encode
from drllm.records.manifest import new_manifest, write_records
from drllm.records.search import Retest, SearchRecord, TriedPath, read_search
from drllm.records.splits import find_split, question_key
from drllm.records.supervision import SupervisionRecord, read_supervision

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
filled = texts.filter(str.strip)
margins = st.none() | st.floats(-100, 100)


@st.composite
def retests(draw):
    asked = draw(st.integers(0, 4))
    passed = draw(st.integers(0, asked))
    survived = passed * 2 > asked and draw(st.booleans())
    return Retest(passed=passed, asked=asked, margin=draw(margins), survived=survived)


@st.composite
def search_records(draw, layers):
    vectors = st.lists(st.sampled_from([0, 1, 2]), min_size=layers, max_size=layers)
    others = draw(st.lists(vectors.filter(any).map(tuple), max_size=4, unique=True))
    full = full_decisions(layers)
    tried = [full, *(decisions for decisions in others if decisions != full)]
    return SearchRecord(
        id=draw(texts),
        task=draw(texts),
        question=draw(filled),
        prompt=draw(filled),
        answer=draw(texts),
        reward="loglikelihood",
        num_layers=layers,
        paths=tuple(
            TriedPath(
                decisions=decisions,
                simulation=simulation,
                reward=draw(st.floats(0, 1)),
                margin=draw(margins),
                executions=float(sum(decisions)),
                answer=draw(st.none() | texts),
                kl=draw(st.none() | st.floats(0, 10)),
                retest=draw(st.none() | retests()),
            )
            for simulation, decisions in enumerate(tried)
        ),
        seconds=draw(st.floats(0, 1e6)),
    )


@st.composite
def supervision_records(draw, layers=4):
    vectors = st.lists(st.sampled_from([0, 1, 2]), min_size=layers, max_size=layers)
    decisions = tuple(draw(vectors.filter(any)))
    return SupervisionRecord(
        question=draw(filled),
        optimal_layer_config=decisions,
        answer=draw(texts),
        prompt=draw(filled),
        id=draw(texts),
        task=draw(texts),
        executions=float(sum(decisions)),
        improving=draw(st.booleans()),
        margin=draw(margins),
    )


names = (
    lambda record: (record.task, record.id),
    lambda record: (record.task, question_key(record.question)),
)
one_file = st.integers(1, 6).flatmap(
    lambda layers: st.lists(search_records(layers), min_size=1, max_size=3, unique_by=names[0])
)
files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
several_targets = st.lists(supervision_records(), min_size=1, max_size=3, unique_by=names)


def written(folder, records, schema="search"):
    file = folder / f"{schema}.jsonl"
    write_records(file, records, new_manifest(schema, model={}, config={}))
    return file


@given(records=one_file, targets=several_targets)
@files
def test_files_come_back_as_they_were_written(records, targets, tmp_path):
    assert list(read_search(written(tmp_path, records))) == records
    assert read_supervision(written(tmp_path, targets, "supervision")) == targets


@given(records=one_file, data=st.data())
@files
def test_a_file_cut_off_or_changed_anywhere_is_refused(records, data, tmp_path):
    file = written(tmp_path, records)
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
    for content in (whole[:place], whole[:place] + changed + whole[place + 1 :]):
        file.write_bytes(content)
        with pytest.raises(RecordError, match=r"search\.jsonl"):
            read_search(file)


@given(records=one_file, data=st.data())
@files
def test_without_a_manifest_a_file_cut_off_inside_a_line_is_refused(records, data, tmp_path):
    file = tmp_path / "own.jsonl"
    lines = [encode(record) + b"\n" for record in records]
    whole_lines = data.draw(st.integers(0, len(lines) - 1))
    part = lines[whole_lines][: data.draw(st.integers(1, len(lines[whole_lines]) - 2))]
    file.write_bytes(b"".join(lines[:whole_lines]) + part)
    with pytest.raises(RecordError, match=r"own\.jsonl"):
        read_search(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(string.ascii_letters, max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def refused_or_understood(kind, row):
    """Whether a row is refused in one line, or read into something that can be read again."""
    try:
        record = decode(json.dumps(row), kind, "x")
    except RecordError as error:
        return "\n" not in str(error)
    return bool(decode(encode(record), kind, "x") == record)


@given(search_records(4), supervision_records(), st.data())
def test_any_foreign_value_in_a_line_is_refused_or_understood(record, target, data):
    row, other = json.loads(encode(record)), json.loads(encode(target))
    first = row["paths"][0]
    at = data.draw(st.sampled_from([row, first, *([first["retest"]] if first["retest"] else [])]))
    for part in (at, other):
        part[data.draw(st.sampled_from([*part]))] = data.draw(json_values)
    assert refused_or_understood(SearchRecord, row)
    assert refused_or_understood(SupervisionRecord, other)


@given(filled, st.sampled_from(["train", "validation", "single", "own"]))
def test_a_question_is_in_one_split_however_it_is_spaced_and_cased(question, origin):
    split = find_split(question, origin)
    assert split in {"search", "fit", "select", "test"}
    assert find_split(f"  {question}\n", origin) == split
    if question.isascii():
        assert find_split(question.upper(), origin) == split
