"""A run folder: all stages of a recipe in a row, skipping what is done.

A stage is done when `run.manifest.json` says that it was made from exactly what it would be made
from now (settings, questions, hashes of its input files, version), and every file that it wrote
is still there, unchanged. What resumes inside a stage is up to the stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from drllm.config import EvaluateConfig, ModelConfig
from drllm.errors import RecordError
from drllm.evaluation.baselines.registry import files_needed
from drllm.evaluation.questions import chosen_on
from drllm.listener import Listener, duration
from drllm.pipeline.recipes import Recipe, read_recipe
from drllm.records import (
    SCHEMA_VERSION,
    read_json,
    read_manifest,
    read_supervision,
    rejected_path,
    sha256,
    write_atomically,
    write_json,
)
from drllm.records.places import check_folder
from drllm.tasks.base import Example, Task, choose
from drllm.tasks.registry import get_task

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel

STAGES = ("search", "supervise", "train", "evaluate", "report")
RECIPE_FILE = "run.yaml"
RUN_FILE = "run.manifest.json"
RUN_SCHEMA = "drllm.run"


# --- what is done ------------------------------------------------------------------------------


class StageDone(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One stage of a run.

    Attributes:
        made_from: Settings, hashes of inputs and the version, as plain JSON.
        outputs: Hash of every file written, by its place in the folder; empty until it ends.
        seconds: How long it took.
    """

    made_from: dict[str, Any]
    outputs: dict[str, str] = {}
    seconds: float = 0.0


class RunManifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`run.manifest.json`: what each stage was made from, what it wrote and how long it took."""

    schema: str = RUN_SCHEMA
    schema_version: int = SCHEMA_VERSION
    drllm_version: str = ""
    stages: dict[str, StageDone] = {}

    def is_done(self, stage: str, made_from: Mapping[str, Any], folder: Path) -> bool:
        """Tell whether a stage need not be run again."""
        done = self.stages.get(stage)
        return (
            done is not None
            and bool(done.outputs)
            and done.made_from == made_from
            and all(hash_of(folder / name) == sha for name, sha in done.outputs.items())
        )


def read_run(folder: Path) -> RunManifest:
    """Read a folder's `run.manifest.json`; empty where there is none.

    Raises:
        RecordError: It is broken or of a future version.
    """
    path = folder / RUN_FILE
    if not path.exists():
        return RunManifest()
    try:
        found = read_json(path, RunManifest)
    except RecordError as error:
        raise RecordError(
            f"{error}; delete {path}, and finished stages are checked or made anew"
        ) from error
    if found.schema != RUN_SCHEMA or found.schema_version > SCHEMA_VERSION:
        raise RecordError(
            f"{path} is {found.schema!r} of schema version {found.schema_version}; this drllm "
            f"reads {RUN_SCHEMA!r} up to {SCHEMA_VERSION}: choose another --output-dir, or install "
            f"a newer drllm"
        )
    return found


def hash_of(path: Path) -> str:
    """Return a file's hash; empty for one that isn't there."""
    return sha256(path) if path.is_file() else ""


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()


def _evaluated(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return, by task, a hash of the questions that an evaluation would ask."""
    folder = None if config.data_dir is None else Path(config.data_dir)

    def digest(task: Task, split: str, limit: int | None) -> str:
        return _digest(choose(task.examples(split, folder), limit, config.seed))

    found = {
        task.name: digest(task, config.split_of(task.name), config.limit_of(task.name))
        for task in tasks
    }
    if config.worked_answers is not None:
        worked = get_task(config.worked_answers)
        for split in (chosen_on(worked, config), config.split_of(worked.name)):
            found[f"worked answers of {worked.name}, {split}"] = digest(
                worked, split, config.num_texts
            )
    return found


# --- a run -------------------------------------------------------------------------------------


@contextmanager
def loaded(config: ModelConfig, listener: Listener) -> Iterator[BaseModel]:
    """Load the base model, and keep transformers quiet until the block ends."""
    with listener.busy(f"loading {config.model}"):
        from drllm.models.base.hub import quiet
        from drllm.models.base.load import load

        base = load(config)
    with quiet():
        yield base


def check_targets(files: Sequence[Path], identity: Mapping[str, Any]) -> list[str]:
    """Refuse targets that were searched with another base model.

    Args:
        files: Supervision files; one without a manifest says nothing about its model.
        identity: Of the base model to be trained on.

    Returns:
        The rewards that their prompts were made for, where known.

    Raises:
        RecordError: Another number of layers or fingerprint; another id alone doesn't matter.
    """
    rewards: dict[str, None] = {}
    for file in files:
        manifest = read_manifest(file, "supervision") or {}
        rewards |= dict.fromkeys(manifest.get("rewards") or ())
        theirs = manifest.get("model", {})
        for name in ("num_layers", "fingerprint"):
            if name in theirs and theirs[name] != identity[name]:
                raise RecordError(
                    f"{file} holds targets of {theirs.get('id', 'another model')!r} ({name} "
                    f"{theirs[name]}), the base model {identity['id']!r} has {name} "
                    f"{identity[name]}; give the model that they were searched with, or search "
                    f"with this one"
                )
    return list(rewards)


class Loader:
    """The base model of one run or several, loaded by the first stage that needs it."""

    def __init__(self, config: ModelConfig, listener: Listener, stack: ExitStack) -> None:
        self._config, self._listener, self._stack = config, listener, stack

    @cached_property
    def base(self) -> BaseModel:
        """The model."""
        return self._stack.enter_context(loaded(self._config, self._listener))


@dataclasses.dataclass(frozen=True)
class StageTime:
    """How long a stage took, in seconds, and whether an earlier run did it."""

    name: str
    seconds: float
    done_before: bool


def run(
    recipe: Recipe | Path | str, folder: Path | str, *, listener: Listener | None = None
) -> list[StageTime]:
    """Carry out a recipe in a folder; what is done there already is skipped.

    Args:
        recipe: The settings of all stages, or the YAML file that has them.
        folder: Receives everything.
        listener: Hears how far it is.

    Returns:
        The stages in order.

    Raises:
        ConfigError: The recipe or the folder can't be used; nothing has been written then.
        TaskError: An unknown task, or no questions to be had; nothing has been written then.
        RecordError: The folder holds files that can't be trusted, or no question has a target.
    """
    folder, listener = Path(folder), listener or Listener()
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    recipe.check()
    check_folder(folder, "--output-dir")
    with ExitStack() as stack:
        return RunFolder(recipe, folder, Loader(recipe.model, listener, stack), listener).stages(
            STAGES
        )


class RunFolder:
    """The stages of a recipe in a folder.

    Args:
        recipe: The settings.
        folder: The run folder.
        loader: Gives the base model.
        listener: Hears how far it is.
        shared: The run folder whose files a stage reads that doesn't run in this one.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        loader: Loader,
        listener: Listener,
        shared: Mapping[str, Path] | None = None,
    ) -> None:
        self.recipe, self.folder = recipe, folder
        self.loader, self.listener = loader, listener
        self.manifest = read_run(folder)
        shared = shared or {}
        self.search_file = shared.get("search", folder) / "search.jsonl"
        self.supervision_file = shared.get("supervise", folder) / "supervision.jsonl"
        self.routers = shared.get("train", folder) / "routers"

    def stages(self, names: Sequence[str]) -> list[StageTime]:
        """Run what isn't done, in order; what the stages that aren't named give is shared."""
        steps: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], Sequence[Path]]]] = {
            "search": (self._search_from, self._search),
            "supervise": (self._supervise_from, self._supervise),
            "train": (self._train_from, self._train),
            "evaluate": (self._evaluate_from, self._evaluate),
            "report": (self._report_from, self._report),
        }
        times = []
        for number, name in enumerate(names, start=1):
            gather, perform = steps[name]
            made_from = {"drllm_version": importlib.metadata.version("drllm"), **gather()}
            skipped = self.manifest.is_done(name, made_from, self.folder)
            if not skipped:
                self._perform(name, made_from, perform)
            if name == names[0]:
                self._keep_recipe()
            times.append(StageTime(name, self.manifest.stages[name].seconds, skipped))
            took = "done before" if skipped else duration(times[-1].seconds)
            self.listener.note(f"[{number}/{len(names)}] {name}: {took}")
        return times

    def _perform(
        self, name: str, made_from: dict[str, Any], perform: Callable[[], Sequence[Path]]
    ) -> None:
        started = time.perf_counter()
        if name != "search":  # which refuses a folder with another search: nothing has changed then
            self.begin(name, made_from)
        outputs = perform()
        hashes = {path.relative_to(self.folder).as_posix(): sha256(path) for path in outputs}
        seconds = round(time.perf_counter() - started, 3)
        self.manifest.stages[name] = StageDone(made_from=made_from, outputs=hashes, seconds=seconds)
        self._write_manifest()

    def begin(self, name: str, made_from: dict[str, Any]) -> None:
        """Note that a stage begins; delete what it wrote when it last ended."""
        before = self.manifest.stages.get(name, StageDone(made_from=made_from))
        if name == "train" and before.made_from != made_from:
            from drllm.training.stage import discard

            discard(self.routers, self.recipe.train)
        for output in before.outputs:
            path = self.folder / output
            if path.resolve() == self.folder.resolve() / output:  # no link leads elsewhere
                path.unlink(missing_ok=True)
        self.manifest.stages[name] = StageDone(made_from=made_from)
        self._write_manifest()

    def _write_manifest(self) -> None:
        self.manifest.schema_version = SCHEMA_VERSION
        self.manifest.drllm_version = importlib.metadata.version("drllm")
        write_json(self.folder / RUN_FILE, self.manifest)

    def _keep_recipe(self) -> None:
        """Write the recipe with all its settings into the folder, now that it fits the folder."""
        path, text = self.folder / RECIPE_FILE, self.recipe.to_yaml()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)

    # What each stage is made from, and its work. The work returns the files it wrote.

    def _search_from(self) -> dict[str, Any]:
        return {
            "config": self.recipe.search.decisive(),
            "model": self.recipe.model.to_dict(),
            "questions": _digest([question.example for question in self.recipe.questions]),
        }

    def _search(self) -> Sequence[Path]:
        from drllm.search.run import search_paths

        recipe = self.recipe
        # Ray's workers load the model themselves.
        model = recipe.model if recipe.search.executor == "ray" else self.loader.base
        search_paths(model, recipe.questions, recipe.search, self.folder, listener=self.listener)
        return [self.search_file, self.folder / "search.manifest.json"]

    def _supervise_from(self) -> dict[str, Any]:
        return {
            "config": self.recipe.supervise.to_dict(),
            "search.jsonl": hash_of(self.search_file),
        }

    def _supervise(self) -> Sequence[Path]:
        from drllm.supervision.select import supervise

        supervise([self.search_file], self.recipe.supervise, self.supervision_file)
        rejected = rejected_path(self.supervision_file)
        return [
            self.supervision_file,
            self.folder / "supervision.manifest.json",
            *([rejected] if rejected.is_file() else []),
        ]

    def _train_from(self) -> dict[str, Any]:
        return {
            "config": self.recipe.train.decisive(),
            "model": self.recipe.model.to_dict(),
            "supervision.jsonl": hash_of(self.supervision_file),
        }

    def _train(self) -> Sequence[Path]:
        from drllm.training.stage import train
        from drllm.training.targets import REJECTED_FILE

        base, files = self.loader.base, [self.supervision_file]
        train(
            base,
            read_supervision(self.supervision_file),
            self.recipe.train,
            self.routers,
            rewards=check_targets(files, base.identity),
            listener=self.listener,
        )
        names = ["router_config.json", "routers.safetensors", "README.md"]
        names += ["metrics.jsonl", "layers.json"]
        rejected = [path for path in [self.routers / REJECTED_FILE] if path.is_file()]
        return [*(folder / name for folder in self._seeds() for name in names), *rejected]

    def _seeds(self) -> list[Path]:
        """Return the folders of routers, one a seed, the first seed's first."""
        return list(self.recipe.train.by_seed(self.routers))

    def _evaluate_from(self) -> dict[str, Any]:
        config = self.recipe.evaluate
        routers = [
            folder / name
            for folder in self._seeds()
            for name in ("router_config.json", "routers.safetensors")
        ]
        return {
            "config": config.decisive() | {"measures_time": config.latency_rounds > 0},
            "model": self.recipe.model.to_dict(),
            "questions": _evaluated(self.recipe.tasks, config),
            **{path.relative_to(self.routers).as_posix(): hash_of(path) for path in routers},
        }

    def _evaluate(self) -> Sequence[Path]:
        from drllm.evaluation.run import evaluate

        output, config = self.folder / "eval", self.recipe.evaluate
        needed = files_needed(config.baselines)  # the run's own, unless others are given
        if "search" in needed and config.search is None:
            config = dataclasses.replace(config, search=str(self.search_file))
        if "supervision" in needed and config.supervision is None:
            config = dataclasses.replace(config, supervision=str(self.supervision_file))
        results = evaluate(
            self.loader.base,
            self.recipe.tasks,
            config,
            output,
            routers=self._seeds(),
            listener=self.listener,
        )
        names = [f"{result.task}.json" for result in results]
        names += ["samples.jsonl", "samples.manifest.json"]
        names += ["latency.json"] if config.latency_rounds else []
        return [output / name for name in names]

    def _report_from(self) -> dict[str, Any]:
        made = {RECIPE_FILE: sha256(self.folder / RECIPE_FILE)}
        for stage in STAGES[:-1]:
            if stage in self.manifest.stages:
                made.update(self.manifest.stages[stage].outputs)
        return made

    def _report(self) -> Sequence[Path]:
        from drllm.reporting.stage import figures_of, report

        page, text = report(self.folder, listener=self.listener)
        return [page, text, *figures_of(page)]
