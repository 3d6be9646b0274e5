import json
import resource
import signal
from dataclasses import replace

import pytest
import torch
from killable import kills_that_changed_nothing, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import IDENTITY, QUICK, BrokenOffError, Watching, files_of, make_features, stop_at

from drllm.errors import CheckpointError
from drllm.training import CHECKPOINT_FILE
from drllm.training.checkpoint import HEADER
from drllm.training.stage import train_seed

SETTINGS = replace(QUICK, num_epochs=6, warmup_steps=5)
FEATURES = make_features()


@pytest.fixture
def interrupted(tmp_path):
    """A folder left behind in the middle of the fourth of six epochs of three steps."""
    folder = tmp_path / "interrupted"
    with pytest.raises(BrokenOffError):
        train_seed(FEATURES, IDENTITY, SETTINGS, folder, listener=stop_at(10))
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return train_seed(FEATURES, IDENTITY, SETTINGS, folder), files_of(folder)


@pytest.mark.parametrize("steps", [1, 3, 4, 10, 17, 18])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(tmp_path, unbroken, steps):
    with pytest.raises(BrokenOffError):
        train_seed(FEATURES, IDENTITY, SETTINGS, tmp_path, listener=stop_at(steps))
    rows = train_seed(FEATURES, IDENTITY, SETTINGS, tmp_path)
    assert (rows, files_of(tmp_path)) == unbroken


def test_a_resumed_run_repeats_no_finished_epoch(interrupted):
    seen = []
    watching = Watching(lambda done, total: seen.append(done))
    train_seed(FEATURES, IDENTITY, SETTINGS, interrupted, listener=watching)
    assert seen == list(range(9, 19))


def test_a_run_cut_off_after_its_last_epoch_only_writes_what_is_missing(tmp_path, unbroken):
    (tmp_path / "README.md").mkdir()  # in the way of the card
    with pytest.raises(CheckpointError, match=r"README\.md in it is a folder"):
        train_seed(FEATURES, IDENTITY, SETTINGS, tmp_path)
    assert (tmp_path / CHECKPOINT_FILE).exists()
    (tmp_path / "README.md").rmdir()
    rows = train_seed(FEATURES, IDENTITY, SETTINGS, tmp_path)
    assert (rows, files_of(tmp_path)) == unbroken


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.thorough)])
def test_a_training_killed_at_random_moments_ends_bit_for_bit_as_an_unbroken_one(tmp_path, kills):
    run_script("train_features", tmp_path, kills)
    assert kills_that_changed_nothing(tmp_path, 2 * 6) == kills


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_whole(interrupted):
    """The operating system itself refuses, as it lets no file of the process grow any more."""
    content = (interrupted / CHECKPOINT_FILE).read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, before[1]))
    try:
        with pytest.raises(CheckpointError, match=f"can't write .*{CHECKPOINT_FILE}: .*too large"):
            train_seed(FEATURES, IDENTITY, SETTINGS, interrupted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert (interrupted / CHECKPOINT_FILE).read_bytes() == content
    assert not list(interrupted.glob(f".{CHECKPOINT_FILE}*"))


def relabelled():
    """The features with another label."""
    labels = FEATURES.labels.clone()
    labels[0] = 2
    return replace(FEATURES, labels=labels)


OTHERS = {
    "settings": (
        (FEATURES, IDENTITY, replace(SETTINGS, learning_rate=0.01, num_epochs=7)),
        r"belongs to another run, made with num_epochs 6, now 7; learning_rate 0\.001, now 0",
    ),
    "targets": ((relabelled(), IDENTITY, SETTINGS), "other targets or base dtype"),
    "prompts": (
        (replace(FEATURES, made_from=("another", "float32")), IDENTITY, SETTINGS),
        "other targets",
    ),
    "dtype": (
        (replace(FEATURES, made_from=("", "bfloat16")), IDENTITY, SETTINGS),
        "base dtype",
    ),
    "base model": ((FEATURES, {**IDENTITY, "fingerprint": "another"}, SETTINGS), "base_model"),
    "bypass": (
        (FEATURES, {**IDENTITY, "bypass": "another"}, SETTINGS),
        'bypass none, now "another"',
    ),
    "seed": ((FEATURES, IDENTITY, replace(SETTINGS, seed=5)), "seed 0, now 5"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs_and_left_alone(interrupted, what):
    arguments, message = OTHERS[what]
    before = files_of(interrupted)
    with pytest.raises(CheckpointError, match=message) as caught:
        train_seed(*arguments, interrupted)
    assert "\n" not in str(caught.value)
    assert files_of(interrupted) == before


def test_last_bits_of_the_features_do_not_make_another_run(interrupted):
    noisy = replace(FEATURES, means=FEATURES.means * (1 + 1e-6))
    train_seed(noisy, IDENTITY, SETTINGS, interrupted)
    assert (interrupted / "router_config.json").exists()


def cut_off(size: int):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def foreign(path) -> None:
    save_file({"weights": torch.ones(2)}, path)


def lacking_a_tensor(path) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    del tensors["exp_avg.decision_bias"]
    save_file(tensors, path, metadata=header)


def of_another_header(path) -> None:
    save_file(load_file(path), path, metadata={HEADER: "{}"})


def with_change(change):
    """Return a function that changes the tensors and the header of a checkpoint in place."""

    def spoil(path) -> None:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
        tensors = load_file(path)
        change(tensors, header)
        save_file(tensors, path, metadata={HEADER: json.dumps(header)})

    return spoil


def make_bias_nan(tensors, header) -> None:
    tensors["weights.decision_bias"][0, 0] = float("nan")


def make_bias_half(tensors, header) -> None:
    tensors["weights.decision_bias"] = tensors["weights.decision_bias"].half()


def count_more_epochs(tensors, header) -> None:
    header["epochs_done"] = SETTINGS.num_epochs + 1


def count_fewer_epochs(tensors, header) -> None:
    header["epochs_done"] -= 1


def count_negative_epochs(tensors, header) -> None:
    header["epochs_done"] = -1


@pytest.mark.parametrize(
    "spoil",
    [
        with_change(make_bias_nan),
        with_change(make_bias_half),
        with_change(count_more_epochs),
        with_change(count_fewer_epochs),
        with_change(count_negative_epochs),
        cut_off(0),
        cut_off(5),
        cut_off(200),
        cut_off(-1),
        foreign,
        lacking_a_tensor,
        of_another_header,
    ],
)
def test_a_broken_checkpoint_is_refused(interrupted, spoil):
    spoil(interrupted / CHECKPOINT_FILE)
    with pytest.raises(CheckpointError, match="is broken; delete it to train from the beginning"):
        train_seed(FEATURES, IDENTITY, SETTINGS, interrupted)


def test_an_interrupted_run_leaves_no_routers_but_one_file_of_plain_tensors(interrupted):
    assert sorted(files_of(interrupted)) == [CHECKPOINT_FILE, "metrics.jsonl"]
    weights = ("hidden_weight", "hidden_bias", "decision_weight", "decision_bias")
    parts = ("weights", "exp_avg", "exp_avg_sq")
    names = {f"{part}.{weight}" for part in parts for weight in weights}
    assert set(load_file(interrupted / CHECKPOINT_FILE)) == names
