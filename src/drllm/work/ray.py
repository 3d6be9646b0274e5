"""Run blocks on Ray: one worker process per device, on this machine or on a cluster.

`RayExecutor` keeps every worker busy with a small number of blocks, and replaces workers that die.
Ray is imported only when an executor is created.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from drllm.errors import ConfigError, DrllmError, ModelError
from drllm.extras import need
from drllm.work.run import Block, BlockFunction, BlockSteps, D, Keep, OnBlockStep, R
from drllm.work.store import ResultStore

BLOCKS_A_WORKER = 2
"""Blocks that a worker has: the current block and the next, so that the worker never waits."""
MAX_LOSSES = 3
"""A part of a block is given up when this many workers have died on it."""
MAX_FAILED_STARTS = 3
"""The stage ends when this many workers in a row have died while they loaded the model."""
START_TIMEOUT_S = 600.0  # maximum time in seconds until the first worker has loaded the model
CONNECT_TIMEOUT_S = 5.0
"""Maximum time in seconds to connect to an address; Ray itself would try for minutes."""
MAX_PORT = 2**16 - 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """How many workers run, and what each worker gets."""

    num_workers: int
    device: str  # "cuda" or "cpu" in place of "auto", else the device that the user named
    num_threads: int  # threads of torch in each worker
    num_sharing: int  # maximum number of workers that share the memory of one machine
    options: Mapping[str, int]  # the devices of a worker, as Ray's options of an actor


class ModelLoader(Protocol):
    """Loads the model of one worker; Ray pickles it and calls it in the worker."""

    def __call__(self, plan: WorkerPlan, /) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        """Return the model for `BlockFunction.prepare`, its identity, and how it runs."""


class Worker:
    """A process with a copy of the model; Ray makes it an actor."""

    def load(
        self, load_model: ModelLoader, plan: WorkerPlan
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Load the model; return its identity and how it runs."""
        self.model, identity, runtime = load_model(plan)
        return identity, runtime

    def prepare(self, function: BlockFunction[Any, Any]) -> None:
        """Prepare the function of the next blocks."""
        self.function = function
        self.prepared = function.prepare(self.model)

    def run(self, data: Any, store: ResultStore | None) -> Any:
        """Return the result of a block."""
        return self.function(self.prepared, data, BlockSteps(store))


@dataclass(eq=False)
class Seat:
    """The state of one worker, as the executor knows it.

    Attributes:
        worker: Ray's handle of the `Worker`.
        starting: Ray's future of `Worker.load`; None once the model is loaded.
        function: Ray's reference to the function that the worker prepares for its blocks.
        preparing: Ray's future of that; None once a block has shown that the function is prepared.
        jobs: The worker's jobs in their order: Ray's future of each result, and the job.
    """

    worker: Any
    starting: Any
    function: Any = None
    preparing: Any = None
    jobs: deque[tuple[Any, Job]] = field(default_factory=deque)

    @property
    def is_ready(self) -> bool:
        """Whether the worker has loaded the model."""
        return self.starting is None

    @property
    def has_room(self) -> bool:
        """Whether the worker may get one more job. A part of a block has its worker to itself."""
        if not self.is_ready or len(self.jobs) >= BLOCKS_A_WORKER:
            return False
        return all(job.part is None for _, job in self.jobs)

    @property
    def next_future(self) -> Any:
        """The future to wait for: of the start, then of the first job; None without jobs."""
        if not self.is_ready:
            return self.starting
        if not self.jobs:
            return None
        future, _ = self.jobs[0]
        return future


class RayExecutor:
    """Runs blocks on Ray with one worker per device; a context manager.

    A worker that dies is replaced, and its blocks are run again. The results are the same as those
    of `LocalExecutor`.

    If this process is connected to Ray already, the executor uses this connection. Otherwise the
    executor connects to the cluster at `address`, or starts Ray on this machine, and disconnects or
    stops it at the end.

    Args:
        load_model: Loads the model in each worker.
        device: The device that the user named. With `auto` each worker gets a GPU if Ray has GPUs,
            else the CPU.
        num_workers: None for one worker per GPU, or one per CPU core without GPUs.
        address: The cluster's address; see `connect`.

    Raises:
        ConfigError: The device has a number, there are more workers than devices, or the address
            can't be reached.
        ModelError: The model can't be loaded.
    """

    def __init__(
        self,
        load_model: ModelLoader,
        *,
        device: str = "auto",
        num_workers: int | None = None,
        address: str | None = None,
    ) -> None:
        need("ray", "--executor ray")
        import ray

        self.ray: Any = ray
        names = ("RayActorError", "ObjectLostError", "OutOfMemoryError", "WorkerCrashedError")
        self._loss_errors = tuple(getattr(ray.exceptions, name) for name in names)
        self._connects = not ray.is_initialized()
        self._is_on_this_machine = self._connects and address is None
        self._load_model = load_model
        self.seats: list[Seat] = []
        self.identity: Mapping[str, Any] = {}
        self.runtime: Mapping[str, Any] = {}
        self._failed_starts = 0
        self._function: Any = None  # the function of the last run,
        self._reference: Any = None  # and Ray's reference to it, by which workers know it
        if self._connects:
            connect(ray, address, num_workers)
        try:
            self._start_workers(device, num_workers)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the workers, and the connection to Ray if this executor made it."""
        for seat in self.seats:
            self.ray.kill(seat.worker)
        self.seats = []
        if self._connects:
            self.ray.shutdown()

    @property
    def num_workers(self) -> int:
        """How many workers there are."""
        return self.plan.num_workers

    @property
    def num_sharing(self) -> int:
        """How many workers share the memory of one machine."""
        return self.plan.num_sharing

    def run(
        self,
        blocks: Sequence[Block[D]],
        function: BlockFunction[D, R],
        keep: Keep[R] | None = None,
        on_step: OnBlockStep | None = None,
    ) -> Iterator[tuple[Block[D], R]]:
        """Run blocks on all workers, and yield them in any order.

        Workers of a cluster don't keep the steps of an unfinished block, since they may not see the
        folder.
        """
        jobs = Jobs(blocks, function)
        if function is not self._function:
            self._function = function
            self._reference = self.ray.put(function)
        reference = self._reference
        kept_steps = keep if self._is_on_this_machine else None
        try:
            while True:
                self._hand_out(jobs, reference, kept_steps)
                if jobs.are_handed_out and not any(seat.jobs for seat in self.seats):
                    return
                for seat in self._wait_for_seats():
                    if not seat.is_ready:
                        self._finish_start(seat)
                        continue
                    finished = self._finish_job(seat, jobs)
                    if finished is not None:
                        yield finished
        finally:  # after an error, the next run doesn't wait for the blocks of this one
            for seat in self.seats:
                seat.jobs.clear()

    def _hand_out(self, jobs: Jobs, reference: Any, keep: Keep[Any] | None) -> None:
        """Give new jobs to every worker that has loaded the model and has room for a job."""
        for seat in self.seats:
            while seat.has_room:
                job = jobs.next_job(is_worker_idle=not seat.jobs)
                if job is None:
                    break
                if seat.function != reference:
                    seat.preparing = seat.worker.prepare.remote(reference)
                    seat.function = reference
                store = None if keep is None else keep.steps_of(job.block.key)
                seat.jobs.append((seat.worker.run.remote(job.data, store), job))

    def _finish_job(self, seat: Seat, jobs: Jobs) -> tuple[Block[Any], Any] | None:
        """Handle the end of a worker's first job: its result, or the death of the worker.

        Returns a block with its result if the job was its last one, else None.
        """
        future, job = seat.jobs.popleft()
        try:
            if seat.preparing is not None:
                self._get(seat.preparing)
                seat.preparing = None
            result = self._get(future)
        except self._loss_errors:
            # The worker may have finished this block and died on the next one; then the result was
            # lost with it. So the loss of a whole block isn't counted. Its parts run again, one by
            # one.
            jobs.retries.extend(waiting for _, waiting in seat.jobs)
            self._replace(seat)
            return jobs.lose(job)
        return jobs.finish(job, result)

    def _start_workers(self, device: str, num_workers: int | None) -> None:
        """Start all workers, and wait until one of them has loaded the model."""
        self.plan = plan_workers(self.ray, device, num_workers)
        self.seats = [self._new_seat() for _ in range(self.plan.num_workers)]
        while not self.identity:
            for seat in self._wait_for_seats():
                self._finish_start(seat)

    def _new_seat(self) -> Seat:
        worker = self.ray.remote(Worker).options(**self.plan.options).remote()
        return Seat(worker, starting=worker.load.remote(self._load_model, self.plan))

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
                    f"{model.get(name)!r}; set --dtype and --revision, and use nodes of one kind"
                )

    def _get(self, future: Any) -> Any:
        """Return a future's value. If the worker raised a DrllmError, raise the same error."""
        try:
            return self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DrllmError):
                raise error.cause from None
            raise


def plan_workers(ray: Any, device: str, num_workers: int | None) -> WorkerPlan:
    """Decide how many workers run, and on which device.

    Args:
        ray: The package, connected.
        device: The device that the user named: `auto`, `cuda` or `cpu`.
        num_workers: None for one worker per GPU, or one per CPU core.

    Raises:
        ConfigError: The device has a number, or there are more workers than devices.
    """
    if ":" in device:
        raise ConfigError(
            f"--device {device} doesn't go with --executor ray, which gives each worker "
            f"a device of its own; give --device {device.partition(':')[0]}"
        )
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    num_cores = int(resources.get("CPU", 1))
    uses_gpus = device == "cuda" or (device == "auto" and num_gpus > 0)
    num_devices = num_gpus if uses_gpus else num_cores
    if num_workers is None:
        num_workers = max(1, num_devices)
    if num_workers > num_devices:
        raise _too_few_devices(device, num_workers, num_devices, uses_gpus)
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


@dataclass(frozen=True, eq=False)
class Job:
    """A block, or a part of one, that a worker runs.

    `part` is the place of the part in the block; None for the whole block.
    """

    block: Block[Any]
    data: Any
    part: int | None = None


class Jobs:
    """The jobs of a stage, for workers that may die.

    When a worker dies, its block is divided as the stage's function says, and each part is run
    again, alone on its worker. When `MAX_LOSSES` workers have died on a part, the function gives
    the part up.

    Attributes:
        retries: Jobs to run again, before new blocks.
    """

    def __init__(self, blocks: Sequence[Block[Any]], function: BlockFunction[Any, Any]) -> None:
        self.retries: deque[Job] = deque()
        self._new = deque(blocks)
        self._function = function
        self._split: dict[str, SplitBlock] = {}  # key of a block → its parts

    @property
    def are_handed_out(self) -> bool:
        """Whether every job is with a worker or finished."""
        return not self.retries and not self._new

    def next_job(self, *, is_worker_idle: bool) -> Job | None:
        """Return the next job for a worker; None if there is none for it now.

        Args:
            is_worker_idle: Whether the worker has no other job. Only then it gets a part of a
                block.
        """
        if self.retries:
            if self.retries[0].part is not None and not is_worker_idle:
                return None
            return self.retries.popleft()
        if not self._new:
            return None
        block = self._new.popleft()
        return Job(block, block.data)

    def finish(self, job: Job, result: Any) -> tuple[Block[Any], Any] | None:
        """Record the result of a job.

        Returns the whole block with its result; None while other parts of the block are left.
        """
        if job.part is None:
            return job.block, result
        split = self._split[job.block.key]
        split.results[job.part] = result
        if len(split.results) < len(split.parts):
            return None
        del self._split[job.block.key]
        results = [split.results[part] for part in range(len(split.parts))]
        return job.block, self._function.join(job.block.data, results)

    def lose(self, job: Job) -> tuple[Block[Any], Any] | None:
        """Record that a worker died during a job.

        Returns the same as `finish` if the part is given up and was the last, else None.
        """
        if job.part is None:
            self.retries.extend(self._split_up(job.block))
            return None
        split = self._split[job.block.key]
        split.num_losses[job.part] = split.num_losses.get(job.part, 0) + 1
        num_losses = split.num_losses[job.part]
        logger.warning(
            "a worker died on part %d of %s (loss %d of at most %d)",
            job.part + 1,
            job.block.key,
            num_losses,
            MAX_LOSSES,
        )
        if num_losses < MAX_LOSSES:
            self.retries.append(job)
            return None
        return self.finish(job, self._function.give_up(job.data, num_losses))

    def _split_up(self, block: Block[Any]) -> list[Job]:
        """Return one job for each part of a block."""
        parts = list(self._function.split(block.data))
        logger.warning("a worker died on %s; parts to run again: %d", block.key, len(parts))
        self._split[block.key] = SplitBlock(parts)
        return [Job(block, data, part=number) for number, data in enumerate(parts)]


@dataclass
class SplitBlock:
    """A block that is run part by part: its parts, the results so far, and the workers lost."""

    parts: Sequence[Any]
    results: dict[int, Any] = field(default_factory=dict)
    num_losses: dict[int, int] = field(default_factory=dict)


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
