"""Who searches the batches: what every executor offers, the one in this process, and the jobs.

The executor on Ray is in `ray`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from drllm.config import SearchConfig
from drllm.errors import ConfigError, TaskError
from drllm.models.base.prompts import render
from drllm.models.routing.routed_model import RoutedModel
from drllm.records import Chunks
from drllm.search.batch import Searched, failed_question, search_batch
from drllm.search.questions import Batch
from drllm.tasks.base import Prompt

MAX_LOSSES = 3
"""Workers that a question may cost while it is searched alone, before it is set aside."""

OnShare = Callable[[Batch, float, int], None]
"""Called within a batch with the share of it that is done, and its paths tried now."""

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """One or more copies of the base model that search batches."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Which base model, for the manifest."""

    @property
    def runtime(self) -> Mapping[str, Any]:
        """How it runs; another dtype, say, is another search."""

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_share: OnShare | None = None,
    ) -> Iterator[tuple[Batch, Searched]]:
        """Search batches, and hand each over as soon as it is done, in any order.

        Batches are taken when there is somebody to search them, not before.

        Args:
            batches: What to search.
            config: Settings of the search.
            chunks: Where what is done of a batch is kept, under `key_of`.
            on_share: See `OnShare`; only executors that search one batch at a time call it.
        """


def key_of(batch: Batch) -> str:
    """Return the key under which a batch is kept."""
    return f"batch {batch.number}"


class LocalExecutor:
    """Searches in this process, one batch after the other.

    Args:
        routed: The model, made with its tokenizer.
        identity: Which base model it is.
        runtime: How it runs.

    Raises:
        TaskError: A model without its tokenizer.
    """

    def __init__(
        self, routed: RoutedModel, identity: Mapping[str, Any], runtime: Mapping[str, Any]
    ) -> None:
        if routed.tokenizer is None:
            raise TaskError("the search asks questions as text; give the model's tokenizer")
        self.routed = routed
        self.identity = identity
        self.runtime = runtime

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""
        return read_texts(self.routed, prompts)

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_share: OnShare | None = None,
    ) -> Iterator[tuple[Batch, Searched]]:
        """Search batches in order; see `Executor.search`."""
        for batch in batches:
            parts = None if chunks is None else chunks.within(key_of(batch))
            on_round = None if on_share is None else partial(on_share, batch)
            yield batch, search_batch(self.routed, batch, config, parts=parts, on_round=on_round)


def read_texts(routed: RoutedModel, prompts: Sequence[Prompt]) -> list[str | None]:
    """Return what a model reads of each prompt; None where its template refuses it."""
    return [_read_text(routed, prompt) for prompt in prompts]


def _read_text(routed: RoutedModel, prompt: Prompt) -> str | None:
    try:
        return render(routed.tokenizer, prompt.text, chat=prompt.chat)
    except ConfigError:  # said when the question is searched, and set aside there
        return None


# --- jobs for workers that may die --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """A batch to search, or one of its questions.

    Attributes:
        whole: The batch.
        place: In the batch, of the only question that is searched; None where all of them are.
    """

    whole: Batch
    place: int | None = None

    @property
    def batch(self) -> Batch:
        """What is searched, as a batch."""
        if self.place is None:
            return self.whole
        return Batch(self.whole.number, (self.whole.questions[self.place],))


class Jobs:
    """The jobs of a search.

    A batch that costs a worker is searched again question by question, which gives the same
    decisions and rewards; a question that costs workers when it is alone is set aside alone. What
    is to be done again comes before batches that nobody has seen yet, so no more batches are under
    way than jobs.

    Args:
        batches: What to search; one is taken when nothing else is left to do.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._fresh = iter(batches)
        self._again: deque[Job] = deque()
        self._losses: Counter[tuple[int, int]] = Counter()
        self._parts: dict[int, dict[int, Searched]] = {}  # of a batch, by place

    def take(self) -> Job | None:
        """Return the next job; None where there is none at the moment."""
        if self._again:
            return self._again.popleft()
        batch = next(self._fresh, None)
        return None if batch is None else Job(batch)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Take back jobs that weren't begun."""
        self._again.extend(jobs)

    @property
    def are_waiting(self) -> bool:
        """Whether something is to be done again."""
        return bool(self._again)

    def done(self, job: Job, result: Searched) -> tuple[Batch, Searched] | None:
        """Take the result of a job.

        Returns:
            A whole batch with its result; None while other questions of it are missing.
        """
        whole = job.whole
        if job.place is None:
            return whole, result
        parts = self._parts[whole.number]
        parts[job.place] = result
        if len(parts) < len(whole.questions):
            return None
        del self._parts[whole.number]
        ordered = [parts[place] for place in sorted(parts)]
        return whole, Searched(
            tuple(record for part in ordered for record in part.records),
            tuple(failed for part in ordered for failed in part.failed),
        )

    def lost(self, job: Job) -> tuple[Batch, Searched] | None:
        """Record that a worker died of a job.

        Returns:
            As `done`, of the questions that are set aside; None where they are searched again.
        """
        whole, size = job.whole, len(job.whole.questions)
        if job.place is None and size > 1:
            logger.warning(
                "a worker died while it searched batch %d; its %d questions are searched again, "
                "one by one",
                *(whole.number, size),
            )
            self._parts[whole.number] = {}
            self._again.extend(Job(whole, place) for place in range(size))
            return None
        key = whole.number, job.place or 0
        self._losses[key] += 1
        (question,) = job.batch.questions
        logger.warning(
            "a worker died while it searched question %s of %s (loss %d of at most %d)",
            *(question.example.id, question.task, self._losses[key], MAX_LOSSES),
        )
        if self._losses[key] < MAX_LOSSES:
            self._again.append(job)
            return None
        failed = failed_question(question, "its worker process died", MAX_LOSSES)
        return self.done(job, Searched((), (failed,)))
