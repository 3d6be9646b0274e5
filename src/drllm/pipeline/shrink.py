"""The stage `shrink`: a smaller checkpoint that is shown to lose little, or an honest no.

It tunes paths, heals some of them, measures these on questions that nothing was chosen on, and
writes the smallest that is shown to lose less than the limits. Each step is a stage of its own,
which keeps its work in a folder beside the output. A killed run resumes.

Source: ours; the order of the tests is explained in `statistics.exclusion`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from drllm.config import HealConfig, ShrinkConfig, TuneConfig
from drllm.config.fields import make_settings, replace_settings
from drllm.errors import ConfigError, NotShownError
from drllm.extras import need
from drllm.model.load import BaseModel
from drllm.model.prompts import context_length, encode
from drllm.models.export import export_path, refuse_quantised
from drllm.models.routed_model import RoutedModel, unrouted
from drllm.pipeline.shrink_answers import describe_wrong_answers
from drllm.pipeline.shrink_candidates import choose_candidates
from drllm.pipeline.shrink_measurement import ModelMeasurement
from drllm.pipeline.shrink_questions import ShrinkQuestions, read_questions
from drllm.pipeline.shrink_time import TimedListener
from drllm.records.codec import read_json, write_json
from drllm.records.manifest import new_manifest
from drllm.records.places import check_new_folder, only_writer
from drllm.records.shrink import (
    SHRINK_FILE,
    ShrinkRecord,
    ShrunkModel,
    find_work_folder,
    read_shrink,
)
from drllm.records.static_paths import PATHS_FILE, NamedPath, StaticPaths, load_path
from drllm.statistics.exclusion import (
    Limits,
    TaskTest,
    Trial,
    end_at_failure,
    judge_task,
    judge_texts,
)
from drllm.statistics.ranges import Amount, Count
from drllm.tuning.data_splits import TasksArgument
from drllm.tuning.heal import heal
from drllm.tuning.heal_texts import TextArgument, TextSource, Tokens
from drllm.tuning.heal_tokens import TextTokenizer
from drllm.tuning.objectives import LOSS
from drllm.tuning.run import tune
from drllm.work.listener import Listener, OnProgress, write_minutes
from drllm.work.store import ResultStore, refuse_other_run

SHARE_TO_TUNE = 1 / 3  # of `minutes`, to find paths and to refit the best ones
SHARE_TO_REFIT = 1 / 6  # of `minutes`, to refit the candidates before they are trained
LEAST_SHARE_TO_HEAL = 1 / 3  # of `minutes`, also where finding paths took longer than planned
TIMES_FILE = "times.json"
TUNED_FOLDER = "tuned"
MAX_TOKENS = 512  # maximum tokens of a text, and of an answer to a prompt
NUM_JUDGED = 100  # maximum questions per task that choose among paths


def shrink(
    model: Any,
    tasks: TasksArgument = None,
    config: ShrinkConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    texts: TextArgument = None,
    force: bool = False,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> ShrinkRecord:
    """Write a smaller checkpoint that is shown to lose less than some limits on held-out questions.

    Paths are tuned and healed on a part of the questions. The candidates and their order are fixed.
    Then they are measured on the held-out questions, from the most layers to the fewest. A
    candidate passes if a loss of accuracy of `max_drop` points and an increase of the next-token
    loss of `max_loss_increase` nats a token are excluded with 95 % confidence. The last that passed
    before one failed is written, as an ordinary checkpoint with a model card and `shrink.json`. If
    none passed, nothing is written.

    With `save` or `layers` the number of layers is given. Then one candidate is measured and
    written, whatever it loses.

    After an interruption the same call resumes. The work is kept in a folder beside the output,
    `NAME.work`, which may be deleted afterwards.

    Args:
        model: As for `tune`, without Ray.
        tasks: Tasks, names of tasks, or files of questions. Questions may have options, right
            answers, or be prompts without answers; then the text loss alone decides, on the answers
            of the full model.
        config: The settings; None takes the defaults.
        output_dir: The folder of the checkpoint; it must not exist, or be empty. None writes no
            checkpoint.
        texts: Texts that the model must still be able to write, as for `heal`; None takes the
            config's texts. A quarter of them is held out.
        force: Write the candidate whose test failed, if none passed. Also go on if the full model
            answers none of some questions right.
        tokenizer: As for `tune`.
        listener: Receives progress and notes.
        settings: Settings of `ShrinkConfig` by name, which replace the config's settings.

    Returns:
        What each candidate loses, and which one was written.

    Raises:
        ConfigError: The settings don't fit the model, or the folders belong to another run.
        TaskError: A task is unknown, has too few questions, or has none to hold out.
        ArchitectureError: The model can't be exported, such as one with quantised weights.
        NotShownError: The full model answers none of some questions right, without `force`.

    Source: ours.
    """
    config = replace_settings(ShrinkConfig, config, settings)
    config.check()
    questions = read_questions(config, config.tasks if tasks is None else tasks, texts)
    return shrink_questions(
        model,
        questions,
        config,
        output_dir,
        force=force,
        tokenizer=tokenizer,
        listener=listener,
    )


def shrink_questions(
    model: Any,
    questions: ShrinkQuestions,
    config: ShrinkConfig,
    output_dir: Path | str | None = None,
    *,
    force: bool = False,
    tokenizer: Any = None,
    listener: Listener | None = None,
) -> ShrinkRecord:
    """Shrink a model for questions that are read already; otherwise as `shrink`."""
    listener = OnceListener(listener or Listener())
    need("eval", "measuring accuracy")
    need("heal", "training an adapter")
    with ExitStack() as stack:
        output = None if output_dir is None else Path(output_dir)
        work = _choose_work_folder(output, stack)
        if output is not None:
            check_new_folder(output)
        stack.enter_context(only_writer(work, "shrink", "OUT"))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        base.refuse_bypass("shrink repairs paths")
        if output is not None:
            refuse_quantised(base)
        run = ShrinkRun(base, questions, config, work, listener)
        run.check_answers(force=force)
        record = run.find_models()
        return run.write(record, output, force=force)


def _choose_work_folder(output: Path | None, stack: ExitStack) -> Path:
    """Return the folder of the work: beside the output, or a temporary one."""
    if output is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return find_work_folder(output)


class ShrinkTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the time is divided, as it is kept for a resumed run.

    Attributes:
        minutes: The minutes to find paths and to heal them.
        num_candidates: How many paths are healed.
        minutes_to_heal: The minutes of healing of each candidate.
    """

    minutes: Amount
    num_candidates: Count
    minutes_to_heal: Amount


class OnceListener(Listener):
    """Passes each note on once, since healing each candidate warns of the same texts.

    Args:
        listener: Receives the notes and the progress.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._seen: set[str] = set()

    def note(self, text: str) -> None:
        """Pass a note on if it is new."""
        if text not in self._seen:
            self._seen.add(text)
            self.listener.note(text)

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show that work goes on, as the other listener does."""
        return self.listener.busy(what)

    def progress(self, title: str, unit: str) -> AbstractContextManager[OnProgress]:
        """Show the progress, as the other listener does."""
        return self.listener.progress(title, unit)


@dataclass(frozen=True)
class ShrinkRun:
    """One run of the stage.

    Attributes:
        base: The model.
        questions: The questions and texts.
        config: The settings.
        work: The folder of the work.
        listener: Receives progress and notes.
    """

    base: BaseModel
    questions: ShrinkQuestions
    config: ShrinkConfig
    work: Path
    listener: Listener

    def check_answers(self, *, force: bool) -> None:
        """Refuse questions of which the full model answers none right, before any long work.

        With `force`, or where the number of layers is given, it is only noted. A run that has begun
        isn't checked again.

        Raises:
            NotShownError: The full model answers none of some questions of a task right.
        """
        if (self.work / TUNED_FOLDER).exists():
            return
        has_limits = self.config.choose_num_skipped(self.base.num_layers) is None
        for splits in self.questions.graded_tasks:
            with self.listener.busy(f"asking the full model questions of {splits.task.name}"):
                sentence = describe_wrong_answers(self.base, splits, self.config.seed)
            if sentence and has_limits and not force:
                raise NotShownError(
                    f"{sentence}; check the answers and how they are graded, or give --force to go "
                    f"on"
                )
            if sentence:
                self.listener.note(sentence)

    def find_models(self) -> ShrinkRecord:
        """Find, heal and measure candidates, or return what an earlier run found."""
        header = self.make_header()
        file = self.work / SHRINK_FILE
        finished = self.read_finished(file, header)
        if finished is not None:
            return finished
        sources, held_out = self.prepare_texts()
        started = time.monotonic()
        tuned = self.tune_paths(sources)
        candidates = self.choose_candidates(tuned)
        minutes = self.divide_time(time.monotonic() - started, len(candidates))
        folders = self.heal_candidates(candidates, sources, minutes)
        record = self.measure(header, folders, held_out)
        record = self.judge(record)
        write_json(file, record)
        return record

    @property
    def max_tokens(self) -> int:
        """The maximum tokens of a text, and of an answer to a prompt."""
        return min(MAX_TOKENS, context_length(self.base.model) or MAX_TOKENS)

    def prepare_texts(self) -> tuple[list[TextSource], dict[str, list[Tokens]]]:
        """Let the full model answer prompts without answers, once for all steps.

        Returns:
            What paths are repaired and healed on, with the answers as texts; and the held-out texts
            as tokens, by their name.
        """
        base = self.base
        identity = {"questions_sha256": self.questions.digest(), "model": base.identity}
        store = ResultStore(self.work / "answers", identity, stage="shrink")
        store.open()
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        held_out = {}
        try:
            sources = []
            for source in self.questions.sources:
                if source.is_open:
                    answers = self.tokenize(routed, store, source, "to heal on")
                    texts = [base.tokenizer.decode(tokens) for tokens in answers]
                    source = TextSource(name=source.name, texts=texts)
                sources.append(source)
            for source in self.questions.held_out_sources:
                held_out[source.name] = self.tokenize(routed, store, source, "to measure on")
        finally:
            routed.detach()
        return sources, held_out

    def tokenize(
        self, routed: RoutedModel, store: ResultStore, source: TextSource, use: str
    ) -> list[Tokens]:
        """Return the texts of a source as tokens; prompts without answers are answered first.

        Args:
            routed: The model.
            store: Keeps the answers.
            source: The source.
            use: What its texts are for, in words.
        """
        num_prompts = len(source.prompts)
        what = f"answering {num_prompts:,} prompts of {source.name} {use}"
        listener = TimedListener(self.listener, what)
        tokenizer = TextTokenizer(routed, self.max_tokens, store, listener)
        return tokenizer.tokenize_sources([source])[source.name]

    def make_header(self) -> dict[str, Any]:
        """Return the fields that are known before any work."""
        questions = self.questions
        manifest = new_manifest("shrink", model=self.base.identity, config=self.config.to_dict())
        return {
            **manifest,
            "tasks": tuple(splits.task.name for splits in questions.tasks),
            "texts": tuple(questions.held_out_texts),
            "files": tuple(questions.files),
            "num_questions": questions.count_to_find(),
            "num_held_out": questions.count_held_out(),
            "runtime": dict(self.base.runtime),
            "questions_sha256": questions.digest(),
        }

    def read_finished(self, file: Path, header: Mapping[str, Any]) -> ShrinkRecord | None:
        """Return the record of a finished run; refuse the record of another run."""
        if not file.exists():
            return None
        record = read_shrink(file)
        identity_before = _make_identity(msgspec.structs.asdict(record))
        remedy = f"choose another folder, or delete {self.work}"
        refuse_other_run(f"the work in {file}", identity_before, _make_identity(header), remedy)
        return record

    def tune_paths(self, sources: Sequence[TextSource]) -> StaticPaths:
        """Find paths with fewer layers, repaired with texts of some sources."""
        config = self.config
        num_layers = self.base.num_layers
        num_skipped = config.choose_num_skipped(num_layers)
        questions = self.questions
        # Where all questions have answers, the loss of the answers chooses: what keeps it keeps
        # accuracy too, while paths that keep accuracy alone lose their text.
        has_answers = not (questions.open_tasks or questions.held_out_texts)
        tune_config = TuneConfig(
            data_dir=config.data_dir,
            objective=LOSS if has_answers else None,
            max_skipped=num_skipped,  # None: a sixth of the layers, as for `tune`
            # Candidates are chosen by their loss. Only healed ones have to answer, when measured.
            grade_answers=False,
            # A path may lose more before it is healed than it may lose in the end.
            max_loss=1.0,
            minutes=None if num_skipped else SHARE_TO_TUNE * config.minutes,
            num_fit=config.num_fit,
            num_judged=NUM_JUDGED,
            seed=config.seed,
        )
        text_tasks = questions.make_text_tasks(config.num_fit, self.cut_text)
        self.listener.note("step 1 of 4: which layers can go")
        return tune(
            self.base,
            [*questions.tasks, *text_tasks],
            tune_config,
            self.work / TUNED_FOLDER,
            texts=questions.take_to_fit(sources),
            listener=self.listener,
        )

    def cut_text(self, text: str) -> str:
        """Cut a text to fewer than `max_tokens` tokens, so that one more fits behind it."""
        tokens = encode(self.base.tokenizer, text)
        if len(tokens) < self.max_tokens:
            return text
        first_tokens = tokens[: self.max_tokens - 1]
        return str(self.base.tokenizer.decode(first_tokens, skip_special_tokens=True))

    def choose_candidates(self, tuned: StaticPaths) -> list[NamedPath]:
        """Choose the paths to heal and to measure, from the most layers to the fewest."""
        config = self.config
        num_skipped = config.choose_num_skipped(self.base.num_layers)
        if num_skipped is None:
            return choose_candidates(tuned, config.max_loss_increase, config.num_candidates)
        for path in tuned.paths:
            if len(path.steps) == self.base.num_layers - num_skipped:
                return [path]
        raise ConfigError(
            f"no path with {num_skipped} layers left out was found; the search ended with "
            f"{tuned.paths[-1].name}, since shorter paths lose too much"
        )

    def divide_time(self, tuning_seconds: float, num_candidates: int) -> float:
        """Return the minutes to train each candidate: half of all, or less if the search took long.

        The minutes are kept, so that a resumed run heals for as long. A run with other settings is
        refused.

        Args:
            tuning_seconds: How long the search took. It is too little where an interrupted run did
                a part of it, so the search counts as no shorter than planned.
            num_candidates: How many candidates share the time.
        """
        file = self.work / TIMES_FILE
        minutes = self.config.minutes
        if file.exists():
            earlier_times = read_json(file, ShrinkTimes)
            self.refuse_other_times(earlier_times, num_candidates)
            return earlier_times.minutes_to_heal
        tuning_minutes = max(tuning_seconds / 60, SHARE_TO_TUNE * minutes)
        left = (1 - SHARE_TO_REFIT) * minutes - tuning_minutes
        each = max(left, LEAST_SHARE_TO_HEAL * minutes) / num_candidates
        times = ShrinkTimes(minutes=minutes, num_candidates=num_candidates, minutes_to_heal=each)
        write_json(file, times)
        return each

    def refuse_other_times(self, earlier_times: ShrinkTimes, num_candidates: int) -> None:
        """Refuse to go on with work whose time was divided otherwise."""
        before = {"minutes": earlier_times.minutes, "candidates": earlier_times.num_candidates}
        now = {"minutes": self.config.minutes, "candidates": num_candidates}
        remedy = f"give the same --minutes again, or delete {self.work}"
        refuse_other_run(f"the work in {self.work}", before, now, remedy)

    def heal_candidates(
        self, candidates: Sequence[NamedPath], sources: Sequence[TextSource], minutes: float
    ) -> dict[str, Path]:
        """Heal each candidate for some minutes, and return the folder of each by its name."""
        config = self.config
        heal_config = HealConfig(
            data_dir=config.data_dir,
            minutes=minutes,
            rank=config.rank,
            max_tokens=self.max_tokens,
            seed=config.seed,
        )
        folders = {}
        for candidate in candidates:
            self.listener.note(
                f"step 2 of 4: healing {len(candidate.steps)} of {self.base.num_layers} layers, "
                f"{write_minutes(minutes)} minutes of training"
            )
            folder = self.work / f"healed-{candidate.name}"
            path = load_path(f"{self.work / TUNED_FOLDER / PATHS_FILE}:{candidate.name}")
            heal(
                self.base,
                path,
                texts=list(sources),
                config=heal_config,
                output_dir=folder,
                listener=self.listener,
            )
            folders[candidate.name] = folder
        return folders

    def measure(
        self,
        header: Mapping[str, Any],
        folders: Mapping[str, Path],
        held_out: Mapping[str, Sequence[Tokens]],
    ) -> ShrinkRecord:
        """Measure the full model and the candidates on what is held out."""
        self.listener.note("step 3 of 4: measuring on held-out questions")
        tasks = self.questions.graded_tasks
        cut = {
            name: [text[: self.max_tokens] for text in texts] for name, texts in held_out.items()
        }
        measurement = ModelMeasurement(self.base, tasks, cut, self.config, self.listener)
        models = measurement.measure(folders, self.work / "eval")
        return ShrinkRecord(**header, models=models)

    def judge(self, record: ShrinkRecord) -> ShrinkRecord:
        """Test the candidates in their order, and choose the last that passed."""
        if self.config.has_given_size:
            return replace(record, chosen=record.candidates[0].name)
        limits = Limits(
            max_drop=self.config.max_drop, max_loss_increase=self.config.max_loss_increase
        )
        trials = [_try(model, limits) for model in record.candidates]
        result = end_at_failure(trials, limits)
        return replace(record, limits=limits, trials=result.trials, chosen=result.chosen)

    def write(self, record: ShrinkRecord, output: Path | None, *, force: bool) -> ShrinkRecord:
        """Write the chosen checkpoint, or with `force` the one whose test failed."""
        if record.chosen is None and force:
            record = replace(record, chosen=record.fallback.name, is_forced=True)
        if record.chosen is None or output is None:
            return record
        self.listener.note("step 4 of 4: writing the checkpoint")
        path = load_path(self.work / f"healed-{record.chosen}")
        with self.listener.busy("writing and checking"):
            export_path(self.base, path, output, shrink=record)
        return record


def _make_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by which a run recognises its own record."""
    config = make_settings(ShrinkConfig, values["config"])
    return {
        "settings": config.decisive(),
        "model": values["model"],
        "runtime": values["runtime"],
        "questions_sha256": values["questions_sha256"],
    }


def _try(model: ShrunkModel, limits: Limits) -> Trial:
    """Test one candidate on every task and every source of texts."""
    tests: list[TaskTest] = []
    for task, scores in model.tasks.items():
        tests.append(judge_task(task, scores.against_full, limits))
    assert limits.max_loss_increase is not None
    for source, text_scores in model.texts.items():
        assert text_scores.against_full is not None
        tests.append(judge_texts(source, text_scores.against_full, limits.max_loss_increase))
    return Trial(name=model.name, tasks=tuple(tests))
