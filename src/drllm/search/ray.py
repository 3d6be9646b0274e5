"""Batches searched by Ray: one worker process a device, on this machine or on a cluster.

Keeps every worker busy with a bounded number of batches, and replaces a worker that died. Ray is
imported only when an executor is made.
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
from drllm.search.batch import LocalExecutor, OnShare, Searched, failed_question, search_batch
from drllm.search.questions import Batch
from drllm.tasks.base import Prompt

BATCHES_A_WORKER = 2
"""Batches that a worker holds: the one it searches and the next, so that it never waits."""
MAX_LOSSES = 3
"""Workers that a question may cost while it is searched alone, before it is set aside."""
MAX_FAILED_STARTS = 3  # workers in a row that may die while they load the model
START_TIMEOUT_S = 600.0  # how long nothing at all may happen while no worker has a model yet
CONNECT_TIMEOUT_S = 5.0
"""How long it may take until somebody answers at an address; Ray itself tries for minutes."""


class Worker:
    """A process with a copy of the base model; Ray makes it an actor."""

    def load(
        self, model: ModelConfig, num_threads: int, num_sharing: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the base model; return which it is and how it runs.

        So many workers share the memory that it is in.
        """
        torch.set_num_threads(num_threads)
        share_memory(num_sharing)
        with quiet():
            base = load(model)
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        self.local = LocalExecutor(routed, base.identity, base.runtime)
        return base.identity, base.runtime

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Do what `LocalExecutor.texts` does."""
        return self.local.texts(prompts)

    def search(self, batch: Batch, config: SearchConfig, parts: Chunks | None) -> Searched:
        """Search a batch."""
        with quiet():
            return search_batch(self.local.routed, batch, config, parts=parts)


@dataclass(eq=False)
class Seat:
    """A device's place: the worker that has it now, and its promised results, the next first."""

    worker: Any
    starting: Any  # Ray's promise that the model is loaded; None once it is
    jobs: deque[tuple[Any, Batch]] = field(default_factory=deque)


class RayExecutor:
    """Searches batches on Ray, one worker a device, as `LocalExecutor` does; a context manager.

    A worker that dies is replaced, and what it had to do is searched again: its records are the
    same, wherever and however often a batch is searched. With the device `auto` each worker has a
    GPU of its own where Ray has any, else the CPU; unless their number is given there is one a GPU,
    or else one a CPU core. Without a cluster's address Ray is started on this machine, and ended
    afterwards; one that this process has started already is used as it is.
    """

    def __init__(
        self, model: ModelConfig, *, num_workers: int | None = None, address: str | None = None
    ) -> None:
        need("ray", "--executor ray")
        import ray

        self.ray: Any = ray
        losses = ("RayActorError", "ObjectLostError", "OutOfMemoryError", "WorkerCrashedError")
        self._lost = tuple(getattr(ray.exceptions, name) for name in losses)
        self._is_ours = not ray.is_initialized()
        self._is_here = self._is_ours and address is None
        self.seats: list[Seat] = []
        self.identity: Mapping[str, Any] = {}
        self.runtime: Mapping[str, Any] = {}
        self._failed_starts = 0
        if self._is_ours:
            connect(ray, address, num_workers)
        try:
            self._plan_workers(model, num_workers)
            self.seats = [self._seat() for _ in range(self.num_workers)]
            while not self.identity:
                for seat in self._news():
                    self._take_in(seat)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers, and Ray where it was started for them."""
        for seat in self.seats:
            self.ray.kill(seat.worker)
        self.seats = []
        if self._is_ours:
            self.ray.shutdown()

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""
        seat = next(seat for seat in self.seats if seat.starting is None)
        texts: list[str | None] = self.ray.get(seat.worker.texts.remote(list(prompts)))
        return texts

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_share: OnShare | None = None,
    ) -> Iterator[tuple[Batch, Searched]]:
        """Search batches on all workers, and hand them over in any order.

        The caller's pace is the limit: no more batches are out than the workers can hold. Workers
        of a cluster keep nothing of a batch under way: they may not see the folder.
        """
        jobs = Jobs(batches)
        # A worker gets its share of the memory; the manifest keeps what the user has given.
        if config.state_cache_gb is not None:
            share = config.state_cache_gb / self.num_sharing
            config = dataclasses.replace(config, state_cache_gb=share)
        stored = self.ray.put(config)
        kept = chunks if self._is_here else None
        while True:
            for seat in self.seats:
                has_begun = seat.starting is None
                while has_begun and len(seat.jobs) < BATCHES_A_WORKER and (batch := jobs.take()):
                    parts = None if kept is None else kept.within(batch.key)
                    seat.jobs.append((seat.worker.search.remote(batch, stored, parts), batch))
            if not jobs.again and not any(seat.jobs for seat in self.seats):
                return
            for seat in self._news():
                if seat.starting is not None:
                    self._take_in(seat)
                    continue
                promised, batch = seat.jobs[0]
                try:
                    result = self._get(promised)
                except self._lost:
                    # What waited after the first job wasn't begun, and isn't to blame.
                    jobs.again.extend([waiting for _, waiting in seat.jobs][1:])
                    self._replace(seat)
                    finished = jobs.lost(batch)
                else:
                    seat.jobs.popleft()
                    finished = jobs.done(batch, result)
                if finished is not None:
                    yield finished

    def _plan_workers(self, model: ModelConfig, num_workers: int | None) -> None:
        if ":" in model.device:
            raise ConfigError(
                f"--device {model.device} doesn't go with --executor ray, which gives each worker "
                f"a device of its own; give --device {model.device.partition(':')[0]}"
            )
        resources, nodes = self.ray.cluster_resources(), self.ray.nodes()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        is_gpu = model.device == "cuda" or (model.device == "auto" and gpus > 0)
        device, there = ("GPU", gpus) if is_gpu else ("CPU core", cores)
        self.num_workers = max(1, there) if num_workers is None else num_workers
        if self.num_workers > there:
            raise ConfigError(
                f"--executor ray: {self.num_workers} workers need a {device} each, and Ray has "
                f"{there}; give --num-workers {there}"
                if there
                else f"--device is {model.device!r}, but Ray has no {device}; give --device cpu"
            )
        # A Ray of ours may count more cores than there are, so that workers can share them.
        real = min(cores, os.cpu_count() or 1) if len(nodes) == 1 else cores
        self.num_threads = max(1, real // self.num_workers)
        # As many as the node with the most cores has room for; a GPU's memory is one worker's own.
        largest = max(int(node["Resources"].get("CPU", 0)) for node in nodes)
        on_a_node = min(self.num_workers, max(1, largest // self.num_threads))
        self.num_sharing = 1 if is_gpu else on_a_node
        chosen = ("cuda" if is_gpu else "cpu") if model.device == "auto" else model.device
        self._model = dataclasses.replace(model, device=chosen)
        self._options = {"num_gpus": int(is_gpu), "num_cpus": 0 if is_gpu else self.num_threads}

    def _seat(self) -> Seat:
        worker = self.ray.remote(Worker).options(**self._options).remote()
        return Seat(worker, worker.load.remote(self._model, self.num_threads, self.num_sharing))

    def _replace(self, seat: Seat) -> None:
        """Start a new worker in the place of one that died."""
        self.ray.kill(seat.worker)  # one that can't be reached may still live
        self.seats[self.seats.index(seat)] = self._seat()

    def _news(self) -> list[Seat]:
        """Wait until a worker has loaded the model, done its first job, or died."""
        seats = {
            seat.jobs[0][0] if seat.starting is None else seat.starting: seat
            for seat in self.seats
            if seat.starting is not None or seat.jobs
        }
        is_started = any(seat.starting is None for seat in self.seats)
        timeout = None if is_started else START_TIMEOUT_S
        done, others = self.ray.wait(list(seats), num_returns=1, timeout=timeout)
        if not done:
            raise ModelError(
                f"no worker of Ray has loaded the model within {START_TIMEOUT_S:.0f} s; "
                f"'ray status' says what its nodes lack"
            )
        if others:
            done += self.ray.wait(others, num_returns=len(others), timeout=0)[0]
        return [seats[promised] for promised in done]

    def _take_in(self, seat: Seat) -> None:
        """Note that a worker has loaded the model; one whose model differs is refused."""
        try:
            identity, runtime = self._get(seat.starting)
        except self._lost as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ModelError(
                    f"{MAX_FAILED_STARTS} workers in a row died while they loaded the model; give "
                    f"fewer --num-workers, or a machine with more memory"
                ) from error
            self._replace(seat)
            return
        if not self.identity:
            self.identity, self.runtime = identity, runtime
        theirs = {**identity, **runtime}
        for name, ours in {**self.identity, **self.runtime}.items():
            if ours != theirs.get(name):
                raise ModelError(
                    f"the workers' models differ: one has {name} {ours!r}, another "
                    f"{theirs.get(name)!r}; give --dtype and --revision, and nodes that are alike"
                )
        self._failed_starts = 0
        seat.starting = None

    def _get(self, promised: Any) -> Any:
        """Return what was promised; an error of ours that a worker met is raised as it was."""
        try:
            return self.ray.get(promised)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DrllmError):
                raise error.cause from None
            raise


class Jobs:
    """The batches of a search, for workers that may die.

    A batch that costs a worker is searched again question by question, which gives the same
    decisions and rewards; a question that costs workers when it is alone is set aside alone. What
    is to be done `again`, whole batches or one question of a batch, comes before batches that
    nobody has seen yet, so no more batches are under way than jobs.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.again: deque[Batch] = deque()
        self._fresh = iter(batches)
        self._losses: Counter[int] = Counter()  # by the question's place in the search
        self._divided: dict[int, tuple[Batch, dict[int, Searched]]] = {}  # results by place

    def take(self) -> Batch | None:
        """Return the next job; None where there is none at the moment."""
        return self.again.popleft() if self.again else next(self._fresh, None)

    def done(self, job: Batch, result: Searched) -> tuple[Batch, Searched] | None:
        """Return a whole batch with its result; None while other questions of it are missing."""
        if job.number not in self._divided:
            return job, result
        whole, parts = self._divided[job.number]
        parts[job.questions[0].place] = result
        if len(parts) < len(whole.questions):
            return None
        del self._divided[job.number]
        ordered = [parts[question.place] for question in whole.questions]
        return whole, Searched(
            tuple(record for part in ordered for record in part.records),
            tuple(failed for part in ordered for failed in part.failed),
        )

    def lost(self, job: Batch) -> tuple[Batch, Searched] | None:
        """Record that a worker died of a job; returns as `done`, once questions are set aside."""
        if len(job.questions) > 1:
            logger.warning(
                "a worker died while it searched batch %d; its %d questions are searched again, "
                "one by one",
                *(job.number, len(job.questions)),
            )
            self._divided[job.number] = job, {}
            self.again.extend(Batch(job.number, (question,)) for question in job.questions)
            return None
        (question,) = job.questions
        self._losses[question.place] += 1
        logger.warning(
            "a worker died while it searched question %s of %s (loss %d of at most %d)",
            *(question.example.id, question.task, self._losses[question.place], MAX_LOSSES),
        )
        if self._losses[question.place] < MAX_LOSSES:
            self.again.append(job)
            return None
        failed = failed_question(question, "its worker process died", MAX_LOSSES)
        return self.done(job, Searched((), (failed,)))


def connect(ray: Any, address: str | None, num_workers: int | None) -> None:
    """Start Ray on this machine, with cores for so many workers at least, or join a cluster.

    The address is HOST:PORT, or `auto` for the cluster that `RAY_ADDRESS` names or Ray finds on
    this machine. One that is none, or at which there is no cluster, is a ConfigError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    silent: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cores = max(os.cpu_count() or 1, num_workers or 1)
        # A RAY_ADDRESS in the environment isn't asked: without --ray-address, this machine.
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **silent)
        return
    found = re.fullmatch(r"([^/]+):([0-9]{1,5})", address)
    if address != "auto" and not (found and int(found[2]) < 1 << 16):
        raise ConfigError(
            f"--ray-address is {address!r}; give HOST:PORT of a running cluster, 'auto' for one "
            f"on this machine, or leave it out to start one"
        )
    try:
        if found:
            host = found[1].strip("[]")  # an IPv6 address stands in brackets
            socket.create_connection((host, int(found[2])), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, **silent)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray-address {address!r} can't be reached ({' '.join(str(error).split())[:200]}); "
            f"give HOST:PORT of a running cluster, as 'ray start' has said it, or leave it out"
        ) from error
