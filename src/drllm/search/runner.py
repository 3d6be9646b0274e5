"""The search as a stage: questions in, `search.jsonl` out, resumable at any moment.

Owns the blocks of questions that are searched together and committed at once, the re-test of
what they found, and resuming. Leaves choosing paths to the strategies, what a path is worth to
`evaluator`, and whose files may be gone on from to `plan`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from drllm.config import SearchConfig
from drllm.cost import executions
from drllm.errors import TaskError
from drllm.models.routed import RoutedModel
from drllm.models.sharing import Pair
from drllm.paths import Decisions, full_decisions
from drllm.records import (
    Retest,
    SearchRecord,
    TriedPath,
    new_manifest,
    read_lines,
    search_record,
    to_lines,
    write_atomically,
    write_records,
)
from drllm.search.evaluator import BlockEvaluator, Outcome
from drllm.search.plan import is_complete, new_plan, open_blocks, remove_blocks
from drllm.search.strategies import PathSearch, new_search
from drllm.tasks.base import Example, Prompt, Task, choose

OnProgress = Callable[[float, int, str], None]
"""Called with questions done (in fractions while a block runs), questions in all, and a note."""

SEARCH_FILE = "search.jsonl"
BLOCKS_FOLDER = "search.blocks"


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
        Every path tried, with reward, margin, executions and re-test.

    Raises:
        TaskError: A reward that the task can't grade, or a model without its tokenizer.

    Source: Dr.LLM section 3.1.
    """
    return search_block(routed, [example], task, config)[0]


def search_block(
    routed: RoutedModel,
    examples: Sequence[Example],
    task: Task,
    config: SearchConfig,
    on_round: Callable[[float], None] | None = None,
) -> list[SearchRecord]:
    """Search the paths of several questions in step, each with a tree of its own.

    Every round evaluates one new path of every question that isn't done, in one batch. A
    question's tree depends on its own seed and rewards only, not on its neighbours.

    Args:
        routed: The model, made with its tokenizer.
        examples: The questions; at least one.
        task: The task that they belong to.
        config: Settings of the search.
        on_round: Called after each round with the share of the block that is done.

    Returns:
        One record per question, in order.
    """
    if routed.tokenizer is None:
        raise TaskError("the search asks questions as text; give RoutedModel its tokenizer")
    started = time.perf_counter()
    reward = task.check_reward(config.reward)
    evaluator = BlockEvaluator(
        routed, [task.prompt(example, reward) for example in examples], config.state_cache_gb
    )
    searches = [
        new_search(routed.num_layers, config, Random(f"{config.seed}:{task.name}:{example.id}"))
        for example in examples
    ]
    found: list[dict[Decisions, Outcome]] = [{} for _ in examples]
    while pairs := _proposals(searches):
        for (place, decisions), outcome in zip(pairs, evaluator.evaluate(pairs), strict=True):
            found[place][decisions] = outcome
            searches[place].observe(decisions, outcome.reward)
        if on_round is not None:
            done = sum(s.num_simulations_done for s in searches)
            on_round(done / (len(searches) * config.num_simulations))
    tried = [(place, decisions) for place, paths in enumerate(found) for decisions in paths]
    completed = evaluator.with_margins(tried, [found[place][d] for place, d in tried])
    for (place, decisions), outcome in zip(tried, completed, strict=True):
        found[place][decisions] = outcome
    retests = _retest(evaluator, examples, task, config, found)
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
                    retest=retests.get((place, decisions)),
                )
                for decisions, outcome in found[place].items()
            ),
            seconds=seconds,
        )
        for place, example in enumerate(examples)
    ]


def _proposals(searches: Sequence[PathSearch]) -> list[Pair]:
    proposed = ((place, search.propose()) for place, search in enumerate(searches))
    return [(place, decisions) for place, decisions in proposed if decisions is not None]


def _retest(
    asked_first: BlockEvaluator,
    examples: Sequence[Example],
    task: Task,
    config: SearchConfig,
    found: Sequence[dict[Decisions, Outcome]],
) -> dict[Pair, Retest]:
    """Ask every question again in the task's other ways, under every path that may be a target.

    Candidates are the right paths that improve on the full path or are shorter, and the full path
    itself where it is right. The full path's margins are needed in any case, to compare with.

    Source: ours (docs/differences.md, D-05).
    """
    routed = asked_first.routed
    reward = asked_first.prompts[0].reward
    full = full_decisions(routed.num_layers)
    candidates = [
        (place, decisions)
        for place, paths in enumerate(found)
        for decisions, outcome in paths.items()
        if outcome.reward >= 1
        and (
            paths[full].reward < 1 or decisions == full or executions(decisions) < executions(full)
        )
    ]
    if not candidates:
        return {}
    places = sorted({place for place, _ in candidates})
    pairs = [*dict.fromkeys([*((place, full) for place in places), *candidates])]
    asked = {place: task.retests(examples[place], reward) for place in places}
    results: dict[Pair, list[Outcome]] = {pair: [] for pair in pairs}
    ways = []
    for way in range(max(len(prompts) for prompts in asked.values())):
        # Questions may have different numbers of ways: one with 3 options has fewer rotations.
        here = [place for place in places if way < len(asked[place])]
        as_first = list(asked_first.prompts)
        for place in here:
            as_first[place] = asked[place][way]
        ways.append((not asked_first.reads_the_same(as_first), here, as_first))
    # What reads as at first needs the states that are held; they can go before other states come.
    for reads_anew, here, prompts in sorted(ways, key=lambda way: way[0]):
        part = [pair for pair in pairs if pair[0] in here]
        if reads_anew:
            asked_first.forget()
            evaluator = BlockEvaluator(routed, [prompts[p] for p in here], config.state_cache_gb)
            asking = [(here.index(place), decisions) for place, decisions in part]
        else:
            evaluator, asking = asked_first.judged_as(prompts), part
        outcomes = evaluator.with_margins(asking, evaluator.evaluate(asking))
        for pair, outcome in zip(part, outcomes, strict=True):
            results[pair].append(outcome)
    return {
        pair: _judge(results[pair], results[pair[0], full], config.margin_tolerance)
        for pair in candidates
    }


def _judge(outcomes: list[Outcome], full: list[Outcome], tolerance: float) -> Retest:
    passed = sum(outcome.reward >= 1 for outcome in outcomes)
    # Margins are compared only over the ways in which both paths have one.
    both = [
        (mine.margin, theirs.margin)
        for mine, theirs in zip(outcomes, full, strict=True)
        if mine.margin is not None and theirs.margin is not None
    ]
    mine = sum(m for m, _ in both) / len(both) if both else None
    lost = sum(f - m for m, f in both) / len(both) if both else 0.0
    return Retest(
        passed=passed,
        asked=len(outcomes),
        margin=mine,
        survived=passed * 2 > len(outcomes) and lost <= tolerance,
    )


def run_search(
    routed: RoutedModel,
    tasks: Sequence[Task],
    config: SearchConfig,
    identity: Mapping[str, Any],
    runtime: Mapping[str, Any],
    on_progress: OnProgress | None = None,
) -> Path:
    """Search all questions of the tasks and write `search.jsonl` with its manifest.

    Blocks of questions are committed one by one; after an interruption at any moment the same
    call goes on behind the last committed block and ends with the same records as an unbroken run
    (times apart).

    Args:
        routed: The model, made with its tokenizer.
        tasks: Where the questions come from.
        config: Settings of the search.
        identity: The base model's identity, for the manifest.
        runtime: How the base model runs; another dtype, say, is another search.
        on_progress: See `OnProgress`.

    Returns:
        The path of `search.jsonl`.

    Raises:
        ConfigError: The folder holds a search with other settings, model, runtime, version or
            questions.
        TaskError: No questions, or questions that can't be had.
        RecordError: The folder can't be written, or holds a `search.jsonl` that isn't ours.
    """
    folder = Path(config.output_dir)
    output, parts = folder / SEARCH_FILE, folder / BLOCKS_FOLDER
    blocks = _blocks(tasks, config)
    plan = new_plan(blocks, config, identity, runtime)
    if is_complete(output, plan):
        remove_blocks(parts, plan)  # a kill after the manifest leaves them
        return output
    open_blocks(parts, plan, output, len(blocks))
    total = sum(len(examples) for _, examples in blocks)
    done = 0
    for number, (task, examples) in enumerate(blocks):
        part = parts / f"{number:05d}.jsonl"
        if not part.exists():
            records = search_block(
                routed,
                examples,
                task,
                config,
                _reporter(on_progress, done, len(examples), total, task.name),
            )
            write_atomically(part, to_lines(records))
        done += len(examples)
        if on_progress is not None:
            on_progress(done, total, task.name)
    records = [
        search_record(row)
        for number in range(len(blocks))
        for _, row in read_lines(parts / f"{number:05d}.jsonl")
    ]
    manifest = new_manifest("search", model=identity, config=config.to_dict(), extra={"plan": plan})
    write_records(output, records, manifest)
    remove_blocks(parts, plan)
    return output


def _reporter(
    on_progress: OnProgress | None, done: int, size: int, total: int, note: str
) -> Callable[[float], None] | None:
    if on_progress is None:
        return None
    return lambda share: on_progress(done + size * share, total, note)


def _blocks(tasks: Sequence[Task], config: SearchConfig) -> list[tuple[Task, list[Example]]]:
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    blocks: list[tuple[Task, list[Example]]] = []
    for task in tasks:
        examples = choose(task.examples(config.split, data_dir), config.limit, config.seed)
        if not examples:
            raise TaskError(f"task {task.name!r} has no questions in split {config.split!r}")
        # Questions of like length make a block: little of the batch is then padding.
        reward = task.check_reward(config.reward)
        by_length = sorted(examples, key=lambda example: _length(task.prompt(example, reward)))
        blocks += [
            (task, by_length[start : start + config.block_size])
            for start in range(0, len(by_length), config.block_size)
        ]
    return blocks


def _length(prompt: Prompt) -> int:
    return len(prompt.text) + sum(len(text) for text in prompt.continuations)
