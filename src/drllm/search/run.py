"""The search as a stage: questions in, `search.jsonl` out, resumable at any moment.

Owns the run: what is still to be done, committing block by block, and the files at the end.
Leaves which questions are asked to `questions`, the work to an executor, whose files may be gone
on from to `plan` and `commits`, and the search of a block to `block`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.config import SearchConfig
from drllm.errors import TaskError
from drllm.records import (
    FailedQuestion,
    clear_half_written,
    manifest_path,
    new_manifest,
    only_writer,
    to_lines,
    write_atomically,
    write_records,
)
from drllm.search.block import search_block, search_path
from drllm.search.commits import Commits
from drllm.search.counts import Tally, tally
from drllm.search.executors import Executor
from drllm.search.plan import is_complete, new_plan
from drllm.search.questions import Block, blocks_of, num_questions
from drllm.tasks.base import Prompt, Task

__all__ = ["FAILED_FILE", "SEARCH_FILE", "Status", "run_search", "search_block", "search_path"]

SEARCH_FILE = "search.jsonl"
FAILED_FILE = "search.failed.jsonl"
HOPELESS = 16
"""Questions that may fail before the first one succeeds; then something else is wrong."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a search is.

    Attributes:
        done: Questions done, those of an earlier run included; a fraction while a block runs.
        total: Questions in all.
        task: The task that was worked on last.
        found: What the blocks that are done hold, counted.
        fresh_paths: Paths tried by this run.
    """

    done: float
    total: int
    task: str
    found: Tally
    fresh_paths: int


OnBegin = Callable[[Mapping[str, str]], None]
"""Called before a block is searched, with one prompt of each task as the model reads it."""
OnProgress = Callable[[Status], None]


def run_search(
    executor: Executor,
    tasks: Sequence[Task],
    config: SearchConfig,
    on_progress: OnProgress | None = None,
    on_begin: OnBegin | None = None,
) -> Path:
    """Search all questions of the tasks and write `search.jsonl` with its manifest.

    Blocks of questions are committed one by one; after an interruption at any moment the same
    call goes on behind the committed blocks and ends with the same records as an unbroken run
    (times apart). Questions that fail every time are set aside in `search.failed.jsonl`.

    Args:
        executor: Who searches, with the base model.
        tasks: Where the questions come from.
        config: Settings of the search.
        on_progress: Called after each round or block.
        on_begin: See `OnBegin`; not called where the search is complete already.

    Returns:
        The path of `search.jsonl`.

    Raises:
        ConfigError: The folder holds a search with other settings, model, runtime, version or
            questions; a shard that makes no sense.
        TaskError: No questions, questions that can't be had, or every question failed.
        RecordError: The folder can't be written, another search writes to it, or it holds a
            `search.jsonl` that isn't ours.
    """
    folder = Path(config.output_dir)
    output = folder / SEARCH_FILE
    blocks = blocks_of(tasks, config)
    texts = executor.texts([*_prompts(blocks, config)])
    plan = new_plan(blocks, texts, config, executor.identity, executor.runtime)
    commits = Commits(folder, plan)
    with only_writer(folder, "search", "--output-dir"):
        clear_half_written(output, manifest_path(output), folder / FAILED_FILE)
        if is_complete(output, plan):
            commits.remove()  # a kill after the manifest leaves them
            return output
        commits.open(output, blocks)
        samples = _samples(blocks, texts)
        logger.info("the model reads, for example, %r", samples)
        if on_begin is not None:
            on_begin(samples)
        found = _search(executor, blocks, commits, config, on_progress)
        held = [commits.read(block) for block in blocks]
        _write_failed(folder / FAILED_FILE, [one for _, failed in held for one in failed])
        places = {
            (block.task.name, example.id): place
            for block in blocks
            for example, place in zip(block.examples, block.places, strict=True)
        }
        records = [record for read, _ in held for record in read]
        records.sort(key=lambda record: places[record.task, record.id])
        manifest = new_manifest(
            "search",
            model=executor.identity,
            config=config.to_dict(),
            extra={"plan": plan, "num_failed": found.failed},
        )
        write_records(output, records, manifest)
        commits.remove()
    return output


def _prompts(blocks: Sequence[Block], config: SearchConfig) -> Iterator[Prompt]:
    for block in blocks:
        reward = block.task.check_reward(config.reward)
        for example in block.examples:
            yield block.task.prompt(example, reward)


def _samples(blocks: Sequence[Block], texts: Sequence[str | None]) -> dict[str, str]:
    """Return the first prompt of each task that its chat template takes, as the model reads it."""
    names = [block.task.name for block in blocks for _ in block.examples]
    samples: dict[str, str] = {}
    for name, text in zip(names, texts, strict=True):
        if text is not None:
            samples.setdefault(name, text)
    return samples


def _search(
    executor: Executor,
    blocks: Sequence[Block],
    commits: Commits,
    config: SearchConfig,
    on_progress: OnProgress | None,
) -> Tally:
    """Search and commit the blocks that aren't done; return what all of them hold, counted."""
    total = num_questions(blocks)
    found = Tally()
    fresh_paths = 0

    def report(block: Block, share: float = 0.0, paths: int = 0) -> None:
        if on_progress is not None:
            on_progress(
                Status(
                    done=found.questions + share * len(block.examples),
                    total=total,
                    task=block.task.name,
                    found=found,
                    fresh_paths=fresh_paths + paths,
                )
            )

    todo = []
    for block in blocks:
        held = commits.find(block)
        if held is None:
            todo.append(block)
        else:
            found += tally(*held)
            report(block)
    for block, result in executor.search(todo, config, report):
        commits.commit(block, result.lines)
        found += result.tally
        fresh_paths += result.tally.paths
        report(block)
        _check_hope(found, total, block, commits)
    return found


def _check_hope(found: Tally, total: int, last: Block, commits: Commits) -> None:
    """Refuse to go on where every question fails; nothing of it is kept.

    Raises:
        TaskError: With the last question's error.
    """
    if found.failed == found.questions and found.questions >= min(HOPELESS, total):
        reason = commits.read(last)[1][-1].error
        commits.remove()
        raise TaskError(
            f"none of the first {found.questions} questions could be searched; the last one: "
            f"{reason}"
        )


def _write_failed(path: Path, failed: Sequence[FailedQuestion]) -> None:
    if failed:
        write_atomically(path, to_lines(failed))
    else:
        path.unlink(missing_ok=True)
