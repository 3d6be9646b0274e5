"""Features on disk: what is stored, used again, refused, and kept whatever breaks a pass off."""

import errno
import json
import os
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
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import BrokenOffError, W, files_of, means_of, stop_at

from drllm.errors import ConfigError, DrllmError, RecordError
from drllm.records.places import only_writer
from drllm.training import feature_store as store_module
from drllm.training import features as features_module
from drllm.training.feature_store import FeatureStore

N = 7
NUMBERS = N * L * W * D
"""Numbers in all means."""
MANIFEST = "features.manifest.json"
BLOCKS = "features-*.safetensors"


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


def blocks_of(folder: Path) -> list[Path]:
    return sorted(folder.glob(BLOCKS))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_stored_in_a_dtype_and_any_reader_of_safetensors_opens_the_files(folder, dtype):
    stored = pool(folder, N, store=FeatureStore(folder, dtype))
    kind = getattr(torch, dtype)
    chosen = [5, 0, 5]
    whole = means_of(pooled(make_records(N), batch_size=3))
    assert torch.equal(stored.rows(chosen), whole[chosen].to(kind).float())
    targets = []
    for path in blocks_of(folder):
        with safe_open(path, framework="pt") as file:
            rows = file.get_tensor("targets")
            assert file.get_tensor("means").dtype == kind
            assert torch.equal(file.get_tensor("means").float(), stored.rows(rows.tolist()))
            assert torch.equal(file.get_tensor("filled"), stored.filled[rows])
        targets += rows.tolist()
    assert sorted(targets) == list(range(N))
    size = sum(path.stat().st_size for path in blocks_of(folder))
    assert 0 < size - NUMBERS * kind.itemsize < 300 * len(blocks_of(folder)) + 16 * N


def test_the_manifest_tells_what_the_features_are_of(folder):
    pool(folder, N)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["schema"] == "drllm.features"
    assert manifest["config"] == {"num_windows": W, "feature_dtype": "float32"}
    assert manifest["targets"]["number"] == N
    assert manifest["runtime"] == {"dtype": "float32", "device": "cpu"}
    assert len(manifest["model"]["fingerprint"]) == 25


def test_nothing_else_is_left_and_removing_leaves_what_others_put_there(folder):
    pool(folder, N)
    blocks = [path.name for path in blocks_of(folder)]
    assert len(blocks) == 3
    assert sorted(files_of(folder)) == [*blocks, MANIFEST]
    (folder / "notes.txt").write_text("mine")
    FeatureStore(folder).remove()
    assert list(files_of(folder)) == ["notes.txt"]
    (folder / "notes.txt").unlink()
    pool(folder, N)
    FeatureStore(folder).remove()
    assert not folder.exists()


def test_removing_also_deletes_the_file_of_an_older_version(folder):
    folder.mkdir()
    (folder / "features.safetensors").touch()
    (folder / MANIFEST).touch()
    FeatureStore(folder).remove()
    assert not folder.exists()


def test_whole_features_are_used_again_without_a_pass_and_without_writing(
    folder, passes, monkeypatch
):
    first = pool(folder, N)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    passes.clear()
    monkeypatch.setattr(store_module, "only_writer", lambda *_: 1 / 0)  # the folder is read only
    notes: list[str] = []
    again = pool(folder, N, on_note=notes.append)
    assert torch.equal(means_of(first), means_of(again))
    assert passes == []
    assert notes == [f"the routers' inputs in {folder} are used again"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's maps in a file")
def test_files_are_mapped_and_never_copied_so_that_features_may_be_larger_than_the_memory(folder):
    for features in (pool(folder, N), pool(folder, N)):  # after a pass, and when used again
        means_of(features)
        maps = Path("/proc/self/smaps").read_text()
        for path in blocks_of(folder):
            of_file = maps.split(f" {path}\n")[1:]
            assert of_file
            assert all(
                "Private_Dirty:         0 kB" in part.split("VmFlags")[0] for part in of_file
            )


RECORDS = make_records(N)
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "windows": ({"num_windows": 5}, "num_windows 4, now 5"),
    "model": ({"model": make_model(1)}, r"model fingerprint \"[\w-]{25}\", now \"[\w-]{25}\""),
    "dtype": ({"model": make_model().bfloat16()}, "dtype .float32., now .bfloat16."),
    "adapter": (
        {"model": inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make_model())},
        r"adapters none, now \"[0-9a-f]{16}\"",
    ),
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
    before = files_of(folder)
    options, message = OTHERS[what]
    options = dict(options)
    store = FeatureStore(folder, options.pop("dtype", "float32"))
    with pytest.raises(ConfigError, match=message) as caught:
        pool(folder, N, store=store, **options)
    assert "\n" not in str(caught.value)
    assert "choose another folder, or delete this one" in str(caught.value)
    assert files_of(folder) == before


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
    kills = kills_that_changed_nothing(killed / "once", 2, BLOCKS)
    assert kills >= 3 * 2  # a wait and a name for the manifest and each of two blocks
    assert not list(killed.rglob("*.lock"))
    assert not list(killed.rglob(".features*"))


@pytest.mark.thorough
def test_a_pass_killed_ten_times_ends_with_the_bytes_of_an_unbroken_one(killed):
    folders = (killed / "often" / "killed", killed / "often" / "unbroken")
    ours, unbroken = (files_of(folder, BLOCKS) for folder in folders)
    assert ours == unbroken


def test_what_was_pooled_before_an_error_is_kept_and_not_pooled_again(folder, passes):
    with pytest.raises(BrokenOffError):
        pool(folder, N, on_progress=stop_at(6).on_progress)
    passes.clear()
    seen: list[int] = []
    notes: list[str] = []
    pool(folder, N, on_progress=lambda done, total: seen.append(done), on_note=notes.append)
    assert passes == [1]
    assert seen == [6, 7]
    assert notes == [f"6 of 7 targets are in {folder} already"]


def test_a_pass_with_batches_of_another_size_pools_only_what_is_missing(folder, passes):
    with pytest.raises(BrokenOffError):
        pool(folder, N, on_progress=stop_at(3).on_progress)
    passes.clear()
    features = pool(folder, N, batch_size=5)
    assert passes == [2, 2]
    expected = means_of(pooled(make_records(N)))
    torch.testing.assert_close(means_of(features), expected, rtol=1e-5, atol=1e-6)


def test_a_broken_off_pass_of_something_else_is_refused_but_not_a_manifest_alone(folder):
    with pytest.raises(BrokenOffError):
        pool(folder, N, on_progress=stop_at(3).on_progress)
    with pytest.raises(ConfigError, match="num_windows 4, now 2"):
        pool(folder, N, num_windows=2)
    for path in blocks_of(folder):
        path.unlink()
    assert pool(folder, N, num_windows=2).shape == (N, L, 2, D)


def test_a_second_training_is_kept_out_while_the_first_pools(folder):
    with (
        only_writer(folder, "training", "folder for the features"),
        pytest.raises(RecordError, match=r"another training is writing to .*wait until it ends"),
    ):
        pool(folder, N)


@pytest.mark.parametrize("is_short", [True, False])
def test_the_need_is_announced_before_the_pass_where_space_is_short(folder, monkeypatch, is_short):
    free = (1 if is_short else 3) * NUMBERS * 4
    usage = store_module.shutil.disk_usage(folder.parent)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda place: usage._replace(free=free))
    notes: list[str] = []

    def on_progress(done: int, total: int) -> None:
        assert len(notes) == is_short

    pool(folder, N, on_note=notes.append, on_progress=on_progress)
    if is_short:
        assert notes[0].startswith(f"the routers' inputs need 0.1 MB in {folder}, where ")
        assert notes[0].endswith(" are free")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_that_does_not_fit_on_the_disk_is_not_begun(folder, monkeypatch, passes, dtype):
    need = NUMBERS * {"float32": 4, "bfloat16": 2}[dtype]
    usage = store_module.shutil.disk_usage(folder.parent)
    monkeypatch.setattr(
        store_module.shutil, "disk_usage", lambda place: usage._replace(free=need - 1)
    )
    with pytest.raises(RecordError, match=r"inputs need 0\.1 MB in .*free some space") as caught:
        pool(folder, N, store=FeatureStore(folder, dtype))
    assert ("give --feature-dtype bfloat16" in str(caught.value)) == (dtype == "float32")
    assert passes == []
    assert not folder.exists()
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda place: usage._replace(free=need))
    pool(folder, N, store=FeatureStore(folder, dtype))


def test_a_disk_that_fills_up_during_the_pass_is_said_and_loses_nothing(folder, passes):
    """The operating system itself refuses, as it lets no file of the process grow any more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill_up(done: int, total: int) -> None:
        if done == 3:  # half a target
            resource.setrlimit(resource.RLIMIT_FSIZE, (L * W * D * 2, before[1]))

    try:
        with pytest.raises(RecordError, match=r"can't write .*features-.*: File too") as caught:
            pool(folder, N, on_progress=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert "resumes after 3 of 7 targets" in str(caught.value)
    passes.clear()
    pool(folder, N)
    assert passes == [3, 1]
    pool(folder.with_name("unbroken"), N)
    assert files_of(folder, BLOCKS) == files_of(folder.with_name("unbroken"), BLOCKS)


def with_tensors(**changes: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., None]:
    """Replace tensors of the first block by what functions make of them; None drops one."""

    def spoil(folder: Path) -> None:
        path = blocks_of(folder)[0]
        tensors = load_file(path)
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        kept = {name: value.clone() for name, value in tensors.items() if value is not None}
        save_file(kept, path)

    return spoil


def replace_block(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace the first block by something else."""

    def spoil(folder: Path) -> None:
        path = blocks_of(folder)[0]
        content = path.read_bytes()
        path.unlink()
        make(path)
        if path.is_file():
            path.write_bytes(content[:-1])

    return spoil


BROKEN_BLOCK = r"features-\d{6}\.safetensors is broken; delete it to pool its targets again"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (replace_block(Path.touch), BROKEN_BLOCK),
    "a FIFO": (replace_block(os.mkfifo), "it is a FIFO"),
    "a folder": (replace_block(Path.mkdir), "it is a folder"),
    "a link to nothing": (
        replace_block(lambda path: path.symlink_to("nowhere")),
        "it is a link to a missing file",
    ),
    "another dtype": (with_tensors(means=torch.Tensor.half), BROKEN_BLOCK),
    "another shape": (with_tensors(means=lambda means: means[..., :-1]), BROKEN_BLOCK),
    "no means": (with_tensors(means=lambda means: None), BROKEN_BLOCK),
    "too many windows": (with_tensors(filled=lambda filled: filled + W), BROKEN_BLOCK),
    "not done": (with_tensors(filled=torch.zeros_like), BROKEN_BLOCK),
    "unknown targets": (with_tensors(targets=lambda targets: targets + N), BROKEN_BLOCK),
    "negative targets": (with_tensors(targets=lambda targets: targets - N), BROKEN_BLOCK),
    "targets of another block": (
        with_tensors(targets=lambda targets: (targets + 1) % N),
        BROKEN_BLOCK,
    ),
    "a target twice": (with_tensors(targets=lambda targets: targets[:1].repeat(3)), BROKEN_BLOCK),
    "targets as floats": (with_tensors(targets=torch.Tensor.float), BROKEN_BLOCK),
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        r"is broken \(features\.manifest\.json is missing\); delete .* to pool the features again",
    ),
    "no JSON": (
        lambda folder: (folder / MANIFEST).write_text("{"),
        "features.manifest.json: cut off in the middle",
    ),
    "one file of an older version": (
        lambda folder: (folder / "features.safetensors").touch(),
        r"features\.safetensors was written by an older version of drllm; delete .* again, or",
    ),
    "a FIFO as an older version": (
        lambda folder: os.mkfifo(folder / "features.safetensors"),
        "was written by an older version of drllm",
    ),
}
TYPED = ("model", "config", "runtime", "targets", "feature_version")
for field in TYPED:
    for value in (5.5, "text", [1]):
        BROKEN[f"{field} is {value!r}"] = (
            lambda folder, field=field, value=value: edit_manifest(folder, **{field: value}),
            rf"features\.manifest\.json: expected .*`{field}`",
        )


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
