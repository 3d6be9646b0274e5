"""`drllm run` and `drllm sweep`: recipes, by file or by name."""

from __future__ import annotations

from pathlib import Path

from drllm import pipeline
from drllm.cli.show_results import show_results
from drllm.cli.show_sweep import show_sweep
from drllm.cli.terminal import Terminal
from drllm.cli.verbs import Flag, Request, verb
from drllm.errors import ConfigError, unknown_name
from drllm.listener import duration
from drllm.reporting.sweeps import SWEEP_FILE

RUNS = Path("runs")
RECIPES = Path(__file__).with_name("recipes")
IN_A_FOLDER = (
    Flag("output_dir", "folder of the run; default: runs/ and the recipe's name"),
    Flag("data_dir", "folder with SPLIT.jsonl[.gz] files by task"),
)


@verb(
    "run",
    help="carry out a recipe: all stages in a row, skipping what is done",
    example="drllm run demo --output-dir runs/demo",
    flags=(
        Flag(
            "recipe", "YAML file, or the name of a packaged recipe", required=True, positional=True
        ),
        *IN_A_FOLDER,
    ),
    resumes=True,
)
def run(request: Request, terminal: Terminal) -> None:
    """Carry out a recipe, and print the results, each stage's time and the report's place."""
    path = find_recipe(request.path("recipe"))
    folder = _folder_of(request, path)
    recipe = pipeline.read_recipe(path, request.values["data_dir"])
    done = pipeline.run(recipe, folder, listener=terminal)
    show_results(folder / "eval", terminal)
    terminal.say()
    for stage in done:
        before = ", done before" if stage.done_before else ""
        terminal.say(f"{stage.name:12} {duration(stage.seconds)}{before}")
    terminal.say(f"{'report':12} {folder / 'report.html'}")


@verb(
    "sweep",
    help="train with many settings, choose one on the select split, test it once",
    example="drllm sweep sweeps/demo --output-dir runs/sweep",
    flags=(
        Flag(
            "sweep",
            "YAML file, or the name of a packaged sweep: a recipe, and under 'settings' what "
            "differs from it",
            required=True,
            positional=True,
        ),
        *IN_A_FOLDER,
    ),
    resumes=True,
)
def sweep(request: Request, terminal: Terminal) -> None:
    """Carry out a sweep, and print its table and the test of what was chosen."""
    path = find_recipe(request.path("sweep"))
    folder = _folder_of(request, path)
    plan = pipeline.read_sweep(path, request.values["data_dir"])
    chosen = pipeline.sweep(plan, folder, listener=terminal)
    show_sweep(folder / SWEEP_FILE, terminal)
    if chosen is not None:
        show_results(folder / "test" / "eval", terminal)
        terminal.fact("report", str(folder / "test" / "report.html"))


def find_recipe(given: Path) -> Path:
    """Return the file of a recipe or sweep, given as a file or by the name of a packaged one.

    Raises:
        ConfigError: No such file, and no such name.
    """
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")]
    if given.suffix or given.is_absolute() or given.is_file():
        same = [name for name in names if Path(name).name == given.stem]
        if same and not given.exists():
            known = " or ".join(sorted(same))
            raise ConfigError(f"{given} doesn't exist; packaged recipes are run by name: {known}")
        return given
    ours = RECIPES / f"{given}.yaml"
    if not ours.is_file():
        raise ConfigError(unknown_name("recipe", str(given), names) + "; or give a YAML file")
    return ours


def _folder_of(request: Request, file: Path) -> Path:
    """Return where a recipe is carried out: as asked, else `runs/` and its name."""
    return request.path("output_dir") if request.values["output_dir"] else RUNS / file.stem
