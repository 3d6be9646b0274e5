"""Searching a block of questions in step: from examples to search records.

Owns the rounds in which all questions of a block advance together, and the record of each. Leaves
choosing paths to the strategies, what a path is worth to `evaluator`, asking again in other ways
to `retest`, and what happens to a question that can't be searched to `attempts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random

from drllm.config import SearchConfig
from drllm.cost import executions
from drllm.errors import TaskError
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.prefix_sharing import Pair
from drllm.paths import Decisions
from drllm.records import SearchRecord, TriedPath
from drllm.search.evaluator import BlockEvaluator, Outcome, check_fits
from drllm.search.retest import retested
from drllm.search.strategies import PathSearch, graded, new_search
from drllm.tasks.base import Example, Task

OnRound = Callable[[float, int], None]
"""Called after each round with the share of the block that is done, and the paths tried so far."""


def search_path(
    routed: RoutedModel, example: Example, task: Task, config: SearchConfig
) -> SearchRecord:
    """Search the paths of one question.

    Args:
        routed: The model, made with its tokenizer.
        example: The question.
        task: The task that it belongs to.
        config: Settings of the search.

    Returns:
        Every path tried, with reward, margin, executions, KL and re-test.

    Raises:
        TaskError: A reward that the task can't grade, or a model without its tokenizer.
        ModelError: A question that is too long for the model's context in one of the ways that
            it is asked; or log-probabilities that aren't finite.

    Source: Dr.LLM section 3.1.
    """
    return search_block(routed, [example], task, config)[0]


def search_block(
    routed: RoutedModel,
    examples: Sequence[Example],
    task: Task,
    config: SearchConfig,
    on_round: OnRound | None = None,
) -> list[SearchRecord]:
    """Search the paths of several questions in step, each with a tree of its own.

    Every round evaluates up to `leaves_per_round` new paths of every question that isn't done, in
    one batch. A question's tree depends on its own seed and outcomes only, not on its neighbours.

    Args:
        routed: The model, made with its tokenizer.
        examples: The questions; at least one.
        task: The task that they belong to.
        config: Settings of the search.
        on_round: See `OnRound`.

    Returns:
        One record per question, in order.

    Raises:
        TaskError: A reward that the task can't grade, or a model without its tokenizer.
        ModelError: As in `search_path`.
    """
    check_tokenizer(routed)
    started = time.perf_counter()
    reward = task.check_reward(config.reward)
    prompts = [task.prompt(example, reward) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        # Re-tests too, before anything is run: without them no path of the question could count.
        for one in (prompt, *task.retests(example, reward)):
            check_fits(routed, one)
    evaluator = BlockEvaluator(
        routed,
        prompts,
        config.state_cache_gb,
        kl=config.kl,
        paths_per_pass=config.paths_per_pass,
    )
    searches = [
        new_search(routed.num_layers, config, Random(f"{config.seed}:{task.name}:{example.id}"))
        for example in examples
    ]
    found: list[dict[Decisions, Outcome]] = [{} for _ in examples]
    while pairs := _proposals(searches, config.leaves_per_round):
        for (place, decisions), outcome in zip(pairs, evaluator.evaluate(pairs), strict=True):
            found[place][decisions] = outcome
            score = graded(outcome.margin, outcome.kl)
            searches[place].tell(decisions, outcome.reward, score)
        if on_round is not None:
            done = sum(search.num_simulations_done for search in searches)
            on_round(done / (len(searches) * config.num_simulations), sum(map(len, found)))
    tried = [(place, decisions) for place, paths in enumerate(found) for decisions in paths]
    completed = evaluator.with_margins(tried, [found[place][d] for place, d in tried])
    for (place, decisions), outcome in zip(tried, completed, strict=True):
        found[place][decisions] = outcome
    retests = retested(evaluator, examples, task, config, found)
    seconds = (time.perf_counter() - started) / len(examples)
    return [
        SearchRecord(
            id=example.id,
            task=task.name,
            question=example.question,
            prompt=evaluator.texts[place],
            answer=example.answer,
            reward=reward,
            num_layers=routed.num_layers,
            paths=tuple(
                TriedPath(
                    decisions=decisions,
                    simulation=searches[place].tried[decisions].simulation,
                    reward=outcome.reward,
                    margin=outcome.margin,
                    executions=executions(decisions),
                    answer=None if outcome.answer is None else outcome.answer.text,
                    kl=outcome.kl,
                    retest=retests.get((place, decisions)),
                )
                for decisions, outcome in found[place].items()
            ),
            seconds=seconds,
        )
        for place, example in enumerate(examples)
    ]


def check_tokenizer(routed: RoutedModel) -> None:
    """Refuse a model that can't read texts.

    Raises:
        TaskError: Saying what to give it.
    """
    if routed.tokenizer is None:
        raise TaskError("the search asks questions as text; give RoutedModel its tokenizer")


def _proposals(searches: Sequence[PathSearch], most: int) -> list[Pair]:
    return [
        (place, decisions)
        for place, search in enumerate(searches)
        for decisions in search.ask(most)
    ]
