"""Two workers of Ray give the records of one process, also where workers die."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys

import pytest

from drllm.config import ModelConfig, SearchConfig
from drllm.errors import ConfigError, ModelError
from drllm.models.base.load import load
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import read_manifest, read_search
from drllm.search import jobs
from drllm.search import ray as ray_executor
from drllm.search.executors import LocalExecutor
from drllm.search.questions import blocks_of
from drllm.search.ray import RayExecutor
from drllm.search.run import FAILED_FILE, run_search

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
def test_a_question_that_kills_its_workers_is_set_aside_and_its_block_is_not(
    workers, facts, tmp_path, in_process, assert_same_run, monkeypatch
):
    """The question kills the process in which it is asked, where that is a worker."""
    bad = blocks_of([facts], settings(tmp_path))[3].examples[0]
    driver = os.getpid()
    monkeypatch.setattr(jobs, "MAX_LOSSES", 1)  # each is a process that imports torch

    class Deadly(type(facts)):
        def prompt(self, example, reward):
            if example.id == bad.id and os.getpid() != driver:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().prompt(example, reward)

    deadly = copy.copy(facts)
    deadly.__class__ = Deadly
    done = []
    output = run_search(
        workers, [deadly], settings(tmp_path), lambda status: done.append(status.done)
    )
    assert_same_run([record for record in in_process if record.id != bad.id], read_search(output))
    [line] = output.with_name(FAILED_FILE).read_text().splitlines()
    row = json.loads(line)
    assert (row["id"], row["attempts"]) == (bad.id, 1)
    assert row["error"] == "its worker process died"
    assert done == [2, 4, 6, 8, 10, 12, 14, 16]


@needs_ray
def test_workers_share_the_memory_of_a_machine_and_the_manifest_keeps_all_of_it(
    workers, facts, tmp_path, monkeypatch
):
    config = dataclasses.replace(settings(tmp_path), state_cache_gb=3.0, limit=2)
    sent = []
    put = workers.ray.put
    monkeypatch.setattr(workers.ray, "put", lambda value: sent.append(value) or put(value))
    output = run_search(workers, [facts], config)
    assert [x.state_cache_gb for x in sent if isinstance(x, SearchConfig)] == [3.0 / WORKERS]
    assert read_manifest(output, "search")["config"]["state_cache_gb"] == 3.0

    def num_parts(worker):
        import psutil
        import torch

        from drllm.models.scoring.batching import free_bytes

        return psutil.virtual_memory().available / free_bytes(torch.device("cpu"))

    seat = next(seat for seat in workers.seats if seat.pid)
    parts = workers.ray.get(seat.worker.__ray_call__.remote(num_parts))
    assert parts == pytest.approx(WORKERS, rel=0.2)


@needs_ray
@pytest.mark.thorough  # two more processes that import torch
def test_a_running_ray_is_joined_by_its_address_and_goes_on_afterwards(own_ray, model):
    program = (
        "import sys\n"
        "from drllm.config import ModelConfig\n"
        "from drllm.search.ray import RayExecutor\n"
        "model = ModelConfig(model=sys.argv[2], device='cpu', dtype='float32')\n"
        "with RayExecutor(model, num_workers=1, address=sys.argv[1]) as executor:\n"
        "    print(executor.identity['num_layers'])\n"
    )
    address = own_ray.get_runtime_context().gcs_address
    child = subprocess.run(
        [sys.executable, "-c", program, address, model.model],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stdout) == (0, "4\n"), child.stderr
    assert own_ray.get(own_ray.put("alive")) == "alive"


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
