"""The recipes of the paper and of its released code, number by number, each with its source."""

from pathlib import Path
from typing import Any

import pytest

from drllm.cli.parser import parse
from drllm.config import SearchConfig, SuperviseConfig, TrainConfig
from drllm.config.files import PRESETS, read_yaml, with_preset
from drllm.pipeline.recipes import read_recipe
from drllm.supervision.select import check_settings, read_quotas
from drllm.tasks.registry import get_tasks

RECIPES = Path(__file__).resolve().parents[3] / "src" / "drllm" / "cli" / "recipes"
LLAMA = "meta-llama/Llama-3.2-3B-Instruct"
TABLE_2 = {
    "arc_easy": 400,
    "arc_challenge": 600,
    "dart-1": 200,
    "dart-2": 400,
    "dart-3": 600,
    "dart-4": 800,
    "dart-5": 1000,
}
"""Kept questions by set: Dr.LLM (arXiv 2510.12773), Table 2."""

OURS = "ours; not in the source"

# section.setting: (value, where it stands). "Search", "router", "loss", "training" are the parts of
# arXiv 2510.12773 on the method and its set-up.
PAPER: dict[str, tuple[Any, str]] = {
    "model.model": (LLAMA, "the model of the ablations"),
    "model.dtype": ("bfloat16", "training: bf16"),
    "search.dataset": ("arc,dart", "Table 2"),
    "search.reward": ("letter,boxed", "search: letters A to D on ARC, boxed answers on DART"),
    "search.strategy": ("tree", "search: Monte Carlo tree search"),
    "search.stop_rule": ("paper", "search: first improving, or correct and strictly shorter"),
    "search.num_simulations": (50, "search"),
    "search.budget": (2.0, "search: at most 2L executions"),
    "search.exploration_constant": (1.8, "search: c"),
    "search.length_penalty": (3.0, "search: lambda"),
    "search.random_child_probability": (0.1, "search"),
    "search.leaves_per_round": (1, "search: one path a simulation"),
    "search.kl": (False, OURS),
    "supervise.target": ("paper", "search: the shortest correct path"),
    "supervise.quotas": (TABLE_2, "Table 2"),
    "train.num_epochs": (25, "training"),
    "train.learning_rate": (1e-3, "training"),
    "train.weight_decay": (0.01, "training"),
    "train.warmup_steps": (500, "training"),
    "train.gradient_accumulation": (16, "training: batch 16, as 1 x 16"),
    "train.num_windows": (8, "router"),
    "train.router_width": (128, "router"),
    "train.loss": ("focal", "loss"),
    "train.gamma": (2.0, "loss"),
    "train.class_weights": ("effective_number", "loss"),
    "train.beta": (0.999, "loss"),
    "train.validation_fraction": (0.0, "Table 2: 4,000 targets to train on"),
    "evaluate.tasks": ("arc", "Table 3; DART can't be evaluated by options"),
}

# Here "search", "train" and "model" are data_generation.py, train.py and models/modeling_qwen3.py
# of github.com/parameterlab/dr-llm at commit 14e8837.
RELEASED: dict[str, tuple[Any, str]] = {
    "model.model": (LLAMA, "search, train: default of --model_name, --model_id"),
    "model.dtype": ("bfloat16", "train: torch_dtype"),
    "search.dataset": ("arc,dart", "search: every choice of --dataset"),
    "search.reward": ("letter,boxed", "search: evaluate_path"),
    "search.strategy": ("walk", "search: a node is expanded only while it has no child"),
    "search.stop_rule": ("released", "search: improving, or at least two layers shorter"),
    "search.num_simulations": (200, "search: default of --num_simulations"),
    "search.budget": (2.0, "search: repeats up to num_layers * 2"),
    "search.leaves_per_round": (1, "search: one evaluate_path a simulation"),
    "search.kl": (False, OURS),
    "supervise.target": ("released", "search: shortest of good_paths, the default path among them"),
    "supervise.quotas": (TABLE_2, "arXiv 2510.12773, Table 2, one --num_samples each"),
    "supervise.quota_improving": (0.3, "search: target_accuracy"),
    "train.num_epochs": (15, "train: default of --num_epochs"),
    "train.learning_rate": (1e-3, "train: default of --learning_rate"),
    "train.weight_decay": (0.01, "train: default of --weight_decay"),
    "train.warmup_steps": (500, "train: default of --warmup_steps"),
    "train.gradient_accumulation": (16, "train: default of --gradient_accumulation"),
    "train.loss_reduction": ("sum", "train: accepts_loss_kwargs is set under another name"),
    "train.max_grad_norm": (1.0, "train: default of the Trainer"),
    "train.num_windows": (8, "model: num_windows"),
    "train.router_width": (128, "model: hidden_dim"),
    "train.loss": ("focal", "model: focal_loss"),
    "train.gamma": (2.0, "model: gamma"),
    "train.class_weights": ("effective_number", "model: class_w"),
    "train.beta": (0.999, "model: beta"),
    "train.validation_fraction": (70 / 4000, "train: eval_size_per_type = 10, of 7 sets"),
    "evaluate.tasks": ("arc", OURS),
}

BOTH = pytest.mark.parametrize(
    ("name", "table"), [("paper_4k.yaml", PAPER), ("released_4k.yaml", RELEASED)]
)


@BOTH
def test_every_setting_is_the_sources_and_none_is_without_one(name: str, table: dict[str, Any]):
    recipe = read_recipe(RECIPES / name)
    values = with_preset(RECIPES / name, read_yaml(RECIPES / name, "a recipe"))
    assert {f"{section}.{key}" for section, keys in values.items() for key in keys} == set(table)
    for place, (value, source) in table.items():
        section, setting = place.split(".")
        found = getattr(getattr(recipe, section), setting)
        if setting == "quotas":
            found = read_quotas(found)
        assert found == value, f"{place} ({source})"


@pytest.mark.parametrize("verb", ["search", "supervise", "train"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_stage_with_a_preset_has_the_settings_of_the_recipe_that_names_it(preset: str, verb: str):
    needed = {"supervise": "--search s.jsonl --output o.jsonl", "train": "--run-name r"}
    request = parse(f"{verb} --config {preset} {needed.get(verb, '')}".split())
    recipe, own = read_recipe(RECIPES / f"{preset}_4k.yaml"), read_yaml(PRESETS[preset], "settings")
    groups = {"search": SearchConfig, "supervise": SuperviseConfig, "train": TrainConfig}
    for section, settings in own.items():
        if groups[section] in map(type, request.settings):
            found, theirs = request.get_settings(groups[section]), getattr(recipe, section)
            assert {n: getattr(found, n) for n in settings} == {
                n: getattr(theirs, n) for n in settings
            }


@BOTH
def test_the_quotas_of_all_tasks_that_are_searched_add_up_to_four_thousand(name: str, table: Any):
    recipe = read_recipe(RECIPES / name)
    tasks = [task.name for task in get_tasks(recipe.search.dataset)]
    assert check_settings(recipe.supervise, tasks) == TABLE_2
    assert tasks == list(TABLE_2)
    assert sum(TABLE_2.values()) == 4000
