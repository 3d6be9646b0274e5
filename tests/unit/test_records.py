import json
import os
import unicodedata
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from drllm.errors import ConfigError, RecordError
from drllm.records import codec, manifest
from drllm.records.codec import SCHEMA_VERSION, decode, encode, sha256, write_atomically
from drllm.records.identity import have_same_weights
from drllm.records.manifest import (
    manifest_path,
    new_manifest,
    read_manifest,
    to_lines,
    write_records,
)
from drllm.records.places import check_file, choose_file, resolve
from drllm.records.search import (
    FailedQuestion,
    Retest,
    SearchRecord,
    TriedPath,
    read_failed,
    read_search,
)
from drllm.records.splits import find_split, question_key
from drllm.records.supervision import (
    RejectedQuestion,
    SupervisionRecord,
    join_supervision,
    read_rejected,
    read_supervision,
)

RECORD = SearchRecord(
    id="q1",
    task="facts",
    question="Was ist Eis? · 冰",
    prompt="Question: Was ist Eis? · 冰\nAnswer:",
    answer="Wasser",
    reward="loglikelihood",
    num_layers=3,
    paths=(
        TriedPath(decisions=(1, 1, 1), simulation=0, reward=0.0, margin=-0.5, executions=3.0),
        TriedPath(
            decisions=(1, 0, 2),
            simulation=1,
            reward=1.0,
            margin=0.25,
            executions=3.0,
            answer="Wasser",
            retest=Retest(passed=3, asked=4, margin=None, survived=True),
        ),
    ),
    seconds=0.5,
)
OTHER = replace(RECORD, id="q2")
TARGET = SupervisionRecord(
    question="What is ice?",
    optimal_layer_config=(1, 0, 2),
    answer="water",
    prompt="Question: What is ice?",
    id="q1",
    task="facts",
    executions=3.0,
    improving=True,
    margin=0.25,
)

SHORTER = {"optimal_layer_config": (1, 1, 0), "executions": 2.0}


def search_row() -> dict[str, Any]:
    row: dict[str, Any] = json.loads(encode(RECORD))
    return row


def written(file: Path, *found: Any, schema: str = "search") -> Path:
    write_records(file, found, new_manifest(schema, model={"num_layers": 3}, config={"seed": 0}))
    return file


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("train", {"search": 0.6, "fit": 0.2, "select": 0.2}),
        ("validation", {"test": 1.0}),
        ("single", {"select": 0.5, "test": 0.5}),
        ("own", {"search": 0.5, "fit": 0.1, "select": 0.15, "test": 0.25}),
    ],
)
def test_questions_are_divided_by_where_they_come_from(origin, expected):
    found = Counter(find_split(f"Question number {number}?", origin) for number in range(4000))
    shares = {split: number / found.total() for split, number in found.items()}
    assert shares == pytest.approx(expected, abs=0.03)


def test_copies_of_a_question_differ_in_white_space_and_case_alone():
    assert question_key("  What is \n ICE? ") == question_key("what is ice?") == "what is ice?"


def test_a_question_in_another_unicode_form_is_a_copy_in_the_same_split():
    for number in range(20):
        question = f"Où est le café numéro {number} ?"
        decomposed = unicodedata.normalize("NFD", question)
        assert decomposed != question
        assert question_key(decomposed) == question_key(question)
        assert find_split(decomposed, "own") == find_split(question, "own")


def test_a_question_stays_in_the_split_it_was_in_when_this_was_written():
    """A change here would move questions that routers were trained on into the test set."""
    stored = {
        "What is ice?": ("search", "select", "search"),
        "Wie heißt das?": ("search", "select", "search"),
        "How far is the moon?": ("search", "test", "fit"),
        "Why is the sky blue?": ("select", "test", "test"),
        "What do cats eat?": ("fit", "test", "select"),
    }
    for question, splits in stored.items():
        assert tuple(find_split(question, o) for o in ("train", "single", "own")) == splits


def read_row(row: dict[str, Any], kind: type[Any] = SearchRecord) -> Any:
    return decode(json.dumps(row), kind, "x")


def test_a_line_is_compact_utf_8_in_the_order_of_the_fields():
    line = encode(RECORD).decode()
    assert read_row(json.loads(line)) == RECORD
    assert line.startswith('{"id":"q1","task":"facts","question":"Was ist Eis? · 冰","prompt":')


def test_a_supervision_line_needs_question_decisions_and_answer_only():
    row = {"question": "What is ice?", "optimal_layer_config": [1, 0, 2], "answer": "water"}
    record = read_row({**row, "a column": 1}, SupervisionRecord)
    assert record.optimal_layer_config == (1, 0, 2)
    assert record.prompt == "What is ice?"
    assert (record.task, record.executions, record.improving) == ("own", 3.0, False)
    assert len(record.id) == 16
    assert read_row({**row, "question": "b?"}, SupervisionRecord).id != record.id


def spoiled(**values: Any) -> dict[str, Any]:
    """A search line with other values; without those that are `...`."""
    return {key: v for key, v in (search_row() | values).items() if v is not ...}


def spoiled_path(**values: Any) -> dict[str, Any]:
    row = search_row()
    row["paths"][1] |= values
    return row


def spoiled_retest(**values: Any) -> dict[str, Any]:
    return spoiled_path(retest=search_row()["paths"][1]["retest"] | values)


FULL = search_row()["paths"][0]
BROKEN_SEARCH_ROWS = {
    "no question": (spoiled(question=...), "`question`"),
    "an unknown field": (spoiled(more=1), "`more`"),
    "an empty question": (spoiled(question="  "), "'question' is empty"),
    "no paths": (spoiled(paths=[]), "'paths' doesn't start with the full path"),
    "the full path last": (spoiled(paths=search_row()["paths"][::-1]), "'paths' doesn't start"),
    "a path twice": (spoiled(paths=[FULL, FULL]), "'paths' holds the same decisions twice"),
    "a decision of 3": (spoiled_path(decisions=[1, 3, 1]), r"decision 3 at layer 1.*`paths\[1\]`"),
    "a decision of 1.0": (spoiled_path(decisions=[1.0, 1, 0]), r"`paths\[1\]\.decisions\[0\]`"),
    "too few decisions": (spoiled_path(decisions=[1, 1], executions=2), "2 decisions .* 3 layers"),
    "another depth": (spoiled(num_layers=4), "3 decisions .* 4 layers"),
    "nothing executed": (spoiled_path(decisions=[0, 0, 0]), "at least one layer"),
    "executions of another path": (spoiled_path(executions=2), r"'executions'.*`paths\[1\]`"),
    "a reward above 1": (spoiled_path(reward=1.5), r"<= 1.0.*`paths\[1\]\.reward`"),
    "a negative KL": (spoiled_path(kl=-0.1), r"`paths\[1\]\.kl`"),
    "a negative simulation": (spoiled_path(simulation=-1), r">= 0.*`paths\[1\]\.simulation`"),
    "a margin of NaN": (spoiled_path(margin=float("nan")), "NaN"),
    "a re-test without verdict": (spoiled_path(retest={"passed": 1, "asked": 2}), "`margin`"),
    "more passed than asked": (spoiled_retest(passed=5), r"5 of 4.*`paths\[1\]\.retest`"),
    "survived with half": (spoiled_retest(passed=2), "'survived' is true, but 2 of 4"),
}


@pytest.mark.parametrize("what", BROKEN_SEARCH_ROWS)
def test_a_search_line_is_refused_with(what):
    row, message = BROKEN_SEARCH_ROWS[what]
    with pytest.raises(RecordError, match=message):
        read_row(row)


BROKEN_TARGETS = {
    "no decisions": ({"optimal_layer_config": None}, "`optimal_layer_config`"),
    "a label of 3": ({"optimal_layer_config": [1, 3]}, "'optimal_layer_config': decision 3 at"),
    "no layers": ({"optimal_layer_config": []}, "at least one layer must be executed"),
    "an empty question": ({"question": " "}, "'question' is empty"),
    "an empty prompt": ({"prompt": ""}, "'prompt' is empty"),
    "executions of another path": ({"executions": 2.0}, "'executions' is 2.0"),
}


@pytest.mark.parametrize("what", BROKEN_TARGETS)
def test_a_supervision_line_is_refused_with(what):
    values, message = BROKEN_TARGETS[what]
    with pytest.raises(RecordError, match=message):
        read_row(json.loads(encode(TARGET)) | values, SupervisionRecord)


def test_blank_lines_are_counted_where_a_message_names_a_line(tmp_path):
    deep = replace(TARGET, id="deep", optimal_layer_config=(1,) * 9, executions=9.0)
    file = tmp_path / "mine.jsonl"
    file.write_text(f"\n{encode(TARGET).decode()}\n\n{encode(deep).decode()}\n")
    with pytest.raises(RecordError, match=r"line 4: .* for 9 layers, but .*line 2 is for 3;"):
        read_supervision(file)


def test_a_supervision_file_can_be_loaded_by_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = written(tmp_path / "supervision.jsonl", TARGET, schema="supervision")
    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[0]["question"] == "What is ice?"
    assert loaded[0]["optimal_layer_config"] == [1, 0, 2]


@pytest.fixture
def two_lines(tmp_path):
    """A search file of two questions."""
    return written(tmp_path / "search.jsonl", RECORD, OTHER)


def test_a_file_that_lost_whole_lines_is_refused_unless_it_is_ones_own(two_lines):
    two_lines.write_bytes(encode(RECORD) + b"\n")
    with pytest.raises(RecordError, match="was changed or cut off after it was written"):
        read_search(two_lines)
    manifest_path(two_lines).unlink()
    assert list(read_search(two_lines)) == [RECORD]


def test_a_question_that_stands_twice_is_refused_with_both_lines(tmp_path):
    file = written(tmp_path / "search.jsonl", RECORD, OTHER, RECORD)
    with pytest.raises(RecordError, match=r"line 3: question 'q1' .* is in line 1 already"):
        read_search(file)


def test_one_id_in_two_tasks_is_two_questions(tmp_path):
    records = [RECORD, replace(RECORD, task="more facts")]
    assert list(read_search(written(tmp_path / "search.jsonl", *records))) == records


@pytest.mark.parametrize("question", ["What is ice?", "  what is\n ICE?"])
def test_two_targets_of_one_question_are_refused_with_both_lines(tmp_path, question):
    between = replace(TARGET, id="q2", question="What is steam?")
    other = replace(TARGET, id="q3", question=question, **SHORTER)
    file = written(tmp_path / "supervision.jsonl", TARGET, between, other, schema="supervision")
    with pytest.raises(
        RecordError, match=r"line 3: .*line 1 has the same question with another target .*q3"
    ):
        read_supervision(file)


@pytest.mark.parametrize(
    "changes",
    [{"id": "q2"}, {"task": "more", **SHORTER}],
)
def test_one_target_twice_and_one_question_in_two_tasks_are_accepted(tmp_path, changes):
    other = replace(TARGET, **changes)
    file = written(tmp_path / "supervision.jsonl", TARGET, other, schema="supervision")
    assert read_supervision(file) == [TARGET, other]


def two_files(folder: Path, **changes: Any) -> list[Path]:
    """A target, and the same with changes, in a file of its own."""
    other = replace(TARGET, **changes)
    return [
        written(folder / f"{name}.jsonl", record, schema="supervision")
        for name, record in (("first", TARGET), ("other", other))
    ]


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 1),
        ({"margin": 0.2500001}, 1),
        ({"id": "q2", "question": "What is steam?"}, 2),
        ({"task": "more", **SHORTER}, 2),
    ],
    ids=["a copy", "a copy with another last bit", "another question", "another task"],
)
def test_joined_files_have_the_targets_of_all_and_copies_once(tmp_path, changes, number):
    files = two_files(tmp_path, **changes)
    joined = join_supervision(files)
    assert joined[0] == TARGET
    assert joined[1:] == read_supervision(files[1])[: number - 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (SHORTER, "differ in 'optimal_layer_config' of question 'q1'"),
        ({"prompt": "ice?"}, "differ in 'prompt' of question 'q1' of task 'facts'"),
        ({"question": "What is steam?"}, "differ in 'question' of question 'q1'"),
        (
            {"id": "q2", "question": " what IS ice?", **SHORTER},
            r"same question with another target \(ids 'q2' and 'q1' of task 'facts'\)",
        ),
        (
            {"id": "q2", "question": "x", "optimal_layer_config": (1, 1), "executions": 2.0},
            "2 layers, .* 3;",
        ),
    ],
)
def test_files_that_contradict_one_another_are_not_joined(tmp_path, changes, says):
    first, other = two_files(tmp_path, **changes)
    with pytest.raises(RecordError, match=f"{other}.*{says}"):
        join_supervision([first, other])


def test_a_file_is_not_joined_with_itself(tmp_path):
    file, _ = two_files(tmp_path)
    with pytest.raises(RecordError, match="given twice"):
        join_supervision([file, file.parent / ".." / file.parent.name / file.name])


def test_a_manifest_tells_where_a_file_comes_from(tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text("{}\n")
    file = tmp_path / "search.jsonl"
    about = new_manifest(
        "search",
        model={"id": "some/model"},
        config={"seed": 3},
        inputs=[source],
        extra={"prompt_hash": "abc"},
    )
    write_records(file, [RECORD], about)
    stored = read_manifest(file, "search")
    assert stored is not None
    assert (stored["schema"], stored["schema_version"]) == ("drllm.search", SCHEMA_VERSION)
    assert (stored["model"], stored["config"]) == ({"id": "some/model"}, {"seed": 3})
    assert stored["inputs"] == {"source.jsonl": sha256(source)}
    assert (stored["num_records"], stored["sha256"]) == (1, sha256(file))
    assert stored["prompt_hash"] == "abc"
    assert set(stored["libraries"]) == set(manifest.LIBRARIES)


def test_inputs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    files = [tmp_path / folder / "search.jsonl" for folder in ("a", "b")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"{number}\n")
    inputs = new_manifest("supervision", model={}, config={}, inputs=files)["inputs"]
    assert inputs == {str(file): sha256(file) for file in files}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "search.manifest.json: cut off"),
        ("[]", "search.manifest.json: .*object"),
        ('{"schema": "drllm.supervision"}', "schema 'drllm.supervision'; expected 'drllm.search'"),
        ('{"schema": "drllm.search", "model": {}}', "`schema_version`"),
        ('{"schema": "drllm.search", "schema_version": "1", "model": {}}', "`schema_version`"),
        ('{"schema": "drllm.search", "schema_version": 1}', "`model`"),
        ('{"schema": "drllm.search", "schema_version": 1, "model": {}, "plan": 1}', "`plan`"),
        (
            '{"schema": "drllm.search", "schema_version": 99, "model": {}}',
            "schema version 99.*install a newer drllm",
        ),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(two_lines, text, message):
    manifest_path(two_lines).write_text(text)
    with pytest.raises(RecordError, match=message):
        read_search(two_lines)


def test_writing_makes_a_folder_with_two_files_that_who_may_read_new_files_may_read(tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    file = written(tmp_path / "new" / "folder" / "search.jsonl", RECORD)
    names = sorted(each.name for each in file.parent.iterdir())
    assert names == ["search.jsonl", "search.manifest.json"]
    assert file.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(28, "No space left on device"), RecordError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path,
    monkeypatch,
    failure,
    raised,
):
    file = tmp_path / "search.jsonl"
    file.write_text("old")

    def fail(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised) as caught:
        write_atomically(file, "new")
    if raised is RecordError:
        assert f"{file}: No space left on device" in str(caught.value)
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["search.jsonl"]


@pytest.mark.parametrize("name", ["search.jsonl", "search.manifest.json"])
def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(RecordError, match=f"{name}: it is a folder"):
        written(tmp_path / "search.jsonl", RECORD)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "schema", "is_refused"),
    [
        ("search.jsonl", "supervision", True),
        ("search.jsonl", "search", False),
        ("search.manifest.json", "search", True),
        ("own.manifest.json", "supervision", True),
        ("run.yaml", "supervision", True),
        ("own.json", "supervision", False),
        ("own.jsonl", "supervision", False),
        ("fifo", "supervision", True),
        ("new/own.jsonl", "supervision", False),
        ("own.json/own.jsonl", "supervision", True),
    ],
)
def test_an_output_that_another_stage_has_written_or_that_is_no_file_is_refused(
    two_lines, name, schema, is_refused
):
    for own in ("own.manifest.json", "own.json", "own.jsonl", "run.yaml"):
        (two_lines.parent / own).write_text("{}")
    os.mkfifo(two_lines.parent / "fifo")
    before = sorted(two_lines.parent.iterdir())
    with pytest.raises(ConfigError, match="--output") if is_refused else nullcontext():
        check_file(two_lines.parent / name, "--output", schema)
    assert sorted(two_lines.parent.iterdir()) == before


def test_a_new_file_never_has_an_old_manifest(two_lines, monkeypatch):
    """A run killed between the two files leaves one that nobody vouches for."""
    seen = []
    write = codec.write_atomically

    def watch(path: Path, text: str) -> None:
        seen.append((path.name, manifest_path(two_lines).exists()))
        write(path, text)

    monkeypatch.setattr(codec, "write_atomically", watch)
    written(two_lines, RECORD)
    assert seen == [("search.jsonl", False), ("search.manifest.json", False)]


WEIGHTS, OTHERS, EMBEDDING = "0123456789abcdef", "fedcba9876543210", "89abcdef"


@pytest.mark.parametrize(
    ("one", "other", "same", "warns"),
    [
        (WEIGHTS, f"{WEIGHTS}-{EMBEDDING}", True, False),
        (f"{WEIGHTS}-{EMBEDDING}", f"{OTHERS}-{EMBEDDING}", False, False),
        (f"{WEIGHTS}-{EMBEDDING}", f"quantised-{EMBEDDING}", True, True),
        (f"{WEIGHTS}-{EMBEDDING}", "quantised-00000000", False, False),
        (WEIGHTS, f"quantised-{EMBEDDING}", True, True),  # an earlier file's, which says no more
        (f"{WEIGHTS}-{EMBEDDING}", "quantised-", True, True),
        (f"quantised-{EMBEDDING}-1", f"quantised-{EMBEDDING}-1", True, False),
        (f"quantised-{EMBEDDING}-1", f"quantised-{EMBEDDING}-2", True, True),
    ],
)
def test_a_quantised_base_is_known_by_its_embedding_and_warned_of(one, other, same, warns, caplog):
    assert (
        have_same_weights(one, other, "paths.json")
        is have_same_weights(other, one, "paths.json")
        is same
    )
    assert ("paths.json: one of two base models is quantised" in caplog.text) is warns


def test_results_may_be_named_by_their_folder_or_their_file(tmp_path: Path):
    (tmp_path / "v1.2").mkdir()
    (tmp_path / "old").write_text("")
    places = {"new": "new/a.jsonl", "v1.2": "v1.2/a.jsonl", "b.jsonl": "b.jsonl", "old": "old"}
    for place, file in places.items():
        assert choose_file(tmp_path / place, "a.jsonl") == tmp_path / file


def test_links_are_followed_also_to_a_place_that_does_not_exist(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert resolve(tmp_path / "link" / "new.jsonl") == tmp_path.resolve() / "folder" / "new.jsonl"


def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path):
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("first")
    for place in (tmp_path / "first", tmp_path / "first" / "file.jsonl"):
        with pytest.raises(RecordError, match=r"can't follow .*first.* lead in a circle"):
            resolve(place)


def test_a_manifest_does_not_vouch_for_a_file_that_another_process_has_replaced(
    tmp_path, monkeypatch
):
    file = tmp_path / "search.jsonl"
    write = codec.write_atomically

    def write_and_lose(path, content):
        write(path, content)
        if path == file:  # another process writes the same file before the manifest is written
            write(path, to_lines([replace(RECORD, id="other")]))

    monkeypatch.setattr(codec, "write_atomically", write_and_lose)
    write_records(file, [RECORD], new_manifest("search", model={}, config={}))
    with pytest.raises(RecordError, match="was changed or cut off"):
        read_search(file)


def test_a_manifest_that_counts_other_records_is_refused(two_lines):
    file = manifest_path(two_lines)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "num_records": 3}))
    with pytest.raises(RecordError, match=r"manifest\.json counts 3 records, but .* has 2; make"):
        read_search(two_lines)


def test_failed_questions_are_as_many_as_the_manifest_of_the_search_counts(tmp_path):
    failed = [
        FailedQuestion(id=name, task="facts", question="Why?", error="none", attempts=3)
        for name in ("a", "b")
    ]
    file = tmp_path / "search.failed.jsonl"
    file.write_text(to_lines(failed))
    assert read_failed(file) == tuple(failed)  # the user's own, without a manifest
    about = new_manifest("search", model={}, config={}, extra={"num_failed": 2})
    write_records(tmp_path / "search.jsonl", [RECORD], about)
    assert read_failed(file) == tuple(failed)
    file.write_text(to_lines(failed[:1]))
    with pytest.raises(
        RecordError, match=r"failed\.jsonl has 1 questions, but the .* counts 2 that"
    ):
        read_failed(file)


@pytest.mark.parametrize("name", ["supervision.rejected.jsonl", "rejected.jsonl"])
def test_rejected_questions_are_as_many_as_the_manifest_of_the_targets_counts(tmp_path, name):
    rejected = [
        RejectedQuestion(id=name, task="facts", question="Why?", reason="no valid path")
        for name in ("a", "b", "c")
    ]
    summary = {"rejected": {"no valid path": 2, "over the quota": 0}, "copies": 1}
    about = new_manifest("supervision", model={}, config={}, extra={"summary": summary})
    write_records(tmp_path / "supervision.jsonl", [TARGET], about)
    file = tmp_path / name
    file.write_text(to_lines(rejected))
    assert read_rejected(file) == rejected
    file.write_text(to_lines(rejected[:2]))
    if name == "rejected.jsonl":  # of a training, whose manifest doesn't count them
        assert read_rejected(file) == rejected[:2]
        return
    with pytest.raises(
        RecordError, match=r"rejected\.jsonl has 2 questions, but the .* counts 3 wi"
    ):
        read_rejected(file)
