"""`drllm run`: all stages of a recipe in a row in one folder, skipping what is done.

A stage is done when the ledger says that it was made from exactly what it would be made from now
(settings, questions, hashes of its input files, version), and every file that it wrote is still
there, unchanged. Leaves recipes to `recipe`, the ledger to `ledger` and the work to `stages`; what
is resumed inside a stage (blocks of the search, epochs of the training) is up to the stage.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from drllm.cli import checks, stages
from drllm.cli.ledger import Ledger
from drllm.cli.recipe import Recipe, read_recipe
from drllm.cli.show_results import show_results
from drllm.cli.terminal import Terminal, duration
from drllm.cli.verbs import Flag, Request, verb
from drllm.config import ModelConfig
from drllm.errors import ConfigError, unknown_name
from drllm.evaluation.baselines.registry import files_needed
from drllm.records import rejected_path, sha256, write_atomically
from drllm.records.places import check_folder
from drllm.supervision import supervise
from drllm.tasks.base import Task

if TYPE_CHECKING:
    from drllm.models.base.load import BaseModel

RECIPE_FILE = "run.yaml"
STAGES = ("search", "supervise", "train", "evaluate", "report")
RUNS = Path("runs")
RECIPES = Path(__file__).with_name("recipes")
IN_A_FOLDER = (
    Flag("output_dir", "folder of the run; default: runs/ and the file's name"),
    Flag("data_dir", "folder with SPLIT.jsonl[.gz] files by task"),
)


@verb(
    "run",
    help="carry out a recipe: all stages in a row, skipping what is done",
    example="drllm run demo --output-dir runs/demo",
    flags=(
        Flag(
            "recipe", "YAML file, or the name of a recipe of ours", required=True, positional=True
        ),
        *IN_A_FOLDER,
    ),
    resumes=True,
)
def run(request: Request, terminal: Terminal) -> None:
    """Carry out a recipe, and print the results, each stage's time and the report's place.

    Raises:
        ConfigError: The recipe or the folder can't be used; nothing has been written then.
        RecordError: The folder holds files that can't be trusted, or no question has a target.
    """
    path = find_recipe(request.path("recipe"))
    folder = folder_of(request, path)
    recipe = read_recipe(path, folder, request.values["data_dir"])
    tasks = recipe.tasks()
    check_folder(folder, "--output-dir")
    with ExitStack() as stack:
        load = Loader(recipe.model, terminal, stack)
        done = Run(recipe, tasks, folder, terminal, load).carry_out()
    show_results(folder / "eval", terminal)
    terminal.say()
    for name, seconds, skipped in done:
        terminal.say(f"{name:12} {duration(seconds)}{', done before' if skipped else ''}")
    terminal.say(f"{'report':12} {folder / 'report.html'}")


def find_recipe(given: Path) -> Path:
    """Return the file of a recipe or sweep, given as a file or as the name of one of ours.

    Raises:
        ConfigError: No such file, and no such name.
    """
    if given.suffix or given.is_absolute() or given.is_file():
        return given
    ours = RECIPES / f"{given}.yaml"
    if not ours.is_file():
        names = [path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.yaml")]
        raise ConfigError(
            unknown_name("recipe", str(given), map(str, names)) + "; or give a YAML file"
        )
    return ours


def folder_of(request: Request, file: Path) -> Path:
    """Return where what a file says is carried out: as asked, else `runs/` and its name."""
    return request.path("output_dir") if request.values["output_dir"] else RUNS / file.stem


class Loader:
    """The base model of one run or several, loaded by the first stage that needs it.

    Args:
        config: Which model.
        terminal: Where it is said.
        stack: Holds the model until it is closed.
    """

    def __init__(self, config: ModelConfig, terminal: Terminal, stack: ExitStack) -> None:
        self._config, self._terminal, self._stack = config, terminal, stack
        self._base: BaseModel | None = None

    def __call__(self) -> BaseModel:
        """Return the model."""
        if self._base is None:
            self._base = self._stack.enter_context(stages.loaded(self._config, self._terminal))
        return self._base


class Run:
    """One run of a recipe in a folder.

    Args:
        recipe: The settings.
        tasks: Those of `search` and those of `evaluate`.
        folder: The run folder.
        terminal: Where progress is shown.
        load: Gives the base model.
        shared: The run folder whose files a stage reads that doesn't run in this one; this one
            unless given.
    """

    def __init__(
        self,
        recipe: Recipe,
        tasks: Mapping[str, Sequence[Task]],
        folder: Path,
        terminal: Terminal,
        load: Callable[[], BaseModel],
        shared: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.recipe = recipe
        self.tasks = tasks
        self.folder = folder
        self.terminal = terminal
        self.load = load
        self.ledger = Ledger(folder)
        self.search_file = shared.get("search", folder) / "search.jsonl"
        self.supervision_file = shared.get("supervise", folder) / "supervision.jsonl"
        self.routers = shared.get("train", folder) / "routers"
        self._resumes = False

    def carry_out(self, names: Sequence[str] = STAGES) -> list[tuple[str, float, bool]]:
        """Run what isn't done, in order.

        Args:
            names: Some of `STAGES`, in their order; what the others give is shared.

        Returns:
            Each stage's name, its measured time in seconds, and whether an earlier run did it.
        """
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
            skipped = self.ledger.is_done(name, made_from)
            label = f"[{number}/{len(names)}] {name}"
            if not skipped:
                self._perform(name, made_from, perform)
            if name == names[0]:
                self._keep_recipe()
            seconds = float(self.ledger.stages[name]["seconds"])
            self.terminal.note(f"{label}: {'done before' if skipped else duration(seconds)}")
            times.append((name, seconds, skipped))
        return times

    def _perform(
        self, name: str, made_from: Mapping[str, Any], perform: Callable[[], Sequence[Path]]
    ) -> None:
        if name == "evaluate":
            for stale in self.ledger.outputs(name):
                stale.unlink(missing_ok=True)  # the tasks may be others now
        started = time.perf_counter()
        if name == "search":
            # It refuses a folder with another search in it: then the ledger stays as it is.
            outputs = perform()
            self.ledger.begin(name, made_from)
        else:
            self._resumes = self.ledger.begin(name, made_from)
            outputs = perform()
        self.ledger.finish(name, outputs, time.perf_counter() - started)

    def _keep_recipe(self) -> None:
        """Write the recipe with all its settings into the folder, now that it fits the folder."""
        path, text = self.folder / RECIPE_FILE, self.recipe.to_yaml()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)

    # What each stage is made from, and its work. The work returns the files it wrote.

    def _search_from(self) -> dict[str, Any]:
        config = self.recipe.search
        questions = checks.questions_digest(
            self.tasks["search"], config.split, config.data_dir, config.limit, config.seed
        )
        return {
            "config": config.decisive(),
            "model": self.recipe.model.to_dict(),
            "questions": questions,
        }

    def _search(self) -> Sequence[Path]:
        from drllm.search.run import search_paths

        config = self.recipe.search
        model = self.recipe.model if config.executor == "ray" else self.load()
        search_paths(model, self.tasks["search"], config, self.folder, listener=self.terminal)
        return [self.search_file, self.folder / "search.manifest.json"]

    def _supervise_from(self) -> dict[str, Any]:
        return {
            "config": self.recipe.supervise.to_dict(),
            "search.jsonl": checks.file_hash(self.search_file),
        }

    def _supervise(self) -> Sequence[Path]:
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
            "supervision.jsonl": checks.file_hash(self.supervision_file),
        }

    def _train(self) -> Sequence[Path]:
        from drllm.training.stage import discard
        from drllm.training.targets import REJECTED_FILE

        if not self._resumes:
            discard(self.routers, self.recipe.train)
        stages.run_train_stage(
            self.load(), [self.supervision_file], self.routers, self.recipe.train, self.terminal
        )
        names = (
            *("router_config.json", "routers.safetensors", "README.md"),
            *("metrics.jsonl", "layers.json"),
        )
        rejected = [path for path in [self.routers / REJECTED_FILE] if path.is_file()]
        return [*(folder / name for folder in self._seeds() for name in names), *rejected]

    def _seeds(self) -> list[Path]:
        """Return the folders of routers, one a seed, the first seed's first."""
        return list(self.recipe.train.by_seed(self.routers))

    def _evaluate_from(self) -> dict[str, Any]:
        config = self.recipe.evaluate
        return {
            "config": config.decisive() | {"measures_time": config.latency_rounds > 0},
            "model": self.recipe.model.to_dict(),
            "questions": checks.evaluation_digests(self.tasks["evaluate"], config),
            **{
                (folder / name).relative_to(self.routers).as_posix(): checks.file_hash(
                    folder / name
                )
                for folder in self._seeds()
                for name in ("router_config.json", "routers.safetensors")
            },
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
            self.load(),
            self.tasks["evaluate"],
            config,
            output,
            routers=self._seeds(),
            listener=self.terminal,
        )
        latency = ["latency.json"] if config.latency_rounds else []
        beside = ["samples.jsonl", "samples.manifest.json", *latency]
        return [*(output / f"{each.task}.json" for each in results), *(output / n for n in beside)]

    def _report_from(self) -> dict[str, Any]:
        made = {RECIPE_FILE: sha256(self.folder / RECIPE_FILE)}
        for stage in STAGES[:-1]:
            made.update(self.ledger.stages.get(stage, {}).get("outputs", {}))
        return made

    def _report(self) -> Sequence[Path]:
        from drllm.reporting.stage import figures_of, report

        page, text = report(self.folder, listener=self.terminal)
        return [page, text, *figures_of(page)]
