"""Texts of a data set of the hub, which stands in for one here that lies in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from drllm.config import HealConfig
from drllm.errors import ConfigError, DrllmError, TaskError
from drllm.tuning.heal_texts import read_sources

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data sets that lie in the current folder are found by their ids."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str, split: str, rows: list[dict[str, Any]]) -> None:
    file = Path(name) / f"{split}.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_data_set_gives_its_first_texts_that_are_not_blank_beside_those_of_files():
    texts = ["", "one", " ", "two", "three"]
    written("owner/first", "train", [{"text": text} for text in texts])
    Path("notes.txt").write_text("four\n\nfive")
    notes, found = read_sources(HealConfig(text="notes.txt, owner/first", limit=2))
    assert (notes.name, set(notes.texts)) == ("notes", {"four", "five"})
    assert (found.name, set(found.texts)) == ("first", {"one", "two"})


def test_texts_may_be_in_a_table_or_a_json_list():
    Path("table.csv").write_text('id,text\n1,one\n2,"two, or three"\n')
    Path("list.json").write_text('[{"text": "four"}, {"text": "five"}]')
    table, items = read_sources(HealConfig(text="table.csv,list.json"))
    assert (table.name, set(table.texts)) == ("table", {"one", "two, or three"})
    assert (items.name, set(items.texts)) == ("list", {"four", "five"})


def test_a_configuration_is_asked_for_by_name_and_no_more_than_a_limit_is_read(monkeypatch):
    asked, read = [], []

    def load_dataset(*place, **options):
        asked.append((*place, options))
        return (read.append(n) or {"text": f"text {n}"} for n in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = HealConfig(text="owner/many:small-v1")
    [source] = read_sources(config)
    assert source.name == "many:small-v1"
    assert len(source.texts) == len(read) == 10_000
    assert read_sources(config, texts=[source]) == [source]
    assert asked == [("owner/many", "small-v1", {"split": "train", "streaming": True})]


def test_a_data_set_without_the_column_text_is_refused_with_the_columns_that_there_are():
    written("owner/other", "train", [{"id": 1, "body": "one"}])
    with pytest.raises(TaskError, match=r"--text owner/other has no texts.*'id', 'body'.*; give"):
        read_sources(HealConfig(text="owner/other"))


def test_a_data_set_without_the_split_train_is_refused_with_those_that_there_are():
    written("owner/test_only", "test", [{"text": "one"}])
    with pytest.raises(TaskError, match=r"can't fetch train of owner/test_only .*test.*; ") as told:
        read_sources(HealConfig(text="owner/test_only"))
    assert "\n" not in str(told.value)


def test_a_data_set_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    def load_dataset(*place, **options):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"Couldn't reach the Hub \(offline\)") as told:
        read_sources(HealConfig(text="owner/away"))
    assert "OWNER/NAME" in str(told.value)


@pytest.mark.parametrize("word", ["owner/name.txt", "folder/rows.jsonl"])
def test_what_is_called_like_a_file_is_a_file(word):
    with pytest.raises(DrllmError, match="doesn't exist"):
        read_sources(HealConfig(text=word))


def test_a_word_that_is_neither_is_refused_with_both_ways_to_write_it():
    with pytest.raises(ConfigError, match=r"\.txt.*OWNER/NAME"):
        read_sources(HealConfig(text="wikitext"))
