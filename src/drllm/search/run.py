"""The search stage: from questions to `search.jsonl`, and the targets beside it.

`search_paths` is the stage for Python users: it collects the questions, searches them, and picks
their targets. `run_search` is the search itself: it makes blocks of the questions, runs those that
an interrupted search hasn't finished, and writes the records.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from drllm.config import SearchConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError, RecordError, TaskError
from drllm.model.identity import describe_adapters
from drllm.model.prompts import render
from drllm.models.workers import Workers, open_workers
from drllm.records.codec import hash_values
from drllm.records.manifest import new_manifest, read_manifest, write_or_remove, write_records
from drllm.records.places import only_writer
from drllm.records.search import (
    SEARCH_FILE,
    FailedQuestion,
    SearchRecord,
    SearchRecords,
    read_failed,
    read_search,
)
from drllm.search import CHUNKS_FOLDER, FAILED_FILE
from drllm.search.batch import BatchRecords, BatchSearcher
from drllm.search.progress import SearchProgress
from drllm.search.questions import (
    Batch,
    QuestionSource,
    SearchQuestion,
    collect_questions,
    split_into_batches,
)
from drllm.search.targets import supervise_search
from drllm.search.wrong_answers import FirstAnswers, warn_of_no_right_answer
from drllm.work.first_block import FirstBlock
from drllm.work.listener import Listener, logger
from drllm.work.run import Block, run
from drllm.work.store import ResultStore, refuse_other_run

MAX_PROMPT_CHARACTERS = 600
"""Maximum characters of a prompt that are shown; a longer prompt is shown without its middle."""


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
    """Search the paths of questions, and write `search.jsonl` and `supervision.jsonl`.

    After an interruption the same call resumes the search. Of an unfinished batch at most one step
    is lost. The records are the same as without the interruption, except for their times and the
    last bits of margins and KLs. A question that fails every time is set aside in
    `search.failed.jsonl`. The targets in `supervision.jsonl` are those of `supervise` with its
    default settings; a file of the user's own stays as it is.

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
    questions = _collect(examples, config)
    folder = None if output_dir is None else Path(output_dir)
    records = search_questions(
        model, questions, config, folder, tokenizer=tokenizer, listener=listener
    )
    if records.file is not None:
        targets = supervise_search(records)
        if targets.reason:
            listener.note(targets.reason)
    return records


def _collect(
    examples: QuestionSource | Sequence[SearchQuestion] | None, config: SearchConfig
) -> list[SearchQuestion]:
    """Return the questions of a search; the result of `collect_questions` stays as it is."""
    if examples is None or isinstance(examples, (str, Path)):
        return collect_questions(examples, config)
    questions = [item for item in examples if isinstance(item, SearchQuestion)]
    if questions and len(questions) == len(examples):
        return questions
    return collect_questions(examples, config)  # type: ignore[arg-type]


def search_questions(
    model: Any,
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    folder: Path | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
) -> SearchRecords:
    """Search questions as `search_paths` does, and pick no targets.

    Args:
        model: As in `search_paths`.
        questions: The result of `collect_questions`.
        config: The settings.
        folder: The folder for the files; None writes no files.
        tokenizer: As in `search_paths`.
        listener: As in `search_paths`.
    """
    listener = listener or Listener()
    with open_workers(model, tokenizer, config, listener) as workers:
        return run_search(workers, questions, config, folder, listener)


def run_search(
    workers: Workers,
    questions: Sequence[SearchQuestion],
    config: SearchConfig,
    folder: Path | None = None,
    listener: Listener | None = None,
) -> SearchRecords:
    """Search questions with a model that is loaded; see `search_questions`.

    Args:
        workers: The model, and who searches the batches.
        questions: The result of `collect_questions`.
        config: The settings.
        folder: The folder for the files; None writes no files.
        listener: Gets progress, one prompt of each task, and warnings.
    """
    search = SearchPlan(
        config=config,
        questions=questions,
        texts=[_render_prompt(workers.base.tokenizer, question) for question in questions],
        blocks=make_blocks(questions, config.block_size),
    )
    listener = listener or Listener()
    if folder is None:
        result = _run_blocks(workers, search, listener, store=None)
        return SearchRecords.of(result.records, workers.executor.identity, failed=result.failed)
    with only_writer(folder, "search", "--output-dir"):
        return _search_into(folder, workers, search, listener)


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What is searched: the questions, in blocks of work.

    Attributes:
        config: The settings.
        questions: The questions.
        texts: The prompt of each question as the model reads it; None if the chat template refuses
            the prompt.
        blocks: The batches of the questions.
    """

    config: SearchConfig
    questions: Sequence[SearchQuestion]
    texts: Sequence[str | None]
    blocks: Sequence[Block[Batch]]


def _render_prompt(tokenizer: Any, question: SearchQuestion) -> str | None:
    """Return a question's prompt as the model reads it; None if the chat template refuses it."""
    try:
        return render(tokenizer, question.prompt.content, chat=question.prompt.chat)
    except ConfigError:  # the search of this question will raise the error again and record it
        return None


def make_blocks(questions: Sequence[SearchQuestion], size: int) -> list[Block[Batch]]:
    """Divide questions into blocks of at most `size`."""
    batches = split_into_batches(questions, size)
    return [Block(batch.key, batch, float(batch.num_characters)) for batch in batches]


def _search_into(
    folder: Path, workers: Workers, search: SearchPlan, listener: Listener
) -> SearchRecords:
    """Run or resume a search in a folder; if the search is complete, return its records."""
    file = folder / SEARCH_FILE
    identity = _make_identity(workers, search)
    store = ResultStore(folder / CHUNKS_FOLDER, identity, stage="search")
    manifest = read_manifest(file, "search")
    if manifest is not None:
        _refuse_other_search(file, manifest, identity)
        records_on_disk = read_search(file)
        records_on_disk.failed = _read_failed(folder / FAILED_FILE)
        _refuse_other_names(file, records_on_disk, search.questions)
        store.remove()  # a process that was killed just after it wrote the manifest left it
        return records_on_disk
    has_results = store.open()
    # The file is written when all batches are done, and its manifest after it. If a process was
    # killed in between, the folder still has the results of all batches. Otherwise the file comes
    # from elsewhere, and must not be overwritten.
    has_all_results = has_results and all(store.has(block.key) for block in search.blocks)
    if file.exists() and not has_all_results:
        raise RecordError(
            f"{file} exists without its manifest, so it can't be resumed; "
            f"choose another --output-dir"
        )
    result = _run_blocks(workers, search, listener, store)
    write_or_remove(folder / FAILED_FILE, result.failed)
    manifest = new_manifest(
        "search",
        model=workers.executor.identity,
        config=search.config.to_dict(),
        extra={"plan": identity, "num_failed": len(result.failed)},
    )
    write_records(file, result.records, manifest)
    store.remove()
    return SearchRecords.of(
        result.records, workers.executor.identity, file=file, failed=result.failed
    )


def _read_failed(file: Path) -> tuple[FailedQuestion, ...]:
    """Return the questions that a complete search has set aside; there may be no file."""
    if not file.exists():
        return ()
    return read_failed(file)


def _make_identity(workers: Workers, search: SearchPlan) -> dict[str, Any]:
    """Return the values that identify a search; a search with other values isn't resumed."""
    prompts: list[Any] = []
    for question in search.questions:
        prompts += [question.prompt, *question.retests]
    return {
        "settings": search.config.decisive(),
        "model": dict(workers.executor.identity),
        "runtime": {**workers.executor.runtime, **describe_adapters(workers.base.model)},
        "questions": len(search.questions),
        "prompts_sha256": hash_values(prompts),
        "chat_template_sha256": hash_values(search.texts),
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


def _refuse_other_names(
    file: Path, records: SearchRecords, questions: Sequence[SearchQuestion]
) -> None:
    """Refuse a complete search whose questions have other ids or are of other tasks.

    The prompts may be the same. But the ids decide the random numbers of a search, and records are
    found by both names.
    """
    names = {(question.task, question.example.id) for question in questions}
    for record in (*records, *records.failed):
        if (record.task, record.id) not in names:
            raise ConfigError(
                f"{file} was made with other ids or tasks, such as question {record.id!r} of task "
                f"{record.task!r}; choose another --output-dir, or the same questions"
            )


def _run_blocks(
    workers: Workers, search: SearchPlan, listener: Listener, store: ResultStore | None
) -> BatchRecords:
    """Search all batches; return records and failed questions in the questions' order.

    Batches that `store` holds already aren't searched again.

    Raises TaskError if all of the first questions fail, or all questions.
    """
    _show_prompts(search, listener)
    config = _share_memory(search.config, workers.executor.num_sharing)
    keep = None if store is None else store.of(BatchRecords, reads_back=False)
    with listener.progress("searching", "") as on_progress:
        watch = SearchWatch(SearchProgress.of(search.blocks, on_progress), store)
        function = BatchSearcher(config)
        if config.executor == "local":  # workers of Ray search several batches at a time
            watch.first_block = FirstBlock(listener, workers.base.model.device)
            function = BatchSearcher(config, FirstAnswers(listener).add)
        results = run(
            search.blocks,
            function,
            workers.executor,
            keep=keep,
            on_result=watch.on_result,
            on_step=watch.progress.report_step,
        )
    records, failed = _sort_by_question(results, search.questions)
    if failed and not records:  # a process was killed just after it kept the last of them
        watch.end(failed[-1])
    warn_of_no_right_answer(records, listener)
    return BatchRecords(tuple(records), tuple(failed))


def _share_memory(config: SearchConfig, num_sharing: int) -> SearchConfig:
    """Return the settings with one worker's share of the memory for shared states."""
    if config.state_cache_gb is None:
        return config
    return dataclasses.replace(config, state_cache_gb=config.state_cache_gb / num_sharing)


def _sort_by_question(
    results: Sequence[BatchRecords], questions: Sequence[SearchQuestion]
) -> tuple[list[SearchRecord], list[FailedQuestion]]:
    """Return the records and the failed questions of all batches, in the questions' order."""
    records: list[SearchRecord] = []
    failed: list[FailedQuestion] = []
    for result in results:
        records += result.records
        failed += result.failed
    places = {(question.task, question.example.id): question.place for question in questions}
    records.sort(key=lambda record: places[record.task, record.id])
    failed.sort(key=lambda question: places[question.task, question.id])
    return records, failed


@dataclass
class SearchWatch:
    """Follows a search: reports its progress, and ends it if all of the first questions fail.

    Attributes:
        progress: Counts what is done.
        store: The results that are kept; None keeps none.
        first_block: Estimates the time of the search from its first batch, unless it is None.
    """

    progress: SearchProgress
    store: ResultStore | None
    first_block: FirstBlock | None = None

    def on_result(self, block: Block[Batch], result: BatchRecords, /, *, is_new: bool) -> None:
        """Receive a finished batch."""
        if is_new and self.first_block is not None:
            num_left = self.progress.num_characters - self.progress.num_characters_done
            self.first_block.finish(block.size / num_left)
        self.progress.add(block, result, is_new=is_new)
        if is_new and self.progress.has_only_failed:
            self.end(result.failed[-1])

    def end(self, last: FailedQuestion) -> NoReturn:
        """End a search of which every question failed so far; `last` is the last of them."""
        if self.store is not None:
            self.store.remove()  # so that the next call tries these questions again
        raise TaskError(
            f"none of the first {self.progress.num_done} questions could be searched; the last one "
            f"failed with: {last.error}"
        )


def _show_prompts(search: SearchPlan, listener: Listener) -> None:
    """Show one prompt of each task, so that users see a wrong template before hours are spent.

    Prompts that the chat template refuses are left out.
    """
    prompts: dict[str, str] = {}  # by task
    for question, text in zip(search.questions, search.texts, strict=True):
        if text is not None:
            prompts.setdefault(question.task, text)
    for task, text in prompts.items():
        logger.info("the model reads, for example, %r", text)
        num_left_out = len(text) - MAX_PROMPT_CHARACTERS
        if num_left_out > 0:
            half = MAX_PROMPT_CHARACTERS // 2
            text = f"{text[:half]}[... {num_left_out} characters left out ...]{text[-half:]}"
        lines = text.replace("\n", "\n  | ")
        listener.note(f"a prompt of {task}, as the model reads it:\n  | {lines}")
