"""The evaluation as a stage: tasks in, `eval/TASK.json` and samples out.

Questions are asked in blocks. What a system did on a block is kept as soon as it is done, in
`partial/`, and not done again when the same evaluation is started anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from drllm.config import TIMING, EvaluateConfig
from drllm.config.fields import changed
from drllm.errors import ConfigError, PathError
from drllm.evaluation.baselines.base import BASELINES
from drllm.evaluation.latency import timed_tokens, write_latency
from drllm.evaluation.questions import check_output, tasks_of, without_routers
from drllm.listener import Listener
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
    Results,
    read_evaluation,
    results_in,
)
from drllm.records.resume import refuse_other_run
from drllm.records.static_paths import (
    PathFile,
    read_path_list,
    steps_to_write,
)
from drllm.tasks.base import Task
from drllm.tasks.examples import KL_REWARD, OPTIONS_REWARD
from drllm.tasks.graded import pin_reward

if TYPE_CHECKING:
    from drllm.evaluation.tables import TaskRuns

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
        model: A `RoutedModel`, whose own routers are evaluated; or the base model (a name or a
            `ModelConfig`, what `load` returns, or a model of transformers), with `routers`, `paths`
            or both.
        tasks: Tasks, their names or files of questions; None for those of the config.
        config: Splits, samples, baselines, depths.
        output_dir: Folder for `TASK.json` of each task, `samples.jsonl`, `latency.json` and the
            task folder; an evaluation that was interrupted there is resumed. None writes nothing
            that stays.
        routers: Folders of routers, or routers. Further ones are of the same training with other
            seeds: they run at every depth too, with their own routes permuted if that baseline is
            asked for, and say how far seeds lie apart. Baselines are compared with the first.
        paths: Static paths by name, or files as `--paths` takes them; None for those of the config.
            Without routers they are compared with base alone.
        tokenizer: The model's; None loads the one of its name, unless it comes with one.
        listener: Hears how far it is.
        settings: Settings of `EvaluateConfig` by name, in place of the config's.

    Returns:
        The results in the order of the tasks. They are written when all tasks are done, since
        p-values are corrected for how many there are.

    Raises:
        ConfigError: A baseline that lacks what it is fitted on, a depth that makes no sense,
            neither routers nor paths, or an `output_dir` that holds another evaluation.
        PathError: A path that the model can't run, or whose name another system has.
        TaskError: An unknown task, or one without questions in the split.
        CheckpointError: Routers of another model.
        RecordError: An `output_dir` with other files that would be taken for results.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    config, listener = changed(EvaluateConfig, config, settings), listener or Listener()
    if paths is not None:
        named = [paths] if isinstance(paths, str) else list(paths)
        config = replace(config, paths=",".join(named) or None)
    given = [routers] if isinstance(routers, (str, Path, RouterStack)) else list(routers)
    is_routed = bool(given) or (isinstance(model, RoutedModel) and model.routers is not None)
    if not is_routed:
        config = without_routers(config)
    if config.reward is not None:
        config = replace(config, reward=pin_reward(config.reward))  # records say which file it was
    found = tasks_of(config, tasks)
    by_name: Mapping[str, StaticPath | PathFile] = (
        paths if isinstance(paths, Mapping) else read_path_list(config.paths or "")
    )
    taken = {BASE, ROUTED, *BASELINES}
    for name in taken & by_name.keys():
        raise PathError(f"a path is called {name!r}, as another system is; give it another name")
    for chosen in by_name.values():
        if isinstance(chosen, PathFile):
            _refuse_chosen_on(chosen, found, config)
    with ExitStack() as stack:
        output = stage_folder(output_dir, stack)
        check_output(output)
        adapters = model.injection.lora.all_weights() if isinstance(model, RoutedModel) else {}
        if isinstance(model, RoutedModel):
            if given:
                raise ConfigError(
                    "a RoutedModel is evaluated with its own routers, but other routers are given; "
                    "give its base model and the routers"
                )
            given = [model.routers] if model.routers is not None else []
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        checked = {
            name: path.check(base.identity["num_layers"])
            if isinstance(path, StaticPath)
            else path.path_of(base.identity)
            for name, path in by_name.items()
        }
        records = (path.record for path in by_name.values() if isinstance(path, PathFile))
        tuned_on = {task for record in records if record is not None for task in record.tasks}
        loaded: dict[Path, RouterStack] = {}
        for number, each in enumerate(given):
            folder = output / "routers" / str(number)
            if isinstance(each, RouterStack):
                save_routers(each, folder)
            else:
                folder = Path(each)
            loaded[folder] = load_routers(folder)
        first = next(iter(loaded), None)
        trained = None if first is None else loaded[first]
        asked_by = trained and trained.config.training.get("rewards")
        ours = OPTIONS_REWARD if config.reward is None else config.reward
        if isinstance(asked_by, list) and {*asked_by} - {KL_REWARD} and ours not in asked_by:
            listener.note(
                f"drllm: the routers were trained on prompts for {', '.join(map(str, asked_by))}, "
                f"the evaluation asks by {ours}; give both the same --reward to have them alike"
            )
        hashes = {folder: sha256(folder / WEIGHTS_FILE) for folder in loaded}
        if len(set(hashes.values())) < len(given):
            raise ConfigError("the same routers are given twice; give those of each seed once")
        header = {
            **new_manifest(
                "evaluation",
                model=base.identity,
                config=config.to_dict(),
                inputs=[folder / WEIGHTS_FILE for folder in loaded],
            ),
            "runtime": base.runtime,
            "routers": first and str(first),
            "routers_sha256": first and hashes[first],
            "paths": {name: steps_to_write(path) for name, path in checked.items()},
            "other_seeds": {str(folder): hashes[folder] for folder in loaded if folder != first},
        }
        for file in results_in(output):
            refuse_other_run(
                f"the evaluation in {file}",
                _identity(msgspec.structs.asdict(read_evaluation(file))),
                _identity(header),
                "choose another --output-dir, or delete the old results",
            )
        for each in loaded.values():
            check_routers(base.model, each)
            each.to(base.model.device)
        # Only here, since they load the harness, which an installation without `eval` lacks.
        from drllm.evaluation.comparison import Comparison, Shared
        from drllm.evaluation.lm_eval.model import RoutedLM
        from drllm.models.healed import load_path

        lm = RoutedLM(base, routers=trained, batch_size=config.batch_size)
        stack.callback(detach, base.model)
        for name, weights in adapters.items():
            lm.routed.injection.add_adapter(name, weights)
        for path in by_name.values():
            if isinstance(path, PathFile):
                load_path(lm.routed, path)
        shared = Shared(lm, loaded, checked, tuned_on, found, config, output)
        stack.enter_context(only_writer(output, "evaluation", "--output-dir"))
        shared.chunks.open()
        with listener.busy("reading the questions"):
            comparisons = [Comparison(shared, task) for task in found]
        timed = timed_tokens(config) if loaded else 0
        shared.plan(timed)
        with listener.progress("evaluating", "") as shared.on_progress:
            done = []
            for comparison in comparisons:
                with shared.planned(comparison.cost):
                    done.append(comparison.run())
            detach(base.model)
            with shared.doing("measuring time", timed):
                timing = base, first, trained, shared.prompts, config, output
                from_first(lambda: write_latency(*timing))
        results = Results(_write(done, header, output))
        shared.chunks.remove()
    results.folder = None if output_dir is None else output
    return results


def _refuse_chosen_on(path: PathFile, tasks: Sequence[Task], config: EvaluateConfig) -> None:
    """Refuse, by a ConfigError, questions that paths were fitted, chosen or certified on."""
    record = path.record
    for task in tasks:
        if record is None or task.name not in record.tasks:
            continue
        if task.name in record.divided:
            raise ConfigError(
                f"{path.file} was tuned on a part of the questions of {task.name} that an "
                f"evaluation asks; 'drllm show {path.file}' has what its paths do on the others"
            )
        if config.split_of(task.name) != "test":
            raise ConfigError(
                f"{path.file} was tuned on {task.name}, and --split "
                f"{config.split_of(task.name)} holds questions that its paths were chosen on; "
                f"evaluate them on test"
            )


def _identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two evaluations the same one; how often time is measured doesn't."""
    names = ("routers_sha256", "paths", "other_seeds", "model", "runtime")
    return {
        "config": header["config"] | dict.fromkeys(TIMING),
        **{name: header[name] for name in names},
    }


def _write(
    done: Sequence[TaskRuns], header: Mapping[str, Any], output: Path
) -> tuple[Evaluation, ...]:
    from drllm.evaluation.comparison import TASKS_FOLDER
    from drllm.evaluation.lm_eval.folders import CACHE
    from drllm.evaluation.tables import correct

    # Without routers the most accurate path stands first.
    rivals = header["paths"] if not header["routers"] else ()
    tables = correct([each.table() for each in done], rivals)
    results = tuple(one.evaluation(table, header) for one, table in zip(done, tables, strict=True))
    for result in results:
        write_json(output / f"{result.task}.json", result)
    manifest = new_manifest("samples", model=header["model"], config=header["config"])
    samples = [sample for each in done for sample in each.samples()]
    write_records(output / SAMPLES_FILE, samples, manifest)
    for cache in (output / TASKS_FOLDER).glob(f"*/{CACHE}"):
        shutil.rmtree(cache)  # what the harness made of the rows, to read them
    return results
