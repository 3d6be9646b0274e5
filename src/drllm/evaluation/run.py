"""The evaluation as a stage: tasks in, `eval/TASK.json` and samples out.

Questions are asked in blocks. What a system did on a block is kept as soon as it is done, in
`partial/`, and not done again when the same evaluation is started anew.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from drllm.config import EvaluateConfig
from drllm.config.fields import changed
from drllm.errors import ConfigError
from drllm.evaluation.latency import TIMED_TOKENS, write_latency
from drllm.evaluation.questions import check_output, tasks_of
from drllm.listener import Listener
from drllm.models.base.load import BaseModel
from drllm.models.routers.checkpoint import WEIGHTS_FILE, check_routers, load_routers, save_routers
from drllm.models.routers.stack import RouterStack
from drllm.models.routing.routed_model import RoutedModel, unrouted
from drllm.records import (
    new_manifest,
    only_writer,
    refuse_other_run,
    sha256,
    write_json,
    write_records,
)
from drllm.records.results import SAMPLES_FILE, Evaluation, Results, read_evaluation, results_in
from drllm.tasks.base import OPTIONS_REWARD, Task

if TYPE_CHECKING:
    from drllm.evaluation.tables import TaskRuns

Routers: TypeAlias = "Path | str | RouterStack"


def evaluate(
    model: Any,
    tasks: Task | str | Sequence[Task | str] | None = None,
    config: EvaluateConfig | None = None,
    output_dir: Path | str | None = None,
    *,
    routers: Routers | Sequence[Routers] = (),
    tokenizer: Any = None,
    listener: Listener | None = None,
    **settings: Any,
) -> Results:
    """Evaluate base, routed model and baselines on tasks.

    Args:
        model: A `RoutedModel`, whose own routers are evaluated; or the base model (a name or a
            `ModelConfig`, what `load` returns, or a model of transformers), with `routers`.
        tasks: Tasks, their names or files of questions; None for those of the config.
        config: Splits, samples, baselines, depths.
        output_dir: Folder for `TASK.json` of each task, `samples.jsonl`, `latency.json` and the
            task folder; an evaluation that was interrupted there is resumed. None writes nothing
            that stays.
        routers: Folders of routers, or routers. Further ones are of the same training with other
            seeds: they run at every depth too, with their own routes permuted if that baseline is
            asked for, and say how far seeds lie apart. Baselines are compared with the first.
        tokenizer: The model's; None loads the one of its name, unless it comes with one.
        listener: Hears how far it is.
        settings: Settings of `EvaluateConfig` by name, in place of the config's.

    Returns:
        The results in the order of the tasks. They are written when all tasks are done, since
        p-values are corrected for how many there are.

    Raises:
        ConfigError: A baseline that lacks what it is fitted on, a depth that makes no sense, no
            routers, or an `output_dir` that holds another evaluation.
        TaskError: An unknown task, or one without questions in the split.
        CheckpointError: Routers of another model.
        RecordError: An `output_dir` with other files that would be taken for results.

    Source: the comparison is ours (docs/differences.md, D-18).
    """
    config, listener = changed(EvaluateConfig, config, settings), listener or Listener()
    found = tasks_of(config, tasks)
    given = [routers] if isinstance(routers, (str, Path, RouterStack)) else list(routers)
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        check_output(folder)
        if isinstance(model, RoutedModel):
            if given or model.routers is None:
                what = "other routers are given" if given else "it has none"
                raise ConfigError(
                    f"a RoutedModel is evaluated with its own routers, but {what}; give its base "
                    f"model and the routers"
                )
            given = [model.routers]
        base = stack.enter_context(unrouted(model, tokenizer, listener))
        results = Results(_evaluate(base, found, config, folder, given, listener))
    results.folder = None if output_dir is None else folder
    return results


def _evaluate(
    base: BaseModel,
    tasks: Sequence[Task],
    config: EvaluateConfig,
    output: Path,
    given: Sequence[Routers],
    listener: Listener,
) -> tuple[Evaluation, ...]:
    if not given:
        raise ConfigError("no routers are given; name their folder, or evaluate a RoutedModel")
    routers = {}
    for number, each in enumerate(given):
        folder = output / "routers" / str(number) if isinstance(each, RouterStack) else Path(each)
        if isinstance(each, RouterStack):
            save_routers(each, folder)
        routers[folder] = load_routers(folder)
    (first, trained), *_ = routers.items()
    asked_by = trained.config.training.get("rewards")
    if isinstance(asked_by, list) and asked_by and OPTIONS_REWARD not in asked_by:
        listener.note(
            f"drllm: the routers were trained on prompts for {', '.join(map(str, asked_by))}, the "
            f"evaluation asks by {OPTIONS_REWARD}; to have both alike, search with --reward "
            f"{OPTIONS_REWARD}"
        )
    hashes = {folder: sha256(folder / WEIGHTS_FILE) for folder in routers}
    if len(set(hashes.values())) < len(given):
        raise ConfigError(
            "the same routers are given twice, and would count as another seed; give each once"
        )
    header = {
        **new_manifest(
            "evaluation",
            model=base.identity,
            config=config.to_dict(),
            inputs=[folder / WEIGHTS_FILE for folder in routers],
        ),
        "runtime": base.runtime,
        "routers": str(first),
        "routers_sha256": hashes[first],
        "other_seeds": {str(folder): hashes[folder] for folder in routers if folder != first},
    }
    for path in results_in(output):
        refuse_other_run(
            f"the evaluation in {path}",
            _identity(msgspec.structs.asdict(read_evaluation(path))),
            _identity(header),
            "choose another --output-dir, or delete the old results",
        )
    for stack in routers.values():
        check_routers(base.model, stack)
        stack.to(base.model.device)
    # Only here, since they load the harness, which an installation without `eval` lacks.
    from drllm.evaluation.comparison import Comparison, Shared
    from drllm.evaluation.lm_eval.model import RoutedLM

    lm = RoutedLM(base, routers=trained, batch_size=config.batch_size)
    with ExitStack() as attached:
        attached.callback(lm.routed.detach)
        shared = Shared(lm, routers, tasks, config, output)
        with only_writer(output, "evaluation", "--output-dir"):
            shared.chunks.open()
            with listener.busy("reading the questions"):
                comparisons = [Comparison(shared, task) for task in tasks]
            shared.plan(TIMED_TOKENS * config.latency_rounds)
            with listener.progress("evaluating", "") as shared.on_progress:
                done = [comparison.run() for comparison in comparisons]
                attached.close()
                with shared.doing("measuring time", TIMED_TOKENS * config.latency_rounds):
                    write_latency(base, first, trained, shared.prompts, config, output)
            results = _write(done, header, output)
            shared.chunks.remove()
    return results


def _identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two evaluations the same one; how often time is measured doesn't."""
    names = ("routers_sha256", "other_seeds", "model", "runtime")
    config = {**header["config"], "latency_rounds": None}
    return {"config": config, **{name: header[name] for name in names}}


def _write(
    done: Sequence[TaskRuns], header: Mapping[str, Any], output: Path
) -> tuple[Evaluation, ...]:
    from drllm.evaluation.comparison import TASKS_FOLDER
    from drllm.evaluation.lm_eval.folders import CACHE
    from drllm.evaluation.tables import correct

    tables = correct([each.table() for each in done])
    results = tuple(
        each.evaluation(table, header) for each, table in zip(done, tables, strict=True)
    )
    for result in results:
        write_json(output / f"{result.task}.json", result)
    manifest = new_manifest("samples", model=header["model"], config=header["config"])
    samples = [sample for each in done for sample in each.samples()]
    write_records(output / SAMPLES_FILE, samples, manifest)
    for cache in (output / TASKS_FOLDER).glob(f"*/{CACHE}"):
        shutil.rmtree(cache)  # what the harness made of the rows, to read them
    return results
