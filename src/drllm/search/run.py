"""The search stage: from questions to `search.jsonl`.

`search_paths` is the stage for Python users: it loads the model and collects the questions.
`run_search` then searches them, and resumes an interrupted search.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drllm.config import ModelConfig, SearchConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.records.codec import hash_values
from drllm.records.manifest import new_manifest, read_manifest, write_or_remove, write_records
from drllm.records.places import only_writer
from drllm.records.resume import Chunks, refuse_other_run
from drllm.records.search import FailedQuestion, SearchRecord, SearchRecords, read_search
from drllm.search import CHUNKS_FOLDER, FAILED_FILE, SEARCH_FILE
from drllm.search.batch import BatchRecords, Executor, LocalExecutor
from drllm.search.questions import (
    Batch,
    QuestionSource,
    SearchQuestion,
    collect_questions,
    split_into_batches,
)
from drllm.supervision.rules import is_improving, survived
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener, OnProgress, logger

MAX_FAILED_AT_START = 16
"""The search ends if this many questions fail before any question succeeds."""
MAX_PROMPT_CHARACTERS = 600
"""Maximum characters of a prompt that are shown; a longer prompt is shown without its middle."""
MIN_QUESTIONS_TO_WARN = 5
"""A task needs this many questions for the warning that the full path is never right on it."""
MAX_TEXT_CHARACTERS = 60  # maximum characters of a question or an answer in a warning


def search_paths(
    model: Any,
    examples: QuestionSource | Sequence[SearchQuestion] | None = None,
    config: SearchConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> SearchRecords:
    """Search the paths of questions, and write `search.jsonl` with its manifest.

    After an interruption the same call resumes the search. Of an unfinished batch at most one step
    is lost. The records are the same as without the interruption, except for their times. A
    question that fails every time is set aside in `search.failed.jsonl`.

    Args:
        model: A name or a `ModelConfig` to load the model, the result of `load`, a `RoutedModel`,
            or a causal language model of transformers. With `config.executor` "ray" every worker
            loads the model, so only a name or a `ModelConfig` will do.
        examples: Names of tasks, or a file; a list of tasks, of examples, or of rows (dicts with
            the fields of a `.jsonl` file); or the result of `collect_questions`. Of tasks the
            questions in `config.split` are searched. Examples and rows are searched whatever their
            split. None stands for the tasks that `config.dataset` names.
        config: The settings. `config.output_dir` is read only by the command line.
        output_dir: The folder for the files; None writes no files.
        tokenizer: The model's tokenizer. None takes the tokenizer that comes with the model, or
            loads the tokenizer by the model's name.
        listener: Gets progress, one prompt of each task, and warnings.
        settings: Settings of `SearchConfig` by name; they replace the settings in `config`.

    Returns:
        The records of all questions that could be searched, in the questions' order.

    Raises:
        ConfigError: A setting has no effect, or the folder holds another search.
        TaskError: There are no questions, questions can't be loaded, or every question failed.
        RecordError: The folder can't be written, another search writes to the folder, or the folder
            holds a `search.jsonl` without its manifest.

    Source: Dr.LLM section 3.1.
    """
    config = replace_settings(SearchConfig, config, settings)
    listener = listener or Listener()
    questions: list[SearchQuestion] = []
    if examples is not None and not isinstance(examples, (str, Path)):
        questions = [item for item in examples if isinstance(item, SearchQuestion)]
    if not questions:
        questions = collect_questions(examples, config)  # type: ignore[arg-type]
    folder = None if output_dir is None else Path(output_dir)
    with _start_executor(model, config, tokenizer, listener) as executor:
        return run_search(executor, questions, config, folder, listener)


@contextmanager
def _start_executor(
    model: Any, config: SearchConfig, tokenizer: Any, listener: Listener
) -> Iterator[Executor]:
    """Load the model in this process, or in the workers of Ray."""
    if config.executor == "ray":
        if isinstance(model, str):
            model = ModelConfig(model=model)
        if not isinstance(model, ModelConfig):
            raise ConfigError("--executor ray loads a model for each worker; give a ModelConfig")
        with listener.busy("starting Ray"):
            from drllm.search.ray import RayExecutor

            ray_executor = RayExecutor(
                model, num_workers=config.num_workers, address=config.ray_address
            )
        with ray_executor:
            yield ray_executor
        return
    with unrouted(model, tokenizer, listener) as base:
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        try:
            yield LocalExecutor(routed, base.identity, base.runtime)
        finally:
            routed.detach()


def run_search(
    executor: Executor,
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    folder: Path | None = None,
    listener: Listener | None = None,
) -> SearchRecords:
    """Search questions with an executor; the files and the result are those of `search_paths`.

    Args:
        executor: Searches the batches.
        questions: The result of `collect_questions`.
        config: The settings.
        folder: The folder for the files; None writes no files.
        listener: Gets progress, one prompt of each task, and warnings.
    """
    listener = listener or Listener()
    texts = executor.render_prompts([question.prompt for question in questions])
    search = _Search(
        executor=executor,
        config=config,
        listener=listener,
        batches=split_into_batches(questions, config.block_size),
        prompts=_find_first_prompts(questions, texts),
    )
    if folder is None:
        records, failed = search.run(chunks=None)
        return SearchRecords.of(records, executor.identity, failed=failed)
    identity = _make_identity(executor, questions, texts, config)
    with only_writer(folder, "search", "--output-dir"):
        return _search_into(folder, search, identity)


def _search_into(folder: Path, search: _Search, identity: Mapping[str, Any]) -> SearchRecords:
    """Run or resume a search in a folder; if the search is complete, return its records."""
    file = folder / SEARCH_FILE
    chunks = Chunks(folder / CHUNKS_FOLDER, identity, stage="search")
    manifest = read_manifest(file, "search")
    if manifest is not None:
        _refuse_other_search(file, manifest, identity)
        records_on_disk = read_search(file)
        chunks.remove()  # a process that was killed just after it wrote the manifest left them
        return records_on_disk
    has_chunks = chunks.open()
    # The file is written when all batches are done, and its manifest after it. If a process was
    # killed in between, the folder still has the chunks of all batches. Otherwise the file comes
    # from elsewhere, and must not be overwritten.
    has_all_batches = has_chunks and all(chunks.has(batch.key) for batch in search.batches)
    if file.exists() and not has_all_batches:
        raise RecordError(
            f"{file} exists without its manifest, so it can't be resumed; "
            f"choose another --output-dir"
        )
    records, failed = search.run(chunks)
    write_or_remove(folder / FAILED_FILE, failed)
    manifest = new_manifest(
        "search",
        model=search.executor.identity,
        config=search.config.to_dict(),
        extra={"plan": identity, "num_failed": len(failed)},
    )
    write_records(file, records, manifest)
    chunks.remove()
    return SearchRecords.of(records, search.executor.identity, file=file, failed=failed)


def _make_identity(
    executor: Executor,
    questions: Sequence[SearchQuestion],
    texts: Sequence[str | None],
    config: SearchConfig,
) -> dict[str, Any]:
    """Return the values that identify a search; a search with other values isn't resumed."""
    prompts: list[Any] = []
    for question in questions:
        prompts += [question.prompt, *question.retests]
    return {
        "settings": config.decisive(),
        "model": dict(executor.identity),
        "runtime": dict(executor.runtime),
        "questions": len(questions),
        "prompts_sha256": hash_values(prompts),
        "chat_template_sha256": hash_values(texts),
    }


def _refuse_other_search(
    file: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    """Refuse a complete search that has other settings, other questions or another model."""
    version = importlib.metadata.version("drllm")
    refuse_other_run(
        str(file),
        {**manifest.get("plan", {}), "drllm_version": manifest.get("drllm_version")},
        {**identity, "drllm_version": version},
        "choose another --output-dir, or the same settings",
    )


def _find_first_prompts(
    questions: Sequence[SearchQuestion], texts: Sequence[str | None]
) -> dict[str, str]:
    """Return the first prompt of each task, as the model reads it.

    A prompt is None if the chat template refuses it; these are left out.
    """
    prompts: dict[str, str] = {}
    for question, text in zip(questions, texts, strict=True):
        if text is not None:
            prompts.setdefault(question.task, text)
    return prompts


@dataclass(frozen=True, kw_only=True)
class _Search:
    """A search that is ready to run: its batches, and the executor that searches them."""

    executor: Executor
    config: SearchConfig
    listener: Listener
    batches: Sequence[Batch]
    prompts: Mapping[str, str]  # for each task, one prompt as the model reads it

    def run(self, chunks: Chunks | None) -> tuple[list[SearchRecord], list[FailedQuestion]]:
        """Search all batches, and return records and failed questions in the questions' order.

        Batches that `chunks` holds already aren't searched again.
        """
        _show_prompts(self.prompts, self.listener)
        results = self._search_batches(chunks)
        records: list[SearchRecord] = []
        failed: list[FailedQuestion] = []
        for result in results:
            records += result.records
            failed += result.failed
        places = self._map_places()
        records.sort(key=lambda record: places[record.task, record.id])
        failed.sort(key=lambda question: places[question.task, question.id])
        _warn_of_no_right_answer(records, self.listener)
        return records, failed

    def _map_places(self) -> dict[tuple[str, str], int]:
        """Return the place of each question by its task and its id."""
        places: dict[tuple[str, str], int] = {}
        for batch in self.batches:
            for question in batch.questions:
                places[question.task, question.example.id] = question.place
        return places

    def _search_batches(self, chunks: Chunks | None) -> list[BatchRecords]:
        """Return the results of all batches: first those in `chunks`, then new ones."""
        with self.listener.progress("searching", "") as on_progress:
            progress = SearchProgress.of(self.batches, on_progress)
            results: list[BatchRecords] = []
            remaining: list[Batch] = []
            for batch in self.batches:
                result = None if chunks is None else _read_result(chunks, batch)
                if result is None:
                    remaining.append(batch)
                else:
                    results.append(result)
                    progress.add(batch, result, is_new=False)
            results += self._search_remaining(remaining, chunks, progress)
        return results

    def _search_remaining(
        self, remaining: Sequence[Batch], chunks: Chunks | None, progress: SearchProgress
    ) -> Iterator[BatchRecords]:
        """Search batches, keep their results, and yield them.

        Raises TaskError if all of the first questions fail.
        """
        first_block = self._time_first_block()
        num_characters = sum(batch.num_characters for batch in remaining)
        results = self.executor.search(remaining, self.config, chunks, progress.report)
        for batch, result in results:
            if first_block is not None:
                first_block.finish(batch.num_characters / num_characters)
            if chunks is not None:
                chunks.put(batch.key, result)
            progress.add(batch, result)
            if progress.has_only_failed:
                if chunks is not None:
                    chunks.remove()  # so that the next call tries these questions again
                raise TaskError(
                    f"none of the first {progress.num_done} questions could be searched; the "
                    f"last one failed with: {result.failed[-1].error}"
                )
            yield result

    def _time_first_block(self) -> FirstBlock | None:
        """Return an object that estimates the time of the search from its first batch.

        None for Ray: its workers search several batches at a time, so the time of a batch says
        little about the search.
        """
        if not isinstance(self.executor, LocalExecutor):
            return None
        return FirstBlock(self.listener, self.executor.routed.model.device)


def _read_result(chunks: Chunks, batch: Batch) -> BatchRecords | None:
    """Return a batch's result from `chunks`; None if it isn't there or has other questions."""
    result = chunks.get(batch.key, BatchRecords)
    if result is None:
        return None
    result_ids = sorted(question.id for question in (*result.records, *result.failed))
    batch_ids = sorted(question.example.id for question in batch.questions)
    if result_ids != batch_ids:
        return None
    return result


@dataclass
class SearchProgress:
    """Counts the searched questions and paths, and reports progress.

    Progress is measured in characters of prompts, not in questions. Long questions come last and
    take longer, so by questions the time left would be estimated too short.
    """

    num_questions: int  # of all batches
    num_characters: int  # of all batches
    on_progress: OnProgress
    num_done: int = 0  # finished questions, including questions of an interrupted search
    num_characters_done: int = 0  # characters of the finished questions
    num_failed: int = 0  # finished questions that failed
    num_valid: int = 0  # finished questions with a right path that survived the re-test
    num_improving: int = 0  # of these, the questions whose full path is wrong
    num_new_paths: int = 0  # paths run since the search was started or resumed
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, batches: Sequence[Batch], on_progress: OnProgress) -> SearchProgress:
        """Return the progress of a search before its first batch."""
        num_questions = sum(len(batch.questions) for batch in batches)
        num_characters = sum(batch.num_characters for batch in batches)
        return cls(num_questions, num_characters, on_progress)

    def add(self, batch: Batch, result: BatchRecords, *, is_new: bool = True) -> None:
        """Count a finished batch, and report it.

        Args:
            batch: The batch.
            result: Its result.
            is_new: Whether the batch was searched now, and not by an interrupted search.
        """
        self.num_done += len(batch.questions)
        self.num_characters_done += batch.num_characters
        self.num_failed += len(result.failed)
        for record in result.records:
            survivors = [path for path in record.paths if survived(path)]
            if survivors:
                self.num_valid += 1
            if any(is_improving(path, record) for path in survivors):
                self.num_improving += 1
            if is_new:
                self.num_new_paths += len(record.paths)
        self.report(batch)

    def report(self, batch: Batch, share: float = 0.0, num_paths: int = 0, step: str = "") -> None:
        """Report progress, after a batch or after a step of an unfinished batch.

        The last three arguments are for an unfinished batch, which `add` hasn't counted yet.

        Args:
            batch: The batch.
            share: The share of the batch's work that is done.
            num_paths: Number of the batch's paths that were run so far.
            step: The finished step in words.
        """
        note = f"{self.num_done} of {self.num_questions} questions, {batch.task}"
        if step:
            note = f"{step}, {note}"
        num_new_paths = self.num_new_paths + num_paths
        if num_new_paths > 0:
            seconds = max(time.monotonic() - self.started, 1e-9)
            note += f", {num_new_paths / seconds:.1f} paths a second"
        if self.num_done > 0:
            note += f", right path for {100 * (self.num_valid / self.num_done):.0f} % of questions"
            note += f", {100 * (self.num_improving / self.num_done):.0f} % corrected"
        # The bar counts questions, so the share of the characters is scaled to questions.
        num_characters_done = self.num_characters_done + share * batch.num_characters
        share_done = num_characters_done / self.num_characters
        self.on_progress(self.num_questions * share_done, self.num_questions, note)

    @property
    def has_only_failed(self) -> bool:
        """Whether all questions so far failed, and they are enough to end the search."""
        if self.num_failed < self.num_done:
            return False
        return self.num_failed >= min(MAX_FAILED_AT_START, self.num_questions)


def _show_prompts(prompts: Mapping[str, str], listener: Listener) -> None:
    """Show one prompt of each task, so that users see a wrong template before hours are spent."""
    for task, text in prompts.items():
        logger.info("the model reads, for example, %r", text)
        num_left_out = len(text) - MAX_PROMPT_CHARACTERS
        if num_left_out > 0:
            half = MAX_PROMPT_CHARACTERS // 2
            text = f"{text[:half]}[... {num_left_out} characters left out ...]{text[-half:]}"
        lines = text.replace("\n", "\n  | ")
        listener.note(f"a prompt of {task}, as the model reads it:\n  | {lines}")


def _warn_of_no_right_answer(records: Sequence[SearchRecord], listener: Listener) -> None:
    """Warn of each task on which the full path is never right.

    Then usually the prompt or the grading is wrong.
    """
    by_task: dict[str, list[SearchRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    for task, task_records in by_task.items():
        is_ever_right = any(record.full.reward > 0 for record in task_records)
        if is_ever_right or len(task_records) < MIN_QUESTIONS_TO_WARN:
            continue
        listener.note(
            f"the full model answers none of the {len(task_records)} questions of {task} "
            f"right: {_advise_on_wrong_answer(task_records[0])}"
        )


def _advise_on_wrong_answer(record: SearchRecord) -> str:
    """Say what to check about a question that the full path answers wrong."""
    if record.full.answer is None:  # options were scored
        return "check which option the rows name as right"
    question = record.question[:MAX_TEXT_CHARACTERS]
    answer = record.full.answer[:MAX_TEXT_CHARACTERS]
    right_answer = record.answer[:MAX_TEXT_CHARACTERS]
    return (
        f"to {question!r} it answers {answer!r}, and {right_answer!r} is right; check the "
        f"answers, or give another --reward"
    )
