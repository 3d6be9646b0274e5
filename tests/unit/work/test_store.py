"""Resuming: the same run goes on, another is refused, and no kill or foreign file does harm."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drllm.errors import ConfigError, RecordError
from drllm.work.store import MARKER_FILE, ResultStore, differences

IDENTITY = {
    "settings": {"budget": 2, "tasks": ("arc", "dart"), "limit": None},
    "model": {"class": "Llama"},
    "prompts_sha256": "aa",
}


def make_store(folder: Path, **changes: Any) -> ResultStore:
    return ResultStore(folder / "kept", {**IDENTITY, **changes}, stage="search")


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "kept").iterdir()}


def test_a_result_is_made_once_and_comes_back_at_the_next_start(tmp_path):
    made = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"x": (1, 2.5, None)}

    for is_begun in (False, True):
        kept = make_store(tmp_path)
        assert kept.open() is is_begun
        assert kept.get_or_make("block 1 of ARC", dict[str, Any], make) == {"x": [1, 2.5, None]}
        assert kept.has("block 1 of ARC")
        assert not kept.has("block 1 of arc")
    assert len(made) == 1
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_new_result_is_what_a_later_run_reads_unless_it_need_not_be_read_back(tmp_path):
    store = make_store(tmp_path)
    result = (1, 2)
    assert store.of(list[int]).put("a", result) == [1, 2]
    assert store.of(tuple[int, int], reads_back=False).put("b", result) is result
    assert store.of(tuple[int, int]).get("b") == result


def test_a_start_without_a_result_leaves_nothing(tmp_path):
    kept = make_store(tmp_path)
    kept.open()
    kept.expect("arc", {"questions_sha256": "bb"})
    assert kept.get("a", int) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"budget": 3, "tasks": ["arc", "dart"], "limit": None}}, "budget 2, now 3"),
        ({"settings": {"budget": 2, "limit": 5}}, 'limit none, now 5; tasks .*"dart".*, now none'),
        ({"model": {"class": "Gemma"}}, 'model class "Llama", now "Gemma"'),
        ({"prompts_sha256": "bb"}, "with other prompts;"),
        ({"seed": 1}, "no seed, now 1"),
        ({"texts_sha256": "bb"}, "with other texts;"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, changes, said):
    kept = make_store(tmp_path)
    kept.put("a", 1)
    other = make_store(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"kept.*{said}.*--output-dir"):
        other.open()
    other.remove()  # which leaves what isn't its own
    assert kept.open()
    assert kept.get("a", int) == 1


def test_another_version_is_refused(tmp_path):
    make_store(tmp_path).put("a", 1)
    marker = tmp_path / "kept" / MARKER_FILE
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"drllm_version": "0.0.1"}))
    with pytest.raises(ConfigError, match=r"0\.0\.1"):
        make_store(tmp_path).open()


def test_what_becomes_known_during_a_run_is_compared_too(tmp_path):
    kept = make_store(tmp_path)
    kept.open()
    kept.expect("arc", {"questions_sha256": "bb"})
    kept.put("a", 1)
    kept.expect("dart", {"questions_sha256": "cc"})
    kept.put("b", 2)
    again = make_store(tmp_path)
    again.open()
    again.expect("arc", {"questions_sha256": "bb"})
    with pytest.raises(ConfigError, match="other dart questions"):
        again.expect("dart", {"questions_sha256": "dd"})


@given(st.recursive(st.none() | st.integers() | st.text(), lambda v: st.dictionaries(st.text(), v)))
@settings(max_examples=30)
def test_an_identity_differs_from_itself_in_nothing(value):
    identity = {"a": value}
    assert differences(identity, json.loads(json.dumps(identity))) == []
    assert differences(identity, {"a": [value]}) != []


def test_a_result_whose_settings_are_not_named_is_refused_in_words():
    current = {"settings": {"limit": 6}, "model": "m"}
    assert differences({"model": "m"}, current) == ["settings that it doesn't name"]


def test_results_of_steps_go_when_their_block_is_done(tmp_path):
    kept = pickle.loads(pickle.dumps(make_store(tmp_path)))
    parts = kept.within("block 1")
    for number in range(3):
        parts.put(f"round {number}", number)
    kept.within("block 2").put("round 0", 7)
    assert parts.get("round 2", int) == 2
    kept.put("block 1", [0, 1, 2])
    assert parts.get("round 2", int) is None
    assert kept.within("block 2").get("round 0", int) == 7
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("content", ["{", '"a"', "", "[1, 2", "NaN"])
def test_a_result_that_cannot_be_read_is_done_again(tmp_path, content, caplog):
    kept = make_store(tmp_path)
    kept.put("a", 1)
    [file] = (tmp_path / "kept").glob("a-*.json")
    file.write_text(content)
    assert kept.get_or_make("a", int, lambda: 2) == 2
    assert file.name in caplog.text
    kept.remove()
    assert list(tmp_path.iterdir()) == []


def test_results_without_a_marker_are_not_read_by_another_run(tmp_path):
    ended = make_store(tmp_path)
    ended.put("a", 1)
    steps = ended.within("block 1")
    ended.remove()
    steps.put("round 0", 7)  # by a worker that outlives its run
    other = make_store(tmp_path, seed=1)
    assert not other.open()
    assert other.within("block 1").get("round 0", int) is None
    other.remove()
    assert list(tmp_path.iterdir()) == []


# Hostile folders.


def test_a_folder_that_is_a_link_is_refused_and_left_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    make_store(elsewhere).put("a", 1)
    (elsewhere / "kept" / "mine.txt").write_text("x")
    before = names(elsewhere)
    (tmp_path / "kept").symlink_to(elsewhere / "kept")
    kept = make_store(tmp_path)
    with pytest.raises(RecordError, match="kept is a link"):
        kept.open()
    kept.remove()
    assert names(elsewhere) == before


def test_foreign_files_are_refused_without_a_marker_and_kept_with_one(tmp_path):
    (tmp_path / "kept").mkdir()
    mine = tmp_path / "kept" / "mine.json"
    mine.write_text("{}")
    with pytest.raises(RecordError, match=r"mine\.json"):
        make_store(tmp_path).open()
    mine.unlink()
    kept = make_store(tmp_path)
    kept.put("a", 1)
    mine.write_text("{}")
    (tmp_path / "kept" / ("a" * 12 + ".json")).mkdir()  # a folder by the name of a result
    kept.open()
    kept.remove()
    assert names(tmp_path) == {mine.name, "a" * 12 + ".json"}


def test_links_in_the_folder_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("5")
    kept = make_store(tmp_path)
    kept.put("a", 1)
    [file] = (tmp_path / "kept").glob("a-*.json")
    file.unlink()
    file.symlink_to(outside)
    assert kept.get_or_make("a", int, lambda: 2) == 2
    kept.remove()
    assert outside.read_text() == "5"
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", ["drllm_version", "identity", "later"])
def test_a_marker_that_lacks_a_field_is_refused(tmp_path, name):
    make_store(tmp_path).put("a", 1)
    marker = tmp_path / "kept" / MARKER_FILE
    values = json.loads(marker.read_text())
    del values[name]
    marker.write_text(json.dumps(values))
    with pytest.raises(RecordError, match=rf"{MARKER_FILE}: the field `{name}` is missing; delete"):
        make_store(tmp_path).open()


def test_a_broken_marker_and_a_file_in_place_of_the_folder_are_refused(tmp_path):
    kept = make_store(tmp_path)
    kept.put("a", 1)
    (tmp_path / "kept" / MARKER_FILE).write_text("{")
    with pytest.raises(RecordError, match=MARKER_FILE):
        kept.open()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("x")
    with pytest.raises(RecordError, match="kept"):
        make_store(tmp_path / "other").open()


# Kills: a run in a process of its own that ends at its n-th operation on files.

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def run(folder: Path) -> None:
    """Keep two results, one of them in steps, and a file; write the results; clear up."""
    kept = make_store(folder)
    if (folder / "results.json").exists():
        kept.remove()
        return
    kept.open()
    parts = kept.within("b")
    total = kept.get_or_make("a", int, lambda: 1)
    total += kept.get_or_make(
        "b", int, lambda: sum(parts.get_or_make(str(n), int, lambda n=n: n) for n in (2, 3))
    )
    (folder / "results.json").write_text(str(total))
    kept.remove()


def killed_at(operation: int, work: Callable[[], None]) -> bool:
    """Tell whether a process that does the work came to that operation, and was killed there."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _: Any) -> None:
            nonlocal seen
            if event in FILE_OPERATIONS:
                seen += 1
                if seen == operation:
                    os._exit(9)

        status = 1
        try:
            sys.addaudithook(count)
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def test_no_kill_at_any_operation_changes_the_result_or_leaves_anything(tmp_path):
    for operation in range(1, 1000):
        folder = tmp_path / str(operation)
        folder.mkdir()
        was_killed = killed_at(operation, lambda folder=folder: run(folder))
        killed_at(operation // 2 + 1, lambda folder=folder: run(folder))  # and a second time
        run(folder)
        run(folder)
        assert (folder / "results.json").read_text() == "6"
        assert [path.name for path in folder.iterdir()] == ["results.json"]
        if not was_killed:
            break
    assert operation > 20
