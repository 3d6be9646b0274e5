"""The routers' inputs from two workers of Ray: the files and the routers of one process."""

import os
import random
import shutil
import signal

import pytest
import torch
from killable import N, W, files_of
from safetensors.torch import load_file, save_file
from small import Watching, means_of

import drllm
from drllm.config import ModelConfig, TrainConfig
from drllm.errors import ConfigError, ModelError
from drllm.model.load import load_without_weights
from drllm.models.workers import open_workers
from drllm.records.supervision import SupervisionRecord
from drllm.training import stage
from drllm.training.feature_store import FeatureStore
from drllm.training.features import collect_features
from drllm.work.listener import Listener

WORKERS = 2
RAY = TrainConfig(executor="ray", num_workers=WORKERS, num_epochs=2, num_windows=W)
LOCAL = TrainConfig(num_epochs=2, num_windows=W)
BLOCKS = "features-*.safetensors"


def make_targets() -> list[SupervisionRecord]:
    """Prompts of several lengths, along paths of four layers."""
    choice = random.Random(0)
    targets = []
    for number in range(N):
        decisions = tuple(choice.choice((0, 1, 1, 2)) for _ in range(3))
        prompt = f"question {number} " + " ".join(["word"] * (number % 7))
        targets.append(
            SupervisionRecord(
                question=prompt, optimal_layer_config=(1, *decisions), answer="yes", prompt=prompt
            )
        )
    return targets


@pytest.fixture(scope="module")
def model(model_folder):
    return ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def workers(model, own_ray):
    with open_workers(model, None, RAY, Listener()) as opened:
        yield opened


@pytest.fixture
def threads_of_a_worker(workers):
    """Has this process compute on as many threads as a worker: else last bits may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(workers.executor.plan.num_threads)
    yield
    torch.set_num_threads(before)


def pool_on(workers, folder, listener=None):
    return collect_features(
        workers,
        make_targets(),
        num_windows=W,
        store=FeatureStore(folder),
        batch_size=3,
        listener=listener,
    )


@pytest.fixture
def in_process(model, tmp_path, threads_of_a_worker):
    """The features of one process, in a folder."""
    with open_workers(model, None, LOCAL, Listener()) as one:
        return pool_on(one, tmp_path / "one")


@pytest.mark.thorough
def test_features_from_two_workers_are_bit_for_bit_those_of_one_process(
    workers, in_process, tmp_path
):
    """With the same number of threads; who runs a batch doesn't matter, the batches are alike."""
    seen = []
    features = pool_on(workers, tmp_path / "two", Watching(lambda done, _: seen.append(done)))
    assert torch.equal(means_of(features), means_of(in_process))
    assert torch.equal(features.filled, in_process.filled)
    assert features.digest == in_process.digest
    assert files_of(tmp_path / "two", BLOCKS) == files_of(tmp_path / "one", BLOCKS)
    assert seen == sorted(seen)
    assert seen[-1] == N


@pytest.mark.thorough
def test_a_killed_worker_loses_nothing(workers, in_process, tmp_path):
    pids = {
        seat: workers.executor.ray.get(seat.worker.__ray_call__.remote(lambda _: os.getpid()))
        for seat in workers.executor.seats
        if seat.is_ready
    }
    killed = []

    def kill_one(done: int, total: int) -> None:
        seats = [seat for seat in pids if seat.jobs]
        if not killed and seats:
            os.kill(pids[seats[0]], signal.SIGKILL)
            killed.append(seats[0])

    pool_on(workers, tmp_path / "killed", Watching(kill_one))
    assert killed
    assert files_of(tmp_path / "killed", BLOCKS) == files_of(tmp_path / "one", BLOCKS)


@pytest.mark.thorough
def test_a_pass_begun_on_ray_goes_on_in_this_process(workers, model, in_process, tmp_path):
    folder = tmp_path / "two"
    pool_on(workers, folder)
    [*first, last] = sorted(folder.glob(BLOCKS))
    last.unlink()
    with open_workers(model, None, LOCAL, Listener()) as one:
        pool_on(one, folder)
    assert first
    assert files_of(folder, BLOCKS) == files_of(tmp_path / "one", BLOCKS)


@pytest.mark.thorough
def test_targets_whose_states_overflow_are_refused_while_workers_pool(
    own_ray, tmp_path, model_folder, model
):

    broken = shutil.copytree(model_folder(), tmp_path / "broken")
    [weights] = broken.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(float("inf"))
    save_file(tensors, weights, metadata={"format": "pt"})
    config = ModelConfig(model=str(broken), device="cpu", dtype="float32")
    with (
        open_workers(config, None, TrainConfig(executor="ray", num_workers=1), Listener()) as one,
        pytest.raises(ModelError, match=r"NaN or infinity in torch\.float32"),
    ):
        pool_on(one, tmp_path / "features")


@pytest.mark.thorough
def test_routers_trained_with_ray_are_those_of_one_process(
    model, own_ray, tmp_path, threads_of_a_worker
):
    drllm.train(model, make_targets(), RAY, tmp_path / "two")
    drllm.train(model, make_targets(), LOCAL, tmp_path / "one")
    two = files_of(tmp_path / "two")
    assert two == files_of(tmp_path / "one")
    assert "routers.safetensors" in two


@pytest.mark.parametrize(
    ("pooled_on", "is_here", "device"),
    [("cuda", True, "cuda"), ("cuda", False, "cpu"), ("cpu", True, "cpu")],
)
def test_routers_are_trained_on_the_kind_of_device_that_pooled_if_it_is_here(
    pooled_on, is_here, device, model, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_here)
    runtime = {"dtype": "float32", "device": pooled_on, "attn_implementation": "sdpa"}
    base = load_without_weights(model, {}, runtime)
    assert stage._choose_device(base) == torch.device(device)


def test_a_model_object_is_refused_before_ray_starts(tiny_llama, tiny_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"takes a model's name or folder, not a Llama.*give the"):
        drllm.train(
            tiny_llama(num_layers=4), make_targets(), RAY, tmp_path / "r", tokenizer=tiny_tokenizer
        )
    assert not (tmp_path / "r").exists()
