"""Search batches on Ray: one worker process per device, on this machine or on a cluster.

`RayExecutor` gives every worker a small number of batches at a time, and replaces workers that die.
`Jobs` says which batch comes next. Ray is imported only when an executor is made.
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
from drllm.models.base.batching import share_memory
from drllm.models.base.hub import quiet
from drllm.models.base.load import load
from drllm.models.routing.routed_model import RoutedModel
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
from drllm.work.listener import logger

BATCHES_A_WORKER = 2
"""Batches that a worker has: the current batch and the next, so that the worker never waits."""
MAX_LOSSES = 3
"""A question is set aside when this many workers have died while they searched it alone."""
MAX_FAILED_STARTS = 3
"""The search ends when this many workers in a row have died while they loaded the model."""
START_TIMEOUT_S = 600.0  # maximum time in seconds until the first worker has loaded the model
CONNECT_TIMEOUT_S = 5.0
"""Maximum time in seconds to connect to an address; Ray itself would try for minutes."""
MAX_PORT = 2**16 - 1


class Worker:
    """A process with a copy of the base model; Ray makes it an actor."""

    def load(
        self, model: ModelConfig, num_threads: int, num_sharing: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the base model; return its identity and how it runs.

        Args:
            model: Which model, and how to load it.
            num_threads: Number of threads of torch.
            num_sharing: Number of workers that share the memory of this machine.
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
        """Search a batch; `parts` keeps the result of every step."""
        with quiet():
            return search_batch(self.local.routed, batch, config, parts=parts)


@dataclass(eq=False)
class Seat:
    """The state of one worker, as the executor knows it.

    Attributes:
        worker: Ray's handle of the `Worker`.
        starting: Ray's future of `Worker.load`; None once the model is loaded.
        jobs: The worker's jobs in their order: Ray's future of each result, and the batch.
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
        """The future to wait for: of the start, then of the first job; None without jobs."""
        if not self.is_ready:
            return self.starting
        if not self.jobs:
            return None
        future, _ = self.jobs[0]
        return future


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """How many workers run, and what each worker gets."""

    num_workers: int
    device: str  # "cuda" or "cpu" in place of "auto", else the device in the model's settings
    num_threads: int  # threads of torch in each worker
    num_sharing: int  # maximum number of workers that share the memory of one machine
    options: Mapping[str, int]  # the devices of a worker, as Ray's options of an actor


class RayExecutor:
    """Searches batches on Ray with one worker per device; a context manager.

    A worker that dies is replaced, and its jobs are searched again. The records are the same as
    those of `LocalExecutor`.

    If this process is connected to Ray already, the executor uses this connection. Otherwise the
    executor connects to the cluster at `address`, or starts Ray on this machine, and disconnects or
    stops it at the end.

    Args:
        model: Which model, and how to load it. With the device `auto` each worker gets a GPU if Ray
            has GPUs, else the CPU.
        num_workers: None for one worker per GPU or, on the CPU, one worker per core.
        address: The cluster's address; see `connect`.
    """

    def __init__(
        self, model: ModelConfig, *, num_workers: int | None = None, address: str | None = None
    ) -> None:
        need("ray", "--executor ray")
        import ray

        self.ray: Any = ray
        names = ("RayActorError", "ObjectLostError", "OutOfMemoryError", "WorkerCrashedError")
        # The errors that Ray raises if a worker died.
        self._loss_errors = tuple(getattr(ray.exceptions, name) for name in names)
        self._connects = not ray.is_initialized()
        self._is_on_this_machine = self._connects and address is None
        self.seats: list[Seat] = []
        self.identity: Mapping[str, Any] = {}
        self.runtime: Mapping[str, Any] = {}
        self._failed_starts = 0
        if self._connects:
            connect(ray, address, num_workers)
        try:
            self._start_workers(model, num_workers)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the workers, and the connection to Ray if this executor made it."""
        for seat in self.seats:
            self.ray.kill(seat.worker)
        self.seats = []
        if self._connects:
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
        """Search batches on all workers; see `Executor.search`.

        A batch is taken from the iterable only when a worker has room for it. Workers of a cluster
        don't use `chunks`, since they may not see its folder.
        """
        jobs = Jobs(batches)
        stored_config = self.ray.put(self._make_worker_config(config))
        if not self._is_on_this_machine:
            chunks = None
        while True:
            self._hand_out(jobs, stored_config, chunks)
            if not jobs.retries and not any(seat.jobs for seat in self.seats):
                return
            for seat in self._wait_for_seats():
                if not seat.is_ready:
                    self._finish_start(seat)
                    continue
                finished_batch = self._finish_job(seat, jobs)
                if finished_batch is not None:
                    yield finished_batch

    def _make_worker_config(self, config: SearchConfig) -> SearchConfig:
        """Return the settings with one worker's share of the memory for shared states."""
        if config.state_cache_gb is None:
            return config
        share_gb = config.state_cache_gb / self.plan.num_sharing
        return dataclasses.replace(config, state_cache_gb=share_gb)

    def _hand_out(self, jobs: "Jobs", stored_config: Any, chunks: Chunks | None) -> None:
        """Give new jobs to every worker that has loaded the model and has room for a job."""
        for seat in self.seats:
            while seat.is_ready and len(seat.jobs) < BATCHES_A_WORKER:
                batch = jobs.next_job()
                if batch is None:
                    return
                parts = None if chunks is None else chunks.within(batch.key)
                future = seat.worker.search.remote(batch, stored_config, parts)
                seat.jobs.append((future, batch))

    def _finish_job(self, seat: Seat, jobs: "Jobs") -> tuple[Batch, BatchRecords] | None:
        """Handle the end of a worker's first job: its result, or the death of the worker.

        Returns a batch with its result if the job was its last one, else None.
        """
        future, batch = seat.jobs[0]
        try:
            result = self._get(future)
        except self._loss_errors:
            # Only the first job was running, so the waiting jobs can't have killed the worker.
            for _, waiting_batch in list(seat.jobs)[1:]:
                jobs.retries.append(waiting_batch)
            self._replace(seat)
            return jobs.lose(batch)
        seat.jobs.popleft()
        return jobs.finish(batch, result)

    def _start_workers(self, model: ModelConfig, num_workers: int | None) -> None:
        """Start all workers, and wait until the first of them has loaded the model."""
        self.plan = plan_workers(self.ray, model, num_workers)
        self._model = dataclasses.replace(model, device=self.plan.device)
        self.seats = [self._new_seat() for _ in range(self.plan.num_workers)]
        while not self.identity:
            for seat in self._wait_for_seats():
                self._finish_start(seat)

    def _new_seat(self) -> Seat:
        """Start a worker; it begins to load the model."""
        worker = self.ray.remote(Worker).options(**self.plan.options).remote()
        starting = worker.load.remote(self._model, self.plan.num_threads, self.plan.num_sharing)
        return Seat(worker, starting)

    def _replace(self, seat: Seat) -> None:
        """Replace a worker that died by a new worker."""
        self.ray.kill(seat.worker)  # a worker that can't be reached may still be alive
        self.seats[self.seats.index(seat)] = self._new_seat()

    def _wait_for_seats(self) -> list[Seat]:
        """Wait until a worker has loaded the model, finished a job, or died.

        Return all workers for which this is true by then.
        """
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
        if waiting:  # `wait` returns only one future, even if more are done
            also_done, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
            done += also_done
        return [seats[future] for future in done]

    def _finish_start(self, seat: Seat) -> None:
        """Mark a worker as ready, or replace it if it died while it loaded the model."""
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
        """Refuse a worker's model if it differs from the first worker's."""
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
    num_real_cores = num_cores
    if len(nodes) == 1:
        # To let workers share cores, `connect` tells a local Ray that there are more cores.
        num_real_cores = min(num_cores, os.cpu_count() or 1)
    num_threads = max(1, num_real_cores // num_workers)
    if uses_gpus:
        num_sharing = 1  # a worker has the memory of its GPU to itself
        options = {"num_gpus": 1, "num_cpus": 0}
    else:
        # As many workers share the memory of a node as fit on the node with the most cores.
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
    """The jobs of a search, for workers that may die.

    A job is a whole batch or, if a worker died during a batch, one question of the batch. Questions
    that are searched alone get the same decisions and rewards. A question is set aside when
    `MAX_LOSSES` workers have died while they searched it alone.

    Attributes:
        retries: Jobs to run again, before new batches.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.retries: deque[Batch] = deque()
        self._new_batches = iter(batches)
        self._num_losses: Counter[int] = Counter()  # place of a question → number of dead workers
        self._split_batches: dict[int, SplitBatch] = {}  # number of a batch → the batch

    def next_job(self) -> Batch | None:
        """Return the next job; None if no job is left to hand out now."""
        if self.retries:
            return self.retries.popleft()
        return next(self._new_batches, None)

    def finish(self, job: Batch, result: BatchRecords) -> tuple[Batch, BatchRecords] | None:
        """Record the result of a job.

        Returns the whole batch with its result; None while other questions of the batch are left.
        """
        split_batch = self._split_batches.get(job.number)
        if split_batch is None:
            return job, result
        [question] = job.questions
        split_batch.results[question.place] = result
        if len(split_batch.results) < len(split_batch.batch.questions):
            return None
        del self._split_batches[job.number]
        return split_batch.batch, split_batch.join_results()

    def lose(self, job: Batch) -> tuple[Batch, BatchRecords] | None:
        """Record that a worker died during a job.

        Returns the same as `finish` if the job's only question is set aside, else None.
        """
        if len(job.questions) > 1:
            self._split(job)
            return None
        [question] = job.questions
        self._num_losses[question.place] += 1
        num_losses = self._num_losses[question.place]
        logger.warning(
            "a worker died while it searched question %s of %s alone (%d of at most %d times)",
            question.example.id,
            question.task,
            num_losses,
            MAX_LOSSES,
        )
        if num_losses < MAX_LOSSES:
            self.retries.append(job)
            return None
        failed = failed_question(question, "its worker process died", MAX_LOSSES)
        return self.finish(job, BatchRecords((), (failed,)))

    def _split(self, batch: Batch) -> None:
        """Turn a batch into one job per question."""
        logger.warning(
            "a worker died while it searched batch %d; its %d questions are searched again, "
            "one by one",
            batch.number,
            len(batch.questions),
        )
        self._split_batches[batch.number] = SplitBatch(batch)
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
        address: HOST:PORT of a cluster. `auto` stands for the cluster that `RAY_ADDRESS` names or
            that Ray finds on this machine. None starts Ray on this machine.
        num_workers: If Ray is started here, it is told that there are at least this many cores, so
            that workers may share a core.

    Raises:
        ConfigError: The address isn't valid, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet_options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        num_cores = max(os.cpu_count() or 1, num_workers or 1)
        # Unlike None, "local" ignores RAY_ADDRESS: without --ray-address Ray runs on this machine.
        ray.init(address="local", num_cpus=num_cores, include_dashboard=False, **quiet_options)
        return
    match = re.fullmatch(r"([^/]+):([0-9]{1,5})", address)
    is_host_and_port = match is not None and int(match[2]) <= MAX_PORT
    if address != "auto" and not is_host_and_port:
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
