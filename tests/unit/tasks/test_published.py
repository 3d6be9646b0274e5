"""Published questions: which file serves which split, what is left out, broken or absent."""

import gzip
import json
import logging
import warnings

import pytest

from drllm.config import SPLITS
from drllm.errors import TaskError
from drllm.records.splits import BOUNDS, find_split
from drllm.tasks.published import task
from drllm.tasks.published.task import PublishedTask, find_file
from drllm.tasks.registry import TASKS, get_task

ARC_EASY, COMMONSENSE_QA, GSM8K = map(get_task, ("arc_easy", "commonsense_qa", "gsm8k"))
ROWS = [
    {
        "id": f"q{number}",
        "question": f"Question {number}?",
        "choices": {"text": ["one", "two", "three"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    }
    for number in range(40)
]


@pytest.fixture
def arc(tmp_path, write_rows):
    """A data folder with small ARC-Easy files."""
    write_rows("arc_easy/train", ROWS)
    write_rows("arc_easy/validation", [{**ROWS[0], "question": "Another?"}])
    return tmp_path


def test_every_split_of_every_published_task_comes_from_one_file():
    for found in map(get_task, TASKS):
        if isinstance(found, PublishedTask):
            splits = [split for origin in found.files.values() for split in BOUNDS[origin]]
            assert len(splits) == len(set(splits))
            assert "test" in splits


def test_a_split_keeps_the_files_order_and_the_first_of_equal_questions(arc, write_rows):
    copy = {**ROWS[0], "id": "copy", "question": "  question 0? ", "answerKey": "1"}
    write_rows("arc_easy/train", [*ROWS, copy])
    found = [e.id for split in SPLITS[:3] for e in ARC_EASY.examples(split, arc)]
    assert sorted(found) == sorted(row["id"] for row in ROWS)
    search = [e.id for e in ARC_EASY.examples("search", arc)]
    expected = [r["id"] for r in ROWS if find_split(str(r["question"]), "train") == "search"]
    assert search == expected


def test_what_is_reported_is_asked_as_published_with_copies_under_ids_of_their_own(arc, write_rows):
    others = {**ROWS[0], "choices": {"text": ["four", "five"], "label": ["2", "3"]}}
    write_rows("arc_easy/validation", [ROWS[0], others, ROWS[0]])
    found = ARC_EASY.examples("test", arc)
    assert [e.choices for e in found] == [found[0].choices, ("four", "five"), found[0].choices]
    assert [e.id for e in found] == ["q0", "validation-2", "validation-3"]
    assert "q0" not in [e.id for split in SPLITS[:3] for e in ARC_EASY.examples(split, arc)]


def test_rows_with_an_empty_text_are_skipped_and_named_unless_none_is_left(arc, write_rows, caplog):
    empty = {**ROWS[1], "choices": {"text": ["one", "", "three"], "label": ["1", "2", "3"]}}
    path = write_rows("arc_easy/validation", [ROWS[0], empty, ROWS[2], empty])
    with caplog.at_level(logging.WARNING, "drllm"):
        assert [e.id for e in ARC_EASY.examples("test", arc)] == ["q0", "q2"]
    assert list(ARC_EASY.skipped("test", arc)) == ["validation-2", "validation-4"]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{path}, line 2: 'text' holds ''")
    assert message.endswith("rows like this are skipped: 2 of 4")
    write_rows("arc_easy/validation", [empty, empty])
    with pytest.raises(TaskError, match=r"line 1: 'text' holds ''.* no other row is usable"):
        ARC_EASY.examples("test", arc)


def test_a_training_question_that_the_task_or_a_related_one_reports_is_left_out(arc, write_rows):
    write_rows("arc_easy/validation", [{**ROWS[3], "question": " question  3? "}])
    write_rows("arc_challenge/validation", [{**ROWS[5], "question": "QUESTION 5?"}])
    found = {e.id for split in SPLITS[:3] for e in ARC_EASY.examples(split, arc)}
    assert found == {row["id"] for row in ROWS} - {"q3", "q5"}


def test_a_file_is_read_once_and_read_anew_where_it_changed(arc, write_rows, monkeypatch):
    first = ARC_EASY.examples("test", arc)
    monkeypatch.setattr(task, "read_rows", None)  # whoever reads now fails
    again = ARC_EASY.examples("test", arc)
    assert again == first
    assert again is not first
    monkeypatch.undo()
    write_rows("arc_easy/validation", [{**ROWS[0], "question": "Quite another one?"}])
    assert [e.question for e in ARC_EASY.examples("test", arc)] == ["Quite another one?"]


def test_a_torn_file_is_named(arc):
    path = arc / "arc_easy" / "validation.jsonl"
    path.unlink()
    whole = gzip.compress(json.dumps(ROWS[0]).encode())
    path.with_name("validation.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(TaskError, match=r"validation\.jsonl\.gz can't be read"):
        ARC_EASY.examples("test", arc)


def test_without_data_and_network_one_line_names_the_flag():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets  # noqa: F401  (its first import warns)
    with pytest.raises(TaskError, match="--data-dir") as caught:
        ARC_EASY.examples("test")
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file_is_named_where_it_was_looked_for(tmp_path, write_rows):
    with pytest.raises(TaskError, match="is not a folder"):
        COMMONSENSE_QA.examples("test", tmp_path / "absent")
    write_rows("commonsense_qa/validation", ROWS)
    assert len(COMMONSENSE_QA.examples("test", tmp_path)) == len(ROWS)
    missing = tmp_path / "commonsense_qa" / "train.jsonl"
    for split in ("search", "fit", "select"):
        with pytest.raises(TaskError) as caught:
            COMMONSENSE_QA.examples(split, tmp_path)
        assert f"found no {missing} or .jsonl.gz (its questions for search" in str(caught.value)


def test_one_part_of_a_set_serves_where_the_whole_is_not_there_and_is_warned_about_once(
    tmp_path, write_rows, caplog
):
    part = write_rows("arc_easy/validation_subset3", ROWS[:3])
    with caplog.at_level(logging.WARNING, "drllm"):
        assert len(ARC_EASY.examples("test", tmp_path)) == 3
        assert len(ARC_EASY.examples("test", tmp_path)) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{part} holds only a part of the set; the results are for this part"
    ]
    write_rows("arc_easy/validation_subset4", ROWS[:4])
    with pytest.raises(TaskError, match=r"validation_subset3\.jsonl, validation_subset4\.jsonl"):
        find_file(tmp_path / "arc_easy", "validation")
    write_rows("arc_easy/validation", ROWS)
    assert len(ARC_EASY.examples("test", tmp_path)) == len(ROWS)


def test_the_hub_is_asked_for_the_files_that_a_split_needs(hub):
    rows = [{"question": f"{n}?", "answer": f"So.\n#### {n}"} for n in range(20)]
    hub.files["openai/gsm8k", "main", "train"] = rows
    hub.files["openai/gsm8k", "main", "test"] = rows[:5]
    splits = {split: [e.id for e in GSM8K.examples(split)] for split in SPLITS}
    assert splits["test"] == [f"test-{n}" for n in range(1, 6)]
    trained = [name for split in SPLITS[:3] for name in splits[split]]
    assert sorted(trained) == sorted(f"train-{n}" for n in range(6, 21))
    assert set(hub.asked) == set(hub.files)


def test_a_broken_row_of_the_hub_is_named_by_its_number(hub):
    hub.files["openai/gsm8k", "main", "test"] = [
        {"question": "1?", "answer": "#### 1"},
        {"question": "2?", "answer": "two"},
    ]
    with pytest.raises(TaskError, match=r"^openai/gsm8k main test, row 2: 'answer' doesn't end"):
        GSM8K.examples("test")


@pytest.mark.parametrize("kind", ["offline", "gated", "missing", "split", "broken"])
def test_what_the_hub_refuses_is_said_in_one_line(hub, kind):
    from datasets import exceptions

    errors: dict[str, Exception] = {
        "offline": ConnectionError("Couldn't reach the Hub\n(offline mode is enabled)"),
        "gated": exceptions.DatasetNotFoundError("it is a gated dataset; log in"),
        "missing": exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub"),
        "split": ValueError("Unknown split \"test\". Should be one of ['train']."),
        "broken": exceptions.DatasetGenerationError(),
    }
    hub.files["openai/gsm8k", "main", "test"] = errors[kind]
    with pytest.raises(TaskError) as caught:
        GSM8K.examples("test")
    message = str(caught.value)
    assert message.startswith("task 'gsm8k' can't fetch test of openai/gsm8k from the hub (")
    assert (str(errors[kind]).split("\n")[0] or "DatasetGenerationError") in message
    assert "--data-dir with gsm8k/test.jsonl" in message
    assert "\n" not in message
    assert caught.value.__cause__ is errors[kind]
