"""Two workers of Ray give the results of one process, also where workers die."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest
from toys import BLOCKS, IDENTITY, SUMS, AddUp, LoadNumber

from drllm.errors import ConfigError, ModelError
from drllm.work import ray as ray_executor
from drllm.work.ray import RayExecutor, connect
from drllm.work.run import Block, BlockFunction, BlockSteps, run
from drllm.work.store import ResultStore

WORKERS = 2


@pytest.fixture(scope="module")
def workers(own_ray):
    with RayExecutor(LoadNumber(1), num_workers=WORKERS) as executor:
        yield executor
    assert own_ray.is_initialized(), "a Ray that isn't the executor's goes on"


@pytest.mark.thorough
def test_two_workers_give_the_results_of_one_process(workers, tmp_path):
    store = ResultStore(tmp_path / "kept", {}, stage="toy")
    finished = []
    results = run(
        BLOCKS,
        AddUp(),
        workers,
        keep=store.of(list[int]),
        on_result=lambda block, result, *, is_new: finished.append(block.key),
    )
    assert results == SUMS
    assert sorted(finished) == [block.key for block in BLOCKS]
    assert all(store.get(block.key, list[int]) for block in BLOCKS)
    assert workers.identity == IDENTITY


@pytest.mark.thorough
def test_one_function_after_the_other_runs_on_the_same_workers(workers):
    assert run(BLOCKS, AddUp(), workers) == SUMS

    class Doubled(AddUp):
        def prepare(self, model):
            return 20 * model

    assert run(BLOCKS[:1], Doubled(), workers) == [[20, 120]]
    assert run(BLOCKS, AddUp(), workers) == SUMS


@pytest.mark.thorough
def test_a_killed_worker_is_replaced_and_its_blocks_run_again(workers):
    pids = {
        seat: workers.ray.get(seat.worker.__ray_call__.remote(lambda _worker: os.getpid()))
        for seat in workers.seats
        if seat.is_ready
    }
    killed = []

    def kill_one(block: Block[Any], result: Any, *, is_new: bool) -> None:
        seats = [seat for seat in pids if seat.jobs]
        if not killed and seats:
            os.kill(pids[seats[0]], signal.SIGKILL)
            killed.append(seats[0])

    class Slow(AddUp):
        def __call__(self, prepared, data, steps):
            time.sleep(0.2)
            return super().__call__(prepared, data, steps)

    assert run(BLOCKS, Slow(), workers, on_result=kill_one) == SUMS
    assert killed
    assert killed[0] not in workers.seats


@pytest.mark.thorough  # a process for each loss; test_jobs has the rest
def test_a_part_that_kills_its_workers_is_given_up_and_its_block_is_not(workers, monkeypatch):
    monkeypatch.setattr(ray_executor, "MAX_LOSSES", 1)
    function = AddUp(driver=os.getpid(), deadly=(3,))
    results = run(BLOCKS, function, workers)
    assert results == [*SUMS[:3], [-1, 113], *SUMS[4:]]


@pytest.mark.thorough
def test_blocks_wait_for_workers_that_are_all_being_replaced(own_ray, monkeypatch):
    monkeypatch.setattr(ray_executor, "MAX_LOSSES", 1)
    function = AddUp(driver=os.getpid(), deadly=(3,))
    with RayExecutor(LoadNumber(1), num_workers=1) as executor:
        assert run([Block("deadly", [3], 1)], function, executor) == [[-1]]
        assert not any(seat.is_ready for seat in executor.seats)
        assert run(BLOCKS[:3], function, executor) == SUMS[:3]


@pytest.mark.thorough
def test_no_more_blocks_are_out_than_the_workers_can_hold(workers):
    num_out = [sum(len(seat.jobs) for seat in workers.seats) for _ in workers.run(BLOCKS, AddUp())]
    assert len(num_out) == len(BLOCKS)
    assert 0 < max(num_out) <= WORKERS * ray_executor.BLOCKS_A_WORKER


@pytest.mark.thorough
def test_an_error_of_a_block_is_raised_here_and_the_workers_go_on(workers):
    class Refusing(BlockFunction[Any, Any]):
        def __call__(self, prepared: Any, data: Any, steps: BlockSteps) -> Any:
            raise ConfigError("this block can't be run; give another")

    with pytest.raises(ConfigError, match="give another"):
        run(BLOCKS, Refusing(), workers)

    class Unready(BlockFunction[Any, Any]):
        def prepare(self, model: Any) -> Any:
            raise ModelError("this model won't do; give another")

    with pytest.raises(ModelError, match="won't do"):
        run(BLOCKS, Unready(), workers)
    assert run(BLOCKS, AddUp(), workers) == SUMS


@pytest.mark.thorough
def test_a_running_ray_is_joined_by_its_address_and_goes_on_afterwards(own_ray):
    program = (
        "import sys\n"
        "from toys import LoadNumber\n"
        "from drllm.work.ray import RayExecutor\n"
        "with RayExecutor(LoadNumber(1), num_workers=1, address=sys.argv[1]) as executor:\n"
        "    print(executor.identity['class'])\n"
    )
    address = own_ray.get_runtime_context().gcs_address
    child = subprocess.run(
        [sys.executable, "-c", program, address],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (child.returncode, child.stdout) == (0, "Toy\n"), child.stderr
    assert own_ray.get(own_ray.put("alive")) == "alive"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("device", "num_workers", "message"),
    [
        ("cpu", 10_000, "10000 workers need a CPU core each, and Ray has"),
        ("cuda", 1, "--device is 'cuda', but Ray has no GPU; give --device cpu"),
        ("cuda:1", 1, "gives each worker a device of its own"),
    ],
)
def test_devices_that_are_not_there_are_refused(workers, device, num_workers, message):
    if device == "cuda" and workers.ray.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=message):
        RayExecutor(LoadNumber(1), device=device, num_workers=num_workers)


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
