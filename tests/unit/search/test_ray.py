"""Two workers of Ray give the records of one process, also where workers die."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import drllm
from drllm.config import ModelConfig, SearchConfig
from drllm.errors import ConfigError, ModelError
from drllm.records.manifest import read_manifest
from drllm.search import FAILED_FILE
from drllm.search import ray as ray_executor
from drllm.search.questions import collect_questions, split_into_batches
from drllm.search.ray import RayExecutor, connect
from drllm.search.run import run_search
from drllm.tasks.examples import Prompt

WORKERS = 2


@pytest.fixture(scope="module")
def model(model_folder):
    return ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def own_ray(leaving_things_open):
    """A Ray of this process with cores to spare, so that a test can start a third worker."""
    ray = pytest.importorskip("ray")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with leaving_things_open():
        ray.init(
            address="local", num_cpus=2 * (os.cpu_count() or 1), include_dashboard=False, **quiet
        )
    yield ray
    with leaving_things_open():
        ray.shutdown()


@pytest.fixture(scope="module")
def workers(model, own_ray):
    with RayExecutor(model, num_workers=WORKERS) as executor:
        yield executor
    assert own_ray.is_initialized(), "a Ray that isn't the executor's goes on"


CONFIG = SearchConfig(num_simulations=6, limit=16, block_size=2)


@pytest.fixture
def listening():
    """The listener's class; a worker, which imports this file for `Deadly`, can't find its own."""
    from listeners import RecordingListener

    return RecordingListener


@pytest.fixture(scope="module")
def in_process(model, facts):
    """The records of one process."""
    return drllm.search_paths(model, [facts], CONFIG)


@pytest.mark.thorough
def test_two_workers_give_the_records_of_one_process(
    workers, facts, tmp_path, in_process, assert_same_run, listening
):
    listener = listening()
    records = run_search(workers, collect_questions([facts], CONFIG), CONFIG, tmp_path, listener)
    assert_same_run(in_process, records)
    assert listener.questions_done() == [2, 4, 6, 8, 10, 12, 14, 16], (
        "batches are handed over one by one"
    )


@pytest.mark.thorough
def test_a_killed_worker_is_replaced_and_its_batches_are_searched_again(
    workers, facts, tmp_path, in_process, assert_same_run, listening
):
    killed = []
    pid = lambda _worker: os.getpid()  # noqa: E731
    pids = {s: workers.ray.get(s.worker.__ray_call__.remote(pid)) for s in workers.seats}

    def kill_one(done):
        if not killed:
            seat = next(seat for seat in workers.seats if seat.jobs)
            os.kill(pids[seat], signal.SIGKILL)
            killed.append(seat)

    questions = collect_questions([facts], CONFIG)
    listener = listening(on_report=kill_one)
    assert_same_run(in_process, run_search(workers, questions, CONFIG, tmp_path, listener))
    assert killed
    assert killed[0] not in workers.seats


@pytest.mark.thorough
def test_no_more_batches_are_out_than_the_workers_can_hold(workers, facts):
    batches = split_into_batches(collect_questions([facts], CONFIG), CONFIG.block_size)
    batches_out = []

    def counted():
        for batch in batches:
            batches_out.append(batch)
            yield batch

    most = 0
    for done, _ in enumerate(workers.search(counted(), CONFIG)):
        most = max(most, len(batches_out) - done)
    assert len(batches_out) == len(batches)
    assert 1 < most <= WORKERS * ray_executor.BATCHES_A_WORKER


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deadly(Prompt):
    """A prompt that kills the process in which it is read, where that is a worker."""

    driver: int

    def __reduce__(self):
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _revived, (values,)


def _revived(values):
    if os.getpid() != values["driver"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return Deadly(**values)


@pytest.mark.thorough  # a process that imports torch for each loss; test_jobs has the rest
def test_a_question_that_kills_its_workers_is_set_aside_and_its_batch_is_not(
    workers, facts, tmp_path, in_process, assert_same_run, listening, monkeypatch
):
    questions = collect_questions([facts], CONFIG)
    bad = split_into_batches(questions, 2)[3].questions[0]
    monkeypatch.setattr(ray_executor, "MAX_LOSSES", 1)  # each is a process that imports torch
    deadly = Deadly(**dataclasses.asdict(bad.prompt), driver=os.getpid())
    monkeypatch.setattr(
        workers, "render_prompts", lambda prompts: [prompt.text for prompt in prompts]
    )
    questions[bad.place] = dataclasses.replace(bad, retests=(deadly,))
    listener = listening()
    records = run_search(workers, questions, CONFIG, tmp_path, listener)
    assert_same_run([record for record in in_process if record.id != bad.example.id], records)
    [failed] = records.failed
    assert (failed.id, failed.attempts) == (bad.example.id, 1)
    assert "died" in failed.error
    assert (tmp_path / FAILED_FILE).is_file()
    assert listener.questions_done() == [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.thorough
def test_workers_share_the_memory_of_a_machine_and_the_manifest_keeps_all_of_it(
    workers, facts, tmp_path, monkeypatch
):
    assert workers.plan.num_threads == max(1, (os.cpu_count() or 1) // WORKERS)
    config = dataclasses.replace(CONFIG, state_cache_gb=3.0, limit=2)
    sent = []
    put = workers.ray.put
    monkeypatch.setattr(workers.ray, "put", lambda value: sent.append(value) or put(value))
    records = run_search(workers, collect_questions([facts], config), config, tmp_path)
    assert [x.state_cache_gb for x in sent if isinstance(x, SearchConfig)] == [3.0 / WORKERS]
    assert read_manifest(records.file, "search")["config"]["state_cache_gb"] == 3.0

    def num_parts(worker):
        import psutil
        import torch

        from drllm.models.base.batching import free_bytes

        return psutil.virtual_memory().available / free_bytes(torch.device("cpu"))

    seat = next(seat for seat in workers.seats if seat.starting is None)
    parts = workers.ray.get(seat.worker.__ray_call__.remote(num_parts))
    assert parts == pytest.approx(WORKERS, rel=0.2)


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


@pytest.mark.thorough  # a third process that imports torch
def test_a_model_that_workers_cannot_load_is_said_as_ever(workers, model):
    other = dataclasses.replace(model, model="no/such/folder")
    with pytest.raises(ModelError, match="no folder 'no/such/folder'"):
        RayExecutor(other, num_workers=1)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("device", "num_workers", "message"),
    [
        ("cpu", 10_000, "10000 workers need a CPU core each, and Ray has"),
        ("cuda", 1, "--device is 'cuda', but Ray has no GPU; give --device cpu"),
        ("cuda:1", 1, "gives each worker a device of its own"),
    ],
)
def test_devices_that_are_not_there_are_refused(workers, model, device, num_workers, message):
    if device == "cuda" and workers.ray.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=message):
        RayExecutor(dataclasses.replace(model, device=device), num_workers=num_workers)


NEVER_ASKED = object()
"""In place of the package ray: whoever asks it for anything fails."""


def test_an_address_at_which_nobody_listens_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        connect(NEVER_ASKED, address, None)
    assert time.monotonic() - started < 2
    assert re.fullmatch(
        rf"--ray-address '{address}' can't be reached \(.*refused.*\); give HOST:PORT of a running "
        r"cluster, as 'ray start' prints it, or leave it out",
        str(caught.value),
    )


@pytest.mark.parametrize(
    "address",
    ["local", "head", "head:", "head:six", "head:99999", ":6379", "", "ray://head:10001"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match=f"--ray-address is '{address}'; give HOST:PORT"):
        connect(NEVER_ASKED, address, None)


class Noting:
    """A Ray that notes what it is asked for, and may fail."""

    def __init__(self, error=None):
        self.error = error

    def init(self, **options):
        self.asked = options
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_address_at_which_somebody_listens_is_left_to_ray(host):
    ray = Noting()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        try:
            server.bind((host.strip("[]"), 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        server.listen()
        address = f"{host}:{server.getsockname()[1]}"
        connect(ray, address, None)
    assert ray.asked["address"] == address


@pytest.mark.thorough
def test_what_ray_says_is_passed_on_in_one_line():
    message = r"--ray-address 'auto' can't be reached \(Could not find any running"
    with pytest.raises(ConfigError, match=message):
        connect(Noting(ConnectionError("Could not find\nany running Ray instance.")), "auto", None)
