"""A whole training of several seeds: what is left, what goes on, what is refused."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from killable import (
    CONFIG,
    CONTEXT,
    N,
    kills_that_changed_nothing,
    make_record,
    make_records,
    run_script,
    train,
)
from small import BrokenOffError, files_of

from drllm.errors import CheckpointError
from drllm.training import CHECKPOINT_FILE, is_finished, stage
from drllm.training.stage import discard, fit_seed

ONE = replace(CONFIG, num_seeds=1)
FILES = ["README.md", "config.json", "layers.json", "metrics.jsonl"]
FILES += ["router_config.json", "routers.safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds."""
    folder = tmp_path_factory.mktemp("seeds") / "run"
    train(folder)
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "routers.safetensors").read_bytes()


def test_only_routers_are_left_and_those_of_each_seed_are_others(finished):
    assert {path.name for path in finished.iterdir()} == {*FILES, "seed_1"}
    assert {path.name for path in (finished / "seed_1").iterdir()} == {*FILES}
    assert weights(finished) != weights(finished / "seed_1")


@pytest.mark.parametrize("kills", [pytest.param(6, marks=pytest.mark.thorough)])
def test_seeds_killed_at_random_moments_end_bit_for_bit_as_unbroken_ones(tmp_path, kills):
    run_script("train_seeds", tmp_path, kills)
    assert kills_that_changed_nothing(tmp_path, 2 * len(FILES)) == kills


def test_a_finished_seed_is_not_trained_again(finished, tmp_path, monkeypatch):
    trained, broken_off = [], [1]

    def fit(features, identity, config, output, **options):
        if config.seed in broken_off:
            raise BrokenOffError
        trained.append(output)
        return fit_seed(features, identity, config, output, **options)

    monkeypatch.setattr(stage, "fit_seed", fit)
    with pytest.raises(BrokenOffError):
        train(tmp_path)
    broken_off.clear()
    train(tmp_path)
    assert trained == [tmp_path, tmp_path / "seed_1"]
    assert files_of(tmp_path) == files_of(finished)


def test_broken_off_in_the_last_clean_up_routers_are_unfinished_or_nothing_is_left(
    tmp_path, monkeypatch
):
    """At each file and folder that is deleted; else no later call would delete the rest."""
    unlink, rmdir = Path.unlink, Path.rmdir
    for moment in itertools.count():
        folder, counter = tmp_path / str(moment), itertools.count()

        def breaks_off(counter=counter, moment=moment) -> None:
            if next(counter) == moment:
                raise BrokenOffError

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", lambda *p, at=breaks_off, **o: (at(), unlink(*p, **o)))
            patched.setattr(Path, "rmdir", lambda *p, at=breaks_off: (at(), rmdir(*p)))
            try:
                train(folder, replace(ONE, num_epochs=1))
            except BrokenOffError:
                assert not (is_finished(folder) and list(folder.rglob("features")))
            else:
                break
    assert moment > 4


def test_a_folder_with_routers_of_other_settings_is_refused_before_anything_is_trained(tmp_path):
    records = [*make_records(N), make_record(N, "x" * 2 * CONTEXT, (1, 1, 1))]
    train(tmp_path, ONE, records=records)
    before = files_of(tmp_path)
    assert "rejected.jsonl" in before
    with pytest.raises(CheckpointError, match="holds trained routers of another run"):
        train(tmp_path, replace(ONE, learning_rate=0.01))
    assert files_of(tmp_path) == before


def test_a_folder_with_routers_of_other_targets_is_left_as_it_is(tmp_path):
    records = [*make_records(N), make_record(N, "x" * 2 * CONTEXT, (1, 1, 1))]
    train(tmp_path, ONE, records=records)
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="made with other targets or base dtype"):
        train(tmp_path, ONE, records=make_records(N - 1))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_folder_with_a_file_of_the_users_own_is_refused_before_anything_is_trained(
    tmp_path, name
):
    (tmp_path / "seed_1").mkdir()
    (tmp_path / "seed_1" / name).write_text("mine")
    with pytest.raises(CheckpointError, match="would be replaced"):
        train(tmp_path)
    assert files_of(tmp_path) == {f"seed_1/{name}": b"mine"}


def test_a_checkpoint_of_other_settings_is_refused_and_left_as_it_is(tmp_path):
    def break_off(*_) -> None:
        if (tmp_path / CHECKPOINT_FILE).exists():
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        train(tmp_path, ONE, at=break_off)
    before = files_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate 0.05, now 0.01"):
        train(tmp_path, replace(ONE, learning_rate=0.01))
    assert files_of(tmp_path) == before


def test_what_a_training_has_left_can_be_discarded(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    discard(tmp_path / "run", CONFIG)
    kept = [name for name in FILES if name != "routers.safetensors"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [*kept, "seed_1"]
