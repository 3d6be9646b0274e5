"""Two workers of Ray give the records of one process, also where workers die."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import subprocess
import sys

import pytest

from drllm.config import ModelConfig, SearchConfig
from drllm.errors import ConfigError, ModelError
from drllm.models.base.loading import load
from drllm.models.routed import RoutedModel
from drllm.records import read_search
from drllm.search import ray_executor
from drllm.search.executors import LocalExecutor
from drllm.search.questions import blocks_of
from drllm.search.ray_executor import MAX_LOSSES, RayExecutor
from drllm.search.runner import run_search

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray isn't installed (pip install 'drllm[ray]')"
)
WORKERS = 2


@pytest.fixture(scope="module")
def model(model_folder):
    return ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def own_ray():
    """A Ray of this process with cores to spare, so that a test can start a third worker."""
    ray = pytest.importorskip("ray")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2 * (os.cpu_count() or 1), include_dashboard=False, **quiet)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def workers(model, own_ray):
    with RayExecutor(model, num_workers=WORKERS) as executor:
        yield executor
    assert own_ray.is_initialized(), "a Ray that isn't the executor's goes on"


def settings(folder):
    return SearchConfig(num_simulations=6, limit=16, block_size=2, output_dir=str(folder))


@pytest.fixture(scope="module")
def in_process(model, facts, tmp_path_factory):
    """The records of one process."""
    base = load(model)
    routed = RoutedModel(base.model, tokenizer=base.tokenizer)
    local = LocalExecutor(routed, base.identity, base.runtime)
    return read_search(run_search(local, [facts], settings(tmp_path_factory.mktemp("one"))))


@needs_ray
def test_two_workers_give_the_records_of_one_process(
    workers, facts, tmp_path, in_process, assert_same_run
):
    calls = []
    output = run_search(workers, [facts], settings(tmp_path), calls.append)
    assert_same_run(in_process, read_search(output))
    done = [status.done for status in calls]
    assert done == [2, 4, 6, 8, 10, 12, 14, 16], "blocks are handed over one by one"


@needs_ray
def test_a_killed_worker_is_replaced_and_its_blocks_are_searched_again(
    workers, facts, tmp_path, in_process, assert_same_run
):
    killed = []

    def kill_one(status):
        if not killed:
            seat = next(seat for seat in workers.seats if seat.pid and seat.jobs)
            os.kill(seat.pid, signal.SIGKILL)
            killed.append(seat.pid)

    output = run_search(workers, [facts], settings(tmp_path), kill_one)
    assert_same_run(in_process, read_search(output))
    assert killed
    assert killed[0] not in {seat.pid for seat in workers.seats}


@needs_ray
def test_no_more_blocks_are_out_than_the_workers_can_hold(workers, facts, tmp_path):
    blocks = blocks_of([facts], settings(tmp_path))
    taken = []

    def counted():
        for block in blocks:
            taken.append(block)
            yield block

    most = 0
    for done, _ in enumerate(workers.search(counted(), settings(tmp_path))):
        most = max(most, len(taken) - done)
    assert len(taken) == len(blocks)
    assert 1 < most <= WORKERS * ray_executor.BLOCKS_A_WORKER


@needs_ray
def test_a_block_that_kills_its_workers_is_given_up_and_the_others_are_not(
    workers, facts, tmp_path, monkeypatch
):
    """A worker that is killed the moment it is seen with the last block, whichever it is."""
    config = settings(tmp_path)
    *good, bad = blocks_of([facts], config)[:4]
    news = workers._news

    def kill_those_with_the_bad_block():
        for seat in workers.seats:
            if seat.pid and seat.jobs and seat.jobs[0][1] is bad:
                workers.ray.kill(seat.worker)
        return news()

    monkeypatch.setattr(workers, "_news", kill_those_with_the_bad_block)
    results = {block.number: result for block, result in workers.search([*good, bad], config)}
    assert sorted(results) == sorted(block.number for block in [*good, bad])
    assert results[bad.number].tally.failed == len(bad.examples)
    assert f'"attempts":{MAX_LOSSES}' in results[bad.number].lines
    assert "its worker process died" in results[bad.number].lines
    assert all(results[block.number].tally.failed == 0 for block in good)


@needs_ray
def test_threads_are_shared_out_among_the_workers(workers):
    assert workers.num_threads == max(1, (os.cpu_count() or 1) // WORKERS)


@needs_ray
@pytest.mark.thorough  # a third process that imports torch
def test_a_model_that_workers_cannot_load_is_said_as_ever(workers, model):
    other = dataclasses.replace(model, model="no/such/folder")
    with pytest.raises(ModelError, match="no folder 'no/such/folder'"):
        RayExecutor(other, num_workers=1)


@needs_ray
@pytest.mark.parametrize(
    ("device", "num_workers", "says"),
    [
        ("cpu", 10_000, "10000 workers need a CPU core each, and Ray has"),
        ("cuda", 1, "--device is 'cuda', but Ray has no GPU; give --device cpu"),
        ("cuda:1", 1, "gives each worker a device of its own"),
    ],
)
def test_devices_that_are_not_there_are_refused(workers, model, device, num_workers, says):
    config = dataclasses.replace(model, device=device)
    if device == "cuda" and workers.ray.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=says):
        RayExecutor(config, num_workers=num_workers)


def test_without_ray_one_line_says_how_to_get_it(tmp_path):
    """In a process of its own, in which importing ray fails."""
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from drllm.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["search", "--executor", "ray", "--limit", "1", "--output-dir", str(tmp_path / "out")]
    child = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert child.returncode == 2
    [line] = child.stderr.splitlines()
    assert "needs the package ray, which isn't installed; install it with pip" in line
    assert not (tmp_path / "out").exists()
