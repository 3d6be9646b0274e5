"""A command reads its questions once: to check them, to print them, and for the stage."""

from collections import Counter

import pytest

from drllm.tasks.builtin import BuiltinFacts

SHORT = {
    "search": "--dataset builtin_facts --limit 4 --num-simulations 2 --block-size 2",
    "gaps": "--tasks builtin_facts --layers 3",
    "learn": "--tasks builtin_facts --skip 1 --minutes 0",
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
    words = f"{name} {SHORT[name]} --device cpu --output-dir new --model"
    drllm(words, model_folder(num_layers=4))
    assert reads
    assert set(reads.values()) == {1}
