import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from watching import Watching

import drllm
from drllm.config import TrainConfig
from drllm.errors import CheckpointError
from drllm.training.checkpoint import CHECKPOINT_FILE
from drllm.training.stage import train_on

SETTINGS = TrainConfig(
    num_epochs=6, gradient_accumulation=4, num_windows=4, router_width=5, warmup_steps=5
)


class InterruptedRunError(Exception):
    pass


def stop_after(steps: int):
    def on_progress(done: int, total: int) -> None:
        if done == steps:
            raise InterruptedRunError

    return Watching(on_progress)


def weights_of(folder: Path) -> bytes:
    return (folder / "routers.safetensors").read_bytes()


@pytest.fixture
def interrupted(features_of, identity, tmp_path):
    """A folder left behind in the middle of the fourth of six epochs of three steps."""
    folder = tmp_path / "interrupted"
    with pytest.raises(InterruptedRunError):
        train_on(features_of(), identity, SETTINGS, folder, listener=stop_after(10))
    return folder


def test_an_interrupted_run_leaves_no_routers(interrupted):
    names = sorted(path.name for path in interrupted.iterdir())
    assert names == [CHECKPOINT_FILE, "metrics.jsonl"]


@pytest.mark.parametrize("steps", [1, 3, 4, 10, 17, 18])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(features_of, identity, tmp_path, steps):
    features = features_of()
    unbroken = train_on(features, identity, SETTINGS, tmp_path / "unbroken")
    with pytest.raises(InterruptedRunError):
        train_on(features, identity, SETTINGS, tmp_path / "broken", listener=stop_after(steps))
    assert unbroken == train_on(features, identity, SETTINGS, tmp_path / "broken")
    for path in (tmp_path / "unbroken").iterdir():
        assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes()
    assert not (tmp_path / "broken" / CHECKPOINT_FILE).exists()


def test_a_resumed_run_repeats_no_finished_epoch(features_of, identity, interrupted):
    seen = []
    train_on(
        features_of(),
        identity,
        SETTINGS,
        interrupted,
        listener=Watching(lambda done, total: seen.append(done)),
    )
    assert seen == list(range(9, 19))


def test_a_run_cut_off_after_its_last_epoch_only_writes_what_is_missing(
    features_of, identity, tmp_path
):
    train_on(features_of(), identity, SETTINGS, tmp_path / "unbroken")
    folder = tmp_path / "broken"
    (folder / "README.md").mkdir(parents=True)  # in the way of the card
    with pytest.raises(CheckpointError, match=r"README\.md in it is a folder"):
        train_on(features_of(), identity, SETTINGS, folder)
    assert (folder / CHECKPOINT_FILE).exists()
    (folder / "README.md").rmdir()
    train_on(features_of(), identity, SETTINGS, folder)
    assert weights_of(tmp_path / "unbroken") == weights_of(folder)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.thorough)])
def test_a_training_killed_at_random_moments_ends_bit_for_bit_as_an_unbroken_one(tmp_path, kills):
    script = Path(__file__).with_name("killing.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(drllm.__file__).parents[1])}
    subprocess.run(
        [sys.executable, script, tmp_path, str(kills)], env=environment, check=True, timeout=300
    )
    unbroken = sorted((tmp_path / "unbroken").rglob("*.*"))
    assert len(unbroken) == 2 * 5
    killed = [folder for folder in tmp_path.iterdir() if folder.name != "unbroken"]
    assert len(killed) == kills
    for folder in killed:
        for path in unbroken:
            broken = folder / path.relative_to(tmp_path / "unbroken")
            assert path.read_bytes() == broken.read_bytes()
        assert not list(folder.rglob(CHECKPOINT_FILE))


# --- what isn't trusted ----------------------------------------------------------------------


def refused(message: str, *arguments) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        train_on(*arguments)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_other_settings_names_each_that_differs(features_of, identity, interrupted):
    other = replace(SETTINGS, learning_rate=0.01, num_epochs=7)
    message = r"belongs to another run, made with num_epochs 6, now 7; learning_rate 0\.001, now 0"
    refused(message, features_of(), identity, other, interrupted)


def test_a_checkpoint_of_other_targets_is_refused(features_of, identity, interrupted):
    features = features_of()
    labels = features.labels.clone()
    labels[0] = 2
    refused(
        "other targets",
        replace(features, labels=labels),
        identity,
        SETTINGS,
        interrupted,
    )


def test_a_checkpoint_of_other_features_is_refused(features_of, identity, interrupted):
    features = features_of()
    means = features.means.clone()
    means[3, 1] *= 1.01
    refused("other features", replace(features, means=means), identity, SETTINGS, interrupted)


def test_a_checkpoint_for_another_base_model_is_refused(features_of, identity, interrupted):
    other = {**identity, "fingerprint": "another"}
    refused("base_model", features_of(), other, SETTINGS, interrupted)


def test_a_refused_checkpoint_is_left_alone(features_of, identity, interrupted):
    before = {path.name: path.read_bytes() for path in interrupted.iterdir()}
    other = replace(SETTINGS, seed=5)
    refused("seed 0, now 5", features_of(), identity, other, interrupted)
    assert before == {path.name: path.read_bytes() for path in interrupted.iterdir()}


def test_last_bits_of_the_features_do_not_make_another_run(features_of, identity, interrupted):
    features = features_of()
    noisy = replace(features, means=features.means * (1 + 1e-6))
    train_on(noisy, identity, SETTINGS, interrupted)
    assert (interrupted / "router_config.json").exists()


@pytest.mark.parametrize(
    "kept", [0, 5, 200, -1], ids=["empty", "5 bytes", "200 bytes", "all but 1"]
)
def test_a_cut_off_checkpoint_is_refused(features_of, identity, interrupted, kept):
    path = interrupted / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:kept])
    refused(
        "is broken; delete it to train from the beginning",
        features_of(),
        identity,
        SETTINGS,
        interrupted,
    )


def test_a_foreign_safetensors_file_is_refused(features_of, identity, interrupted):
    save_file({"weights": torch.ones(2)}, interrupted / CHECKPOINT_FILE)
    refused("is broken", features_of(), identity, SETTINGS, interrupted)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(features_of, identity, interrupted):
    path = interrupted / CHECKPOINT_FILE
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["exp_avg.decision_bias"]
    save_file(tensors, path, metadata=header)
    refused("is broken", features_of(), identity, SETTINGS, interrupted)


def test_a_checkpoint_is_one_file_of_plain_tensors(interrupted):
    with safe_open(interrupted / CHECKPOINT_FILE, framework="pt") as file:
        names = set(file.keys())
    weights = ("hidden_weight", "hidden_bias", "decision_weight", "decision_bias")
    parts = ("weights", "exp_avg", "exp_avg_sq")
    assert names == {f"{part}.{weight}" for part in parts for weight in weights} | {"feature_sizes"}
