"""The stage `evaluate`: it runs systems on tasks, and writes `eval/TASK.json` and samples.

`evaluate` reads the request (`request`) and the routers (`inputs`), plans each task (`plan`), runs
the systems (`run`), judges the outcomes (`judge`) and writes the records. The results of systems
are kept in `partial/`. If the same evaluation is started again, it reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from drllm.config import EvaluateConfig
from drllm.config.fields import replace_settings
from drllm.errors import ArchitectureError, ConfigError
from drllm.evaluation.flops import ModelShape
from drllm.evaluation.inputs import (
    EvaluationInputs,
    LoadedRouters,
    Routers,
    check_seeds,
    list_routers,
    load_listed_routers,
    note_other_prompts,
    prepare_inputs,
)
from drllm.evaluation.latency import write_latency
from drllm.evaluation.questions import check_output, needs_fitting
from drllm.evaluation.request import EvaluationRequest, PathSources, read_request
from drllm.model.load import BaseModel
from drllm.models.routed_model import unrouted
from drllm.models.routers.places import WEIGHTS_FILE
from drllm.models.routing.policies import RouterPolicy
from drllm.models.workers import Workers, open_workers
from drllm.records.codec import sha256, write_json
from drllm.records.manifest import new_manifest, write_records
from drllm.records.places import only_writer, stage_folder
from drllm.records.results import (
    SAMPLES_FILE,
    Evaluation,
    Results,
    Sample,
    list_possible_results,
    read_evaluation,
)
from drllm.tasks.base import Task
from drllm.tasks.registry import TASKS
from drllm.work.listener import Listener
from drllm.work.store import ResultStore, refuse_other_run

if TYPE_CHECKING:
    from drllm.evaluation.lm_eval.model import RoutedLM
    from drllm.evaluation.outcomes import TaskRuns
    from drllm.evaluation.plan import Planner, TaskPlan

PARTIAL_FOLDER = "partial"


def evaluate(
    model: Any,
    tasks: Task | str | Sequence[Task | str] | None = None,
    config: EvaluateConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    routers: Routers | Sequence[Routers] = (),
    paths: PathSources | None = None,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Results:
    """Evaluate base, routed model, baselines and static paths on tasks.

    `tasks` and `paths` are settings too, for the command line. An argument replaces the setting.

    Args:
        model: A `RoutedModel`, whose own routers are evaluated. Or the base model (a name, a
            `ModelConfig`, the result of `load`, or a model of transformers) with `routers`, `paths`
            or both. With Ray a name or a `ModelConfig`.
        tasks: Tasks, names of tasks, or files of questions; None takes the config's tasks.
        config: The settings; None takes the defaults.
        output_dir: Folder for `TASK.json` of each task, `samples.jsonl` and `latency.json`. An
            interrupted evaluation in this folder is resumed. None keeps no files.
        routers: Routers, or their folders. Several routers must come from the same training with
            different seeds. Baselines are compared with the first seed's routers. The other routers
            show how much the results of seeds differ. They run at every depth too, each with its
            own permuted routes if this baseline runs.
        paths: Static paths by name, or files as for `--paths`; None takes the config's paths.
            Without routers, paths are compared with base alone.
        tokenizer: The model's tokenizer; None loads it by the model's name.
        listener: Receives the progress; None shows nothing.
        settings: Settings of `EvaluateConfig` by name, which replace the config's settings.

    Returns:
        The results in the order of the tasks. The files are written when all tasks are done, since
        p-values are corrected for the number of tasks.

    Raises:
        ConfigError: There are neither routers nor paths, a setting makes no sense, a baseline lacks
            the data that it is fitted on, or `output_dir` holds another evaluation.
        PathError: The model can't run a path, or a path has the name of another system.
        TaskError: A task is unknown, or has no questions in the split.
        CheckpointError: The routers belong to another model.
        RecordError: `output_dir` has other files that would be read as results.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    listener = listener or Listener()
    config = replace_settings(EvaluateConfig, config, settings)
    listed_routers = list_routers(model, routers)
    request = read_request(config, tasks, paths, has_routers=bool(listed_routers))
    loaded_routers = load_listed_routers(listed_routers)
    return evaluate_request(
        request, model, loaded_routers, output_dir, tokenizer=tokenizer, listener=listener
    )


def evaluate_request(
    request: EvaluationRequest,
    model: Any,
    routers: Sequence[LoadedRouters],
    output_dir: Path | str | None = None,
    *,
    tokenizer: Any = None,
    listener: Listener | None = None,
) -> Results:
    """Evaluate what is read and checked already; otherwise as `evaluate`.

    Args:
        request: What is to be evaluated, from `read_request`.
        model: As for `evaluate`.
        routers: The routers of each seed; none if only paths are evaluated.
        output_dir: As for `evaluate`.
        tokenizer: As for `evaluate`.
        listener: As for `evaluate`.
    """
    listener = listener or Listener()
    with ExitStack() as stack:
        output = stage_folder(output_dir, stack)
        check_output(output)
        workers = stack.enter_context(open_workers(model, tokenizer, request.config, listener))
        inputs = prepare_inputs(request, routers, workers, output)
        if inputs.routers.first is not None:
            note_other_prompts(inputs.routers.first, request.config, listener)
        header = _make_header(inputs, workers)
        _refuse_other_results(output, header, request)
        check_seeds(inputs.routers, workers)
        results = _run_evaluation(inputs, workers, header, output, listener)
    if output_dir is not None:
        results.folder = output
    return results


def answer_questions(
    model: BaseModel,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    listener: Listener,
) -> dict[str, TaskRuns]:
    """Let one model answer the questions of tasks, and grade its answers; task → outcomes.

    Args:
        model: The model, shortened or not.
        tasks: The tasks.
        config: The settings; systems beside the model itself don't run.
        listener: Receives the progress.
    """
    request = EvaluationRequest(replace(config, baselines="none"), tasks, {})
    with ExitStack() as stack:
        output = stage_folder(None, stack)
        workers = stack.enter_context(open_workers(model, None, request.config, listener))
        inputs = prepare_inputs(request, [], workers, output)
        lm = _make_harness_model(inputs, workers)
        store = ResultStore(output / PARTIAL_FOLDER, {}, stage="evaluation")
        store.open()
        with listener.busy("reading the questions"):
            plans = _make_planner(inputs, lm, store).plan_tasks(tasks)
        runs = _run_plans(plans, inputs, workers, lm, store, output, listener)
    return {task.name: task_runs for task, task_runs in zip(tasks, runs, strict=True)}


def _run_evaluation(
    inputs: EvaluationInputs,
    workers: Workers,
    header: Mapping[str, Any],
    output: Path,
    listener: Listener,
) -> Results:
    """Plan the tasks, run the systems, measure time, judge the outcomes, and write the records."""
    # Imported here because they load the harness, which an installation without `eval` lacks.
    from drllm.evaluation.judge import build_samples, judge_runs

    lm = _make_harness_model(inputs, workers)
    store = ResultStore(
        output / PARTIAL_FOLDER, _make_identity(inputs, workers), stage="evaluation"
    )
    with only_writer(output, "evaluation", "--output-dir"):
        store.open()
        with listener.busy("reading the questions"):
            plans = _make_planner(inputs, lm, store).plan_tasks(inputs.request.tasks)
        runs = _run_plans(plans, inputs, workers, lm, store, output, listener)
        evaluations = judge_runs(runs, header, inputs.request.config)
        samples = [sample for task_runs in runs for sample in build_samples(task_runs)]
        _write_results(evaluations, samples, header, output)
        store.remove()
    return Results(evaluations)


def _run_plans(
    plans: Sequence[TaskPlan],
    inputs: EvaluationInputs,
    workers: Workers,
    lm: RoutedLM,
    store: ResultStore,
    output: Path,
    listener: Listener,
) -> list[TaskRuns]:
    """Run all systems on all tasks, then measure time."""
    from drllm.evaluation.answers import ModelSettings
    from drllm.evaluation.progress import EvaluationProgress
    from drllm.evaluation.run import run_task
    from drllm.evaluation.systems import Runner

    config = inputs.request.config
    total = sum(plan.cost for plan in plans)
    routers = {str(folder): stack for folder, stack in inputs.routers.stacks.items()}
    with listener.progress("evaluating", "") as on_progress:
        runner = Runner(
            executor=workers.executor,
            settings=ModelSettings(config.batch_size, routers),
            store=store,
            progress=EvaluationProgress(total, on_progress),
            lm=lm,
            config=config,
        )
        shape = _read_shape(workers)
        runs = [run_task(plan, runner, shape) for plan in plans]
    prompts = [tokens for plan in plans for tokens in plan.questions.rendered.prompt_tokens]
    _measure_latency(inputs, workers, prompts, output, listener)
    return runs


def _make_header(inputs: EvaluationInputs, workers: Workers) -> dict[str, Any]:
    """Return the fields that the records of all tasks share."""
    routers = inputs.routers
    first_folder = None
    if routers.first_folder is not None:
        first_folder = str(routers.first_folder)
    bypass = workers.base.bypass
    other_seeds = {}
    for folder, file_hash in routers.hashes.items():
        if folder != routers.first_folder:
            other_seeds[str(folder)] = file_hash
    manifest = new_manifest(
        "evaluation",
        model=workers.base.identity,
        config=inputs.request.config.to_dict(),
        inputs=[folder / WEIGHTS_FILE for folder in routers.stacks],
    )
    return {
        **manifest,
        "runtime": workers.base.runtime,
        "bypass": None if bypass is None else bypass.file or None,
        "routers": first_folder,
        "routers_sha256": routers.first_hash,
        "paths": {name: path.layers for name, path in inputs.paths.items()},
        "other_seeds": other_seeds,
    }


def _refuse_other_results(
    output: Path, header: Mapping[str, Any], request: EvaluationRequest
) -> None:
    """Raise ConfigError if the folder has the results of another evaluation."""
    config = request.config
    names = [task.name for task in request.tasks]
    remedy = "choose another --output-dir, or delete the old results"
    for file in list_possible_results(output):
        evaluation = read_evaluation(file)
        refuse_other_run(
            f"the evaluation in {file}",
            _read_identity(msgspec.structs.asdict(evaluation), config),
            _read_identity(header, config),
            remedy,
        )
        # Tasks that are given as an argument aren't in the settings. The samples of a task that
        # isn't evaluated again would be lost, since all samples are in one file.
        if evaluation.task not in names:
            raise ConfigError(
                f"{file} has the result of task {evaluation.task!r}, which isn't evaluated now "
                f"(the tasks are: {', '.join(names)}); {remedy}"
            )


def _read_identity(header: Mapping[str, Any], config: EvaluateConfig) -> dict[str, Any]:
    """Return the fields of a header that are equal if two evaluations are the same.

    Settings that no result depends on are left out.
    """
    incidental = config.to_dict().keys() - config.decisive().keys()
    settings = {key: value for key, value in header["config"].items() if key not in incidental}
    identity: dict[str, Any] = {"config": settings}
    for name in ("routers_sha256", "paths", "other_seeds", "model", "runtime"):
        identity[name] = header[name]
    return identity


def _make_identity(inputs: EvaluationInputs, workers: Workers) -> dict[str, object]:
    """Return the values that must be equal to resume an interrupted evaluation."""
    config = inputs.request.config
    files = [folder / WEIGHTS_FILE for folder in inputs.routers.stacks]
    if config.supervision is not None:
        files.append(Path(config.supervision))
    return {
        "config": config.decisive(),
        "tasks": [task.name for task in inputs.request.tasks],
        "paths": dict(inputs.paths),
        "files": {f"{path}_sha256": sha256(path) for path in files},
        "model": workers.base.identity,
        "runtime": workers.base.runtime,
    }


def _make_harness_model(inputs: EvaluationInputs, workers: Workers) -> RoutedLM:
    """Return the model with the interface of the harness, to render tasks in this process.

    It has the policy of the first seed's routers, since the harness' requests must have a prompt if
    the policy reads it.
    """
    from drllm.evaluation.lm_eval.model import RoutedLM

    lm = RoutedLM(workers.routed, batch_size=inputs.request.config.batch_size)
    if inputs.routers.first is not None:
        lm.policy = RouterPolicy(inputs.routers.first)
    return lm


def _make_planner(inputs: EvaluationInputs, lm: RoutedLM, store: ResultStore) -> Planner:
    """Return what plans the tasks of this evaluation, and renders their questions."""
    from drllm.evaluation.plan import Planner
    from drllm.evaluation.rendering import TaskRenderer

    config = inputs.request.config
    renderer = TaskRenderer(
        lm=lm, config=config, store=store, may_know_questions=_may_know_questions(inputs)
    )
    return Planner(
        config=config,
        lm=lm,
        renderer=renderer,
        routers=inputs.routers.stacks,
        paths=inputs.paths,
    )


def _may_know_questions(inputs: EvaluationInputs) -> bool:
    """Tell whether something may be trained or fitted on questions of a harness task.

    This is excluded if only drllm's own tasks were used. A task of the user may have the same
    questions under another name.
    """
    config = inputs.request.config
    if config.supervision is not None or needs_fitting(config):
        return True
    tasks: set[str] = set()
    for routers in inputs.routers.stacks.values():
        tasks.update(routers.config.training.get("tasks", ()))
    return not tasks <= {*TASKS}


def _read_shape(workers: Workers) -> ModelShape | str:
    """Return the model's shape, or the reason why its cost can't be derived."""
    try:
        return ModelShape.from_model(workers.base.model, workers.base.bypass)
    except ArchitectureError as error:
        return str(error)


def _measure_latency(
    inputs: EvaluationInputs,
    workers: Workers,
    prompts: Sequence[Sequence[int]],
    output: Path,
    listener: Listener,
) -> None:
    """Measure the first seed's routers and write `latency.json`, if the settings say so."""
    config = inputs.request.config
    routers = inputs.routers
    with unrouted(workers.base) as base:  # time is measured on copies, which are routed anew
        write_latency(base, routers.first_folder, routers.first, prompts, config, output, listener)


def _write_results(
    evaluations: Sequence[Evaluation],
    samples: Sequence[Sample],
    header: Mapping[str, Any],
    output: Path,
) -> None:
    """Write the records of all tasks, and the samples."""
    for evaluation in evaluations:
        write_json(output / f"{evaluation.task}.json", evaluation)
    manifest = new_manifest("samples", model=header["model"], config=header["config"])
    write_records(output / SAMPLES_FILE, samples, manifest)
