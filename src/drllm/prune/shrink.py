"""A smaller checkpoint for a task, with what it gains and loses, or an honest no.

Layers are chosen, the model is repaired and taught right answers, measured on questions that
nothing was chosen on, and written as an ordinary checkpoint. The candidates and their order are
fixed beforehand: from the most layers to the fewest, up to the first that fails.

Source: ours; the order of the tests is explained in `statistics.exclusion`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec.structs import replace

from drllm.config import GapsConfig, LearnConfig, ShrinkConfig
from drllm.config.fields import replace_settings
from drllm.extras import need
from drllm.model.layers import evaluation_mode
from drllm.model.load import BaseModel
from drllm.model.prompts import context_length, encode
from drllm.model.submodel import list_kept_layers, shorten
from drllm.models.routed_model import unrouted
from drllm.prune.choose import choose_layers
from drllm.prune.export import count_bytes, export
from drllm.prune.learn import keep_identity, run_repairs
from drllm.prune.loss import Item, make_text_item
from drllm.prune.measure import Measurement, TaskMeasurement, measure_model, measure_speeds
from drllm.prune.questions import make_items
from drllm.prune.repairs.base import Lessons
from drllm.records.codec import hash_values, read_json, write_json
from drllm.records.gaps import PATHS_FILE, GapsRecord, read_gaps
from drllm.records.manifest import new_manifest
from drllm.records.places import check_new_folder, only_writer
from drllm.records.shortened import (
    FULL,
    OTHER_TEXT,
    SHRINK_FILE,
    TRAINED,
    LossResult,
    ModelResult,
    ShrinkRecord,
    TaskResult,
    find_work_folder,
)
from drllm.statistics.differences import Differences, Verdict
from drllm.statistics.exclusion import (
    Limits,
    TaskTest,
    Trial,
    end_at_failure,
    judge_task,
    judge_texts,
)
from drllm.statistics.intervals import accuracy_interval
from drllm.statistics.paired import Outcomes
from drllm.statistics.verdicts import compare, judge_means
from drllm.tasks.base import Task
from drllm.tasks.examples import choose
from drllm.tasks.files import FileTask
from drllm.tasks.parts import Questions, read_questions
from drllm.tasks.texts import BUILTIN_TEXTS, read_texts
from drllm.work.listener import Listener, write_minutes

SHARES = (1 / 6, 1 / 3, 1 / 2)  # of the layers, that the candidates leave out
FEWEST_DRAWS = 600  # questions drawn; with fewer there is a note
LEAST_SHARE_TO_LEARN = 1 / 2  # of `minutes`, also where choosing the layers took longer
NUM_OTHER_TEXTS = 100
MAX_LOSSES = 400  # held-out answers of a task whose loss is measured
RUN_FILE = "shrink.run.json"


def shrink(
    model: Any,
    questions: Task | str | Sequence[Task | str] | Questions | None = None,
    output_dir: Path | str | None = None,
    config: ShrinkConfig | None = None,
    *,
    texts: str | Sequence[str] | None = None,
    force: bool = False,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> ShrinkRecord:
    """Write a smaller checkpoint for a task, and say what it gains and loses.

    The candidates keep five sixths, two thirds and half of the layers. Each gets the layers that a
    refit needs least, the refit, and some minutes of learning right answers. They are measured on
    held-out questions, the most layers first, up to the first that isn't shown to lose less than
    the limits; the last that passed is written. With `layers` or `save` there is one candidate,
    which is written whatever it loses.

    After an interruption the same call resumes. The work is kept beside the output, in `NAME.work`,
    which may be deleted afterwards.

    Args:
        model: The model, its name, or what `load` returns.
        questions: Tasks, names of tasks, or files of questions: with options, with right answers in
            text, chats, or prompts without answers.
        output_dir: The folder of the checkpoint; None writes none.
        config: The settings; None takes the defaults.
        texts: Texts that the model must still be able to write; None takes the config's texts.
        force: Whether to write the candidate whose test failed, if none passed.
        tokenizer: The tokenizer; None takes that of the model.
        listener: Receives progress and notes.
        settings: Settings of `ShrinkConfig` by name, which replace the config's settings.

    Raises:
        ConfigError: The settings don't fit the model, or the folders belong to another run.
        TaskError: A task is unknown or has too few questions.
        ArchitectureError: The model can't be shortened, such as one with quantised weights.

    Source: ours.
    """
    config = replace_settings(ShrinkConfig, config, settings)
    config.check()
    listener = listener or Listener()
    need("eval", "measuring accuracy")
    questions = read_questions(config, questions, texts)
    with ExitStack() as stack:
        output = None if output_dir is None else Path(output_dir)
        if output is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            check_new_folder(output)
            work = find_work_folder(output)
        stack.enter_context(only_writer(work, "shrink", "OUT"))
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        base.refuse_bypass("shrink shortens a model")
        return _shrink(base, questions, config, output, work, force, listener)


def _shrink(
    base: BaseModel,
    questions: Questions,
    config: ShrinkConfig,
    output: Path | None,
    work: Path,
    force: bool,
    listener: Listener,
) -> ShrinkRecord:
    """Shrink a loaded model; each step reads what an earlier run has finished."""
    given = config.choose_num_skipped(base.num_layers)
    numbers = [given] if given else [max(1, round(share * base.num_layers)) for share in SHARES]
    numbers = sorted(set(numbers))
    shorten(base.model, range(1, 2))  # refuses a model that can't be shortened

    # The questions as tokens.
    max_tokens = min(config.max_tokens, context_length(base.model) or config.max_tokens)
    lessons = Lessons.read(base, questions, max_tokens, listener)
    held_out = make_items(base, questions, "held out", max_tokens=max_tokens, listener=listener)
    identity = {
        "settings": config.decisive(),
        "model": base.identity,
        "questions_sha256": hash_values([questions.examples, questions.texts]),
    }
    keep_identity(work / RUN_FILE, identity)

    # Which layers to leave out.
    started = time.monotonic()
    gaps_config = GapsConfig(seed=config.seed)
    paths_file = work / PATHS_FILE
    if paths_file.exists():
        gaps: GapsRecord = read_gaps(paths_file)
    else:
        listener.note("step 1 of 4: which layers can go")
        gaps = choose_layers(base, lessons, numbers, gaps_config, listener)
        write_json(paths_file, gaps)
    minutes_used = (time.monotonic() - started) / 60

    # Refit and learn.
    left = max(config.minutes - minutes_used, LEAST_SHARE_TO_LEARN * config.minutes)
    minutes = _keep_minutes(work, left / len(numbers))
    skips = {str(base.num_layers - len(path.skip)): list(path.skip) for path in gaps.paths}
    if config.compare_trained:
        skips = {TRAINED: [], **skips}
    models: dict[str, Any] = {}
    reports: dict[str, dict[str, Any]] = {}
    notes = []
    for name, skip in skips.items():
        listener.note(
            f"step 2 of 4: {base.num_layers - len(skip)} of {base.num_layers} layers learn for "
            f"{write_minutes(minutes)} minutes"
        )
        learn_config = LearnConfig(
            repairs="refit,lora" if skip else "lora",
            minutes=minutes,
            max_tokens=config.max_tokens,
            seed=config.seed,
        )
        models[name] = shorten(base.model, skip)
        folder = work / _name_folder(name)
        with evaluation_mode(models[name]):
            reports[name] = run_repairs(models[name], base, lessons, learn_config, folder, listener)
        draws = _count_draws(reports[name])
        if 0 < draws < FEWEST_DRAWS:
            notes.append(
                f"{name} layers drew {draws} questions in {write_minutes(minutes)} minutes, and "
                f"{FEWEST_DRAWS} or more are better: give more --minutes."
            )

    # Measure on what is held out.
    listener.note("step 3 of 4: measuring on held-out questions")
    graded = [task for task in questions.tasks if task.has_answers]
    to_measure = _choose_losses(base, questions, held_out, max_tokens, config.seed)
    measured = {}
    for name, model in {FULL: base.model, **models}.items():
        file = work / f"measured-{_name_folder(name)}.json"
        if not file.exists():
            short = dataclasses.replace(base, model=model)
            measurement = measure_model(
                short, graded, to_measure, config.data_dir, config.seed, listener
            )
            write_json(file, measurement)
        measured[name] = read_json(file, Measurement)
    with listener.busy("measuring time"):
        speeds = measure_speeds({FULL: base.model, **models})

    # Compare, test in order, choose.
    results = []
    for name, model in {FULL: base.model, **models}.items():
        result = _describe(name, model, measured, config.seed)
        repairs = reports.get(name, {}).get("repairs", [])
        result = replace(
            result,
            speed=speeds[name],
            draws=_count_draws(reports.get(name, {})),
            repairs=tuple(each["name"] for each in repairs if each["kept"]),
        )
        results.append(result)
    record = ShrinkRecord(
        **new_manifest("shrink", model=base.identity, config=config.to_dict()),
        counts={
            name: (number, questions.count("check")[name], questions.count("held out")[name])
            for name, number in questions.count("fit").items()
        },
        runtime=dict(base.runtime),
        models=tuple(results),
        files=tuple(
            [task.name for task in questions.tasks if isinstance(task, FileTask)]
            + list(questions.texts["fit"])
        ),
        notes=tuple(notes),
    )
    if given:
        record = replace(record, chosen=record.candidates[0].name)
    else:
        limits = Limits(max_drop=config.max_drop, max_loss_increase=config.max_loss_increase)
        trials = [_try(model, limits) for model in record.candidates]
        tested = end_at_failure(trials, limits)
        record = replace(record, limits=limits, trials=tested.trials, chosen=tested.chosen)
    if record.chosen is None and force:
        record = replace(record, chosen=record.fallback.name, is_forced=True)
    write_json(work / SHRINK_FILE, record)
    if record.chosen is not None and output is not None:
        listener.note("step 4 of 4: writing the checkpoint")
        with listener.busy("writing and checking"):
            export(
                models[record.chosen],
                base,
                output,
                report=reports[record.chosen],
                records={SHRINK_FILE: record},
            )
    return record


def _name_folder(name: str) -> str:
    """Return the name of a model as part of a file's name."""
    return "trained-alike" if name == TRAINED else name


def _keep_minutes(work: Path, minutes: float) -> float:
    """Return the minutes that each candidate learns; a resumed run gets those of the first."""
    file = work / "minutes.json"
    if not file.exists():
        write_json(file, minutes)
    return read_json(file, float)


def _count_draws(report: Mapping[str, Any]) -> int:
    """Return how many questions a model was trained on."""
    return sum(each.get("draws", 0) for each in report.get("repairs", []))


def _choose_losses(
    base: BaseModel,
    questions: Questions,
    held_out: Mapping[str, Sequence[Item]],
    max_tokens: int,
    seed: int,
) -> dict[str, list[Item]]:
    """Return the questions and texts whose losses are measured: all but questions with options.

    Texts of another kind, which come with drllm, are among them, unless they are given as texts.
    """
    chosen = {}
    for name, items in held_out.items():
        if not any(item.lengths for item in items):
            chosen[name] = choose(items, MAX_LOSSES, seed)
    if BUILTIN_TEXTS not in questions.texts["fit"]:
        texts = read_texts(BUILTIN_TEXTS, NUM_OTHER_TEXTS, seed)[BUILTIN_TEXTS]
        tokens = [tuple(encode(base.tokenizer, text))[:max_tokens] for text in texts]
        chosen[OTHER_TEXT] = [make_text_item(text) for text in tokens if len(text) > 1]
    return chosen


def _describe(name: str, model: Any, measured: Mapping[str, Measurement], seed: int) -> ModelResult:
    """Return what was measured of a model, compared with the full model."""
    own = measured[name]
    full = measured[FULL]
    tasks = {}
    for task, answers in own.tasks.items():
        others = {
            measure: fmean(scores)
            for measure, scores in answers.scores.items()
            if measure != answers.measure
        }
        tasks[task] = TaskResult(
            accuracy=fmean(answers.scores[answers.measure]),
            measure=answers.measure,
            other=others,
            against_full=None
            if name == FULL
            else compare_accuracy([answers], [full.tasks[task]], seed),
        )
    losses = {}
    for source, values in own.losses.items():
        against_full = None
        if name != FULL:
            against_full = judge_means("text_loss", values, full.losses[source], seed)
        losses[source] = LossResult(loss=fmean(values), against_full=against_full)
    pooled = None
    against_trained = None
    if own.tasks and name != FULL:
        pooled = compare_accuracy(list(own.tasks.values()), list(full.tasks.values()), seed)
        if TRAINED in measured and name != TRAINED:
            trained = list(measured[TRAINED].tasks.values())
            against_trained = compare_accuracy(list(own.tasks.values()), trained, seed)
    return ModelResult(
        name=name,
        layers=tuple(list_kept_layers(model)),
        num_bytes=count_bytes(model),
        tasks=tasks,
        losses=losses,
        pooled=pooled,
        against_trained=against_trained,
    )


def compare_accuracy(
    ours: Sequence[TaskMeasurement], theirs: Sequence[TaskMeasurement], seed: int
) -> Verdict:
    """Compare the accuracies of two models on the questions of all tasks together.

    A loss is claimed only where the second model is above chance, and a gain where the first is.
    """
    our_scores = [score for task in ours for score in task.scores[task.measure]]
    their_scores = [score for task in theirs for score in task.scores[task.measure]]
    counts = [len(task.scores[task.measure]) for task in ours]
    chance = sum(task.chance * n for task, n in zip(ours, counts, strict=True)) / sum(counts)
    better = our_scores if fmean(our_scores) > fmean(their_scores) else their_scores
    above_chance = accuracy_interval(better, seed)[0] > chance
    differences = compare(
        Outcomes(name="ours", executions=0, correct=our_scores),
        Outcomes(name="theirs", executions=0, correct=their_scores),
        seed,
        above_chance=above_chance,
    )
    return differences.accuracy


def _try(model: ModelResult, limits: Limits) -> Trial:
    """Test one candidate on every task and every source of texts, except those of other kinds."""
    tests: list[TaskTest] = []
    for task, result in model.tasks.items():
        assert result.against_full is not None
        loss = model.losses[task].against_full if task in model.losses else None
        task_limits = limits if loss is not None else Limits(max_drop=limits.max_drop)
        differences = Differences(accuracy=result.against_full, text_loss=loss)
        tests.append(judge_task(task, differences, task_limits))
    assert limits.max_loss_increase is not None
    for source, loss_result in model.losses.items():
        if source not in model.tasks and source != OTHER_TEXT:
            assert loss_result.against_full is not None
            tests.append(judge_texts(source, loss_result.against_full, limits.max_loss_increase))
    return Trial(name=model.name, tasks=tuple(tests))
