"""Search a batch of questions: from questions to search records.

The questions of a batch are searched in step: each round runs new paths of all of them in one
batch of the model. When a batch fails, its questions are searched one by one. A question that keeps
failing is set aside. `LocalExecutor` searches batches in this process, and `ray.RayExecutor`
searches them on Ray.

The results of an unfinished search are kept on disk by `Chunks`. In this module `chunks` are those
of the whole search, and `parts` are the chunks of one batch.
"""

import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, Protocol

import torch

from drllm.config import SearchConfig
from drllm.errors import ConfigError, ModelError, RoutingError, TaskError
from drllm.models.base.prompts import render
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import full_decisions, num_executions
from drllm.records.codec import hash_values
from drllm.records.resume import Chunks
from drllm.records.search import FailedQuestion, Retest, SearchRecord, TriedPath
from drllm.search.evaluator import Evaluator, Outcome, TokenizedPrompt, tokenize_prompt
from drllm.search.questions import Batch, SearchQuestion
from drllm.search.retest import Evaluate, pairs_to_retest, retest_paths
from drllm.search.strategies import PathSearch, new_search, path_score
from drllm.tasks.examples import Prompt
from drllm.work.listener import logger

ATTEMPTS = 3  # attempts to search a question: the first with its batch, the others alone
QUESTION_ERRORS = (
    ConfigError,  # the chat template refuses a prompt
    ModelError,  # log-probabilities aren't finite, or a prompt is longer than the model's context
    RoutingError,
    TaskError,
    torch.cuda.OutOfMemoryError,  # a prompt is too long for the device
)
"""Errors that a single question can cause. Any other error ends the search."""


class OnStep(Protocol):
    """A function that gets the progress of one batch after each step."""

    def __call__(self, share: float, num_paths: int, step: str, /) -> None:
        """Take note of the progress.

        Args:
            share: The share of the batch's work that is done, from 0 to 1.
            num_paths: Number of the batch's paths that were run since the search was started or
                resumed.
            step: The finished step in words, such as "trying paths".
        """


class OnBatchStep(Protocol):
    """A function that gets a batch and its progress; see `OnStep`."""

    def __call__(self, batch: Batch, share: float, num_paths: int, step: str, /) -> None:
        """Take note of the progress."""


class Executor(Protocol):
    """Searches batches with a copy of the base model, in this process or in others."""

    identity: Mapping[str, Any]  # identity of the base model
    runtime: Mapping[str, Any]  # how the model runs, such as its dtype and device

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return each prompt as the model reads it; None if the chat template refuses a prompt."""

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_batch_step: "OnBatchStep | None" = None,
    ) -> "Iterator[tuple[Batch, BatchRecords]]":
        """Search batches, and yield each with its records, in any order.

        Args:
            batches: The batches.
            config: The settings.
            chunks: Keeps the results of steps, so that an interrupted batch can be resumed; None
                keeps nothing.
            on_batch_step: Gets the progress within a batch, if the executor knows it.
        """


@dataclass(frozen=True, slots=True)
class BatchRecords:
    """The result of a batch."""

    records: tuple[SearchRecord, ...]  # in the questions' order
    failed: tuple[FailedQuestion, ...] = ()  # questions whose attempts all failed


def search_batch(
    routed: RoutedModel,
    batch: Batch,
    config: SearchConfig,
    *,
    parts: Chunks | None = None,
    on_step: OnStep | None = None,
) -> BatchRecords:
    """Search a batch, and set aside the questions whose attempts all fail.

    If the batch as a whole fails, its questions are searched one by one. This gives the same
    records, since the search of a question doesn't depend on other questions.

    Args:
        routed: The model, with its tokenizer.
        batch: The batch.
        config: The settings.
        parts: Keeps the result of every step, so that an interruption loses only one step: a round,
            or the re-test of a few questions. None keeps nothing.
        on_step: Gets the progress.
    """
    try:
        records = search_in_step(routed, batch.questions, config, parts=parts, on_step=on_step)
        return BatchRecords(tuple(records))
    except QUESTION_ERRORS as error:
        logger.info("a batch of %d questions failed: %s", len(batch.questions), error)
    return _search_one_by_one(routed, batch, config, parts, on_step)


def _search_one_by_one(
    routed: RoutedModel,
    batch: Batch,
    config: SearchConfig,
    parts: Chunks | None,
    on_step: OnStep | None,
) -> BatchRecords:
    records: list[SearchRecord] = []
    failed: list[FailedQuestion] = []
    for number, question in enumerate(batch.questions):
        if on_step is not None:
            on_step(number / len(batch.questions), 0, "searching one by one")
        result = _search_alone(routed, question, config, parts)
        if isinstance(result, FailedQuestion):
            failed.append(result)
        else:
            records.append(result)
    return BatchRecords(tuple(records), tuple(failed))


def _search_alone(
    routed: RoutedModel, question: SearchQuestion, config: SearchConfig, parts: Chunks | None
) -> SearchRecord | FailedQuestion:
    """Search a question alone up to `ATTEMPTS - 1` times: the first attempt was with its batch."""
    message = ""
    for _ in range(ATTEMPTS - 1):
        try:
            return search_in_step(routed, [question], config, parts=parts)[0]
        except QUESTION_ERRORS as error:  # noqa: PERF203
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return failed_question(question, message, ATTEMPTS)


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
    """Search several questions of one task in step, and return their records.

    A round evaluates up to `leaves_per_round` new paths of every unfinished question in one batch.
    Each question has its own `PathSearch`, which depends only on the question's seed and outcomes,
    not on other questions. After the rounds, right paths are re-tested.

    Args:
        routed: The model, with its tokenizer.
        questions: The questions.
        config: The settings.
        parts: Keeps the result of every step; None keeps nothing.
        on_step: Gets the progress.

    Source: Dr.LLM section 3.1.
    """
    started = time.perf_counter()
    prompts = _tokenize_prompts(routed, [question.prompt for question in questions])
    # The other prompts are tokenised now too, so that a prompt that is too long is refused before
    # any path runs.
    retest_prompts = [_tokenize_prompts(routed, question.retests) for question in questions]
    evaluator = Evaluator(routed, prompts, config.state_cache_gb, kl=config.kl)
    searches = [_start_search(routed.num_layers, question, config) for question in questions]
    outcomes: dict[Pair, Outcome] = {}
    progress = BatchProgress(
        searches=searches,
        outcomes=outcomes,
        num_simulations=config.num_simulations,
        num_retests=[len(question.retests) for question in questions],
        has_late_margins=not evaluator.scores_options,
        on_step=on_step,
    )
    steps = BatchSteps(questions, parts, progress)
    _run_rounds(searches, evaluator, config, steps, outcomes)
    sorted_outcomes = _sort_by_question(outcomes)
    completed_outcomes = _add_late_margins(evaluator, sorted_outcomes, steps)
    retests = retest_paths(evaluator, retest_prompts, config, completed_outcomes, steps.run_retest)
    seconds = (time.perf_counter() - started) / len(questions)
    paths = _list_paths(searches, completed_outcomes, retests)
    return [
        _make_record(routed.num_layers, question, prompts[place], paths[place], seconds)
        for place, question in enumerate(questions)
    ]


def _tokenize_prompts(routed: RoutedModel, prompts: Sequence[Prompt]) -> list[TokenizedPrompt]:
    return [tokenize_prompt(routed, prompt) for prompt in prompts]


def _start_search(num_layers: int, question: SearchQuestion, config: SearchConfig) -> PathSearch:
    """Start the search of one question; its random numbers depend only on the seed and its id."""
    seed = f"{config.seed}:{question.task}:{question.example.id}"
    return new_search(num_layers, config, Random(seed))


def _run_rounds(
    searches: Sequence[PathSearch],
    evaluator: Evaluator,
    config: SearchConfig,
    steps: "BatchSteps",
    outcomes: dict[Pair, Outcome],
) -> None:
    """Evaluate new paths of all questions, round by round, until every search is over.

    Every path's outcome is added to `outcomes`.
    """
    for number in itertools.count():
        pairs = _ask_for_paths(searches, config.leaves_per_round)
        if not pairs:
            return
        evaluate = partial(_evaluate_new, evaluator)
        round_outcomes = steps.run(f"round {number}", pairs, evaluate)
        for (place, decisions), outcome in zip(pairs, round_outcomes, strict=True):
            outcomes[place, decisions] = outcome
            margin = None
            if evaluator.scores_options:  # right generated answers get their margins later
                margin = outcome.margin
            score = path_score(margin, outcome.kl)
            searches[place].tell(decisions, outcome.reward, score)
        steps.progress.report("trying paths", unfinished={place for place, _ in pairs})


def _ask_for_paths(searches: Sequence[PathSearch], leaves_per_round: int) -> list[Pair]:
    """Ask every search for its next paths."""
    pairs: list[Pair] = []
    for place, search in enumerate(searches):
        pairs += [(place, decisions) for decisions in search.ask(leaves_per_round)]
    return pairs


def _evaluate_new(evaluator: Evaluator, pairs: Sequence[Pair]) -> list[Outcome]:
    """Evaluate paths, and add the margins that no later path can change."""
    return evaluator.with_margins(pairs, evaluator.evaluate(pairs), wrong_only=True)


def _sort_by_question(outcomes: Mapping[Pair, Outcome]) -> dict[Pair, Outcome]:
    """Sort outcomes by question; the paths of a question stay in the order in which they ran."""
    pairs = sorted(outcomes, key=lambda pair: pair[0])
    return {pair: outcomes[pair] for pair in pairs}


def _add_late_margins(
    evaluator: Evaluator, outcomes: dict[Pair, Outcome], steps: "BatchSteps"
) -> dict[Pair, Outcome]:
    """Add the margins of right generated answers, now that all wrong answers are known."""
    if evaluator.scores_options:
        return outcomes
    pairs = list(outcomes)

    def add_margins(_: Sequence[Pair]) -> list[Outcome]:
        return evaluator.with_margins(pairs, list(outcomes.values()))

    # Only right answers are scored, so only they count as work. The result has all outcomes.
    right_pairs = [pair for pair, outcome in outcomes.items() if outcome.is_right]
    completed_outcomes = steps.run("margins", right_pairs, add_margins)
    steps.progress.report("scoring answers")
    return dict(zip(pairs, completed_outcomes, strict=True))


def _list_paths(
    searches: Sequence[PathSearch],
    outcomes: Mapping[Pair, Outcome],
    retests: Mapping[Pair, Retest],
) -> list[list[TriedPath]]:
    """Return the paths of each question, in the order of `outcomes`."""
    paths: list[list[TriedPath]] = [[] for _ in searches]
    for (place, decisions), outcome in outcomes.items():
        path = TriedPath(
            decisions=decisions,
            simulation=searches[place].trials[decisions].simulation,
            reward=outcome.reward,
            margin=outcome.margin,
            executions=float(num_executions(decisions)),
            answer=outcome.answer,
            kl=outcome.kl,
            retest=retests.get((place, decisions)),
        )
        paths[place].append(path)
    return paths


def _make_record(
    num_layers: int,
    question: SearchQuestion,
    prompt: TokenizedPrompt,
    paths: Sequence[TriedPath],
    seconds: float,
) -> SearchRecord:
    return SearchRecord(
        id=question.example.id,
        task=question.task,
        question=question.example.question,
        prompt=prompt.text,
        answer=question.example.answer,
        reward=question.prompt.reward,
        num_layers=num_layers,
        paths=tuple(paths),
        seconds=seconds,
    )


@dataclass
class BatchProgress:
    """Estimates which share of a batch is done, and reports the share.

    The work is counted in runs: a path on one prompt. A path runs once in the rounds, and once more
    for each other prompt of a re-test. A right generated answer counts once more for its margin.
    """

    searches: Sequence[PathSearch]
    outcomes: Mapping[Pair, Outcome]  # outcomes of all paths so far
    num_simulations: int  # maximum number of simulations of a question
    num_retests: Sequence[int]  # for each question, the number of its other prompts
    has_late_margins: bool  # whether right answers get their margins after the rounds
    on_step: OnStep | None
    num_run: int = 0  # finished runs, including runs of an interrupted search
    num_new: int = 0  # runs since the search was started or resumed
    share: float = 0.0  # the largest share reported so far, so that the share never falls

    def report(self, step: str, unfinished: Collection[int] = ()) -> None:
        """Report a finished step.

        Args:
            step: The step in words.
            unfinished: Places of the questions that may still try paths; none after the rounds.
        """
        if self.on_step is None:
            return
        self.share = max(self.share, self.num_run / self._estimate_runs(unfinished))
        self.on_step(self.share, self.num_new, step)

    def _estimate_runs(self, unfinished: Collection[int]) -> float:
        """Estimate the number of runs of the whole batch.

        The later steps are extrapolated: future paths need as many further runs, on average, as the
        paths so far.
        """
        num_paths = 0
        for place, search in enumerate(self.searches):
            if place in unfinished:
                num_paths += self.num_simulations + 1
            else:
                num_paths += len(search.trials)
        num_further_runs = 0
        for place, decisions in pairs_to_retest(self.outcomes):
            # Every question's full path is among its first paths. Until the rounds are over, it
            # would make the mean too large.
            is_full = decisions == full_decisions(len(decisions))
            if not unfinished or not is_full:
                num_further_runs += self.num_retests[place]
        if self.has_late_margins:
            num_further_runs += sum(outcome.is_right for outcome in self.outcomes.values())
        return num_paths * (1 + num_further_runs / len(self.outcomes))


@dataclass(frozen=True)
class BatchSteps:
    """Runs the steps of a batch, or reads their results if an interrupted search kept them.

    A step is a round, the late margins, or a part of the re-test.
    """

    questions: Sequence[SearchQuestion]
    parts: Chunks | None  # keeps the results; None keeps nothing
    progress: BatchProgress

    def run(self, name: str, pairs: Sequence[Pair], evaluate: Evaluate) -> list[Outcome]:
        """Return the outcomes of a step, from disk if they are there.

        The name, the questions and the pairs identify the outcomes on disk.
        """

        def evaluate_now() -> list[Outcome]:
            self.progress.num_new += len(pairs)
            return evaluate(pairs)

        if self.parts is None:
            outcomes = evaluate_now()
        else:
            places = [question.place for question in self.questions]
            digest = hash_values([(places, list(pairs))])[:16]
            outcomes = self.parts.get_or_make(f"{name} {digest}", list[Outcome], evaluate_now)
        self.progress.num_run += len(pairs)
        return outcomes

    def run_retest(self, name: str, pairs: Sequence[Pair], evaluate: Evaluate) -> list[Outcome]:
        """Run a step of the re-test, and report it."""
        outcomes = self.run(name, pairs, evaluate)
        self.progress.report("re-testing")
        return outcomes


@dataclass(eq=False)
class LocalExecutor:
    """Searches in this process, one batch after the other."""

    routed: RoutedModel  # the model, with its tokenizer
    identity: Mapping[str, Any]  # identity of the base model
    runtime: Mapping[str, Any]  # how the model runs, such as its dtype and device

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | None]:
        """Return each prompt as the model reads it; None if the chat template refuses a prompt."""
        return [self._render(prompt) for prompt in prompts]

    def _render(self, prompt: Prompt) -> str | None:
        try:
            return render(self.routed.tokenizer, prompt.content, chat=prompt.chat)
        except ConfigError:  # the search of this question will raise the error again and record it
            return None

    def search(
        self,
        batches: Iterable[Batch],
        config: SearchConfig,
        chunks: Chunks | None = None,
        on_batch_step: OnBatchStep | None = None,
    ) -> Iterator[tuple[Batch, BatchRecords]]:
        """Search batches in their order; see `Executor.search`."""
        for batch in batches:
            parts = None if chunks is None else chunks.within(batch.key)
            on_step = None if on_batch_step is None else partial(on_batch_step, batch)
            result = search_batch(self.routed, batch, config, parts=parts, on_step=on_step)
            yield batch, result
