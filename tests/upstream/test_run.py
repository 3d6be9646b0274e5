"""The script that runs transformers' own tests, on a folder of tests like theirs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run.py")
TESTS = """
import unittest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class LlamaModelTest(unittest.TestCase):
    def setUp(self):
        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, attn_implementation="eager")).eval()

    def test_greedy(self):
        ids = torch.randint(3, 99, (3, 5))
        self.model(ids, output_hidden_states=True)
        self.model.generate(ids, max_new_tokens=3)

    def test_chance(self):
        torch.seed()
        self.model(torch.randint(3, 99, (3, 50)))

    def test_attentions(self):
        self.model(torch.ones(1, 3).long(), output_attentions=True)

    def test_another_model_where_it_is_routed(self):
        ids = torch.randint(3, 99, (3, 5))
        self.model(ids)
        if "generate" in vars(self.model):
            self.model.lm_head.weight.data += 1
        self.model(ids)
"""


@pytest.mark.thorough
def test_outputs_of_tests_are_compared_with_those_of_routed_models(tmp_path):
    folder = tmp_path / "tests" / "models" / "llama"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "test_modeling_llama.py").write_text(TESTS, "utf-8")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--models", "llama"], capture_output=True, text=True
    )
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("llama ")]
    # tests, passed, outputs, differing, failed, refused, unstable, without reference
    assert rows == [
        ["full", "4", "2", "6", "1", "0", "0", "1", "0"],
        ["plan", "4", "1", "5", "1", "0", "1", "1", "0"],
    ], done.stdout + done.stderr
    assert done.returncode == 1
