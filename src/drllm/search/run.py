"""The search as a stage: questions in, `search.jsonl` out, resumable at any moment."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from drllm.config import ModelConfig, SearchConfig
from drllm.config.fields import changed
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.listener import Listener, logger
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.records.codec import digest_of
from drllm.records.manifest import (
    new_manifest,
    read_manifest,
    to_lines,
    write_or_remove,
    write_records,
)
from drllm.records.places import only_writer
from drllm.records.resume import Chunks, refuse_other_run
from drllm.records.search import FailedQuestion, SearchRecord, SearchRecords, read_search
from drllm.search import CHUNKS_FOLDER, FAILED_FILE, SEARCH_FILE
from drllm.search.batch import LocalExecutor, Searched, search_in_step
from drllm.search.questions import Batch, SearchQuestion, Source, batches_of, questions_of
from drllm.supervision.rules import is_improving, survived

if TYPE_CHECKING:
    from drllm.search.ray import RayExecutor

    Executor: TypeAlias = LocalExecutor | RayExecutor

HOPELESS = 16  # questions that may fail before the first one succeeds; then something else is wrong
PROMPT_SHOWN = 600
"""Characters of a prompt that are shown; of a longer one, half of them from either end."""
SAMPLE_QUESTIONS = 8
"""Maximum questions of a task that a forecast searches; never more than a batch holds."""
SAMPLE_SIMULATIONS = 10


def search_paths(
    model: Any,
    examples: Source | Sequence[SearchQuestion] | None = None,
    config: SearchConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> SearchRecords:
    """Search the paths of questions, and write `search.jsonl` with its manifest.

    What is done is kept; after an interruption at any moment the same call resumes, loses one
    round of one batch, and ends with the same records as an unbroken run (times apart). Questions
    that fail every time are set aside in `search.failed.jsonl`.

    Args:
        model: A name or a `ModelConfig` (loaded here, or by the workers of Ray), what `load`
            returns, a `RoutedModel`, or a causal language model of transformers.
        examples: A list of tasks or their examples, of rows as a file of your own has them
            (dicts; all are searched, whatever their split), or of what `questions_of` made of
            them; names of tasks or a file; None for those that `config.dataset` names.
        config: The settings; `config.output_dir` is the command line's and not read here.
        output_dir: Folder that gets the files; None writes none.
        tokenizer: The model's; None loads the one of its name, unless it comes with one.
        listener: Is told of progress, and of one prompt of each task.
        settings: Settings of `SearchConfig` by name, in place of the config's.

    Returns:
        One record per question that could be searched, in the questions' order.

    Raises:
        ConfigError: A setting without effect; a folder that holds another search.
        TaskError: No questions, questions that can't be had, or every question failed.
        RecordError: The folder can't be written, another search writes to it, or it holds a
            `search.jsonl` that isn't ours.

    Source: Dr.LLM section 3.1.
    """
    config, listener = changed(SearchConfig, config, settings), listener or Listener()
    given = () if isinstance(examples, (str, Path)) else examples or ()
    questions = [one for one in given if isinstance(one, SearchQuestion)]
    if not questions:
        questions = questions_of(examples, config)  # type: ignore[arg-type]
    folder = None if output_dir is None else Path(output_dir)
    with ExitStack() as stack:
        executor: Executor
        if config.executor == "ray":
            if isinstance(model, str):
                model = ModelConfig(model=model)
            if not isinstance(model, ModelConfig):
                said = "--executor ray loads a model for each worker; give a ModelConfig"
                raise ConfigError(said)
            with listener.busy("starting Ray"):
                from drllm.search.ray import RayExecutor

                workers, address = config.num_workers, config.ray_address
                executor = RayExecutor(model, num_workers=workers, address=address)
            stack.enter_context(executor)
        else:
            base = stack.enter_context(unrouted(model, tokenizer, listener))
            routed = RoutedModel(base.model, tokenizer=base.tokenizer)
            stack.callback(routed.detach)
            executor = LocalExecutor(routed, base.identity, base.runtime)
        return run_search(executor, questions, config, folder, listener)


def run_search(
    executor: Executor,
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    folder: Path | None = None,
    listener: Listener | None = None,
) -> SearchRecords:
    """Search with an executor; see `search_paths`."""
    listener = listener or Listener()
    shown: dict[str, str] = {}  # of each task the first prompt, as the model reads it
    texts = executor.texts([question.prompt for question in questions])
    for question, text in zip(questions, texts, strict=True):
        if text is not None:
            shown.setdefault(question.task, text)
    batches = batches_of(questions, config.block_size)
    if folder is None:
        _show_prompts(shown, listener)
        records, failed = _search(executor, batches, config, None, listener)
        return SearchRecords.of(records, executor.identity, failed=failed)
    identity = {  # what must be equal for a search to be resumed, or to count as this one
        "settings": config.decisive(),
        "model": dict(executor.identity),
        "runtime": dict(executor.runtime),
        "questions": len(questions),
        "prompts_sha256": digest_of(p for q in questions for p in (q.prompt, *q.retests)),
        "chat_template_sha256": digest_of(texts),
    }
    file = folder / SEARCH_FILE
    chunks = Chunks(folder / CHUNKS_FOLDER, identity, stage="search")
    with only_writer(folder, "search", "--output-dir"):
        manifest = read_manifest(file, "search")
        if manifest is not None:
            refuse_other_run(
                str(file),
                {**manifest.get("plan", {}), "drllm_version": manifest.get("drllm_version")},
                {**identity, "drllm_version": importlib.metadata.version("drllm")},
                "choose another --output-dir, or the same settings",
            )
            finished = read_search(file)
            chunks.remove()  # a kill after the manifest leaves them
            return finished
        is_begun = chunks.open()
        # A kill between file and manifest leaves a file while every batch is still kept.
        if file.exists() and not (is_begun and all(chunks.has(b.key) for b in batches)):
            raise RecordError(
                f"{file} exists without its manifest, so it can't be resumed; "
                f"choose another --output-dir"
            )
        _show_prompts(shown, listener)
        records, failed = _search(executor, batches, config, chunks, listener)
        write_or_remove(folder / FAILED_FILE, failed)
        manifest = new_manifest(
            "search",
            model=executor.identity,
            config=config.to_dict(),
            extra={"plan": identity, "num_failed": len(failed)},
        )
        write_records(file, records, manifest)
        chunks.remove()
    return SearchRecords.of(records, executor.identity, file=file, failed=failed)


def _search(
    executor: Executor,
    batches: Sequence[Batch],
    config: SearchConfig,
    chunks: Chunks | None,
    listener: Listener,
) -> tuple[list[SearchRecord], list[FailedQuestion]]:
    """Search the batches that aren't done, and return all records in the questions' own order."""
    places = {(one.task, one.example.id): one.place for batch in batches for one in batch.questions}
    results: list[Searched] = []
    todo: list[Batch] = []
    num: Counter[str] = Counter()
    total, started = len(places), time.monotonic()

    with listener.progress("searching", "questions") as on_progress:

        def report(batch: Batch, share: float = 0.0, num_paths: int = 0, what: str = "") -> None:
            """Say how far the search is; of a batch under way, which share, with so many paths."""
            note = f"{what}, {batch.task}" if what else batch.task
            if new := num["paths"] - num["old paths"] + num_paths:
                note += f", {new / max(time.monotonic() - started, 1e-9):.1f} paths a second"
            if num["done"]:
                for found in ("valid", "improving"):
                    note += f", {100 * (num[found] / num['done']):.0f} % {found}"
            on_progress(num["done"] + share * len(batch.questions), total, note)

        def add(batch: Batch, found: Searched) -> None:
            results.append(found)
            num["done"] += len(batch.questions)
            num["failed"] += len(found.failed)
            for record in found.records:
                kept = [path for path in record.paths if survived(path)]
                num["paths"] += len(record.paths)
                num["valid"] += bool(kept)
                num["improving"] += any(is_improving(path, record) for path in kept)
            report(batch)

        for batch in batches:
            kept = None if chunks is None else chunks.get(batch.key, Searched)
            ids = kept and sorted(one.id for one in (*kept.records, *kept.failed))
            if kept is not None and ids == sorted(one.example.id for one in batch.questions):
                add(batch, kept)
            else:
                todo.append(batch)
        num["old paths"] = num["paths"]
        for batch, result in executor.search(todo, config, chunks, report):
            if chunks is not None:
                chunks.put(batch.key, result)
            add(batch, result)
            if num["failed"] == num["done"] >= min(HOPELESS, total):
                if chunks is not None:
                    chunks.remove()
                raise TaskError(
                    f"none of the first {num['done']} questions could be searched; the last "
                    f"one: {result.failed[-1].error}"
                )
    records = [record for result in results for record in result.records]
    failed = [one for result in results for one in result.failed]
    return (
        sorted(records, key=lambda record: places[record.task, record.id]),
        sorted(failed, key=lambda one: places[one.task, one.id]),
    )


def _show_prompts(shown: Mapping[str, str], listener: Listener) -> None:
    """Say one prompt of each task: a wrong template is seen before hours are spent."""
    for task, text in shown.items():
        logger.info("the model reads, for example, %r", text)
        if (left_out := len(text) - PROMPT_SHOWN) > 0:
            half = PROMPT_SHOWN // 2
            text = f"{text[:half]}[... {left_out} characters left out ...]{text[-half:]}"
        lines = text.replace("\n", "\n  | ")
        listener.note(f"a prompt of {task}, as the model reads it:\n  | {lines}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """What one task will take, at most: a stop rule may end questions early."""

    task: str
    questions: int
    paths: int  # full paths included
    executions: float  # of paths and re-tests; those that paths share are run once
    seconds: float  # on the device that was measured
    size_bytes: float  # of the records
    sample_questions: int  # searched to measure
    sample_paths: int  # tried to measure
    prompt: str  # one, as the model reads it


def forecast(
    routed: RoutedModel, questions: Sequence[SearchQuestion], config: SearchConfig
) -> list[TaskForecast]:
    """Search a few questions of each task, and conclude what all of them will take.

    Nothing is written. Time, executions and disk are those of the sample by path. Later paths
    share more with earlier ones, and fuller rounds are quicker where answers are generated, so a
    search of more simulations and questions than the sample's is quicker than this by path.
    """
    by_task: dict[str, list[SearchQuestion]] = {}
    for batch in batches_of(questions, config.block_size):
        by_task.setdefault(batch.task, []).extend(batch.questions)
    num = min(SAMPLE_SIMULATIONS, config.num_simulations)
    once, short = (dataclasses.replace(config, num_simulations=each) for each in (1, num))
    found = []
    for task, asked in by_task.items():
        size = min(SAMPLE_QUESTIONS, config.block_size, len(asked))
        # The questions come by length: a sample from end to end is neither short nor long.
        sample = [asked[(2 * i + 1) * len(asked) // (2 * size)] for i in range(size)]
        search_in_step(routed, sample[:1], once)  # warm
        started = time.perf_counter()
        records = search_in_step(routed, sample, short)
        seconds = time.perf_counter() - started
        tried = [path for record in records for path in record.paths]
        executions = sum(
            path.executions * (1 + (path.retest.asked if path.retest else 0)) for path in tried
        )
        paths = len(asked) * (config.num_simulations + 1)
        by_path = paths / len(tried)
        found.append(
            TaskForecast(
                task=task,
                questions=len(asked),
                paths=paths,
                executions=executions * by_path,
                seconds=seconds * by_path,
                size_bytes=len(to_lines(records).encode()) * by_path,
                sample_questions=len(sample),
                sample_paths=len(tried),
                prompt=records[0].prompt,
            )
        )
    return found
