"""An evaluation on two workers of Ray: the records of one process, also where a worker dies."""

import json
import os
import signal

import pytest
import torch

from drllm.config import EvaluateConfig, ModelConfig
from drllm.errors import ConfigError
from drllm.evaluation import plan
from drllm.evaluation.stage import evaluate
from drllm.model.load import load
from drllm.models.routers.checkpoint import save_routers
from drllm.records.codec import read_json_lines
from drllm.work import ray as ray_executor
from drllm.work.listener import Listener
from slow_way import tiny_routers

WORKERS = 2
TASKS = "builtin_facts,builtin_arithmetic"
PATH = [0, 1, 3]
SETTINGS = {
    "limit": 10,
    "batch_size": 2,
    "num_texts": 4,
    "curve": "0.1",
    "num_calibration": 4,
    "num_random_draws": 2,
    "baselines": "permuted-routes,label-frequency,last-layers,greedy-by-loss,confidence-exit",
}
LOCAL = EvaluateConfig(**SETTINGS)
RAY = EvaluateConfig(**SETTINGS, executor="ray", num_workers=WORKERS)
EXECUTOR = ("executor", "num_workers")


@pytest.fixture(scope="module")
def model(model_folder):
    return ModelConfig(model=str(model_folder()), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def systems(model, tmp_path_factory):
    """Routers of two seeds, and a static path."""
    folder = tmp_path_factory.mktemp("systems")
    base = load(model)
    for seed in (3, 5):
        fitting = {"num_layers": 4, "base_fingerprint": base.identity["fingerprint"]}
        routers = tiny_routers(seed, label_counts=((2, 7, 1),) * 4, **fitting)
        save_routers(routers, folder / f"seed {seed}")
    (folder / "less.json").write_text(json.dumps({"path": PATH}))
    return {
        "routers": [folder / "seed 3", folder / "seed 5"],
        "paths": str(folder / "less.json"),
    }


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(plan, "MIN_BLOCK_SIZE", 4)


@pytest.fixture
def in_process(model, systems, tmp_path):
    """The records of one process, with as many threads as a worker: else last bits may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    evaluate(model, TASKS, LOCAL, tmp_path / "one", **systems)
    torch.set_num_threads(before)
    return records_in(tmp_path / "one")


def records_in(folder):
    """Return what an evaluation wrote, without its times and who ran it."""
    records = {"samples": [row for _, row in read_json_lines(folder / "samples.jsonl", dict)]}
    for task in TASKS.split(","):
        record = json.loads((folder / f"{task}.json").read_text())
        del record["created"]
        for system in record["systems"]:
            del system["seconds"]
        for name in EXECUTOR:
            del record["config"][name]
        records[task] = record
    return records


@pytest.mark.thorough
@pytest.mark.usefixtures("own_ray")
def test_two_workers_give_the_records_of_one_process(model, systems, in_process, tmp_path):
    evaluate(model, TASKS, RAY, tmp_path / "two", **systems)
    assert records_in(tmp_path / "two") == in_process
    facts = in_process["builtin_facts"]
    names = [system["name"] for system in facts["systems"]]
    assert len(names) == 8
    assert {point["setting"] for point in facts["curve"]} == {"", "10 % saved"}
    assert [seeds["num_seeds"] for seeds in facts["seeds"]][:1] == [2]


class Killing(Listener):
    """Kills a worker of Ray when some work is done."""

    def __init__(self, executors):
        self.executors = executors
        self.killed = []

    def progress(self, title, unit):
        return _Progress(self)

    def kill(self):
        [executor] = self.executors
        for seat in executor.seats:
            if seat.is_ready and seat.jobs:
                pid = executor.ray.get(seat.worker.__ray_call__.remote(lambda _: os.getpid()))
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
                return


class _Progress:
    def __init__(self, listener):
        self.listener = listener

    def __enter__(self):
        return self.report

    def __exit__(self, *error):
        pass

    def report(self, done, total, note=""):
        if done > total / 3 and not self.listener.killed:
            self.listener.kill()


@pytest.mark.thorough
@pytest.mark.usefixtures("own_ray")
def test_a_killed_worker_loses_nothing(model, systems, in_process, tmp_path, monkeypatch):
    executors = []
    start = ray_executor.RayExecutor._start_workers

    def starting(self, *args):
        executors.append(self)
        start(self, *args)

    monkeypatch.setattr(ray_executor.RayExecutor, "_start_workers", starting)
    listener = Killing(executors)
    evaluate(model, TASKS, RAY, tmp_path / "killed", listener=listener, **systems)
    assert len(listener.killed) == 1
    assert records_in(tmp_path / "killed") == in_process


@pytest.mark.thorough
@pytest.mark.usefixtures("own_ray")
def test_an_evaluation_begun_on_ray_goes_on_in_this_process(model, systems, in_process, tmp_path):
    class Interrupting(Listener):
        def progress(self, title, unit):
            return _Progress(self)

        killed = ()

        def kill(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, TASKS, RAY, tmp_path / "two", listener=Interrupting(), **systems)
    assert list((tmp_path / "two" / "partial").iterdir())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    evaluate(model, TASKS, LOCAL, tmp_path / "two", **systems)
    assert records_in(tmp_path / "two") == in_process


def test_what_ray_cannot_do_is_refused_before_it_starts(tiny_llama, tiny_tokenizer, systems):
    with pytest.raises(ConfigError, match="takes a model's name or folder, not a Llama"):
        evaluate(tiny_llama(), TASKS, RAY, tokenizer=tiny_tokenizer, **systems)
    with pytest.raises(ConfigError, match="--latency times the model in this process"):
        evaluate("a model", TASKS, RAY, latency=True, **systems)
