"""Runs the stages of a recipe in a run folder, and skips finished stages.

A stage is finished if `run.manifest.json` records the same settings, questions, input files and
version that the stage would use now. All files that the stage wrote must be there and unchanged
too. Each stage resumes its own unfinished work.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from drllm.config import EvaluateConfig, HealConfig, ModelConfig
from drllm.errors import RecordError
from drllm.evaluation.baselines.base import needs_targets
from drllm.listener import Listener, duration
from drllm.pipeline.recipes import Recipe
from drllm.records import codec
from drllm.records.healed import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEALED_FILE
from drllm.records.places import check_folder
from drllm.records.static_paths import PATHS_FILE, read_path
from drllm.records.supervision import rejected_path
from drllm.tasks.base import Task
from drllm.tasks.examples import choose

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel

STAGES = ("search", "supervise", "train", "tune", "heal", "evaluate", "report")
RECIPE_FILE = "run.yaml"
RUN_FILE = "run.manifest.json"
ROUTER_FILES = ("router_config.json", "routers.safetensors")
TRAINED_FILES = (*ROUTER_FILES, "README.md", "config.json", "metrics.jsonl", "layers.json")


class StageState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The state of one stage in `run.manifest.json` (docs/formats.md)."""

    made_from: dict[str, Any]
    outputs: dict[str, str] = {}  # hashes by file; empty until the stage ends
    seconds: float = 0.0


class RunManifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`run.manifest.json`: the inputs, the outputs and the time of each stage."""

    schema: Literal["drllm.run"] = "drllm.run"
    schema_version: int = codec.SCHEMA_VERSION
    drllm_version: str = ""
    stages: dict[str, StageState] = {}

    def is_done(self, stage: str, made_from: Mapping[str, Any], folder: Path) -> bool:
        """Tell whether a stage is finished, and its inputs and outputs are unchanged."""
        done = self.stages.get(stage)
        if done is None or not done.outputs or done.made_from != made_from:
            return False
        return all(hash_file(folder / name) == digest for name, digest in done.outputs.items())


def read_run(folder: Path) -> RunManifest:
    """Read the `run.manifest.json` of a folder; return an empty manifest if there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        return RunManifest()
    try:
        return codec.read_json(path, RunManifest)
    except RecordError as error:
        raise RecordError(
            f"{error}; delete {path}, and the stages are checked or run again"
        ) from error


def hash_file(path: Path) -> str:
    """Return the hash of a file, or an empty text if the file doesn't exist."""
    return codec.sha256(path) if path.is_file() else ""


def _digest_questions(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return a hash of the questions of each task that an evaluation would ask."""
    digests: dict[str, str] = {}
    for task in tasks:
        split = config.get_split(task.name)
        digests[task.name] = _digest_split(task, split, config.get_limit(task.name), config)
    return digests


def _digest_split(task: Task, split: str, limit: int | None, config: EvaluateConfig) -> str:
    folder = None if config.data_dir is None else Path(config.data_dir)
    examples = task.examples(split, folder)
    return codec.hash_values(choose(examples, limit, config.seed))


@contextmanager
def open_model(config: ModelConfig, listener: Listener) -> Iterator[BaseModel]:
    """Load the base model, and keep transformers quiet until the block ends."""
    with listener.busy(f"loading {config.model}"):
        from drllm.models.routing.routed_model import unrouted  # this import takes seconds
    with unrouted(config, listener=listener) as base:
        yield base


@contextmanager
def open_model_lazily(config: ModelConfig, listener: Listener) -> Iterator[Callable[[], BaseModel]]:
    """Yield a function that returns the base model; the first call loads the model."""
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(open_model(config, listener)))


def run(recipe: Recipe, folder: Path, listener: Listener) -> dict[str, str]:
    """Run a recipe in a folder, skip finished stages, and return the time of each stage in words.

    A wrong recipe, task or folder is refused before anything is written.
    """
    recipe.check()
    check_folder(folder, "--output-dir")
    with open_model_lazily(recipe.model, listener) as load:
        names = [name for name in STAGES if recipe.runs(name)]
        return RunFolder(recipe, folder, load, listener).run_stages(names)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run.

    Attributes:
        made_from: The settings and the hashes of inputs that the stage's results depend on.
        run: A function that runs the stage, and returns the files that it wrote.
    """

    made_from: dict[str, Any]
    run: Callable[[], list[Path]]


class RunFolder:
    """Runs the stages of a recipe in a folder; `load` returns the base model."""

    def __init__(
        self, recipe: Recipe, folder: Path, load: Callable[[], BaseModel], listener: Listener
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.load = load
        self.listener = listener
        self.manifest = read_run(folder)
        self.search_file = folder / "search.jsonl"
        self.supervision_file = folder / "supervision.jsonl"
        self.paths_file = folder / PATHS_FILE
        self.healed = folder / "healed"
        self.routers = folder / "routers"
        self.router_folders: list[Path] = []  # one for each seed
        if recipe.has_routers:
            self.router_folders = list(recipe.train.by_seed(self.routers))

    def run_stages(self, names: Sequence[str]) -> dict[str, str]:
        """Run the named stages in order, except finished ones; return the time of each in words."""
        times = {}
        for number, name in enumerate(names, start=1):
            is_done = self._run_stage(name)
            if number == 1:  # the stage didn't refuse the folder
                self._keep_recipe()
            took = duration(self.manifest.stages[name].seconds)
            times[name] = f"{took}, done before" if is_done else took
            progress = "done before" if is_done else took
            self.listener.note(f"[{number}/{len(names)}] {name}: {progress}")
        return times

    def _run_stage(self, name: str) -> bool:
        """Run a stage unless it is finished; return whether it was finished."""
        stage = self._stage(name)
        version = importlib.metadata.version("drllm")
        made_from = {"drllm_version": version, **stage.made_from}
        if self.manifest.is_done(name, made_from, self.folder):
            return True
        started = time.perf_counter()
        if name != "search":  # the search may refuse the folder, and nothing may change before
            self.begin(name, made_from)
        hashes = {}
        for path in stage.run():
            hashes[path.relative_to(self.folder).as_posix()] = codec.sha256(path)
        seconds = round(time.perf_counter() - started, 3)
        self._record(name, StageState(made_from=made_from, outputs=hashes, seconds=seconds))
        return False

    def _keep_recipe(self) -> None:
        """Write the recipe into the folder, unless the same recipe is there."""
        file = self.folder / RECIPE_FILE
        text = self.recipe.to_yaml()
        try:
            is_kept = file.is_file() and file.read_bytes() == text.encode()
        except OSError as error:
            raise RecordError(f"{file} can't be read: {error.strerror}; delete it") from error
        if not is_kept:
            codec.write_atomically(file, text)

    def begin(self, name: str, made_from: dict[str, Any]) -> None:
        """Record that a stage begins, and delete the files of its last run."""
        before = self.manifest.stages.get(name, StageState(made_from=made_from))
        if name == "train" and before.made_from != made_from:
            from drllm.training.stage import discard

            discard(self.routers, self.recipe.train)
        for output in before.outputs:
            path = self.folder / output
            # The path may lead out of the folder through a link.
            leads_elsewhere = path.resolve() != self.folder.resolve() / output
            if not leads_elsewhere:
                path.unlink(missing_ok=True)
        self._record(name, StageState(made_from=made_from))

    def _record(self, name: str, done: StageState) -> None:
        """Write the state of a stage to the manifest."""
        self.manifest.stages[name] = done
        self.manifest.schema_version = codec.SCHEMA_VERSION
        self.manifest.drllm_version = importlib.metadata.version("drllm")
        codec.write_json(self.folder / RUN_FILE, self.manifest)

    def _stage(self, name: str) -> Stage:
        """Return a stage with its current inputs."""
        stages = {
            "search": self._search,
            "supervise": self._supervise,
            "train": self._train,
            "tune": self._tune,
            "heal": self._heal,
            "evaluate": self._evaluate,
            "report": self._report,
        }
        return stages[name]()

    # --- the stages: the inputs of each, and how it runs -----------------------------------------

    def _search(self) -> Stage:
        recipe = self.recipe
        examples = [question.example for question in recipe.questions]
        made_from = {
            "config": recipe.search.decisive(),
            "model": recipe.model.to_dict(),
            "questions": codec.hash_values(examples),
        }
        return Stage(made_from, self._run_search)

    def _run_search(self) -> list[Path]:
        from drllm.search.run import search_paths

        recipe = self.recipe
        # Ray's workers load the model themselves.
        model = recipe.model if recipe.search.executor == "ray" else self.load()
        search_paths(model, recipe.questions, recipe.search, self.folder, listener=self.listener)
        return [self.search_file, self.folder / "search.manifest.json"]

    def _supervise(self) -> Stage:
        made_from = {
            "config": self.recipe.supervise.to_dict(),
            "search.jsonl": hash_file(self.search_file),
        }
        return Stage(made_from, self._run_supervise)

    def _run_supervise(self) -> list[Path]:
        from drllm.supervision.select import supervise

        output = self.supervision_file
        supervise([self.search_file], self.recipe.supervise, output)
        files = [output, self.folder / "supervision.manifest.json", rejected_path(output)]
        return [file for file in files if file.is_file()]

    def _train(self) -> Stage:
        made_from = {
            "config": self.recipe.train.decisive(),
            "model": self.recipe.model.to_dict(),
            "supervision.jsonl": hash_file(self.supervision_file),
        }
        return Stage(made_from, self._run_train)

    def _run_train(self) -> list[Path]:
        from drllm.training.stage import train
        from drllm.training.targets import REJECTED_FILE

        config = self.recipe.train
        train(self.load(), self.supervision_file, config, self.routers, listener=self.listener)
        files = [folder / name for folder in self.router_folders for name in TRAINED_FILES]
        rejected = self.routers / REJECTED_FILE
        if rejected.is_file():
            files.append(rejected)
        return files

    def _tune(self) -> Stage:
        config = self.recipe.tune
        assert config is not None
        digests = {}
        for parts in self.recipe.tuned:
            examples = [example for part in parts.examples.values() for example in part]
            digests[parts.task.name] = codec.hash_values(examples)
        made_from = {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "questions": digests,
        }
        return Stage(made_from, self._run_tune)

    def _run_tune(self) -> list[Path]:
        from drllm.tuning.run import tune

        tune(self.load(), None, self.recipe.tune, self.folder, listener=self.listener)
        return [self.paths_file]

    def _heal(self) -> Stage:
        config = self._heal_config()
        plan = read_path(config.require_path())
        made_from = {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "texts": codec.hash_values(self.recipe.healed),
            "path": [plan.named.name if plan.named else "", hash_file(plan.file)],
        }
        return Stage(made_from, self._run_heal)

    def _heal_config(self) -> HealConfig:
        """Return the settings of healing; a path that this run tunes is named with its file."""
        config = self.recipe.heal
        assert config is not None
        if self.recipe.tune is None:
            return config
        path = str(self.paths_file)
        if config.path is not None:
            path += f":{config.path}"
        return dataclasses.replace(config, path=path)

    def _run_heal(self) -> list[Path]:
        from drllm.tuning.heal import heal

        config = self._heal_config()
        heal(self.load(), config=config, output_dir=self.healed, listener=self.listener)
        names = [HEALED_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, "README.md"]
        return [self.healed / name for name in names]

    def _evaluate(self) -> Stage:
        config = self.recipe.evaluate
        made_from: dict[str, Any] = {
            "config": {**config.decisive(), "measures_time": self._is_timed()},
            "model": self.recipe.model.to_dict(),
            "questions": _digest_questions(self.recipe.tasks, config),
        }
        for folder in self.router_folders:
            for name in ROUTER_FILES:
                path = folder / name
                made_from[path.relative_to(self.routers).as_posix()] = hash_file(path)
        for path in self._static_paths():
            made_from[path.name] = hash_file(path)
        return Stage(made_from, self._run_evaluate)

    def _is_timed(self) -> bool:
        """Tell whether the evaluation measures time; only a routed model is timed."""
        return self.recipe.evaluate.latency and self.recipe.has_routers

    def _static_paths(self) -> list[Path]:
        """Return the files of static paths that this run writes."""
        files = []
        if self.recipe.runs("tune"):
            files.append(self.paths_file)
        if self.recipe.runs("heal"):
            files.append(self.healed / HEALED_FILE)
        return files

    def _evaluate_config(self) -> EvaluateConfig:
        """Return the settings of the evaluation, which uses the files of this run by default."""
        config = self.recipe.evaluate
        if self.router_folders and needs_targets(config.baselines) and config.supervision is None:
            config = dataclasses.replace(config, supervision=str(self.supervision_file))
        static_paths = self._static_paths()
        if static_paths and config.paths is None:
            config = dataclasses.replace(config, paths=",".join(map(str, static_paths)))
        return config

    def _run_evaluate(self) -> list[Path]:
        from drllm.evaluation.run import evaluate

        tasks = self.recipe.tasks
        config = self._evaluate_config()
        output = self.folder / "eval"
        routers = self.router_folders
        evaluate(self.load(), tasks, config, output, routers=routers, listener=self.listener)
        names = [f"{task.name}.json" for task in tasks]
        names += ["samples.jsonl", "samples.manifest.json"]
        if self._is_timed():
            names.append("latency.json")
        return [output / name for name in names]

    def _report(self) -> Stage:
        made_from = {RECIPE_FILE: codec.sha256(self.folder / RECIPE_FILE)}
        for name in STAGES[:-1]:
            if name in self.manifest.stages:
                made_from.update(self.manifest.stages[name].outputs)
        return Stage(made_from, self._run_report)

    def _run_report(self) -> list[Path]:
        from drllm.reporting.stage import figures_of, report

        page, text = report(self.folder, listener=self.listener)
        return [page, text, *figures_of(page)]
