"""Runs the stages of a recipe in a run folder, and skips finished stages.

A stage is finished under two conditions. `run.manifest.json` records the same settings, questions,
input files and version that the stage would use now. And all files that the stage wrote are there
and unchanged. Each stage resumes its own unfinished work.
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

from drllm.config import EvaluateConfig, ExecutorConfig, HealConfig, ModelConfig
from drllm.errors import RecordError
from drllm.evaluation.baselines.base import needs_targets
from drllm.pipeline.recipes import Recipe
from drllm.records import codec
from drllm.records.healed import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEALED_FILE
from drllm.records.places import check_folder
from drllm.records.static_paths import PATHS_FILE, PathFile, load_path
from drllm.records.supervision import SUPERVISION_FILE, rejected_path
from drllm.tasks.base import Task
from drllm.tasks.examples import Example, choose
from drllm.work.listener import Listener, duration

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel

STAGES = ("search", "supervise", "train", "tune", "heal", "evaluate", "report")
RECIPE_FILE = "run.yaml"
RUN_FILE = "run.manifest.json"
ROUTER_FILES = ("router_config.json", "routers.safetensors")
"""The files of routers that results depend on."""
TRAINED_FILES = (*ROUTER_FILES, "README.md", "config.json", "metrics.jsonl", "layers.json")
"""The files that a training writes for each seed."""


class StageState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The state of one stage in `run.manifest.json` (docs/formats.md).

    Attributes:
        made_from: The settings and the hashes of inputs that the stage's results depend on.
        outputs: The hash of each file that the stage wrote; empty until the stage ends.
        seconds: The time that the stage took.
    """

    made_from: dict[str, Any]
    outputs: dict[str, str] = {}
    seconds: float = 0.0


class RunManifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`run.manifest.json`: the inputs, the outputs and the time of each stage."""

    schema: Literal["drllm.run"] = "drllm.run"
    schema_version: int = codec.SCHEMA_VERSION
    drllm_version: str = ""
    stages: dict[str, StageState] = {}

    def is_done(self, stage: str, made_from: Mapping[str, Any], folder: Path) -> bool:
        """Tell whether a stage is finished, and its inputs and outputs are unchanged.

        Args:
            stage: The name of the stage.
            made_from: What the stage would be made from now.
            folder: The run folder.
        """
        state = self.stages.get(stage)
        if state is None or not state.outputs or state.made_from != made_from:
            return False
        return all(hash_file(folder / name) == digest for name, digest in state.outputs.items())


def read_run(folder: Path) -> RunManifest:
    """Read the `run.manifest.json` of a folder; return an empty manifest if there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        return RunManifest()
    try:
        return codec.read_json(path, RunManifest)
    except RecordError as error:
        raise RecordError(
            f"{error}; delete {path}: the next run then checks each stage, or repeats it"
        ) from error


def hash_file(path: Path) -> str:
    """Return the hash of a file, or an empty text if the file doesn't exist."""
    return codec.sha256(path) if path.is_file() else ""


def _hash_questions(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return a hash of the questions that an evaluation would ask, by task."""
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    hashes: dict[str, str] = {}
    for task in tasks:
        examples = task.examples(config.get_split(task.name), data_dir)
        examples_to_ask = choose(examples, config.get_limit(task.name), config.seed)
        hashes[task.name] = codec.hash_values(examples_to_ask)
    return hashes


@contextmanager
def open_model(config: ModelConfig, listener: Listener) -> Iterator[BaseModel]:
    """Load the base model for the block, and keep transformers quiet until the block ends."""
    with listener.busy(f"loading {config.model}"):
        from drllm.models.routing.routed_model import unrouted  # this import takes seconds
    with unrouted(config, listener=listener) as base:
        yield base


@contextmanager
def open_model_lazily(config: ModelConfig, listener: Listener) -> Iterator[Callable[[], BaseModel]]:
    """Yield a function that returns the base model. Only its first call loads the model."""
    with ExitStack() as stack:  # at the end it closes the model, if the model was loaded
        yield functools.cache(lambda: stack.enter_context(open_model(config, listener)))


def run(recipe: Recipe, folder: Path, listener: Listener) -> dict[str, str]:
    """Run the stages of a recipe in a folder, except finished ones.

    A wrong recipe, task or folder is refused before anything is written.

    Returns:
        The time of each stage in words, by the name of the stage.
    """
    recipe.check()
    check_folder(folder, "--output-dir")
    with open_model_lazily(recipe.model, listener) as load:
        names = [name for name in STAGES if recipe.includes(name)]
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
    """Runs the stages of a recipe in a folder.

    Args:
        recipe: The settings of all stages.
        folder: The run folder; it may not exist yet.
        load: Returns the base model.
        listener: Gets the progress and the notes of the stages.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, load: Callable[[], BaseModel], listener: Listener
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.load = load
        self.listener = listener
        self.manifest = read_run(folder)
        self.search_file = folder / "search.jsonl"
        self.supervision_file = folder / SUPERVISION_FILE
        self.paths_file = folder / PATHS_FILE
        self.healed_folder = folder / "healed"
        self.routers_folder = folder / "routers"
        self.seed_folders: list[Path] = []  # the routers of each seed, the first seed's first
        if recipe.has_routers:
            self.seed_folders = list(recipe.train.by_seed(self.routers_folder))

    def run_stages(self, names: Sequence[str]) -> dict[str, str]:
        """Run the named stages in order, except finished ones; return the time of each in words."""
        times = {}
        for number, name in enumerate(names, start=1):
            was_done = self._run_stage(name)
            if number == 1:  # the stage didn't refuse the folder
                self._write_recipe()
            time_taken = duration(self.manifest.stages[name].seconds)
            times[name] = time_taken
            progress = time_taken
            if was_done:
                times[name] += ", done before"
                progress = "done before"
            self.listener.note(f"[{number}/{len(names)}] {name}: {progress}")
        return times

    def _run_stage(self, name: str) -> bool:
        """Run a stage unless it was finished before; return whether it was."""
        stage = self._make_stage(name)
        version = importlib.metadata.version("drllm")
        made_from = {"drllm_version": version, **stage.made_from}
        if self.manifest.is_done(name, made_from, self.folder):
            return True
        started = time.perf_counter()
        if name != "search":
            # The search checks the folder itself, and a folder that it refuses must not change.
            self.begin(name, made_from)
        hashes = {}
        for path in stage.run():
            hashes[path.relative_to(self.folder).as_posix()] = codec.sha256(path)
        seconds = round(time.perf_counter() - started, 3)
        self._record(name, StageState(made_from=made_from, outputs=hashes, seconds=seconds))
        return False

    def _write_recipe(self) -> None:
        """Write the recipe into the folder, unless the same recipe is there."""
        file = self.folder / RECIPE_FILE
        text = self.recipe.to_yaml()
        try:
            is_same = file.is_file() and file.read_bytes() == text.encode()
        except OSError as error:
            raise RecordError(f"{file} can't be read: {error.strerror}; delete it") from error
        if not is_same:
            codec.write_atomically(file, text)

    def begin(self, name: str, made_from: dict[str, Any]) -> None:
        """Record that a stage begins, and delete the files of its last run."""
        last_state = self.manifest.stages.get(name, StageState(made_from=made_from))
        if name == "train" and last_state.made_from != made_from:
            from drllm.training.stage import discard

            discard(self.routers_folder, self.recipe.train)
        for output in last_state.outputs:
            path = self.folder / output
            # A link may lead out of the folder; nothing is deleted there.
            is_inside = path.resolve() == self.folder.resolve() / output
            if is_inside:
                path.unlink(missing_ok=True)
        self._record(name, StageState(made_from=made_from))

    def _record(self, name: str, state: StageState) -> None:
        """Write the state of a stage to the manifest."""
        self.manifest.stages[name] = state
        self.manifest.schema_version = codec.SCHEMA_VERSION
        self.manifest.drllm_version = importlib.metadata.version("drllm")
        codec.write_json(self.folder / RUN_FILE, self.manifest)

    def _make_stage(self, name: str) -> Stage:
        """Make a stage with its current inputs."""
        makers = {
            "search": self._make_search,
            "supervise": self._make_supervise,
            "train": self._make_train,
            "tune": self._make_tune,
            "heal": self._make_heal,
            "evaluate": self._make_evaluate,
            "report": self._make_report,
        }
        make = makers[name]
        return make()

    def _choose_model(self, config: ExecutorConfig) -> BaseModel | ModelConfig:
        """Return the base model of a stage; Ray's workers load it themselves."""
        if config.executor == "ray":
            return self.recipe.model
        return self.load()

    # --- the stages: `_make_…` collects the inputs of a stage, `_run_…` runs it ------------------

    def _make_search(self) -> Stage:
        recipe = self.recipe
        examples = [question.example for question in recipe.questions]
        made_from = {
            "config": recipe.search.decisive(),
            "model": recipe.model.to_dict(),
            "questions": codec.hash_values(examples),
        }
        return Stage(made_from, self._run_search)

    def _run_search(self) -> list[Path]:
        from drllm.search.run import search_questions

        recipe = self.recipe
        model = self._choose_model(recipe.search)
        search_questions(
            model, recipe.questions, recipe.search, self.folder, listener=self.listener
        )
        return [self.search_file, self.folder / "search.manifest.json"]

    def _make_supervise(self) -> Stage:
        made_from = {
            "config": self.recipe.supervise.to_dict(),
            "search.jsonl": hash_file(self.search_file),
        }
        return Stage(made_from, self._run_supervise)

    def _run_supervise(self) -> list[Path]:
        from drllm.supervision.select import supervise

        supervise(self.search_file, self.recipe.supervise, self.folder)
        file = self.supervision_file
        files = [file, self.folder / "supervision.manifest.json", rejected_path(file)]
        return [file for file in files if file.is_file()]

    def _make_train(self) -> Stage:
        made_from = {
            "config": self.recipe.train.decisive(),
            "model": self.recipe.model.to_dict(),
            SUPERVISION_FILE: hash_file(self.supervision_file),
        }
        return Stage(made_from, self._run_train)

    def _run_train(self) -> list[Path]:
        from drllm.training.stage import train
        from drllm.training.targets import REJECTED_FILE

        config = self.recipe.train
        folder = self.routers_folder
        model = self._choose_model(config)
        train(model, self.supervision_file, config, folder, listener=self.listener)
        files: list[Path] = []
        for seed_folder in self.seed_folders:
            files += [seed_folder / name for name in TRAINED_FILES]
        rejected_file = folder / REJECTED_FILE
        if rejected_file.is_file():
            files.append(rejected_file)
        return files

    def _make_tune(self) -> Stage:
        config = self.recipe.tune
        assert config is not None
        hashes = {}  # by task
        for splits in self.recipe.tuning_tasks:
            examples: list[Example] = []
            for part in splits.examples.values():
                examples += part
            hashes[splits.task.name] = codec.hash_values(examples)
        made_from = {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "questions": hashes,
        }
        return Stage(made_from, self._run_tune)

    def _run_tune(self) -> list[Path]:
        from drllm.tuning.run import tune

        config = self.recipe.tune
        assert config is not None
        model = self._choose_model(config)
        tune(model, self.recipe.tuning_tasks, config, self.folder, listener=self.listener)
        return [self.paths_file]

    def _make_heal(self) -> Stage:
        config = self._complete_heal_config()
        path_file = load_path(config.require_path())
        path_name = "" if path_file.named is None else path_file.named.name
        made_from = {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "texts": codec.hash_values(self.recipe.healing_texts),
            "path": [path_name, hash_file(path_file.file)],
        }
        return Stage(made_from, lambda: self._run_heal(config, path_file))

    def _complete_heal_config(self) -> HealConfig:
        """Return the settings of healing.

        If the run tunes paths, the recipe only has the name of a path. The file is added.
        """
        config = self.recipe.heal
        assert config is not None
        if self.recipe.tune is None:
            return config
        path = str(self.paths_file)
        if config.path is not None:
            path += f":{config.path}"
        return dataclasses.replace(config, path=path)

    def _run_heal(self, config: HealConfig, path: PathFile) -> list[Path]:
        from drllm.tuning.heal import heal

        folder = self.healed_folder
        texts = self.recipe.healing_texts
        base = self.load()
        heal(base, path, texts=texts, config=config, output_dir=folder, listener=self.listener)
        names = [HEALED_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, "README.md"]
        return [folder / name for name in names]

    def _make_evaluate(self) -> Stage:
        config = self.recipe.evaluate
        made_from: dict[str, Any] = {
            "config": {**config.decisive(), "measures_time": self._is_timed()},
            "model": self.recipe.model.to_dict(),
            "questions": _hash_questions(self.recipe.tasks, config),
        }
        for seed_folder in self.seed_folders:
            for name in ROUTER_FILES:
                file = seed_folder / name
                made_from[file.relative_to(self.routers_folder).as_posix()] = hash_file(file)
        for file in self._list_path_files():
            made_from[file.name] = hash_file(file)
        return Stage(made_from, self._run_evaluate)

    def _is_timed(self) -> bool:
        """Tell whether the evaluation measures time; only a routed model is timed."""
        return self.recipe.evaluate.latency and self.recipe.has_routers

    def _list_path_files(self) -> list[Path]:
        """List the files of static paths that this run writes."""
        files = []
        if self.recipe.includes("tune"):
            files.append(self.paths_file)
        if self.recipe.includes("heal"):
            files.append(self.healed_folder / HEALED_FILE)
        return files

    def _complete_evaluate_config(self) -> EvaluateConfig:
        """Return the settings of the evaluation, which uses the files of this run by default."""
        config = self.recipe.evaluate
        if self.seed_folders and needs_targets(config.baselines) and config.supervision is None:
            config = dataclasses.replace(config, supervision=str(self.supervision_file))
        path_files = self._list_path_files()
        if path_files and config.paths is None:
            config = dataclasses.replace(config, paths=",".join(map(str, path_files)))
        return config

    def _run_evaluate(self) -> list[Path]:
        from drllm.evaluation.run import evaluate

        tasks = self.recipe.tasks
        config = self._complete_evaluate_config()
        output = self.folder / "eval"
        routers = self.seed_folders
        evaluate(self.load(), tasks, config, output, routers=routers, listener=self.listener)
        names = [f"{task.name}.json" for task in tasks]
        names += ["samples.jsonl", "samples.manifest.json"]
        if self._is_timed():
            names.append("latency.json")
        return [output / name for name in names]

    def _make_report(self) -> Stage:
        made_from = {RECIPE_FILE: codec.sha256(self.folder / RECIPE_FILE)}
        earlier_stages = STAGES[:-1]
        for name in earlier_stages:
            if name in self.manifest.stages:
                made_from.update(self.manifest.stages[name].outputs)
        return Stage(made_from, self._run_report)

    def _run_report(self) -> list[Path]:
        from drllm.reporting.stage import list_pictures, report

        page, text = report(self.folder, listener=self.listener)
        return [page, text, *list_pictures(page)]
