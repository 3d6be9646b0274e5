"""Search a batch of questions: from questions to search records.

`BatchSearcher` is what the search stage does with one block of its work. The questions of a batch
are searched in lockstep: each round runs new paths of all of them in one forward batch (`rounds`).
When a batch fails, its questions are searched one by one. A question that keeps failing is set
aside.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch

from drllm.config import SearchConfig
from drllm.errors import ConfigError, ModelError, RoutingError, TaskError
from drllm.models.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import num_executions
from drllm.records.search import FailedQuestion, Retest, SearchRecord, TriedPath
from drllm.search.evaluator import Evaluator, JudgedOutcome, TokenizedPrompt, tokenize_prompt
from drllm.search.questions import Batch, SearchQuestion
from drllm.search.retest import retest_paths
from drllm.search.rounds import add_late_margins, run_rounds
from drllm.search.steps import BatchProgress, BatchSteps, OnFirstRound, PathCounter
from drllm.search.strategies import PathSearch, new_search
from drllm.tasks.examples import Prompt
from drllm.work.listener import logger
from drllm.work.run import BlockFunction, BlockSteps
from drllm.work.store import ResultStore

ATTEMPTS = 3  # attempts to search a question: the first with its batch, the others alone
QUESTION_ERRORS = (
    ConfigError,  # the chat template refuses a prompt
    ModelError,  # log-probabilities aren't finite, or a prompt is longer than the model's context
    RoutingError,
    TaskError,
    torch.cuda.OutOfMemoryError,  # a prompt is too long for the device
)
"""Errors that a single question can cause. Any other error ends the search."""


@dataclass(frozen=True, slots=True)
class BatchRecords:
    """The result of a batch."""

    records: tuple[SearchRecord, ...]  # in the questions' order
    failed: tuple[FailedQuestion, ...] = ()  # questions whose attempts all failed
    num_new: int = 0  # paths tried since the search was started or resumed


@dataclass(frozen=True)
class BatchSearcher(BlockFunction[Batch, BatchRecords]):
    """Searches a batch of questions; the function of the search's blocks.

    A batch whose worker died is searched again question by question. This gives the same records,
    since the search of a question doesn't depend on other questions. A question on which too many
    workers died is set aside.

    Attributes:
        config: The settings.
        on_first_round: Called after the first round of a batch; None in workers of Ray.
    """

    config: SearchConfig
    on_first_round: OnFirstRound | None = None

    def __call__(self, prepared: RoutedModel, data: Batch, steps: BlockSteps) -> BatchRecords:
        """Return the records of a batch, and the questions whose attempts all failed."""
        return search_batch(prepared, data, self.config, steps, self.on_first_round)

    def split(self, data: Batch) -> list[Batch]:
        """Return a batch for each question."""
        return [Batch(data.number, (question,)) for question in data.questions]

    def join(self, data: Batch, results: Sequence[BatchRecords]) -> BatchRecords:
        """Join the results of all questions, in the questions' order."""
        records: list[SearchRecord] = []
        failed: list[FailedQuestion] = []
        num_new = 0
        for result in results:
            records += result.records
            failed += result.failed
            num_new += result.num_new
        return BatchRecords(tuple(records), tuple(failed), num_new)

    def give_up(self, data: Batch, num_losses: int) -> BatchRecords:
        """Set the only question of a batch aside."""
        [question] = data.questions
        failed = make_failed_question(question, "its worker process died", num_losses)
        return BatchRecords((), (failed,))


def search_batch(
    routed: RoutedModel,
    batch: Batch,
    config: SearchConfig,
    steps: BlockSteps,
    on_first_round: OnFirstRound | None = None,
) -> BatchRecords:
    """Search a batch, and set aside the questions whose attempts all fail.

    If the batch as a whole fails, its questions are searched one by one.

    Args:
        routed: The model, with its tokenizer.
        batch: The batch.
        config: The settings.
        steps: Keeps the result of every step, so that an interruption loses only one step: a round,
            or the re-test of a few questions. Also receives the progress.
        on_first_round: Called after the first round; None calls nothing.
    """
    counter = PathCounter(steps.report)
    counted_steps = BlockSteps(steps.store, counter.report)
    try:
        records = search_in_lockstep(routed, batch.questions, config, counted_steps, on_first_round)
        return BatchRecords(tuple(records), num_new=counter.num_new)
    except QUESTION_ERRORS as error:
        logger.info("a batch of %d questions failed: %s", len(batch.questions), error)
    return _search_one_by_one(routed, batch, config, steps.store, counter)


def _search_one_by_one(
    routed: RoutedModel,
    batch: Batch,
    config: SearchConfig,
    store: ResultStore | None,
    counter: PathCounter,
) -> BatchRecords:
    records: list[SearchRecord] = []
    failed: list[FailedQuestion] = []
    for number, question in enumerate(batch.questions):
        counter.begin_attempt()
        counter.report(number / len(batch.questions), 0, "searching one by one")
        result = _search_alone(routed, question, config, store, counter)
        if isinstance(result, FailedQuestion):
            failed.append(result)
        else:
            records.append(result)
    return BatchRecords(tuple(records), tuple(failed), counter.num_new)


def _search_alone(
    routed: RoutedModel,
    question: SearchQuestion,
    config: SearchConfig,
    store: ResultStore | None,
    counter: PathCounter,
) -> SearchRecord | FailedQuestion:
    """Search a question alone up to `ATTEMPTS - 1` times: the first attempt was with its batch."""
    steps = BlockSteps(store, counter.count)
    message = ""
    for _ in range(ATTEMPTS - 1):
        counter.begin_attempt()
        try:
            return search_in_lockstep(routed, [question], config, steps)[0]
        except QUESTION_ERRORS as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return make_failed_question(question, message, ATTEMPTS)


def make_failed_question(question: SearchQuestion, error: str, attempts: int) -> FailedQuestion:
    """Return the record of a question that is set aside."""
    return FailedQuestion(
        id=question.example.id,
        task=question.task,
        question=question.example.question,
        error=error,
        attempts=attempts,
    )


def search_in_lockstep(
    routed: RoutedModel,
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    steps: BlockSteps | None = None,
    on_first_round: OnFirstRound | None = None,
) -> list[SearchRecord]:
    """Search several questions of one task in lockstep, and return their records.

    A round evaluates up to `leaves_per_round` new paths of every unfinished question in one batch.
    Each question has its own `PathSearch`, which depends only on the question's seed and outcomes,
    not on other questions. After the rounds, right paths are re-tested.

    Args:
        routed: The model, with its tokenizer.
        questions: The questions.
        config: The settings.
        steps: Keeps the result of every step, and receives the progress; None does neither.
        on_first_round: Called after the first round; None calls nothing.

    Source: Dr.LLM section 3.1.
    """
    started = time.perf_counter()
    prompts = _tokenize_prompts(routed, [question.prompt for question in questions])
    # The other prompts are tokenised now too, so that a prompt that is too long is refused before
    # any path runs.
    retest_prompts = [_tokenize_prompts(routed, question.retests) for question in questions]
    evaluator = Evaluator(routed, prompts, config.state_cache_gb, kl=config.kl)
    searches = [_new_search(routed.num_layers, question, config) for question in questions]
    batch_steps = _new_steps(questions, config, evaluator, steps or BlockSteps())
    outcomes = run_rounds(searches, evaluator, batch_steps, on_first_round)
    outcomes = add_late_margins(evaluator, outcomes, batch_steps)
    retests = retest_paths(evaluator, retest_prompts, config, outcomes, batch_steps.run_retest)
    seconds = (time.perf_counter() - started) / len(questions)
    paths = _list_paths(searches, outcomes, retests)
    return [
        _make_record(routed.num_layers, question, prompts[place], paths[place], seconds)
        for place, question in enumerate(questions)
    ]


def _tokenize_prompts(routed: RoutedModel, prompts: Sequence[Prompt]) -> list[TokenizedPrompt]:
    return [tokenize_prompt(routed, prompt) for prompt in prompts]


def _new_search(num_layers: int, question: SearchQuestion, config: SearchConfig) -> PathSearch:
    """Return the search of one question; its random numbers depend only on the seed and its id."""
    seed = f"{config.seed}:{question.task}:{question.example.id}"
    return new_search(num_layers, config, Random(seed))


def _new_steps(
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    evaluator: Evaluator,
    steps: BlockSteps,
) -> BatchSteps:
    progress = BatchProgress(
        num_simulations=config.num_simulations,
        num_retests=[len(question.retests) for question in questions],
        has_late_margins=not evaluator.scores_options,
        on_step=steps.report,
    )
    return BatchSteps(questions, steps.store, progress)


def _list_paths(
    searches: Sequence[PathSearch],
    outcomes: Mapping[Pair, JudgedOutcome],
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
