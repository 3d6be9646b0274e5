"""`drllm run` and `drllm sweep`: recipes, by file or by name."""

from pathlib import Path

from drllm.cli.parser import Flag, Request, verb
from drllm.cli.show import show_results, show_sweep
from drllm.cli.terminal import Terminal
from drllm.errors import ConfigError, unknown_name
from drllm.pipeline import folder as run_folder
from drllm.pipeline import sweeps
from drllm.pipeline.recipes import read_recipe, read_sweep
from drllm.reporting.sweeps import SWEEP_FILE

RECIPES = Path(__file__).with_name("recipes")
IN_A_FOLDER = (
    Flag("output_dir", "folder of the run; default: runs/ and the recipe's name", value="DIR"),
    Flag("data_dir", "folder with SPLIT.jsonl[.gz] files by task", value="DIR"),
)
RECIPE = "YAML file, or the name of a packaged recipe"
SWEEP = "YAML file or packaged sweep: a recipe, and under 'settings' what differs from it"


@verb(
    "run",
    example="drllm run demo --output-dir runs/demo",
    flags=(Flag("recipe", RECIPE, required=True, positional=True), *IN_A_FOLDER),
    resumes=True,
)
def run(request: Request, terminal: Terminal) -> None:
    """Carry out a recipe: all stages in a row, skipping what is done."""
    path, folder = _places(request, "recipe")
    recipe = read_recipe(path, request.values["data_dir"])
    done = run_folder.run(recipe, folder, terminal)
    show_results(folder / "eval", terminal)
    terminal.say()
    for name, took in done.items():
        terminal.say(f"{name:12} {took}")
    terminal.say(f"{'report':12} {folder / 'report.html'}")


@verb(
    "sweep",
    example="drllm sweep sweeps/demo --output-dir runs/sweep",
    flags=(Flag("sweep", SWEEP, required=True, positional=True), *IN_A_FOLDER),
    resumes=True,
)
def sweep(request: Request, terminal: Terminal) -> None:
    """Train with many settings, choose one, test it once."""
    path, folder = _places(request, "sweep")
    plan = read_sweep(path, request.values["data_dir"])
    chosen = sweeps.sweep(plan, folder, terminal)
    show_sweep(folder / SWEEP_FILE, terminal)
    if chosen is not None:
        show_results(folder / "test" / "eval", terminal)
        terminal.fact("report", folder / "test" / "report.html")


def _places(request: Request, flag: str) -> tuple[Path, Path]:
    """Return the file of a recipe or sweep, given itself or by name, and the folder for it."""
    file = request.path(flag)
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")]
    if file.suffix or file.is_absolute() or file.is_file():
        same = [name for name in names if Path(name).name == file.stem]
        if same and not file.exists():
            known = " or ".join(sorted(same))
            raise ConfigError(f"{file} doesn't exist; packaged recipes are run by name: {known}")
    elif str(file) in names:
        file = RECIPES / f"{file}.yaml"
    else:
        raise ConfigError(unknown_name("recipe", str(file), names) + "; or give a YAML file")
    return file, request.optional_path("output_dir") or Path("runs") / file.stem
