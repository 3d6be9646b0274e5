"""Searching a batch of questions in step: from questions to search records.

Questions that can't be searched with others are searched alone, and set aside when they keep
failing. `LocalExecutor` searches batches in this process; what offers the same on Ray is in `ray`.
"""

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch

from drllm.config import SearchConfig
from drllm.errors import ConfigError, ModelError, RoutingError, TaskError
from drllm.listener import logger
from drllm.models.base.prompts import render
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import num_executions
from drllm.records.codec import digest_of
from drllm.records.resume import Chunks
from drllm.records.search import FailedQuestion, SearchRecord, TriedPath
from drllm.search.evaluator import Evaluator, Outcome, read
from drllm.search.questions import Batch, SearchQuestion
from drllm.search.retest import retested, to_retest
from drllm.search.strategies import graded, new_search
from drllm.tasks.base import Prompt

ATTEMPTS = 3  # how often a question is tried: with its batch, then alone
QUESTION_ERRORS = (
    ConfigError,  # a prompt that the chat template refuses
    ModelError,  # log-probabilities that are not finite, a prompt beyond the model's context
    RoutingError,
    TaskError,
    torch.cuda.OutOfMemoryError,  # a prompt too long for the device
)
"""What a single question can cause. Any other error ends the search."""

OnShare = Callable[[Batch, float, int, str], None]
"""Called within a batch with the share of its work that is done, the number of paths run by this
start of the search, and what is being done."""
OnStep = Callable[[float, int, str], None]  # the same for the questions of one batch


@dataclass(frozen=True, slots=True)
class Searched:
    """What became of the questions of a batch: records in order, and what failed every time."""

    records: tuple[SearchRecord, ...]
    failed: tuple[FailedQuestion, ...] = ()


def search_batch(
    routed: RoutedModel,
    batch: Batch,
    config: SearchConfig,
    *,
    parts: Chunks | None = None,
    on_step: OnStep | None = None,
) -> Searched:
    """Search a batch, setting aside the questions that fail every time.

    A batch that fails as a whole is searched question by question, which gives the same records:
    a question's tree doesn't depend on its neighbours. `parts` keeps what is done of the batch, so
    that an interrupted search loses one round, or the re-test of a few questions.
    """
    try:
        records = search_in_step(routed, batch.questions, config, parts=parts, on_step=on_step)
        return Searched(tuple(records))
    except QUESTION_ERRORS as error:
        logger.info("a batch of %d questions failed: %s", len(batch.questions), error)
    records, failed = [], []
    for number, question in enumerate(batch.questions):
        if on_step is not None:
            on_step(number / len(batch.questions), 0, "one by one")
        reason = ""
        for _ in range(ATTEMPTS - 1):
            try:
                records += search_in_step(routed, [question], config, parts=parts)
                break
            except QUESTION_ERRORS as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            failed.append(failed_question(question, reason, ATTEMPTS))
    return Searched(tuple(records), tuple(failed))


def failed_question(question: SearchQuestion, error: str, attempts: int) -> FailedQuestion:
    """Return the record of a question that is set aside."""
    return FailedQuestion(
        id=question.example.id,
        task=question.task,
        question=question.example.question,
        error=error,
        attempts=attempts,
    )


def search_in_step(
    routed: RoutedModel,
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    *,
    parts: Chunks | None = None,
    on_step: OnStep | None = None,
) -> list[SearchRecord]:
    """Search the paths of several questions of one task in step, each with a tree of its own.

    Every round evaluates up to `leaves_per_round` new paths of every question that isn't done, in
    one batch. A question's tree depends on its own seed and outcomes only, not on its neighbours.

    Source: Dr.LLM section 3.1.
    """
    num_run = num_new = 0  # paths; those that weren't kept by an earlier start
    share = 0.0

    def once(
        step: str, pairs: Sequence[Pair], evaluate: Callable[[], list[Outcome]]
    ) -> list[Outcome]:
        """Evaluate, or take what an earlier start of the search has kept."""
        nonlocal num_run

        def evaluate_now() -> list[Outcome]:
            nonlocal num_new
            num_new += len(pairs)
            return evaluate()

        if parts is None:
            outcomes = evaluate_now()
        else:
            what = ([question.place for question in questions], list(pairs))
            digest = digest_of([what])[:16]
            outcomes = parts.once(f"{step} {digest}", list[Outcome], evaluate_now)
        num_run += len(pairs)
        if not step.startswith("round"):
            tell("margins" if step == "margins" else "re-tests")
        return outcomes

    def tell(what: str, going: Collection[int] = ()) -> None:
        """Say how far the batch is; `going` are the questions whose search isn't over."""
        nonlocal share
        if on_step is None:
            return
        tried = [len(each.tried) for each in searches]
        for place in going:
            tried[place] = config.num_simulations + 1
        # How many of those to come are asked again is guessed from those that are known. The full
        # paths, which come first, are no sample of them.
        again = [
            len(asked_again[place])
            for place, path in to_retest(found)
            if not going or set(path) != {1}
        ]
        late = 0 if evaluator.scores_options else sum(one.reward >= 1 for one in found.values())
        share = max(share, num_run / (sum(tried) * (1 + (late + sum(again)) / len(found))))
        on_step(share, num_new, what)

    started = time.perf_counter()
    asked = [read(routed, question.prompt) for question in questions]
    # Re-tests too, before anything is run: without them no path of the question could count.
    asked_again = [[read(routed, prompt) for prompt in one.retests] for one in questions]
    evaluator = Evaluator(
        routed, asked, config.state_cache_gb, kl=config.kl, paths_per_pass=config.paths_per_pass
    )
    searches = [
        new_search(routed.num_layers, config, Random(f"{config.seed}:{one.task}:{one.example.id}"))
        for one in questions
    ]
    found: dict[Pair, Outcome] = {}

    def evaluate(pairs: Sequence[Pair]) -> list[Outcome]:
        return evaluator.with_margins(pairs, evaluator.evaluate(pairs), so_far=True)

    for number in itertools.count():
        pairs = [
            (place, decisions)
            for place, search in enumerate(searches)
            for decisions in search.ask(config.leaves_per_round)
        ]
        if not pairs:
            break
        outcomes = once(f"round {number}", pairs, partial(evaluate, pairs))
        for (place, decisions), outcome in zip(pairs, outcomes, strict=True):
            found[place, decisions] = outcome
            margin = outcome.margin if evaluator.scores_options else None  # of all paths or none
            searches[place].tell(decisions, outcome.reward, graded(margin, outcome.kl))
        tell("new paths", {place for place, _ in pairs})
    found = dict(sorted(found.items(), key=lambda item: item[0][0]))  # question by question
    if not evaluator.scores_options:
        tried, known = [*found], [*found.values()]
        right = [pair for pair, outcome in found.items() if outcome.reward >= 1]
        completed = once("margins", right, lambda: evaluator.with_margins(tried, known))
        found = dict(zip(tried, completed, strict=True))
    retests = retested(evaluator, asked_again, config, found, once)
    paths: list[list[TriedPath]] = [[] for _ in questions]
    for (place, decisions), outcome in found.items():
        paths[place].append(
            TriedPath(
                decisions=decisions,
                simulation=searches[place].tried[decisions].simulation,
                reward=outcome.reward,
                margin=outcome.margin,
                executions=float(num_executions(decisions)),
                answer=outcome.answer,
                kl=outcome.kl,
                retest=retests.get((place, decisions)),
            )
        )
    seconds = (time.perf_counter() - started) / len(questions)
    return [
        SearchRecord(
            id=question.example.id,
            task=question.task,
            question=question.example.question,
            prompt=reading.text,
            answer=question.example.answer,
            reward=question.prompt.reward,
            num_layers=routed.num_layers,
            paths=tuple(tried_paths),
            seconds=seconds,
        )
        for question, reading, tried_paths in zip(questions, asked, paths, strict=True)
    ]


@dataclass(eq=False)
class LocalExecutor:
    """Searches in this process, one batch after the other; the model has its tokenizer."""

    routed: RoutedModel
    identity: Mapping[str, Any]  # which base model it is
    runtime: Mapping[str, Any]  # how it runs: in another dtype, say, it is another search

    def texts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return what the model reads of each prompt; None where its template refuses it."""
        texts: list[str | None] = []
        for prompt in prompts:
            try:
                texts.append(render(self.routed.tokenizer, prompt.asked, chat=prompt.chat))
            except ConfigError:  # noqa: PERF203  # said when the question is searched
                texts.append(None)
        return texts

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_share: OnShare | None = None,
    ) -> Iterator[tuple[Batch, Searched]]:
        """Search batches one by one; what is done of each is kept in `chunks`, under its key."""
        for batch in batches:
            parts = None if chunks is None else chunks.within(batch.key)
            on_step = None if on_share is None else partial(on_share, batch)
            yield batch, search_batch(self.routed, batch, config, parts=parts, on_step=on_step)
