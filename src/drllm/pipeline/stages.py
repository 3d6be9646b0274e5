"""The stages of a run: what each is made from, and how it is run.

`make_stage` makes a stage: `_make_…` collects its inputs, and `_run_…` runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drllm.config import TIMING, EvaluateConfig, ExecutorConfig, ModelConfig
from drllm.config.constants import PYTHON_FUNCTION
from drllm.evaluation.baselines.base import needs_targets
from drllm.evaluation.questions import choose_fitting_split, needs_fitting
from drllm.models.routers.places import CONFIG_FILE, WEIGHTS_FILE
from drllm.pipeline.manifest import RunManifest, hash_file
from drllm.pipeline.recipes import Recipe
from drllm.records import codec
from drllm.records.search import SEARCH_FILE
from drllm.records.static_paths import read_path_list
from drllm.records.supervision import SUPERVISION_FILE, rejected_path
from drllm.tasks.base import NoSplitError, Task
from drllm.tasks.examples import choose
from drllm.tasks.graded import pin_reward
from drllm.work.listener import Listener

if TYPE_CHECKING:
    from drllm.model.load import BaseModel

STAGES = ("search", "supervise", "train", "evaluate", "report")
RECIPE_FILE = "run.yaml"
ROUTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""The files of routers that results depend on."""
TRAINED_FILES = (*ROUTER_FILES, "README.md", "config.json", "metrics.jsonl", "layers.json")
"""The files that a training writes for each seed."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe that is run in a folder.

    Attributes:
        recipe: The settings of all stages.
        folder: The run folder; it may not exist yet.
        manifest: The states of the stages in the folder.
        load: Returns the base model.
        listener: Gets the progress and the notes of the stages.
    """

    recipe: Recipe
    folder: Path
    manifest: RunManifest
    load: Callable[[], BaseModel]
    listener: Listener

    @property
    def search_file(self) -> Path:
        """The file of the search."""
        return self.folder / SEARCH_FILE

    @property
    def supervision_file(self) -> Path:
        """The file of the targets."""
        return self.folder / SUPERVISION_FILE

    @property
    def routers_folder(self) -> Path:
        """The folder of the routers."""
        return self.folder / "routers"

    @property
    def seed_folders(self) -> list[Path]:
        """The folders of each seed's routers, the first seed's first; empty without routers."""
        if not self.recipe.has_routers:
            return []
        return list(self.recipe.train.by_seed(self.routers_folder))


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run.

    Attributes:
        made_from: The settings and the hashes of inputs that the stage's results depend on.
        run: A function that runs the stage, and returns the files that it wrote.
        loads_model: Whether the stage loads the base model in this process.
    """

    made_from: dict[str, Any]
    run: Callable[[], list[Path]]
    loads_model: bool = False


def make_stage(name: str, run: Run) -> Stage:
    """Make a stage with its current inputs."""
    return _MAKERS[name](run)


def _choose_model(config: ExecutorConfig, run: Run) -> BaseModel | ModelConfig:
    """Return the base model of a stage."""
    return run.load() if _loads_model(config) else run.recipe.model


def _loads_model(config: ExecutorConfig) -> bool:
    """Tell whether this process loads the base model; Ray's workers load it themselves."""
    return config.executor != "ray"


# --- the stages in order ------------------------------------------------------------------------


def _make_search(run: Run) -> Stage:
    recipe = run.recipe
    examples = [question.example for question in recipe.questions]
    made_from = {
        "config": recipe.search.decisive(),
        "model": recipe.model.to_dict(),
        "questions": codec.hash_values(examples),
        "reward": _pin_reward(recipe.search.reward),
    }
    if recipe.search.num_fewshot is not None:  # the prompts have worked examples of other splits
        prompts = [question.prompt for question in recipe.questions]
        made_from["prompts"] = codec.hash_values(prompts)
    return Stage(made_from, partial(_run_search, run), loads_model=_loads_model(recipe.search))


def _run_search(run: Run) -> list[Path]:
    from drllm.search.run import search_questions

    recipe = run.recipe
    model = _choose_model(recipe.search, run)
    search_questions(model, recipe.questions, recipe.search, run.folder, listener=run.listener)
    return [run.search_file, run.folder / "search.manifest.json"]


def _make_supervise(run: Run) -> Stage:
    made_from = {
        "config": run.recipe.supervise.to_dict(),
        SEARCH_FILE: hash_file(run.search_file),
    }
    return Stage(made_from, partial(_run_supervise, run))


def _run_supervise(run: Run) -> list[Path]:
    from drllm.supervision.select import supervise

    supervise(run.search_file, run.recipe.supervise, run.folder)
    file = run.supervision_file
    files = [file, run.folder / "supervision.manifest.json", rejected_path(file)]
    return [file for file in files if file.is_file()]


def _make_train(run: Run) -> Stage:
    made_from = {
        "config": run.recipe.train.decisive(),
        "model": run.recipe.model.to_dict(),
        SUPERVISION_FILE: hash_file(run.supervision_file),
    }
    return Stage(made_from, partial(_run_train, run), loads_model=_loads_model(run.recipe.train))


def _run_train(run: Run) -> list[Path]:
    from drllm.training.stage import train
    from drllm.training.targets import REJECTED_FILE

    config = run.recipe.train
    folder = run.routers_folder
    model = _choose_model(config, run)
    train(model, run.supervision_file, config, folder, listener=run.listener)
    files: list[Path] = []
    for seed_folder in run.seed_folders:
        files += [seed_folder / name for name in TRAINED_FILES]
    rejected_file = folder / REJECTED_FILE
    if rejected_file.is_file():
        files.append(rejected_file)
    return files


def _make_evaluate(run: Run) -> Stage:
    config = run.recipe.evaluate
    made_from: dict[str, Any] = {
        "config": {**config.decisive(), "measures_time": _is_timed(run)},
        "model": run.recipe.model.to_dict(),
        "questions": _hash_questions(run.recipe.tasks, config),
        "other questions": _hash_other_questions(run.recipe.tasks, config),
        "reward": _pin_reward(config.reward),
    }
    changed_times = _list_time_settings(config) if _is_timed(run) else {}
    if changed_times:
        made_from["time"] = changed_times
    if config.supervision is not None:
        made_from["supervision"] = hash_file(Path(config.supervision))
    for name, path in read_path_list(config.paths or "").items():
        made_from[f"path {name}"] = [path.layers, path.skipped]
    for seed_folder in run.seed_folders:
        for name in ROUTER_FILES:
            file = seed_folder / name
            made_from[file.relative_to(run.routers_folder).as_posix()] = hash_file(file)
    return Stage(made_from, partial(_run_evaluate, run), loads_model=_loads_model(config))


def _is_timed(run: Run) -> bool:
    """Tell whether the evaluation measures time; only a routed model is timed."""
    return run.recipe.evaluate.latency and run.recipe.has_routers


def _list_time_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return how time is measured, as far as it differs from the default."""
    default = EvaluateConfig(latency=True)
    settings = {name: getattr(config, name) for name in TIMING}
    return {name: value for name, value in settings.items() if value != getattr(default, name)}


def _complete_evaluate_config(run: Run) -> EvaluateConfig:
    """Return the settings of the evaluation, which uses the targets of this run by default."""
    config = run.recipe.evaluate
    if run.seed_folders and needs_targets(config.baselines) and config.supervision is None:
        config = dataclasses.replace(config, supervision=str(run.supervision_file))
    return config


def _run_evaluate(run: Run) -> list[Path]:
    from drllm.evaluation.stage import evaluate

    tasks = run.recipe.tasks
    config = _complete_evaluate_config(run)
    output = run.folder / "eval"
    routers = run.seed_folders
    model = _choose_model(config, run)
    evaluate(model, tasks, config, output, routers=routers, listener=run.listener)
    names = [f"{task.name}.json" for task in tasks]
    names += ["samples.jsonl", "samples.manifest.json"]
    if _is_timed(run):
        names.append("latency.json")
    return [output / name for name in names]


def _make_report(run: Run) -> Stage:
    made_from = {RECIPE_FILE: codec.sha256(run.folder / RECIPE_FILE)}
    earlier_stages = STAGES[:-1]
    for name in earlier_stages:
        if name in run.manifest.stages:
            made_from.update(run.manifest.stages[name].outputs)
    return Stage(made_from, partial(_run_report, run))


def _run_report(run: Run) -> list[Path]:
    from drllm.reporting.stage import list_pictures, report

    page, text = report(run.folder, listener=run.listener)
    return [page, text, *list_pictures(page)]


def _hash_questions(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return a hash of the questions that an evaluation would ask, by task."""
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    hashes: dict[str, str] = {}
    for task in tasks:
        examples = task.examples(config.split, data_dir)
        examples_to_ask = choose(examples, config.limit, config.seed)
        hashes[task.name] = codec.hash_values(examples_to_ask)
    return hashes


def _hash_other_questions(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return a hash of the questions that an evaluation fits on or shows as examples, by use."""
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    hashes: dict[str, str] = {}
    for task in tasks:
        with suppress(NoSplitError):  # then the task's questions have no worked examples
            shots = task.shots(config.split, data_dir)
            hashes[f"{task.name}, worked examples"] = codec.hash_values(shots)
    if needs_fitting(config):
        for task in tasks:
            examples = task.examples(choose_fitting_split(config), data_dir)
            hashes[f"{task.name}, fitted on"] = codec.hash_values(examples)
    return hashes


def _pin_reward(reward: str | None) -> str | None:
    """Return the name of a reward, with the hash of its file if it is a function in a file."""
    if reward is None or PYTHON_FUNCTION not in reward:
        return reward
    names = []
    for name in reward.split(","):
        if PYTHON_FUNCTION in name:
            name = pin_reward(name)
        names.append(name)
    return ",".join(names)


_MAKERS: dict[str, Callable[[Run], Stage]] = {
    "search": _make_search,
    "supervise": _make_supervise,
    "train": _make_train,
    "evaluate": _make_evaluate,
    "report": _make_report,
}
"""The functions that make the stages, by name."""
