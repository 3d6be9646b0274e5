from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from drllm.errors import RecordError
from drllm.records import (
    SCHEMA_VERSION,
    Retest,
    SearchRecord,
    SupervisionRecord,
    TriedPath,
    WeightedPath,
    codec,
    files,
    join_supervision,
    manifest_path,
    manifests,
    new_manifest,
    question_key,
    read_lines,
    read_manifest,
    read_search,
    read_supervision,
    search_record,
    sha256,
    split_of,
    supervision_record,
    to_json,
    write_atomically,
    write_records,
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
OTHER = dataclasses.replace(RECORD, id="q2")
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


def search_row() -> dict[str, Any]:
    row: dict[str, Any] = json.loads(to_json(RECORD))
    return row


def written(file: Path, *found: Any, schema: str = "search") -> Path:
    write_records(file, found, new_manifest(schema, model={"num_layers": 3}, config={"seed": 0}))
    return file


# --- splits ------------------------------------------------------------------------------------


def shares(origin: str) -> dict[str, float]:
    n = 4000
    found = [split_of(f"Question number {number}?", origin) for number in range(n)]
    return {split: found.count(split) / n for split in set(found)}


def test_training_questions_are_divided_60_20_20():
    assert shares("train") == pytest.approx({"search": 0.6, "fit": 0.2, "select": 0.2}, abs=0.03)


def test_validation_questions_are_all_test():
    assert shares("validation") == {"test": 1.0}


def test_a_set_of_one_file_is_halved_into_select_and_test():
    assert shares("single") == pytest.approx({"select": 0.5, "test": 0.5}, abs=0.03)


def test_a_set_of_ones_own_serves_every_stage():
    expected = {"search": 0.5, "fit": 0.1, "select": 0.15, "test": 0.25}
    assert shares("own") == pytest.approx(expected, abs=0.03)


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
        assert tuple(split_of(question, o) for o in ("train", "single", "own")) == splits


def test_an_unknown_origin_is_a_defect_of_the_caller():
    with pytest.raises(ValueError, match="origin 'dev' is not train, validation, single or own"):
        split_of("What is ice?", "dev")


def test_white_space_and_case_do_not_make_another_question():
    assert question_key("  What is\n ICE? ") == question_key("what is ice?")
    assert question_key("What is ice?") != question_key("What is ice")


# --- one line ----------------------------------------------------------------------------------


def test_a_search_line_reads_as_it_was_written():
    assert search_record(search_row()) == RECORD


def test_a_line_keeps_its_letters_and_has_no_line_break():
    line = to_json(RECORD)

    assert "冰" in line
    assert "\n" not in line


def test_a_number_that_json_cannot_hold_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        to_json(dataclasses.replace(TARGET, margin=float("nan")))


def test_a_supervision_line_needs_question_decisions_and_answer_only():
    record = supervision_record(
        {"question": "What is ice?", "optimal_layer_config": [1, 0, 2], "answer": "water"}
    )

    assert record.optimal_layer_config == (1, 0, 2)
    assert record.prompt == "What is ice?"
    assert (record.task, record.executions, record.improving) == ("own", 3.0, False)
    assert len(record.id) == 16


def test_questions_without_ids_get_different_ids():
    rows = [{"question": text, "optimal_layer_config": [1], "answer": "a"} for text in ("a?", "b?")]

    assert len({supervision_record(row).id for row in rows}) == 2


def without(key: str) -> dict[str, Any]:
    row = search_row()
    del row[key]
    return row


def spoiled(**values: Any) -> dict[str, Any]:
    return search_row() | values


def spoiled_path(number: int = 1, **values: Any) -> dict[str, Any]:
    row = search_row()
    row["paths"][number] |= values
    return row


FULL = search_row()["paths"][0]
BROKEN_SEARCH_ROWS = {
    "no question": (without("question"), r"'question' is missing \(the line has: answer, id"),
    "an empty question": (spoiled(question="  "), "'question' is empty"),
    "a question that is no text": (spoiled(question=5), "'question' is 5; expected str"),
    "no paths": (spoiled(paths=[]), "doesn't start with the full path"),
    "paths that are no list": (spoiled(paths={}), "'paths' is {}; expected list"),
    "a path that is no object": (spoiled(paths=[7]), "'paths' holds something that is not an"),
    "the full path last": (spoiled(paths=search_row()["paths"][::-1]), "doesn't start with the"),
    "a path twice": (spoiled(paths=[FULL, FULL]), "holds the same decisions twice"),
    "a decision of 3": (spoiled_path(decisions=[1, 3, 1]), "decision 3 at layer 1 is not one of"),
    "a decision of 1.0": (spoiled_path(decisions=[1.0, 1, 0]), "expected whole numbers 0, 1 or 2"),
    "a decision of true": (spoiled_path(decisions=[True, 1, 0]), "expected whole numbers"),
    "too few decisions": (spoiled_path(decisions=[1, 0]), "2 decisions were given for a model of"),
    "another depth": (spoiled(num_layers=4), "3 decisions were given for a model of 4 layers"),
    "nothing executed": (spoiled_path(decisions=[0, 0, 0]), "at least one layer must be executed"),
    "a reward above 1": (spoiled_path(reward=1.5), r"'reward' is 1.5; it must be in \[0, 1\]"),
    "a reward that is text": (spoiled_path(reward="1"), "'reward' is '1'; expected float"),
    "a reward of true": (spoiled_path(reward=True), "'reward' is True; expected float"),
    "a margin of NaN": (spoiled_path(margin=float("nan")), "'margin' is nan; expected a finite"),
    "an endless margin": (spoiled_path(margin=float("inf")), "expected a finite number"),
    "an answer that is no text": (spoiled_path(answer=5), "'answer' is 5; expected str"),
    "a re-test that is no object": (spoiled_path(retest=5), "'retest' is 5; expected dict"),
    "a re-test without verdict": (spoiled_path(retest={"passed": 1, "asked": 2}), "'survived' is"),
    "a simulation that is text": (
        spoiled_path(simulation="1"),
        "'simulation' is '1'; expected int",
    ),
}


@pytest.mark.parametrize("what", BROKEN_SEARCH_ROWS)
def test_a_search_line_is_refused_with(what: str):
    row, message = BROKEN_SEARCH_ROWS[what]
    with pytest.raises(RecordError, match=message):
        search_record(row)


BROKEN_TARGETS = {
    "no decisions": ({"optimal_layer_config": None}, "'optimal_layer_config' is None"),
    "decisions as text": ({"optimal_layer_config": "1 0 2"}, "expected list"),
    "a label of 3": ({"optimal_layer_config": [1, 3]}, "'optimal_layer_config': decision 3 at"),
    "all skipped": ({"optimal_layer_config": [0, 0]}, "at least one layer must be executed"),
    "no layers": ({"optimal_layer_config": []}, "at least one layer must be executed"),
    "improving as text": ({"improving": "false"}, "'improving' is 'false'; expected bool"),
    "a label of -1": ({"optimal_layer_config": [1, -1]}, "decision -1 at layer 1 is not one of"),
    "an empty question": ({"question": " "}, "'question' is empty"),
    "an empty prompt": ({"prompt": ""}, "'prompt' is empty"),
    "valid paths as text": ({"valid_paths": "1 0 2"}, "'valid_paths' is '1 0 2'; expected list"),
    "a valid path that is a list": ({"valid_paths": [[1, 0, 2]]}, "is not an object"),
    "a valid path of another depth": (
        {"valid_paths": [{"decisions": [1, 0], "weight": 1}]},
        "'valid_paths': 2 decisions were given for a model of 3 layers",
    ),
    "a valid path without weight": (
        {"valid_paths": [{"decisions": [1, 0, 2]}]},
        "'weight' is missing",
    ),
    "a valid path of weight 0": (
        {"valid_paths": [{"decisions": [1, 0, 2], "weight": 0}]},
        "'weight' is 0.0 in 'valid_paths'; it must be above 0",
    ),
    "a valid path twice": (
        {"valid_paths": [{"decisions": [1, 0, 2], "weight": 1}] * 2},
        "'valid_paths' holds the same decisions twice",
    ),
    "valid paths without the target": (
        {"valid_paths": [{"decisions": [1, 1, 2], "weight": 1}]},
        "'valid_paths' lacks the target path itself",
    ),
}


@pytest.mark.parametrize("what", BROKEN_TARGETS)
def test_a_supervision_line_is_refused_with(what: str):
    values, message = BROKEN_TARGETS[what]
    with pytest.raises(RecordError, match=message):
        supervision_record(json.loads(to_json(TARGET)) | values)


def test_valid_paths_read_as_they_were_written():
    paths = (
        WeightedPath(decisions=(1, 0, 2), weight=1.0),
        WeightedPath(decisions=(1, 1, 1), weight=0.5),
    )
    soft = dataclasses.replace(TARGET, valid_paths=paths)
    assert supervision_record(json.loads(to_json(soft))) == soft


def test_a_target_whose_valid_paths_were_not_asked_for_says_nothing_of_them():
    assert "valid_paths" not in json.loads(to_json(TARGET))


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(RecordError) as caught:
        search_record(spoiled(question=["x"] * 10_000))
    assert len(str(caught.value)) < 200


# --- whole files -------------------------------------------------------------------------------


def test_a_file_reads_as_it_was_written(tmp_path: Path):
    assert read_search(written(tmp_path / "search.jsonl", RECORD, OTHER)) == [RECORD, OTHER]


def test_a_supervision_file_can_be_loaded_by_the_datasets_library(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    file = written(tmp_path / "supervision.jsonl", TARGET, schema="supervision")

    loaded = datasets.load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[0]["question"] == "What is ice?"
    assert loaded[0]["optimal_layer_config"] == [1, 0, 2]


@pytest.fixture
def two_lines(tmp_path: Path) -> Path:
    """A search file of two questions."""
    return written(tmp_path / "search.jsonl", RECORD, OTHER)


def test_a_file_cut_off_at_any_byte_is_refused(two_lines: Path):
    whole = two_lines.read_bytes()

    for length in range(len(whole)):
        two_lines.write_bytes(whole[:length])
        with pytest.raises(RecordError, match=r"search\.jsonl"):
            read_search(two_lines)


def test_a_line_that_is_cut_off_is_named(two_lines: Path):
    whole = two_lines.read_bytes()
    two_lines.write_bytes(whole[:-20])

    with pytest.raises(RecordError, match=r"search\.jsonl, line 2: the line is cut off"):
        read_search(two_lines)


def test_a_file_that_lost_whole_lines_is_refused(two_lines: Path):
    two_lines.write_text(to_json(RECORD) + "\n", encoding="utf-8")

    with pytest.raises(RecordError, match="was changed or cut off after it was written"):
        read_search(two_lines)


def test_without_its_manifest_a_changed_file_is_ones_own(two_lines: Path):
    two_lines.write_text(to_json(RECORD) + "\n", encoding="utf-8")
    manifest_path(two_lines).unlink()

    assert read_search(two_lines) == [RECORD]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; run the stage that writes it again"),
        (b"\n", "line 1: "),
        (b"[1, 2]\n", "line 1: .*object"),
        (b"question,answer\n", "line 1: not JSON"),
        (b"\x89PNG\r\n", "not UTF-8"),
        (b"{}\n", "line 1: 'num_layers' is missing"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "foreign.jsonl"
    file.write_bytes(content)

    with pytest.raises(RecordError, match=message):
        read_search(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(RecordError, match=r"absent\.jsonl doesn't exist"):
        read_search(tmp_path / "absent.jsonl")
    with pytest.raises(RecordError, match="is a folder"):
        list(read_lines(tmp_path))


def test_a_question_that_stands_twice_is_refused_with_both_lines(tmp_path: Path):
    file = written(tmp_path / "search.jsonl", RECORD, OTHER, RECORD)

    with pytest.raises(RecordError, match=r"line 3: question 'q1' .* stands already in line 1"):
        read_search(file)


def test_one_id_in_two_tasks_is_two_questions(tmp_path: Path):
    other = dataclasses.replace(RECORD, task="more facts")

    assert len(read_search(written(tmp_path / "search.jsonl", RECORD, other))) == 2


def test_targets_of_two_depths_are_refused(tmp_path: Path):
    other = dataclasses.replace(TARGET, id="q2", optimal_layer_config=(1, 1))
    file = written(tmp_path / "supervision.jsonl", TARGET, other, schema="supervision")

    with pytest.raises(RecordError, match="line 2: 'optimal_layer_config' has 2 layers, line 1"):
        read_supervision(file)


@pytest.mark.parametrize("question", ["What is ice?", "  what is\n ICE?"])
def test_two_targets_of_one_question_are_refused_with_both_lines(tmp_path: Path, question: str):
    between = dataclasses.replace(TARGET, id="q2", question="What is steam?")
    other = dataclasses.replace(TARGET, id="q3", question=question, optimal_layer_config=(1, 1, 0))
    file = written(tmp_path / "supervision.jsonl", TARGET, between, other, schema="supervision")

    with pytest.raises(
        RecordError, match=r"line 3: the question stands already in line 1 with another target .*q3"
    ):
        read_supervision(file)


@pytest.mark.parametrize(
    "changes",
    [{"id": "q2"}, {"task": "more", "optimal_layer_config": (1, 1, 0), "executions": 2.0}],
)
def test_one_target_twice_and_one_question_in_two_tasks_are_accepted(
    tmp_path: Path, changes: dict[str, Any]
):
    other = dataclasses.replace(TARGET, **changes)
    file = written(tmp_path / "supervision.jsonl", TARGET, other, schema="supervision")

    assert read_supervision(file) == [TARGET, other]


def two_files(folder: Path, **changes: Any) -> list[Path]:
    """A target, and the same with changes, in a file of its own."""
    other = dataclasses.replace(TARGET, **changes)
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
        ({"task": "more", "optimal_layer_config": (1, 1, 0), "executions": 2.0}, 2),
    ],
    ids=["a copy", "a copy with another last bit", "another question", "another task"],
)
def test_joined_files_have_the_targets_of_all_and_copies_once(
    tmp_path: Path, changes: dict[str, Any], number: int
):
    files = two_files(tmp_path, **changes)

    joined = join_supervision(files)

    assert joined[0] == TARGET
    assert joined[1:] == read_supervision(files[1])[: number - 1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimal_layer_config": (1, 1, 0)}, "differ in 'optimal_layer_config' of question 'q1'"),
        ({"prompt": "ice?"}, "differ in 'prompt' of question 'q1' of task 'facts'"),
        ({"question": "What is steam?"}, "differ in 'question' of question 'q1'"),
        (
            {"id": "q2", "question": " what IS ice?", "optimal_layer_config": (1, 1, 0)},
            r"one question of task 'facts' with two targets \(ids 'q2' and 'q1'\)",
        ),
        ({"id": "q2", "question": "x", "optimal_layer_config": (1, 1)}, "of 2 layers, .* of 3;"),
    ],
)
def test_files_that_contradict_one_another_are_not_joined(
    tmp_path: Path, changes: dict[str, Any], says: str
):
    first, other = two_files(tmp_path, **changes)

    with pytest.raises(RecordError, match=f"{other}.*{says}"):
        join_supervision([first, other])


def test_a_file_is_not_joined_with_itself(tmp_path: Path):
    file, _ = two_files(tmp_path)

    with pytest.raises(RecordError, match="given twice"):
        join_supervision([file, file.parent / ".." / file.parent.name / file.name])


# --- manifests ---------------------------------------------------------------------------------


def test_a_manifest_tells_where_a_file_comes_from(tmp_path: Path):
    source = tmp_path / "source.jsonl"
    source.write_text("{}\n")
    file = tmp_path / "search.jsonl"
    manifest = new_manifest(
        "search",
        model={"id": "some/model"},
        config={"seed": 3},
        inputs=[source],
        extra={"prompt_hash": "abc"},
    )
    write_records(file, [RECORD], manifest)

    stored = read_manifest(file, "search")
    assert stored is not None
    assert (stored["schema"], stored["schema_version"]) == ("drllm.search", SCHEMA_VERSION)
    assert (stored["model"], stored["config"]) == ({"id": "some/model"}, {"seed": 3})
    assert stored["inputs"] == {"source.jsonl": sha256(source)}
    assert (stored["num_records"], stored["sha256"]) == (1, sha256(file))
    assert stored["prompt_hash"] == "abc"
    assert set(stored["libraries"]) == set(manifests.LIBRARIES)


def test_a_manifest_lies_beside_its_file():
    assert manifest_path(Path("data/search.jsonl")) == Path("data/search.manifest.json")


def test_inputs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    files = [tmp_path / folder / "search.jsonl" for folder in ("a", "b")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(f"{number}\n")

    inputs = new_manifest("supervision", model={}, config={}, inputs=files)["inputs"]
    assert inputs == {str(file): sha256(file) for file in files}


def test_a_file_without_a_manifest_has_none(tmp_path: Path):
    assert read_manifest(tmp_path / "own.jsonl", "search") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "search.manifest.json: the line is cut off"),
        ("[]", "search.manifest.json: .*object"),
        ('{"schema": "drllm.supervision"}', "says 'drllm.supervision'; expected 'drllm.search'"),
        ('{"schema": "drllm.search", "model": {}}', "lacks 'schema_version'"),
        ('{"schema": "drllm.search", "schema_version": "1", "model": {}}', "lacks 'schema_v"),
        ('{"schema": "drllm.search", "schema_version": 1}', "or 'model'"),
        (
            '{"schema": "drllm.search", "schema_version": 99, "model": {}}',
            "schema version 99.*install a newer drllm",
        ),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(two_lines: Path, text: str, message: str):
    manifest_path(two_lines).write_text(text)

    with pytest.raises(RecordError, match=message):
        read_search(two_lines)


# --- writing -----------------------------------------------------------------------------------


def test_writing_makes_the_folder_and_leaves_nothing_else_in_it(tmp_path: Path):
    written(tmp_path / "new" / "folder" / "search.jsonl", RECORD)

    names = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert names == ["search.jsonl", "search.manifest.json"]


def test_a_written_file_may_be_read_by_whoever_may_read_new_files(tmp_path: Path):
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    file = written(tmp_path / "search.jsonl", RECORD)

    assert file.stat().st_mode == plain.stat().st_mode


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "search.jsonl"
    file.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RecordError, match=r"can't write .*search\.jsonl: No space left on device"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["search.jsonl"]


def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "search.jsonl"
    file.write_text("old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["search.jsonl"]


def test_a_folder_in_the_files_place_is_refused_and_kept(tmp_path: Path):
    folder = tmp_path / "search.jsonl"
    folder.mkdir()

    with pytest.raises(RecordError, match="it is a folder; give the name of a file"):
        written(folder, RECORD)
    assert folder.is_dir()


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path):
    (tmp_path / "data").write_text("a file")

    with pytest.raises(RecordError, match=r"can't write .*; choose a folder that you may write to"):
        written(tmp_path / "data" / "search.jsonl", RECORD)


def test_a_new_file_never_stands_beside_an_old_manifest(
    two_lines: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run killed between the two files leaves one that nobody vouches for."""
    seen = []
    write = codec.write_atomically

    def watch(path: Path, text: str) -> None:
        seen.append((path.name, manifest_path(two_lines).exists()))
        write(path, text)

    monkeypatch.setattr(files, "write_atomically", watch)
    monkeypatch.setattr(codec, "write_atomically", watch)
    written(two_lines, RECORD)
    assert seen == [("search.jsonl", False), ("search.manifest.json", False)]
