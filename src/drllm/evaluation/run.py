"""The stage `evaluate`: it runs systems on tasks, and writes `eval/TASK.json` and samples.

Questions are run in blocks. A system's result on a block is stored in `partial/` as soon as the
block is done. If the same evaluation is started again, it reads the stored results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from drllm.config import TIMING, EvaluateConfig
from drllm.config.fields import replace_settings
from drllm.errors import ConfigError, PathError
from drllm.evaluation.baselines.base import BASELINES, read_curve
from drllm.evaluation.latency import count_timed_tokens, write_latency
from drllm.evaluation.questions import check_output, select_tasks, without_routers
from drllm.models.base.load import BaseModel
from drllm.models.routers.checkpoint import check_routers, load_routers, save_routers
from drllm.models.routers.files import WEIGHTS_FILE
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.routed_model import RoutedModel, detach, unrouted
from drllm.paths import StaticPath
from drllm.processes import from_first
from drllm.records.codec import sha256, write_json
from drllm.records.manifest import new_manifest, write_records
from drllm.records.places import only_writer, stage_folder
from drllm.records.results import (
    BASE,
    ROUTED,
    SAMPLES_FILE,
    Evaluation,
    Point,
    Results,
    Sample,
    System,
    list_possible_results,
    read_evaluation,
)
from drllm.records.resume import refuse_other_run
from drllm.records.static_paths import PathFile, read_path_list, steps_to_write
from drllm.statistics.exclusion import DropTest, Limits, exclude_drop
from drllm.tasks.base import Task
from drllm.tasks.examples import KL_REWARD, OPTIONS_REWARD
from drllm.tasks.graded import pin_reward
from drllm.work.listener import Listener

if TYPE_CHECKING:
    from drllm.evaluation.lm_eval.model import RoutedLM
    from drllm.evaluation.tables import TaskRuns
    from drllm.models.routing.lora import LoraWeights

Routers: TypeAlias = "Path | str | RouterStack"
Paths: TypeAlias = "str | Sequence[str] | Mapping[str, StaticPath]"


def evaluate(
    model: Any,
    tasks: Task | str | Sequence[Task | str] | None = None,
    config: EvaluateConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    routers: Routers | Sequence[Routers] = (),
    paths: Paths | None = None,
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Results:
    """Evaluate base, routed model, baselines and static paths on tasks.

    Args:
        model: A `RoutedModel`, whose own routers are evaluated. Or the base model (a name, a
            `ModelConfig`, the result of `load`, or a model of transformers) with `routers`, `paths`
            or both.
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
    if isinstance(routers, (str, Path, RouterStack)):
        routers = [routers]
    routers = list(routers)
    is_routed = isinstance(model, RoutedModel) and model.routers is not None
    has_routers = bool(routers) or is_routed
    config = replace_settings(EvaluateConfig, config, settings)
    config = _complete_settings(config, paths, has_routers=has_routers)
    tasks = select_tasks(config, tasks)
    named_paths = _name_paths(paths, config)
    path_files = {name: path for name, path in named_paths.items() if isinstance(path, PathFile)}
    for path_file in path_files.values():
        refuse_tuning_questions(path_file, tasks, config)
    adapters: dict[str, LoraWeights] = {}
    if isinstance(model, RoutedModel):
        adapters = dict(model.injection.lora.all_weights())
        routers = _take_routers(model, routers)
    with ExitStack() as stack:
        output = stage_folder(output_dir, stack)
        check_output(output)
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        stack.callback(detach, base.model)
        inputs = _Inputs(
            base=base,
            tasks=tasks,
            config=config,
            routers=_load_routers(routers, output),
            paths=_resolve_paths(named_paths, base),
            path_files=path_files,
            adapters=adapters,
        )
        if inputs.routers.first is not None:
            _note_other_prompts(inputs.routers.first, config, listener)
        header = _make_header(inputs)
        _refuse_other_results(output, header)
        inputs.routers.check_and_move(base)
        results = _run(inputs, header, output, listener, stack)
    if output_dir is not None:
        results.folder = output
    return results


@dataclass(frozen=True)
class _Routers:
    """The routers to evaluate by folder, the first seed's first, and the SHA-256 of their weights.

    Both mappings are empty if only paths are evaluated.
    """

    stacks: dict[Path, RouterStack]
    hashes: dict[Path, str]

    @property
    def first_folder(self) -> Path | None:
        """The folder of the first seed's routers; None without routers."""
        return next(iter(self.stacks), None)

    @property
    def first(self) -> RouterStack | None:
        """The first seed's routers, which baselines are compared with; None without routers."""
        return next(iter(self.stacks.values()), None)

    @property
    def first_hash(self) -> str | None:
        """The hash of the first seed's routers; None without routers."""
        return next(iter(self.hashes.values()), None)

    def check_and_move(self, base: BaseModel) -> None:
        """Refuse routers of another model, and move all of them to the model's device."""
        for stack in self.stacks.values():
            check_routers(base.model, stack)
            stack.to(base.model.device)


@dataclass(frozen=True)
class _Inputs:
    """The checked inputs of an evaluation.

    `paths` are all static paths by name, and `path_files` are the files of the paths that come from
    files. `adapters` are the adapters that the model already has, by name.
    """

    base: BaseModel
    tasks: Sequence[Task]
    config: EvaluateConfig
    routers: _Routers
    paths: dict[str, StaticPath]
    path_files: dict[str, PathFile]
    adapters: Mapping[str, LoraWeights]

    @property
    def tuned_on(self) -> set[str]:
        """The tasks on whose `select` questions some of the paths were chosen."""
        tasks: set[str] = set()
        for path in self.path_files.values():
            if path.record is not None:
                tasks.update(path.record.tasks)
        return tasks


def _complete_settings(
    config: EvaluateConfig, paths: Paths | None, *, has_routers: bool
) -> EvaluateConfig:
    """Return the settings as records have them, with the paths and the hash of the reward's file.

    Raises:
        ConfigError: There are neither routers nor paths, or a setting only has an effect on routers
            and there are none.
    """
    if paths is not None:
        names = list(paths)
        if isinstance(paths, str):
            names = [paths]
        config = replace(config, paths=",".join(names) or None)
    if not has_routers:
        config = without_routers(config)
    if config.reward is not None:
        config = replace(config, reward=pin_reward(config.reward))
    return config


def _name_paths(paths: Paths | None, config: EvaluateConfig) -> Mapping[str, StaticPath | PathFile]:
    """Return the static paths by name; raise PathError if a path has another system's name."""
    named_paths: Mapping[str, StaticPath | PathFile]
    if isinstance(paths, Mapping):
        named_paths = paths
    else:
        needs_names = config.max_drop is not None  # the names fix the order of its tests
        named_paths = read_path_list(config.paths or "", needs_names=needs_names)
    for name in named_paths:
        if name in (BASE, ROUTED, *BASELINES):
            raise PathError(
                f"a path is called {name!r}, as another system is; give it another name"
            )
    return named_paths


def _resolve_paths(
    named_paths: Mapping[str, StaticPath | PathFile], base: BaseModel
) -> dict[str, StaticPath]:
    """Return the paths as the model runs them; raise PathError if it can't run one of them."""
    paths = {}
    for name, path in named_paths.items():
        if isinstance(path, PathFile):
            paths[name] = path.path_for(base.identity)
        else:
            paths[name] = path.check(base.identity["num_layers"])
    return paths


def _take_routers(model: RoutedModel, routers: Sequence[Routers]) -> list[RouterStack]:
    """Return the routers of a routed model; the list is empty if the model has no routers.

    Args:
        model: The routed model.
        routers: The routers that the user gave beside the model; there must be none.

    Raises:
        ConfigError: The user gave routers too.
    """
    if routers:
        raise ConfigError(
            "a RoutedModel is evaluated with its own routers, but other routers are given; give "
            "its base model and the routers"
        )
    if model.routers is None:
        return []
    return [model.routers]


def _load_routers(routers: Sequence[Routers], output: Path) -> _Routers:
    """Load routers from their folders; routers without a folder are saved in the output first."""
    stacks: dict[Path, RouterStack] = {}
    for number, stack_or_folder in enumerate(routers):
        if isinstance(stack_or_folder, RouterStack):
            folder = output / "routers" / str(number)
            save_routers(stack_or_folder, folder)
        else:
            folder = Path(stack_or_folder)
        stacks[folder] = load_routers(folder)
    hashes = {folder: sha256(folder / WEIGHTS_FILE) for folder in stacks}
    if len(set(hashes.values())) < len(routers):
        raise ConfigError("the same routers are given twice; give the routers of each seed once")
    return _Routers(stacks, hashes)


def _note_other_prompts(routers: RouterStack, config: EvaluateConfig, listener: Listener) -> None:
    """Print a note if the evaluation's prompts are worded differently from the training's."""
    rewards = routers.config.training.get("rewards")
    if not isinstance(rewards, list):
        return
    if set(rewards) <= {KL_REWARD}:  # trained on prompts without answers, which have no wording
        return
    reward = config.reward or OPTIONS_REWARD
    if reward not in rewards:
        listener.note(
            f"the routers were trained on prompts for {', '.join(map(str, rewards))}, but the "
            f"evaluation's prompts are for {reward}; for the same prompts, give both the same "
            f"--reward"
        )


def _make_header(inputs: _Inputs) -> dict[str, Any]:
    """Return the fields that the records of all tasks share."""
    routers = inputs.routers
    first_folder = None
    if routers.first_folder is not None:
        first_folder = str(routers.first_folder)
    other_seeds = {}
    for folder, file_hash in routers.hashes.items():
        if folder != routers.first_folder:
            other_seeds[str(folder)] = file_hash
    manifest = new_manifest(
        "evaluation",
        model=inputs.base.identity,
        config=inputs.config.to_dict(),
        inputs=[folder / WEIGHTS_FILE for folder in routers.stacks],
    )
    return {
        **manifest,
        "runtime": inputs.base.runtime,
        "routers": first_folder,
        "routers_sha256": routers.first_hash,
        "paths": {name: steps_to_write(path) for name, path in inputs.paths.items()},
        "other_seeds": other_seeds,
    }


def _refuse_other_results(output: Path, header: Mapping[str, Any]) -> None:
    """Raise ConfigError if the folder has the results of another evaluation."""
    for file in list_possible_results(output):
        refuse_other_run(
            f"the evaluation in {file}",
            _read_identity(msgspec.structs.asdict(read_evaluation(file))),
            _read_identity(header),
            "choose another --output-dir, or delete the old results",
        )


def _read_identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a header that are equal if two evaluations are the same.

    Settings of the timing may differ, so they are set to None.
    """
    identity = {"config": header["config"] | dict.fromkeys(TIMING)}
    for name in ("routers_sha256", "paths", "other_seeds", "model", "runtime"):
        identity[name] = header[name]
    return identity


def _run(
    inputs: _Inputs, header: Mapping[str, Any], output: Path, listener: Listener, stack: ExitStack
) -> Results:
    """Run every system on every task, measure time, and write the results."""
    # Imported here because it loads the harness, which an installation without `eval` lacks.
    from drllm.evaluation.comparison import EvaluationContext, TaskComparison

    context = EvaluationContext(
        lm=_make_harness_model(inputs),
        routers=inputs.routers.stacks,
        paths=inputs.paths,
        tuned_on=inputs.tuned_on,
        tasks=inputs.tasks,
        config=inputs.config,
        output=output,
    )
    stack.enter_context(only_writer(output, "evaluation", "--output-dir"))
    context.chunks.open()
    with listener.busy("reading the questions"):
        comparisons = [TaskComparison(context, task) for task in inputs.tasks]
    num_timed_tokens = 0
    if inputs.routers.stacks:
        num_timed_tokens = count_timed_tokens(inputs.config)
    progress = context.progress
    progress.plan(num_timed_tokens)
    with listener.progress("evaluating", "") as progress.report:
        runs = []
        for comparison in comparisons:
            with progress.correcting(comparison.cost):
                runs.append(comparison.run())
        detach(inputs.base.model)  # time is measured on copies, which are routed anew
        with progress.during("measuring time", num_timed_tokens):
            from_first(lambda: _measure_latency(inputs, context.prompts, output))
    results = Results(_write_results(runs, header, inputs.config, output))
    context.chunks.remove()
    return results


def _make_harness_model(inputs: _Inputs) -> RoutedLM:
    """Return the routed model for the harness, with the adapters of healed paths."""
    from drllm.evaluation.lm_eval.model import RoutedLM
    from drllm.models.routing.healed import install_path

    lm = RoutedLM(inputs.base, routers=inputs.routers.first, batch_size=inputs.config.batch_size)
    for name, weights in inputs.adapters.items():
        lm.routed.injection.add_adapter(name, weights)
    for path_file in inputs.path_files.values():
        install_path(lm.routed.injection, path_file)  # adds the adapter of a healed path
    return lm


def _measure_latency(inputs: _Inputs, prompts: Sequence[Sequence[int]], output: Path) -> None:
    """Measure the first seed's routers and write `latency.json`, if the settings say so."""
    routers = inputs.routers
    write_latency(inputs.base, routers.first_folder, routers.first, prompts, inputs.config, output)


def _write_results(
    runs: Sequence[TaskRuns], header: Mapping[str, Any], config: EvaluateConfig, output: Path
) -> tuple[Evaluation, ...]:
    """Write the results of all tasks, and the samples; return the results."""
    evaluations = _judge_runs(runs, header, config)
    for evaluation in evaluations:
        write_json(output / f"{evaluation.task}.json", evaluation)
    manifest = new_manifest("samples", model=header["model"], config=header["config"])
    samples: list[Sample] = []
    for task_runs in runs:
        samples += task_runs.build_samples()
    write_records(output / SAMPLES_FILE, samples, manifest)
    return evaluations


def _judge_runs(
    runs: Sequence[TaskRuns], header: Mapping[str, Any], config: EvaluateConfig
) -> tuple[Evaluation, ...]:
    """Return the records of all tasks, with tests corrected for the number of tasks."""
    from drllm.evaluation.tables import correct_tables

    rivals: Collection[str] = ()
    if not header["routers"]:  # the findings begin with the most accurate path
        rivals = header["paths"]
    tables = correct_tables([task_runs.build_table() for task_runs in runs], rivals)
    curves = []
    for task_runs, table in zip(runs, tables, strict=True):
        curves.append(task_runs.build_curve(table))
    names = [task_runs.harness_task.task.name for task_runs in runs]
    drop_test = _test_drop(
        dict(zip(names, tables, strict=True)), dict(zip(names, curves, strict=True)), config
    )
    evaluations = []
    for task_runs, table, curve in zip(runs, tables, curves, strict=True):
        evaluations.append(task_runs.build_evaluation(table, curve, header, drop_test))
    return tuple(evaluations)


def _test_drop(
    tables: Mapping[str, Sequence[System]],
    curves: Mapping[str, Sequence[Point]],
    config: EvaluateConfig,
) -> DropTest | None:
    """Test which systems lose less than `--max-drop`; return None without this setting.

    Args:
        tables: Name of a task → its systems.
        curves: Name of a task → the points of its curve.
        config: The settings.
    """
    from drllm.evaluation.tables import list_drop_candidates, name_depth

    if config.max_drop is None:
        return None
    depths = [name_depth(share) for share in read_curve(config.curve)]
    candidates = list_drop_candidates(tables, curves, depths)
    limits = Limits(max_drop=config.max_drop, max_loss_increase=config.max_loss_increase)
    return exclude_drop(candidates, limits)


def refuse_tuning_questions(
    path_file: PathFile, tasks: Sequence[Task], config: EvaluateConfig
) -> None:
    """Raise ConfigError if a path would be evaluated on questions that it was chosen on."""
    record = path_file.record
    if record is None:
        return
    file = path_file.file
    for task in tasks:
        if task.name not in record.tasks:
            continue
        if task.name in record.divided:
            raise ConfigError(
                f"{file} was tuned on some of the questions of {task.name} that an evaluation "
                f"asks; 'drllm show {file}' shows its results on the other questions"
            )
        split = config.get_split(task.name)
        if split != "test":
            raise ConfigError(
                f"{file} was tuned on {task.name}, and --split {split} holds questions that its "
                f"paths were chosen on; evaluate them on test"
            )
