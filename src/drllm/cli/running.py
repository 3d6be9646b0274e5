"""The verb `drllm run`: runs a recipe, which is a file or a packaged recipe by name."""

from pathlib import Path

from drllm.cli.command_line import CommandLine
from drllm.cli.show_results import show_next_steps, show_summary
from drllm.cli.terminal import LOADING, Terminal
from drllm.cli.verbs import Flag, verb
from drllm.errors import ConfigError, unknown_name
from drllm.model.places import check_model
from drllm.pipeline.folder import run_recipe
from drllm.pipeline.recipes import read_recipe
from drllm.records.codec import read_json
from drllm.records.places import check_folder, check_new_folder
from drllm.records.shortened import DEMO_FILE, DemoResult
from drllm.reporting.run import read_run
from drllm.tasks.examples import FILE_ENDINGS

DEMO = Path("demo")
DEMO_MODEL = "smollm2-135m"
RECIPES = Path(__file__).with_name("recipes")  # the folder of the packaged recipes


@verb(
    "run",
    example="drllm run demo",
    flags=(
        Flag(
            "recipe",
            "YAML file, or name of a packaged recipe",
            required=True,
            positional=True,
        ),
        Flag(
            "full",
            "run the longer form of the recipe: demo --full trains routers too",
            switch=True,
        ),
        Flag(
            "output_dir",
            "folder of the run; default: runs/RECIPE",
            placeholder="DIR",
            alias="output",
        ),
        Flag(
            "data_dir",
            "folder with TASK/SPLIT.jsonl[.gz] files; default: fetched from the hub",
            placeholder="DIR",
        ),
        Flag(
            "trust_code",
            "let the recipe run code that isn't drllm's: a model's own, a task file's, or a "
            "reward's Python file; read it first",
            switch=True,
        ),
    ),
    resumes=True,
)
def run(command: CommandLine, terminal: Terminal) -> int:
    """Run all stages of a recipe, one after the other; finished stages are skipped."""
    place = command.path("recipe")
    if place == DEMO and not command.values["full"]:
        return _run_demo(command.optional_path("output_dir") or Path("runs/demo"), terminal)
    if command.values["full"]:
        place = _find_longer_form(place)
    path = _find_recipe(place)
    folder = command.optional_path("output_dir") or Path("runs") / path.stem
    data_dir = command.values["data_dir"]
    recipe = read_recipe(path, data_dir, trusts_code=command.values["trust_code"])
    check_model(recipe.model)
    times = run_recipe(recipe, folder, terminal)
    finished_run = read_run(folder)
    show_summary(finished_run.evaluations, folder / "eval", terminal)
    terminal.say()
    for name, time in times.items():
        terminal.fact(name, time)
    terminal.fact("page", folder / "report.html")
    show_next_steps(finished_run, terminal)
    drop_tests = [evaluation.drop_test for evaluation in finished_run.evaluations]
    if any(drop_test and not drop_test.chosen for drop_test in drop_tests):
        return 1  # as `evaluate` does
    return 0


def _run_demo(output: Path, terminal: Terminal) -> int:
    """Run the demo, or print what an earlier one has found."""
    file = output / DEMO_FILE
    check_folder(output, "--output-dir")
    if not file.is_file():
        check_new_folder(output)
        with terminal.busy(LOADING):
            from drllm.models.routed_model import unrouted
            from drllm.prune.demo import run_demo

        with unrouted(DEMO_MODEL, None, terminal) as base:
            run_demo(base, output, listener=terminal)
    show_demo(file, terminal)
    terminal.fact("checkpoint", f"{output / 'smaller'}, loads with transformers alone")
    terminal.say("Your own questions, one a line in a file:")
    terminal.command(f"drllm shrink {DEMO_MODEL} questions.jsonl smaller/")
    return 0


def show_demo(file: Path, terminal: Terminal) -> None:
    """Print what the demo found."""
    result = read_json(file, DemoResult)
    rows = []
    for row in result.rows:
        interval = ""
        if row.against_full is not None:
            low, high = map(row.against_full.write, row.against_full.interval)
            interval = f" ({low} to {high})"
        cells = [row.name, str(row.num_layers), f"{100 * row.accuracy:.1f}{interval}"]
        rows.append([*cells, f"{row.text_loss:.2f}"])
    terminal.table("|layers|right answers, %|loss of other text", rows)
    terminal.say(result.verdict)


def _find_recipe(place: Path) -> Path:
    """Return the file of a recipe; `place` is a file or the name of a packaged recipe."""
    if _is_file_of_questions(place):
        raise ConfigError(
            f"{place} is a file of questions, not a recipe; for a smaller checkpoint: drllm shrink "
            f"MODEL {place} OUT; for routers: drllm search --tasks {place} --output-dir DIR"
        )
    names = ["demo", *(path.stem for path in RECIPES.glob("*.yaml"))]
    # A name without an ending is the name of a packaged recipe, unless there is such a file.
    means_file = place.suffix or place.is_absolute() or place.is_file()
    if not means_file:
        if str(place) not in names:
            raise ConfigError(unknown_name("recipe", str(place), names) + "; or give a YAML file")
        return RECIPES / f"{place}.yaml"
    if not place.exists() and place.stem in names:
        raise ConfigError(
            f"{place} doesn't exist; packaged recipes are run by name: drllm run {place.stem}"
        )
    return place


def _find_longer_form(place: Path) -> Path:
    """Return the name of the longer form of a packaged recipe, which `--full` runs."""
    name = f"{place}_full"
    if not (RECIPES / f"{name}.yaml").is_file():
        raise ConfigError(
            f"recipe {str(place)!r} has no longer form; leave out --full, or give demo --full"
        )
    return Path(name)


def _is_file_of_questions(place: Path) -> bool:
    """Tell whether a file holds questions. A `.json` file without a list may be a recipe."""
    name = place.name.lower()
    if name.endswith(".json") and place.is_file():
        return place.read_bytes().lstrip().startswith(b"[")
    return name.endswith(FILE_ENDINGS) and not name.endswith(".json")
