"""The search stage: from questions to `search.jsonl`. A search can be resumed at any moment.

`search_paths` is the stage for Python users; `run_search` is the same stage with an executor.
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
from drllm.listener import Listener, OnProgress, logger
from drllm.models.base.first_block import FirstBlock
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

HOPELESS = 16  # the search ends if this many questions fail before any question succeeds
MAX_PROMPT_CHARACTERS = 600
"""Maximum characters of a prompt that are shown; a longer prompt is shown without its middle."""
MIN_QUESTIONS_TO_WARN = 5  # minimum questions of a task to warn that the full path is never right
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

    Results are kept as they come. After an interruption the same call resumes the search. The
    interruption loses at most one round of one batch. The records are the same as without the
    interruption, except for their times. A question that fails every time is set aside in
    `search.failed.jsonl`.

    Args:
        model: A name or a `ModelConfig` (the model is loaded here, or by the workers of Ray), the
            result of `load`, a `RoutedModel`, or a causal language model of transformers.
        examples: Names of tasks, or a file; a list of tasks; a list of examples of tasks; a list of
            rows (dicts with the fields of a `.jsonl` file), which are all searched, in whichever
            split they are; or the result of `collect_questions`. None stands for the tasks that
            `config.dataset` names.
        config: The settings; `config.output_dir` is for the command line and isn't read here.
        output_dir: The folder for the files; None writes no files.
        tokenizer: The model's tokenizer. None takes the tokenizer that comes with the model, or
            loads the tokenizer by the model's name.
        listener: Gets progress, one prompt of each task, and warnings.
        settings: Settings of `SearchConfig` by name; they replace the settings in `config`.

    Returns:
        One record per question that could be searched, in the questions' order.

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
    """Search with an executor; see `search_paths`."""
    listener = listener or Listener()
    texts = executor.render_prompts([question.prompt for question in questions])
    search = _Search(
        executor=executor,
        config=config,
        listener=listener,
        batches=split_into_batches(questions, config.block_size),
        prompts=_first_prompts(questions, texts),
    )
    if folder is None:
        records, failed = search.run(chunks=None)
        return SearchRecords.of(records, executor.identity, failed=failed)
    identity = _identity(executor, questions, texts, config)
    with only_writer(folder, "search", "--output-dir"):
        return _search_into(folder, search, identity)


def _search_into(folder: Path, search: _Search, identity: Mapping[str, Any]) -> SearchRecords:
    """Finish the search of a folder, or return its records if it is complete."""
    file = folder / SEARCH_FILE
    chunks = Chunks(folder / CHUNKS_FOLDER, identity, stage="search")
    manifest = read_manifest(file, "search")
    if manifest is not None:
        _refuse_other_search(file, manifest, identity)
        records_on_disk = read_search(file)
        chunks.remove()  # they are left if the process was killed after it wrote the manifest
        return records_on_disk
    is_begun = chunks.open()
    # A process that is killed between file and manifest leaves the file and all its batches.
    is_ours = is_begun and all(chunks.has(batch.key) for batch in search.batches)
    if file.exists() and not is_ours:
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


def _identity(
    executor: Executor,
    questions: Sequence[SearchQuestion],
    texts: Sequence[str | None],
    config: SearchConfig,
) -> dict[str, Any]:
    """Return what a search on disk must have in common with this search to be taken for it."""
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
    """Refuse a complete search with other settings, questions or another model."""
    version = importlib.metadata.version("drllm")
    refuse_other_run(
        str(file),
        {**manifest.get("plan", {}), "drllm_version": manifest.get("drllm_version")},
        {**identity, "drllm_version": version},
        "choose another --output-dir, or the same settings",
    )


def _first_prompts(
    questions: Sequence[SearchQuestion], texts: Sequence[str | None]
) -> dict[str, str]:
    """Return the first prompt of each task, as the model reads it."""
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
        """Search the batches that `chunks` doesn't hold; return records in the questions' order."""
        _show_prompts(self.prompts, self.listener)
        results = self._search_batches(chunks)
        places: dict[tuple[str, str], int] = {}
        for batch in self.batches:
            for question in batch.questions:
                places[question.task, question.example.id] = question.place
        records: list[SearchRecord] = []
        failed: list[FailedQuestion] = []
        for result in results:
            records += result.records
            failed += result.failed
        records.sort(key=lambda record: places[record.task, record.id])
        failed.sort(key=lambda question: places[question.task, question.id])
        _warn_of_no_right_answer(records, self.listener)
        return records, failed

    def _search_batches(self, chunks: Chunks | None) -> list[BatchRecords]:
        """Return the results of all batches; results that `chunks` holds come first."""
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
        """Search batches and keep their results.

        Raises TaskError if all of the first questions fail.
        """
        first_block = self._time_first_block()
        work_left = sum(batch.num_characters for batch in remaining)
        searched = self.executor.search(remaining, self.config, chunks, progress.report)
        for batch, result in searched:
            if first_block is not None:
                first_block.finish(batch.num_characters / work_left)
            if chunks is not None:
                chunks.put(batch.key, result)
            progress.add(batch, result)
            if progress.is_hopeless:
                if chunks is not None:
                    chunks.remove()
                raise TaskError(
                    f"none of the first {progress.num_done} questions could be searched; the "
                    f"last one: {result.failed[-1].error}"
                )
            yield result

    def _time_first_block(self) -> FirstBlock | None:
        """Start to time the first batch; None for Ray, whose workers search several batches."""
        if not isinstance(self.executor, LocalExecutor):
            return None
        return FirstBlock(self.listener, self.executor.routed.model.device)


def _read_result(chunks: Chunks, batch: Batch) -> BatchRecords | None:
    """Return a batch's result from `chunks`; None if there is none for the same questions."""
    result = chunks.get(batch.key, BatchRecords)
    if result is None:
        return None
    ids = sorted(question.id for question in (*result.records, *result.failed))
    if ids != sorted(question.example.id for question in batch.questions):
        return None
    return result


@dataclass
class SearchProgress:
    """Counts the searched questions and paths, and reports progress.

    Progress is measured in characters of prompts. Long questions come last and take longer, so the
    estimate of the time left would be too short if all questions counted the same.
    """

    num_questions: int
    num_characters: int  # characters of all batches
    on_progress: OnProgress
    num_done: int = 0  # finished questions, including questions of an interrupted search
    num_characters_done: int = 0  # characters of the finished questions
    num_failed: int = 0  # questions that failed
    num_valid: int = 0  # questions with a right path that survived the re-test
    num_improving: int = 0  # questions whose full path is wrong, with a path that survived
    num_new_paths: int = 0  # paths run since the search was started or resumed
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, batches: Sequence[Batch], on_progress: OnProgress) -> SearchProgress:
        """Return the progress of a search before its first batch."""
        num_questions = sum(len(batch.questions) for batch in batches)
        num_characters = sum(batch.num_characters for batch in batches)
        return cls(num_questions, num_characters, on_progress)

    def add(self, batch: Batch, result: BatchRecords, *, is_new: bool = True) -> None:
        """Count a finished batch, and report it."""
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
        """Report progress, also within a batch.

        A finished batch is counted already, so its `share`, `num_paths` and `step` are left out.

        Args:
            batch: The batch that is being searched, or the batch that was finished just now.
            share: The share of the batch's work that is done.
            num_paths: How many paths of the batch were run so far.
            step: The current step in words.
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
        work_done = self.num_characters_done + share * batch.num_characters
        done = self.num_questions * (work_done / self.num_characters)
        self.on_progress(done, self.num_questions, note)

    @property
    def is_hopeless(self) -> bool:
        """Whether all questions so far failed, and enough of them to end the search."""
        enough = min(HOPELESS, self.num_questions)
        return self.num_failed == self.num_done >= enough


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
    """Warn if the full path is never right on a task: usually the prompt or grading is wrong."""
    by_task: dict[str, list[SearchRecord]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    for task, records_of_task in by_task.items():
        is_ever_right = any(record.full.reward > 0 for record in records_of_task)
        if is_ever_right or len(records_of_task) < MIN_QUESTIONS_TO_WARN:
            continue
        first = records_of_task[0]
        if first.full.answer is None:
            example = "check which option the rows name as right"
        else:
            question = first.question[:MAX_TEXT_CHARACTERS]
            answer = first.full.answer[:MAX_TEXT_CHARACTERS]
            right_answer = first.answer[:MAX_TEXT_CHARACTERS]
            example = (
                f"to {question!r} it answers {answer!r}, and {right_answer!r} is right; check the "
                f"answers, or give another --reward"
            )
        listener.note(
            f"the full model answers none of the {len(records_of_task)} questions of {task} "
            f"right: {example}"
        )
