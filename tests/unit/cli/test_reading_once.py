"""A command reads its questions once: to check them, to print them, and for the stage."""

import json
from collections import Counter

import pytest

from drllm.tasks.builtin import BuiltinFacts

SHORT = {
    "search": "--dataset builtin_facts --limit 4 --num-simulations 2 --block-size 2",
    "tune": "--tasks builtin_facts --num-fit 12 --num-judged 8 --max-skipped 1",
    "heal": "--tasks builtin_facts --limit 10 --steps 1 --rank 2 --num-held-out 2 --path plan.json",
}


@pytest.fixture
def reads(monkeypatch):
    """How often each split of the built-in facts was read."""
    counts = Counter()
    read = BuiltinFacts.examples

    def count(self, split, data_dir=None):
        counts[split] += 1
        return read(self, split, data_dir)

    monkeypatch.setattr(BuiltinFacts, "examples", count)
    return counts


@pytest.mark.parametrize("name", SHORT)
def test_a_command_reads_each_split_of_its_questions_once(
    name, reads, drllm, model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"decisions": [1, 0, 1, 1]}))
    words = f"{name} {SHORT[name]} --device cpu --output-dir new --model"
    drllm(words, model_folder(num_layers=4))
    assert reads
    assert set(reads.values()) == {1}


RECIPE = """
model: {model: MODEL, device: cpu}
tune: {tasks: builtin_facts, num_fit: 12, num_judged: 8, max_skipped: 1}
heal: {tasks: builtin_facts, limit: 10, steps: 1, rank: 2, num_held_out: 2, path: skip1}
evaluate: {tasks: builtin_arithmetic, limit: 2, num_texts: 2}
"""


def test_a_recipe_reads_the_questions_of_a_stage_once(reads, drllm, model_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("MODEL", str(model_folder(num_layers=4))))
    drllm("run", recipe, "--output-dir", tmp_path / "run")
    stages = ("tune", "heal")
    assert reads["search"] == len(stages)
