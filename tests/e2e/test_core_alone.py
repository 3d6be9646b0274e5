"""drllm without its extras: what works, and what says which one it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from drllm.extras import EXTRAS, make_install_command

CORE_ALONE = f"""
import json, sys
sys.modules |= dict.fromkeys({sum(EXTRAS.values(), ())})  # importing one of these fails
from drllm import *  # every public name is there
from drllm.cli import main
print(json.dumps([main(command.split()) for command in json.loads(sys.argv[1])]))
"""

WORKS = """\
--help
--version
ls tasks
ls models
ls baselines
ls rewards
search --help
evaluate --help
search --model MODEL --dataset builtin_facts --limit 6 --num-simulations 6 --output-dir data
supervise --search data/search.jsonl --output data/again.jsonl
train --model MODEL --supervision data/again.jsonl --run-name r --num-epochs 1 --warmup-steps 0
show data/search.jsonl
show data/supervision.jsonl
show checkpoints/r
generate --routers checkpoints/r --max-new-tokens 4 Why?
export --model MODEL --skip 2 --output-dir exported"""

REFUSED = {
    "run RECIPE --output-dir out": "eval,report",
    "report data": "report",
    "evaluate --routers checkpoints/r --tasks builtin_facts --output-dir out": "eval",
    "lm-eval ls tasks": "eval",
    "search --dataset arc_easy --output-dir out": "eval",
    "search --model MODEL --dataset builtin_arithmetic --output-dir out": "math",
    "search --model MODEL --dataset builtin_facts --executor ray --output-dir out": "ray",
    "train --supervision data/supervision.jsonl --run-name s --report-to wandb": "trackers",
}


@pytest.fixture
def core_alone(tmp_path, model_folder, recipe):
    """A function that runs commands in a process without extras: statuses, and what it said."""

    def run(commands: list[str]) -> tuple[list[int], str]:
        placed = [
            c.replace("MODEL", str(model_folder())).replace("RECIPE", str(recipe)) for c in commands
        ]
        child = subprocess.run(
            [sys.executable, "-c", CORE_ALONE, json.dumps(placed)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert child.stdout, child.stderr
        return json.loads(child.stdout.splitlines()[-1]), child.stderr

    return run


@pytest.mark.thorough  # a process a command
def test_all_but_evaluations_and_reports_works_without_extras(core_alone, tmp_path: Path):
    commands = WORKS.splitlines()
    statuses, said = core_alone(commands)
    assert statuses == [0] * len(commands), said
    assert (tmp_path / "exported" / "config.json").is_file()


@pytest.mark.thorough  # a process a command
def test_what_needs_an_extra_says_so_in_one_line_before_it_writes_anything(core_alone, tmp_path):
    before = set(tmp_path.rglob("*"))
    statuses, said = core_alone(list(REFUSED))
    assert statuses == [2] * len(REFUSED), said
    lines = [line for line in said.splitlines() if "needs" in line]
    commands = [make_install_command(extras.split(",")) for extras in REFUSED.values()]
    assert [line.partition("run: ")[2] for line in lines] == commands
    assert set(tmp_path.rglob("*")) == before
