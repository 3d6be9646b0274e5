"""Features on disk: what is stored, used again, refused, and kept whatever breaks a pass off."""

import errno
import json
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killable import (
    D,
    L,
    kills_that_changed_nothing,
    make_model,
    make_record,
    make_records,
    pool,
    pooled,
    run_script,
)
from safetensors import safe_open
from small import BrokenOffError, W, files_of, stop_at

from drllm.errors import ConfigError, DrllmError, RecordError
from drllm.records.places import only_writer
from drllm.training import feature_store as store_module
from drllm.training import features as features_module
from drllm.training.feature_store import FEATURES_FILE, Store
from drllm.training.features import shape

N = 7
ROWS = N * L * W * D
"""Numbers in `means`."""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


@pytest.fixture
def passes(monkeypatch):
    """How many prompts each forward pass had."""
    sizes: list[int] = []
    forward = features_module.run_prompts

    def counted(routed: Any, policy: Any, prompts: Any) -> None:
        sizes.append(len(prompts))
        forward(routed, policy, prompts)

    monkeypatch.setattr(features_module, "run_prompts", counted)
    return sizes


def bytes_of(folder: Path) -> bytes:
    return (folder / FEATURES_FILE).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_stored_in_a_dtype_and_any_reader_of_safetensors_opens_the_file(folder, dtype):
    stored = pool(folder, N, store=Store(folder, dtype))
    kind = getattr(torch, dtype)
    asked = [5, 0, 5]
    whole = pooled(make_records(N), batch_size=3)
    assert torch.equal(stored.rows(asked), whole.means[asked].to(kind).float())
    with safe_open(folder / FEATURES_FILE, framework="pt") as file:
        assert torch.equal(file.get_tensor("means"), stored.means)
        assert file.get_tensor("means").dtype == kind
        assert torch.equal(file.get_tensor("filled"), stored.filled)
    assert 0 < len(bytes_of(folder)) - ROWS * kind.itemsize < 300 + 8 * N


def test_the_manifest_tells_what_the_features_are_of(folder):
    pool(folder, N)
    manifest = json.loads((folder / "features.manifest.json").read_text())
    assert manifest["schema"] == "drllm.features"
    assert manifest["config"] == {"num_windows": W, "feature_dtype": "float32"}
    assert manifest["targets"]["number"] == N
    assert manifest["runtime"] == {"dtype": "float32", "device": "cpu"}
    assert len(manifest["model"]["fingerprint"]) == 25


def test_nothing_else_is_left_and_removing_leaves_what_others_put_there(folder):
    pool(folder, N)
    assert sorted(files_of(folder)) == ["features.manifest.json", FEATURES_FILE]
    (folder / "notes.txt").write_text("mine")
    Store(folder).remove()
    assert list(files_of(folder)) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    pool(folder, N)
    Store(folder).remove()
    assert not folder.exists()


def test_whole_features_are_used_again_without_a_pass_and_without_writing(
    folder, passes, monkeypatch
):
    first = pool(folder, N)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    passes.clear()
    monkeypatch.setattr(store_module, "only_writer", lambda *_: 1 / 0)  # the folder is read only
    said: list[str] = []
    again = pool(folder, N, on_note=said.append)
    assert torch.equal(first.rows(range(N)), again.rows(range(N)))
    assert passes == []
    assert said == [f"the routers' inputs in {folder} are used again"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's maps in a file")
def test_the_map_is_no_writable_one_so_that_features_may_be_larger_than_the_memory(folder):
    for used in (pool(folder, N), pool(folder, N)):  # mapped after a pass, and when used again
        maps = Path("/proc/self/maps").read_text().splitlines()
        ours = {line.split()[1] for line in maps if line.endswith(f"{folder / FEATURES_FILE}")}
        assert (ours, len(used.labels)) == ({"r--s"}, N)


RECORDS = make_records(N)
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "windows": ({"num_windows": 5}, "num_windows 4, now 5"),
    "model": ({"model": make_model(1)}, r"model fingerprint \"[\w-]{25}\", now \"[\w-]{25}\""),
    "dtype": ({"model": make_model().bfloat16()}, "dtype .float32., now .bfloat16."),
    "stored dtype": ({"dtype": "bfloat16"}, "feature_dtype .float32., now .bfloat16."),
    "number": ({"records": RECORDS[:-1]}, "targets number 7, now 6; other targets prompts"),
    "prompt": (
        {"records": [*RECORDS[:-1], make_record(N - 1, "other", (0, 2, 1))]},
        "other targets prompts",
    ),
    "path": (
        {"records": [make_record(0, RECORDS[0].prompt, (2, 1, 1)), *RECORDS[1:]]},
        "other targets decisions",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_features_of_something_else_are_refused_with_what_differs(folder, what):
    pool(folder, N)
    before = bytes_of(folder)
    given, message = OTHERS[what]
    given = dict(given)
    store = Store(folder, given.pop("dtype", "float32"))
    with pytest.raises(ConfigError, match=message) as caught:
        pool(folder, N, store=store, **given)
    assert "\n" not in str(caught.value)
    assert "choose another folder, or delete it" in str(caught.value)
    assert bytes_of(folder) == before


def test_features_of_another_version_are_refused(folder, monkeypatch):
    pool(folder, N)
    monkeypatch.setattr(store_module, "FEATURE_VERSION", 99)
    with pytest.raises(ConfigError, match="feature_version 1, now 99"):
        pool(folder, N)


def test_answers_and_names_do_not_matter(folder, passes):
    pool(folder, N)
    passes.clear()
    renamed = [
        make_record(100 + row, record.prompt, record.optimal_layer_config)
        for row, record in enumerate(make_records(N))
    ]
    pool(folder, N, records=renamed)
    assert passes == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    run_script("pool", folder, 10)
    return folder


@pytest.mark.thorough
def test_a_pass_killed_at_any_step_ends_with_the_bytes_of_an_unbroken_one(killed):
    kills = kills_that_changed_nothing(killed / "once", 1, FEATURES_FILE)
    assert kills > 4 + 3 * 3  # a write for each of four rows, and three steps a commit
    assert not list(killed.rglob("*.lock"))


@pytest.mark.thorough
def test_a_pass_killed_ten_times_ends_with_the_bytes_of_an_unbroken_one(killed):
    assert bytes_of(killed / "often" / "killed") == bytes_of(killed / "often" / "unbroken")


def test_what_was_pooled_before_an_error_is_kept_and_not_pooled_again(folder, passes):
    with pytest.raises(BrokenOffError):
        pool(folder, N, on_progress=stop_at(6).on_progress)
    passes.clear()
    seen: list[int] = []
    said: list[str] = []
    pool(folder, N, on_progress=lambda done, total: seen.append(done), on_note=said.append)
    assert passes == [1]
    assert seen == [6, 7]
    assert said[0].endswith("; 6 of 7 targets are there already")


def test_a_broken_off_pass_of_something_else_is_refused_but_not_a_manifest_alone(folder):
    with pytest.raises(BrokenOffError):
        pool(folder, N, on_progress=stop_at(3).on_progress)
    with pytest.raises(ConfigError, match="num_windows 4, now 2"):
        pool(folder, N, num_windows=2)
    (folder / FEATURES_FILE).unlink()
    assert shape(pool(folder, N, num_windows=2)) == (N, L, 2, D)


def test_a_second_training_is_kept_out_while_the_first_pools(folder):
    with (
        only_writer(folder, "training", "folder for the features"),
        pytest.raises(RecordError, match=r"another training is writing to .*wait until it ends"),
    ):
        pool(folder, N)


def test_the_need_is_announced_before_the_pass(folder):
    said: list[str] = []

    def on_progress(done: int, total: int) -> None:
        assert len(said) == 1

    pool(folder, N, on_note=said.append, on_progress=on_progress)
    assert said[0].startswith(f"the routers' inputs need 0.1 MB in {folder}, where ")
    assert said[0].endswith(" are free")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_that_does_not_fit_on_the_disk_is_not_begun(folder, monkeypatch, passes, dtype):
    need = ROWS * {"float32": 4, "bfloat16": 2}[dtype]
    usage = store_module.shutil.disk_usage(folder.parent)
    monkeypatch.setattr(
        store_module.shutil, "disk_usage", lambda place: usage._replace(free=need - 1)
    )
    with pytest.raises(RecordError, match=r"inputs need 0\.1 MB in .*free some space") as caught:
        pool(folder, N, store=Store(folder, dtype))
    assert ("give --feature-dtype bfloat16" in str(caught.value)) == (dtype == "float32")
    assert passes == []
    assert not folder.exists()
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda place: usage._replace(free=need))
    pool(folder, N, store=Store(folder, dtype))


def test_a_disk_that_fills_up_during_the_pass_is_said_and_loses_nothing(folder, passes):
    """The operating system itself refuses, as it lets no file of the process grow any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_up(done: int, total: int) -> None:
        if done == 3:  # behind `filled` and half a row
            start = len(bytes_of(folder)) - ROWS * 4
            resource.setrlimit(resource.RLIMIT_FSIZE, (start + L * W * D * 2, before[1]))

    try:
        with pytest.raises(RecordError, match=f"can't write .*{FEATURES_FILE}: File too") as caught:
            pool(folder, N, on_progress=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert "the 3 of 7 targets that are there" in str(caught.value)
    passes.clear()
    pool(folder, N)
    assert passes == [3, 1]
    pool(folder.with_name("unbroken"), N)
    assert bytes_of(folder) == bytes_of(folder.with_name("unbroken"))


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / FEATURES_FILE).write_bytes(change(bytes_of(folder)))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (rewritten(lambda old: old[:-1]), "is broken; delete .* to pool the features anew"),
    "another header": (rewritten(lambda old: old.replace(b'"F32"', b'"F16"')), "is broken; delete"),
    "too many windows": (  # in the last value of `filled`
        rewritten(
            lambda old: old[: -ROWS * 4 - 8] + (W + 1).to_bytes(8, "little") + old[-ROWS * 4 :]
        ),
        "is broken; delete",
    ),
    "no manifest": (
        lambda folder: (folder / "features.manifest.json").unlink(),
        r"is broken; .*features\.manifest\.json is missing",
    ),
    "no JSON": (
        lambda folder: (folder / "features.manifest.json").write_text("{"),
        "features.manifest.json: cut off in the middle",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_cannot_be_trusted_are_refused_and_kept(folder, what):
    spoil, message = BROKEN[what]
    pool(folder, N)
    spoil(folder)
    before = files_of(folder)
    with pytest.raises(DrllmError, match=message) as caught:
        pool(folder, N)
    assert "\n" not in str(caught.value)
    assert files_of(folder) == before
