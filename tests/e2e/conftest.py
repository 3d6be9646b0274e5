"""A whole run on a tiny model in a local folder, made once, for all tests of the command line."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from drllm.cli import main
from interrupted_stages import STAGES
from killable_command import Command
from process_server import PROCESSES

RECIPE = """\
model: {{model: {model}, device: cpu}}
search: {{dataset: builtin_facts, limit: 6, num_simulations: 6, block_size: 3}}
supervise: {{target: shortest}}
train: {{num_epochs: 2, warmup_steps: 0}}
evaluate:
  {{latency: true, latency_rounds: 2, latency_read: 8, latency_written: 2,
  tasks: builtin_facts, limit: 6, num_random_draws: 2}}
"""


@pytest.fixture
def small_harness(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    few_harness_tasks: None,
    no_environment_report: None,
) -> None:
    """Spare each command reading 14,000 task files, and keep the harness' cache and log apart."""
    import lm_eval.tasks
    from lm_eval.caching import cache

    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    monkeypatch.setattr(cache, "PATH", str(tmp_path / "cache"))
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A small recipe for the tiny model."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE.format(model=model_folder()))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """The folder of a whole run. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run") / "done"
    assert main(["run", str(recipe), "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def processes() -> Any:
    """Starts processes that have what they need loaded."""
    return PROCESSES


COMMAND = """
import signal, sys
from drllm.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.stderr = open(said, "w", buffering=1)
sys.exit(main(words))
"""


@pytest.fixture
def start(processes: Any, tmp_path: Path) -> Callable[[Sequence[str]], tuple[Any, Path]]:
    """A function that starts a command; it returns the process, and the file of what it says."""

    def begin(words: Sequence[str]) -> tuple[Any, Path]:
        said = tmp_path / "stderr.txt"
        process = processes.Process(target=exec, args=(COMMAND, {"words": words, "said": said}))
        process.start()
        return process, said

    return begin


NUM_TARGETS = 40
NUM_QUESTIONS = 60


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with targets to train on, a path, and questions."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    rows = []
    for number in range(NUM_TARGETS):
        row = {
            "question": f"Question {number}: {'why ' * (number % 7)}?",
            "optimal_layer_config": [1, number % 3, 1, number // 3 % 3],
            "answer": "yes",
        }
        rows.append(json.dumps(row) + "\n")
    (folder / "supervision.jsonl").write_text("".join(rows))
    questions = []
    for number in range(NUM_QUESTIONS):
        choices = [str(number), str(number + 1)]
        questions.append({"question": f"What is {number} + 0?", "choices": choices, "answer": 0})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "plan.json").write_text('{"path": [0, 2, 3]}')
    return folder


@pytest.fixture
def make_command(
    name: str,
    inputs: Path,
    model_folder: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Callable[[str], Command]:
    """A function that returns the stage's command, which writes to a folder of the given name."""
    stage = STAGES[name]
    model = model_folder()
    routers = None
    if "{routers}" in stage.command:
        routers = request.getfixturevalue("finished_run") / "routers"

    def make(folder_name: str) -> Command:
        folder = tmp_path / folder_name
        command = stage.command
        if "{model}" not in command:
            command += " --model {model} --device cpu --output-dir {folder}"
        places = {"folder": folder, "inputs": inputs, "routers": routers, "model": model}
        words = command.format(**places).split()
        return Command(words, folder, tmp_path / "log.txt", stage.status_when_done)

    return make
