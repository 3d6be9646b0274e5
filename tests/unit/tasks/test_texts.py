"""Texts of files, of data sets of the hub (a folder stands in for one), and those of drllm."""

import json
from pathlib import Path
from typing import Any

import pytest

from drllm.errors import ConfigError, DrllmError, TaskError
from drllm.models.routed_model import RoutedModel
from drllm.tasks.registry import get_task
from drllm.tasks.texts import (
    BUILTIN_TEXTS,
    BUILTIN_TEXTS_FILE,
    choose_calibration_texts,
    cut_texts,
    list_text_warnings,
    read_texts,
)

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data sets that lie in the current folder are found by their ids."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_set(name: str, split: str, rows: list[dict[str, Any]]) -> None:
    file = Path(name) / f"{split}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_data_set_gives_its_first_texts_that_are_not_blank_beside_those_of_files():
    texts = ["", "one", " ", "two", "three"]
    write_set("owner/first", "train", [{"text": text} for text in texts])
    Path("notes.txt").write_text("four\n\nfive")
    found = read_texts("notes.txt, owner/first,", 2, 0)
    assert found == {"notes": ["four", "five"], "first": ["one", "two"]}


def test_texts_may_be_in_a_table_or_a_json_list():
    Path("table.csv").write_text('id,text\n1,one\n2,"two, or three"\n')
    Path("list.json").write_text('[{"text": "four"}, {"text": "five"}]')
    found = read_texts("table.csv,list.json", None, 0)
    assert found == {"table": ["one", "two, or three"], "list": ["four", "five"]}


def test_a_limit_draws_texts_of_a_file_with_the_seed():
    Path("notes.txt").write_text("\n\n".join(map(str, range(50))))
    draws = [tuple(read_texts("notes.txt", 5, seed)["notes"]) for seed in (0, 0, 1)]
    assert len(set(draws[0])) == 5
    assert draws[0] == draws[1] != draws[2]


def test_a_configuration_is_asked_for_by_name_and_no_more_than_a_limit_is_read(monkeypatch):
    asked, read = [], []

    def load_dataset(*place, **options):
        asked.append((*place, options))
        return (read.append(n) or {"text": f"text {n}"} for n in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_texts("owner/many:small-v1", None, 0)
    assert len(found["many:small-v1"]) == len(read) == 10_000
    assert asked == [("owner/many", "small-v1", {"split": "train", "streaming": True})]


def test_a_data_set_without_the_column_text_is_refused_with_the_columns_that_there_are():
    write_set("owner/other", "train", [{"id": 1, "body": "one"}])
    with pytest.raises(TaskError, match=r"--text owner/other has no texts.*'id', 'body'.*; give"):
        read_texts("owner/other", None, 0)


def test_a_data_set_without_the_split_train_is_refused_with_those_that_there_are():
    write_set("owner/test_only", "test", [{"text": "one"}])
    with pytest.raises(TaskError, match=r"can't fetch train of owner/test_only .*test.*; ") as told:
        read_texts("owner/test_only", None, 0)
    assert "\n" not in str(told.value)


def test_a_data_set_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def load_dataset(*place, **options):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"Couldn't reach the Hub \(offline\)") as told:
        read_texts("owner/away", None, 0)
    assert "OWNER/NAME" in str(told.value)


@pytest.mark.parametrize("word", ["owner/name.txt", "folder/rows.jsonl"])
def test_what_is_called_like_a_file_is_a_file(word):
    with pytest.raises(DrllmError, match="doesn't exist"):
        read_texts(word, None, 0)


def test_a_word_that_is_neither_is_refused_with_both_ways_to_write_it():
    with pytest.raises(ConfigError, match=r"\.txt.*OWNER/NAME"):
        read_texts("wikitext", None, 0)


def test_a_row_without_a_text_is_refused_with_its_place():
    Path("rows.jsonl").write_text('{"text": "one"}\n{"text": " "}\n')
    with pytest.raises(TaskError, match=r"rows.jsonl, line 2: 'text' is ' '; give a text"):
        read_texts("rows.jsonl", None, 0)


def test_two_files_of_the_same_name_are_refused():
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "notes.txt").write_text("one")
    with pytest.raises(ConfigError, match="two tasks or files to train on are called 'notes'"):
        read_texts("a/notes.txt,b/notes.txt", None, 0)


def test_the_texts_of_drllm_are_a_small_file_with_enough_for_a_refit(smollm2):
    texts = read_texts(BUILTIN_TEXTS, None, 0)[BUILTIN_TEXTS]
    assert sum(len(smollm2.tokenizer(text)["input_ids"]) for text in texts) > 20_000
    assert BUILTIN_TEXTS_FILE.stat().st_size < 150_000


def test_no_question_is_in_the_texts_of_drllm_that_results_are_reported_on():
    all_texts = "\n".join(read_texts(BUILTIN_TEXTS, None, 0)[BUILTIN_TEXTS])
    for split in ("select", "test"):
        for example in get_task("builtin_facts").examples(split):
            assert example.question not in all_texts


def test_a_text_is_cut_into_sequences_of_two_tokens_or_more():
    texts = [(1, 2, 3, 4), tuple(range(9)), (5,), ()]
    assert cut_texts(texts, 4) == [(1, 2, 3, 4), (0, 1, 2, 3), (4, 5, 6, 7)]


def test_calibration_texts_are_drawn_evenly_up_to_the_number_of_tokens():
    texts = {
        "many": [(number,) * 10 for number in range(100)],
        "few": [(1000 + number,) * 7 for number in range(3)],
        "long": [(2000 + number,) * 50 for number in range(100)],
    }
    chosen = choose_calibration_texts(texts, 400, 0)
    counts = {name: sum(map(len, sequences)) for name, sequences in chosen.items()}
    assert sum(counts.values()) == 400
    assert counts["few"] == 21  # all there is
    assert abs(counts["many"] - counts["long"]) <= 50
    assert choose_calibration_texts(texts, 400, 0) == chosen
    assert choose_calibration_texts(texts, 400, 1) != chosen
    assert choose_calibration_texts(texts, 5, 0).keys() <= texts.keys()
    everything = choose_calibration_texts(texts, 10**6, 0)
    assert {name: sorted(sequences) for name, sequences in everything.items()} == texts


def test_few_texts_of_one_kind_are_warned_of():
    [kind, few] = list_text_warnings(["notes"], 100, "bypass")
    assert "all texts of the bypass are of one kind (notes)" in kind
    assert "100 tokens are few for a bypass" in few
    assert list_text_warnings(["notes", "mails"], 20_000) == []


def test_the_model_writes_texts_of_as_many_tokens_as_needed_the_same_for_a_seed(
    benchmark, monkeypatch, tiny_llama, tiny_tokenizer
):
    script = benchmark("make_builtin_texts")
    monkeypatch.setattr(script, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(script, "TEXTS_AT_ONCE", 4)
    routed = RoutedModel(tiny_llama(max_position_embeddings=1024), tokenizer=tiny_tokenizer)
    texts = script.write_own_texts(routed, 60, seed=0)
    assert sum(len(routed.tokenizer(text)["input_ids"]) for text in texts) >= 60
    assert all(text[0].isalpha() for text in texts)
    assert script.write_own_texts(routed, 60, seed=0) == texts
    assert script.write_own_texts(routed, 60, seed=1) != texts
