"""A run folder: all stages of a recipe in a row, skipping what is done.

A stage is done when `run.manifest.json` says that it was made from exactly what it would be made
from now (settings, questions, hashes of its input files, version), and every file that it wrote
is still there, unchanged. What resumes inside a stage is up to the stage.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from drllm.config import EvaluateConfig, ModelConfig
from drllm.errors import RecordError
from drllm.evaluation.baselines.base import needs_targets
from drllm.evaluation.questions import chosen_on
from drllm.listener import Listener, duration
from drllm.pipeline.recipes import Recipe
from drllm.records import codec
from drllm.records.healed import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HEALED_FILE
from drllm.records.places import check_folder
from drllm.records.static_paths import PATHS_FILE, read_path
from drllm.records.supervision import rejected_path
from drllm.tasks.base import Task
from drllm.tasks.examples import choose
from drllm.tasks.registry import get_task

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel

STAGES = ("search", "supervise", "train", "tune", "heal", "evaluate", "report")
RECIPE_FILE = "run.yaml"
RUN_FILE = "run.manifest.json"
ROUTER_FILES = ("router_config.json", "routers.safetensors")

Stage: TypeAlias = Iterator[Any]


class StageDone(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One stage of a run, as `docs/formats.md` describes it."""

    made_from: dict[str, Any]
    outputs: dict[str, str] = {}  # empty until the stage ends
    seconds: float = 0.0


class RunManifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`run.manifest.json`: what each stage was made from, what it wrote and how long it took."""

    schema: Literal["drllm.run"] = "drllm.run"
    schema_version: int = codec.SCHEMA_VERSION
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
    """Read a folder's `run.manifest.json`; empty where there is none."""
    path = folder / RUN_FILE
    if not path.exists():
        return RunManifest()
    try:
        return codec.read_json(path, RunManifest)
    except RecordError as error:
        raise RecordError(
            f"{error}; delete {path}, and finished stages are checked or made anew"
        ) from error


def hash_of(path: Path) -> str:
    """Return a file's hash; empty for one that isn't there."""
    return codec.sha256(path) if path.is_file() else ""


def _evaluated(tasks: Sequence[Task], config: EvaluateConfig) -> dict[str, str]:
    """Return, by task, a hash of the questions that an evaluation would ask."""
    folder = None if config.data_dir is None else Path(config.data_dir)

    def digest(task: Task, split: str, limit: int | None) -> str:
        return codec.digest_of(choose(task.examples(split, folder), limit, config.seed))

    found = {t.name: digest(t, config.split_of(t.name), config.limit_of(t.name)) for t in tasks}
    if config.worked_answers is not None:
        worked = get_task(config.worked_answers)
        for split in (chosen_on(worked, config), config.split_of(worked.name)):
            name = f"worked answers of {worked.name}, {split}"
            found[name] = digest(worked, split, config.num_texts)
    return found


@contextmanager
def loaded(config: ModelConfig, listener: Listener) -> Iterator[BaseModel]:
    """Load the base model, and keep transformers quiet until the block ends."""
    with listener.busy(f"loading {config.model}"):
        from drllm.models.routing.routed_model import unrouted  # which takes seconds
    with unrouted(config, listener=listener) as base:
        yield base


@contextmanager
def loader(config: ModelConfig, listener: Listener) -> Iterator[Callable[[], BaseModel]]:
    """Yield a function that returns the base model, and loads it when first called."""
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(loaded(config, listener)))


def run(recipe: Recipe, folder: Path, listener: Listener) -> dict[str, str]:
    """Carry out a recipe in a folder, skipping what is done; return how long each stage took.

    A recipe, its tasks or a folder that can't be used are refused before anything is written.
    """
    recipe.check()
    check_folder(folder, "--output-dir")
    with loader(recipe.model, listener) as load:
        return RunFolder(recipe, folder, load, listener).stages([*filter(recipe.runs, STAGES)])


class RunFolder:
    """The stages of a recipe in a folder.

    `load` returns the base model; `shared` names, by stage, the run folder whose files are read
    where the stage doesn't run in this one.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        load: Callable[[], BaseModel],
        listener: Listener,
        shared: Mapping[str, Path] | None = None,
    ) -> None:
        self.recipe, self.folder, self.load, self.listener = recipe, folder, load, listener
        self.manifest = read_run(folder)
        shared = shared or {}
        self.search_file = shared.get("search", folder) / "search.jsonl"
        self.supervision_file = shared.get("supervise", folder) / "supervision.jsonl"
        self.paths_file, self.healed = folder / PATHS_FILE, folder / "healed"
        self.routers = shared.get("train", folder) / "routers"
        # A folder each.
        self.seeds = list(recipe.train.by_seed(self.routers)) if recipe.has_routers else []

    def stages(self, names: Sequence[str]) -> dict[str, str]:
        """Run the named stages that aren't done, in order; other stages' files must be there."""
        version = importlib.metadata.version("drllm")
        times = {}
        for number, name in enumerate(names, start=1):
            stage: Stage = getattr(self, f"_{name}")()
            made_from = {"drllm_version": version, **next(stage)}
            skipped = self.manifest.is_done(name, made_from, self.folder)
            if not skipped:
                started = time.perf_counter()
                if name != "search":  # which refuses a folder with another search: nothing changes
                    self.begin(name, made_from)
                hashes = {
                    path.relative_to(self.folder).as_posix(): codec.sha256(path)
                    for path in next(stage)
                }
                seconds = round(time.perf_counter() - started, 3)
                self._note(name, StageDone(made_from=made_from, outputs=hashes, seconds=seconds))
            if name == names[0]:
                kept, text = self.folder / RECIPE_FILE, self.recipe.to_yaml()
                if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
                    codec.write_atomically(kept, text)  # it fits the folder
            times[name] = duration(self.manifest.stages[name].seconds) + ", done before" * skipped
            took = "done before" if skipped else times[name]
            self.listener.note(f"[{number}/{len(names)}] {name}: {took}")
        return times

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
        self._note(name, StageDone(made_from=made_from))

    def _note(self, name: str, done: StageDone) -> None:
        self.manifest.stages[name] = done
        self.manifest.schema_version = codec.SCHEMA_VERSION
        self.manifest.drllm_version = importlib.metadata.version("drllm")
        codec.write_json(self.folder / RUN_FILE, self.manifest)

    # Each stage yields what it is made from, then, when it has run, the files that it wrote.

    def _search(self) -> Stage:
        recipe = self.recipe
        yield {
            "config": recipe.search.decisive(),
            "model": recipe.model.to_dict(),
            "questions": codec.digest_of([question.example for question in recipe.questions]),
        }
        from drllm.search.run import search_paths

        # Ray's workers load the model themselves.
        model = recipe.model if recipe.search.executor == "ray" else self.load()
        search_paths(model, recipe.questions, recipe.search, self.folder, listener=self.listener)
        yield [self.search_file, self.folder / "search.manifest.json"]

    def _supervise(self) -> Stage:
        config, output = self.recipe.supervise, self.supervision_file
        yield {"config": config.to_dict(), "search.jsonl": hash_of(self.search_file)}
        from drllm.supervision.select import supervise

        supervise([self.search_file], config, output)
        files = [output, self.folder / "supervision.manifest.json", rejected_path(output)]
        yield [file for file in files if file.is_file()]

    def _train(self) -> Stage:
        config, supervision = self.recipe.train, self.supervision_file
        yield {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "supervision.jsonl": hash_of(supervision),
        }
        from drllm.training.stage import train
        from drllm.training.targets import REJECTED_FILE

        train(self.load(), supervision, config, self.routers, listener=self.listener)
        names = [*ROUTER_FILES, "README.md", "config.json", "metrics.jsonl", "layers.json"]
        files = [folder / name for folder in self.seeds for name in names]
        rejected = self.routers / REJECTED_FILE
        yield [*files, rejected] if rejected.is_file() else files

    def _tune(self) -> Stage:
        config = self.recipe.tune
        assert config is not None
        yield {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "questions": {
                each.task.name: codec.digest_of(
                    [e for part in each.examples.values() for e in part]
                )
                for each in self.recipe.tuned
            },
        }
        from drllm.tuning.run import tune

        tune(self.load(), None, config, self.folder, listener=self.listener)
        yield [self.paths_file]

    def _heal(self) -> Stage:
        config = self.recipe.heal
        assert config is not None
        if self.recipe.tune is not None:
            name = f":{config.path}" if config.path else ""
            config = dataclasses.replace(config, path=f"{self.paths_file}{name}")
        plan = read_path(config.named_path())
        yield {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "texts": codec.digest_of(self.recipe.healed),
            "path": [plan.found.name if plan.found else "", hash_of(plan.file)],
        }
        from drllm.tuning.heal import heal

        heal(self.load(), config=config, output_dir=self.healed, listener=self.listener)
        names = [HEALED_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, "README.md"]
        yield [self.healed / name for name in names]

    def _evaluate(self) -> Stage:
        config, tasks = self.recipe.evaluate, self.recipe.tasks
        routers = [folder / name for folder in self.seeds for name in ROUTER_FILES]
        made = {"tune": self.paths_file, "heal": self.healed / HEALED_FILE}
        static = [file for name, file in made.items() if self.recipe.runs(name)]
        is_timed = config.latency and bool(self.seeds)
        yield {
            "config": config.decisive() | {"measures_time": is_timed},
            "model": self.recipe.model.to_dict(),
            "questions": _evaluated(tasks, config),
            **{path.relative_to(self.routers).as_posix(): hash_of(path) for path in routers},
            **{path.name: hash_of(path) for path in static},
        }
        from drllm.evaluation.run import evaluate

        ours: dict[str, Any] = {}
        if self.seeds and needs_targets(config.baselines):  # the run's own, unless others are given
            ours["supervision"] = config.supervision or str(self.supervision_file)
        if static:
            ours["paths"] = config.paths or ",".join(map(str, static))
        config = dataclasses.replace(config, **ours)
        output, base = self.folder / "eval", self.load()
        evaluate(base, tasks, config, output, routers=self.seeds, listener=self.listener)
        names = [f"{task.name}.json" for task in tasks] + ["samples.jsonl", "samples.manifest.json"]
        yield [output / name for name in names + ["latency.json"] * is_timed]

    def _report(self) -> Stage:
        made_from = {RECIPE_FILE: codec.sha256(self.folder / RECIPE_FILE)}
        for stage in STAGES[:-1]:
            if stage in self.manifest.stages:
                made_from |= self.manifest.stages[stage].outputs
        yield made_from
        from drllm.reporting.stage import figures_of, report

        page, text = report(self.folder, listener=self.listener)
        yield [page, text, *figures_of(page)]
