"""Two workers of Ray give the records of one process, also where workers die."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal

import pytest

import drllm
from drllm.config import ModelConfig, SearchConfig
from drllm.errors import ModelError
from drllm.models.workers import open_workers
from drllm.records.manifest import read_manifest
from drllm.search import FAILED_FILE
from drllm.search.batch import BatchSearcher
from drllm.search.questions import collect_questions, split_into_batches
from drllm.search.run import run_search
from drllm.tasks.examples import Prompt
from drllm.work import ray as ray_executor
from drllm.work.listener import Listener

WORKERS = 2
CONFIG = SearchConfig(
    num_simulations=6, limit=16, block_size=2, executor="ray", num_workers=WORKERS
)


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
    with open_workers(model, None, CONFIG, Listener()) as ray_workers:
        yield ray_workers


@pytest.fixture
def listening():
    """The listener's class; a worker, which imports this file for `Deadly`, can't find its own."""
    from listeners import RecordingListener

    return RecordingListener


@pytest.fixture(scope="module")
def in_process(model, facts):
    """The records of one process."""
    local = dataclasses.replace(CONFIG, executor="local", num_workers=None)
    return drllm.search_paths(model, [facts], local)


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
    executor = workers.executor
    killed = []
    pid = lambda _worker: os.getpid()  # noqa: E731
    pids = {s: executor.ray.get(s.worker.__ray_call__.remote(pid)) for s in executor.seats}

    def kill_one(done):
        if not killed:
            seat = next(seat for seat in executor.seats if seat.jobs)
            os.kill(pids[seat], signal.SIGKILL)
            killed.append(seat)

    questions = collect_questions([facts], CONFIG)
    listener = listening(on_report=kill_one)
    assert_same_run(in_process, run_search(workers, questions, CONFIG, tmp_path, listener))
    assert killed
    assert killed[0] not in executor.seats


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


@pytest.mark.thorough  # a process that imports torch for each loss
def test_a_question_that_kills_its_workers_is_set_aside_and_its_batch_is_not(
    workers, facts, tmp_path, in_process, assert_same_run, listening, monkeypatch
):
    questions = collect_questions([facts], CONFIG)
    bad = split_into_batches(questions, 2)[3].questions[0]
    monkeypatch.setattr(ray_executor, "MAX_LOSSES", 1)  # each is a process that imports torch
    deadly = Deadly(**dataclasses.asdict(bad.prompt), driver=os.getpid())
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
    executor = workers.executor
    assert executor.plan.num_threads == max(1, (os.cpu_count() or 1) // WORKERS)
    config = dataclasses.replace(CONFIG, state_cache_gb=3.0, limit=2)
    sent = []
    put = executor.ray.put
    monkeypatch.setattr(executor.ray, "put", lambda value: sent.append(value) or put(value))
    records = run_search(workers, collect_questions([facts], config), config, tmp_path)
    functions = [value for value in sent if isinstance(value, BatchSearcher)]
    assert [function.config.state_cache_gb for function in functions] == [3.0 / WORKERS]
    assert read_manifest(records.file, "search")["config"]["state_cache_gb"] == 3.0

    def num_parts(worker):
        import psutil
        import torch

        from drllm.model.batching import free_bytes

        return psutil.virtual_memory().available / free_bytes(torch.device("cpu"))

    seat = next(seat for seat in executor.seats if seat.is_ready)
    parts = executor.ray.get(seat.worker.__ray_call__.remote(num_parts))
    assert parts == pytest.approx(WORKERS, rel=0.2)


@pytest.mark.thorough  # a third process that imports torch
def test_a_model_that_workers_cannot_load_is_said_as_ever(workers, model, facts):
    other = dataclasses.replace(model, model="no/such/folder")
    config = dataclasses.replace(CONFIG, num_workers=1)
    with pytest.raises(ModelError, match="no folder 'no/such/folder'"):
        drllm.search_paths(other, [facts], config)
