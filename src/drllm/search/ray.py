"""Search batches on Ray: one worker process per device, on this machine or on a cluster.

`RayExecutor` keeps every worker busy with a small number of batches, and replaces workers that die.
Ray is imported only when an executor is created.
"""

import dataclasses
import logging
import os
import re
import socket
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from drllm.config import ModelConfig, SearchConfig
from drllm.errors import ConfigError, DrllmError, ModelError
from drllm.extras import need
from drllm.listener import logger
from drllm.models.base.hub import quiet
from drllm.models.base.load import load
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.batching import share_memory
from drllm.records.resume import Chunks
from drllm.records.search import FailedQuestion, SearchRecord
from drllm.search.batch import (
    BatchRecords,
    LocalExecutor,
    OnBatchStep,
    failed_question,
    search_batch,
)
from drllm.search.questions import Batch
from drllm.tasks.examples import Prompt

BATCHES_A_WORKER = 2
"""Batches that a worker holds: the current batch and the next, so that the worker never waits."""
MAX_LOSSES = 3
"""Number of workers that may die on one question alone; then the question is set aside."""
MAX_FAILED_STARTS = 3  # number of workers in a row that may die while they load the model
START_TIMEOUT_S = 600.0  # maximum time until the first worker has loaded the model
CONNECT_TIMEOUT_S = 5.0
"""Maximum time to connect to an address; Ray itself would try for minutes."""


class Worker:
    """A process with a copy of the base model; Ray makes it an actor."""

    def load(
        self, model: ModelConfig, num_threads: int, num_sharing: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the base model; return its identity and how it runs.

        Args:
            model: Which model, and how to load it.
            num_threads: Threads of torch.
            num_sharing: Workers that share the memory of this machine.
        """
        torch.set_num_threads(num_threads)
        share_memory(num_sharing)
        with quiet():
            base = load(model)
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        self.local = LocalExecutor(routed, base.identity, base.runtime)
        return base.identity, base.runtime

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return each prompt as the model reads it; None if the chat template refuses a prompt."""
        return self.local.render_prompts(prompts)

    def search(self, batch: Batch, config: SearchConfig, parts: Chunks | None) -> BatchRecords:
        """Search a batch."""
        with quiet():
            return search_batch(self.local.routed, batch, config, parts=parts)


@dataclass(eq=False)
class Seat:
    """The worker of one device, with its jobs; a worker that dies is replaced by another seat.

    Attributes:
        worker: Ray's handle of the actor.
        starting: Ray's future of the loaded model; None once the model is loaded.
        jobs: Futures of results with their batches, in the order of submission.
    """

    worker: Any
    starting: Any
    jobs: deque[tuple[Any, Batch]] = field(default_factory=deque)

    @property
    def is_ready(self) -> bool:
        """Whether the worker has loaded the model."""
        return self.starting is None

    @property
    def next_future(self) -> Any:
        """The future to wait for: the loaded model, then the first job; None without jobs."""
        if not self.is_ready:
            return self.starting
        return self.jobs[0][0] if self.jobs else None


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """How many workers run, and what each worker gets."""

    num_workers: int
    device: str  # "cuda", "cpu", or the device in the model's settings
    num_threads: int  # threads of torch in each worker
    num_sharing: int  # number of workers that share the memory of one machine
    options: Mapping[str, int]  # Ray's options of an actor


class RayExecutor:
    """Searches batches on Ray with one worker per device; a context manager.

    A worker that dies is replaced, and its jobs are searched again. The records are the same as
    those of `LocalExecutor`, wherever and however often a batch is searched. With the device `auto`
    each worker gets a GPU if Ray has GPUs, else the CPU. By default there is one worker per GPU, or
    one per CPU core. Without a cluster's address the executor starts Ray on this machine and stops
    Ray afterwards. If this process has started Ray already, the executor uses this Ray.
    """

    def __init__(
        self, model: ModelConfig, *, num_workers: int | None = None, address: str | None = None
    ) -> None:
        need("ray", "--executor ray")
        import ray

        self.ray: Any = ray
        names = ("RayActorError", "ObjectLostError", "OutOfMemoryError", "WorkerCrashedError")
        self._loss_errors = tuple(getattr(ray.exceptions, name) for name in names)
        self._starts_ray = not ray.is_initialized()
        self._is_on_this_machine = self._starts_ray and address is None
        self.seats: list[Seat] = []
        self.identity: Mapping[str, Any] = {}
        self.runtime: Mapping[str, Any] = {}
        self._failed_starts = 0
        if self._starts_ray:
            connect(ray, address, num_workers)
        try:
            self._start_workers(model, num_workers)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the workers, and Ray if this executor has started it."""
        for seat in self.seats:
            self.ray.kill(seat.worker)
        self.seats = []
        if self._starts_ray:
            self.ray.shutdown()

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return each prompt as the model reads it; None if the chat template refuses a prompt."""
        seat = next(seat for seat in self.seats if seat.is_ready)
        texts: list[str | None] = self.ray.get(seat.worker.render_prompts.remote(list(prompts)))
        return texts

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_batch_step: OnBatchStep | None = None,
    ) -> Iterator[tuple[Batch, BatchRecords]]:
        """Search batches on all workers, and yield them in any order.

        A batch is taken from the iterable only when a worker has room for it. Workers of a cluster
        don't keep the steps of an unfinished batch, since they may not see the folder.
        """
        jobs = Jobs(batches)
        stored_config = self.ray.put(self._worker_config(config))
        kept_parts = chunks if self._is_on_this_machine else None
        while True:
            self._hand_out(jobs, stored_config, kept_parts)
            if not jobs.retries and not any(seat.jobs for seat in self.seats):
                return
            for seat in self._wait_for_seats():
                if not seat.is_ready:
                    self._finish_start(seat)
                    continue
                finished = self._finish_job(seat, jobs)
                if finished is not None:
                    yield finished

    def _worker_config(self, config: SearchConfig) -> SearchConfig:
        """Return the settings with one worker's share of the memory for shared states."""
        if config.state_cache_gb is None:
            return config
        return dataclasses.replace(
            config, state_cache_gb=config.state_cache_gb / self.plan.num_sharing
        )

    def _hand_out(self, jobs: "Jobs", stored_config: Any, kept_parts: Chunks | None) -> None:
        """Fill up the jobs of every worker that has loaded the model."""
        for seat in self.seats:
            while seat.is_ready and len(seat.jobs) < BATCHES_A_WORKER:
                batch = jobs.next_job()
                if batch is None:
                    return
                parts = None if kept_parts is None else kept_parts.within(batch.key)
                future = seat.worker.search.remote(batch, stored_config, parts)
                seat.jobs.append((future, batch))

    def _finish_job(self, seat: Seat, jobs: "Jobs") -> tuple[Batch, BatchRecords] | None:
        """Return the batch that a worker's first job completes; None if it completes no batch.

        A worker that died is replaced.
        """
        future, batch = seat.jobs[0]
        try:
            result = self._get(future)
        except self._loss_errors:
            # Only the first job was running, so the other jobs can't have killed the worker.
            waiting = list(seat.jobs)[1:]
            jobs.retries.extend(batch for _, batch in waiting)
            self._replace(seat)
            return jobs.lose(batch)
        seat.jobs.popleft()
        return jobs.finish(batch, result)

    def _start_workers(self, model: ModelConfig, num_workers: int | None) -> None:
        """Start all workers, and wait until one of them has loaded the model."""
        self.plan = plan_workers(self.ray, model, num_workers)
        self._model = dataclasses.replace(model, device=self.plan.device)
        self.seats = [self._new_seat() for _ in range(self.plan.num_workers)]
        while not self.identity:
            for seat in self._wait_for_seats():
                self._finish_start(seat)

    def _new_seat(self) -> Seat:
        worker = self.ray.remote(Worker).options(**self.plan.options).remote()
        starting = worker.load.remote(self._model, self.plan.num_threads, self.plan.num_sharing)
        return Seat(worker, starting)

    def _replace(self, seat: Seat) -> None:
        """Replace a worker that died by a new worker."""
        self.ray.kill(seat.worker)  # a worker that can't be reached may still be alive
        self.seats[self.seats.index(seat)] = self._new_seat()

    def _wait_for_seats(self) -> list[Seat]:
        """Wait for workers that have loaded the model, finished a job, or died; return them."""
        seats: dict[Any, Seat] = {}
        for seat in self.seats:
            if seat.next_future is not None:
                seats[seat.next_future] = seat
        is_any_ready = any(seat.is_ready for seat in self.seats)
        timeout = None if is_any_ready else START_TIMEOUT_S
        done, waiting = self.ray.wait(list(seats), num_returns=1, timeout=timeout)
        if not done:
            raise ModelError(
                f"no worker of Ray has loaded the model within {START_TIMEOUT_S:.0f} s; "
                f"'ray status' says what its nodes lack"
            )
        if waiting:
            more, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
            done += more
        return [seats[future] for future in done]

    def _finish_start(self, seat: Seat) -> None:
        """Mark a worker as ready when it has loaded the model; replace it if it died meanwhile."""
        try:
            identity, runtime = self._get(seat.starting)
        except self._loss_errors as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ModelError(
                    f"{MAX_FAILED_STARTS} workers in a row died while they loaded the model; give "
                    f"fewer --num-workers, or a machine with more memory"
                ) from error
            self._replace(seat)
            return
        if not self.identity:
            self.identity = identity
            self.runtime = runtime
        self._check_same_model({**identity, **runtime})
        self._failed_starts = 0
        seat.starting = None

    def _check_same_model(self, model: Mapping[str, Any]) -> None:
        for name, value in {**self.identity, **self.runtime}.items():
            if value != model.get(name):
                raise ModelError(
                    f"the workers' models differ: one has {name} {value!r}, another "
                    f"{model.get(name)!r}; give --dtype and --revision, and nodes that are alike"
                )

    def _get(self, future: Any) -> Any:
        """Return a future's value. If the worker raised a DrllmError, raise the same error."""
        try:
            return self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DrllmError):
                raise error.cause from None
            raise


def plan_workers(ray: Any, model: ModelConfig, num_workers: int | None) -> WorkerPlan:
    """Decide how many workers run, and on which device.

    Args:
        ray: The package, connected.
        model: The model's settings, with the device `auto`, `cuda` or `cpu`.
        num_workers: None for one worker per GPU, or one per CPU core.

    Raises:
        ConfigError: The device has a number, or there are more workers than devices.
    """
    if ":" in model.device:
        raise ConfigError(
            f"--device {model.device} doesn't go with --executor ray, which gives each worker "
            f"a device of its own; give --device {model.device.partition(':')[0]}"
        )
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    num_cores = int(resources.get("CPU", 1))
    uses_gpus = model.device == "cuda" or (model.device == "auto" and num_gpus > 0)
    num_devices = num_gpus if uses_gpus else num_cores
    if num_workers is None:
        num_workers = max(1, num_devices)
    if num_workers > num_devices:
        raise _too_few_devices(model.device, num_workers, num_devices, uses_gpus)
    device = model.device
    if device == "auto":
        device = "cuda" if uses_gpus else "cpu"

    nodes = ray.nodes()
    # `connect` may report more cores to a local Ray than there are, so that workers share cores.
    num_real_cores = min(num_cores, os.cpu_count() or 1) if len(nodes) == 1 else num_cores
    num_threads = max(1, num_real_cores // num_workers)
    if uses_gpus:
        num_sharing = 1  # workers don't share a GPU
        options = {"num_gpus": 1, "num_cpus": 0}
    else:
        # The number of workers that fit on the node with the most cores.
        most_cores = max(int(node["Resources"].get("CPU", 0)) for node in nodes)
        num_sharing = min(num_workers, max(1, most_cores // num_threads))
        options = {"num_gpus": 0, "num_cpus": num_threads}
    return WorkerPlan(
        num_workers=num_workers,
        device=device,
        num_threads=num_threads,
        num_sharing=num_sharing,
        options=options,
    )


def _too_few_devices(
    device: str, num_workers: int, num_devices: int, uses_gpus: bool
) -> ConfigError:
    kind = "GPU" if uses_gpus else "CPU core"
    if num_devices == 0:
        return ConfigError(f"--device is {device!r}, but Ray has no {kind}; give --device cpu")
    return ConfigError(
        f"--executor ray: {num_workers} workers need a {kind} each, and Ray has {num_devices}; "
        f"give --num-workers {num_devices}"
    )


class Jobs:
    """The batches of a search, for workers that may die.

    When a worker dies, the questions of its batch are searched again one by one. This gives the
    same decisions and rewards. A question whose workers keep dying is set aside.

    Attributes:
        retries: Jobs to run again, before new batches. A job is a whole batch or one question of a
            batch.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.retries: deque[Batch] = deque()
        self._new = iter(batches)
        self._losses: Counter[int] = Counter()  # place of a question → number of lost workers
        self._split: dict[int, SplitBatch] = {}  # number of a batch → the batch

    def next_job(self) -> Batch | None:
        """Return the next job; None if there is none at the moment."""
        if self.retries:
            return self.retries.popleft()
        return next(self._new, None)

    def finish(self, job: Batch, result: BatchRecords) -> tuple[Batch, BatchRecords] | None:
        """Return the whole batch with its result; None while some of its questions are missing."""
        split = self._split.get(job.number)
        if split is None:
            return job, result
        split.results[job.questions[0].place] = result
        if len(split.results) < len(split.batch.questions):
            return None
        del self._split[job.number]
        return split.batch, split.join_results()

    def lose(self, job: Batch) -> tuple[Batch, BatchRecords] | None:
        """Record that a worker died during a job; return the batch if this ends it (`finish`)."""
        if len(job.questions) > 1:
            self._split_up(job)
            return None
        [question] = job.questions
        self._losses[question.place] += 1
        num_losses = self._losses[question.place]
        logger.warning(
            "a worker died while it searched question %s of %s (loss %d of at most %d)",
            *(question.example.id, question.task, num_losses, MAX_LOSSES),
        )
        if num_losses < MAX_LOSSES:
            self.retries.append(job)
            return None
        failed = failed_question(question, "its worker process died", MAX_LOSSES)
        return self.finish(job, BatchRecords((), (failed,)))

    def _split_up(self, batch: Batch) -> None:
        """Turn a batch into one job per question."""
        logger.warning(
            "a worker died while it searched batch %d; its %d questions are searched again, "
            "one by one",
            *(batch.number, len(batch.questions)),
        )
        self._split[batch.number] = SplitBatch(batch)
        for question in batch.questions:
            self.retries.append(Batch(batch.number, (question,)))


@dataclass
class SplitBatch:
    """A batch whose questions are searched one by one, and the results so far."""

    batch: Batch
    results: dict[int, BatchRecords] = field(default_factory=dict)  # place of a question → result

    def join_results(self) -> BatchRecords:
        """Join the results of all questions, in the questions' order."""
        records: list[SearchRecord] = []
        failed: list[FailedQuestion] = []
        for question in self.batch.questions:
            result = self.results[question.place]
            records += result.records
            failed += result.failed
        return BatchRecords(tuple(records), tuple(failed))


def connect(ray: Any, address: str | None, num_workers: int | None) -> None:
    """Start Ray on this machine, or join a cluster.

    Args:
        ray: The package.
        address: HOST:PORT of a cluster; `auto` for the cluster that `RAY_ADDRESS` names or that Ray
            finds on this machine; None to start Ray here.
        num_workers: Minimum number of cores that Ray reports if it is started here.

    Raises:
        ConfigError: The address isn't valid, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet_options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        num_cores = max(os.cpu_count() or 1, num_workers or 1)
        # "local" ignores RAY_ADDRESS: without --ray-address Ray runs on this machine.
        ray.init(address="local", num_cpus=num_cores, include_dashboard=False, **quiet_options)
        return
    match = re.fullmatch(r"([^/]+):([0-9]{1,5})", address)
    is_address = match is not None and int(match[2]) < 1 << 16
    if address != "auto" and not is_address:
        raise ConfigError(
            f"--ray-address is {address!r}; give HOST:PORT of a running cluster, 'auto' for one "
            f"on this machine, or leave it out to start one"
        )
    try:
        if match is not None:
            host = match[1].strip("[]")  # IPv6 addresses are in brackets
            port = int(match[2])
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, **quiet_options)
    except (OSError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--ray-address {address!r} can't be reached ({message}); give HOST:PORT of a running "
            f"cluster, as 'ray start' prints it, or leave it out"
        ) from error
