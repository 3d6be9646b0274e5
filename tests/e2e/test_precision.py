"""Bases in other precisions through the loop: bfloat16, and int8 by torchao and by torch."""

import warnings

import pytest
import torch
from torch import nn

import drllm
from drllm.errors import ArchitectureError, CheckpointError
from drllm.model.identity import fingerprint
from drllm.model.load import BaseModel, load
from drllm.models.routed_model import RoutedModel
from drllm.paths import full_decisions
from drllm.search.evaluator import Evaluator
from drllm.tasks.registry import get_task

INT8 = ["torchao", "dynamic"]


def in_precision(name: str, kind: str) -> BaseModel:
    """Load a model as a user would in one of the precisions."""
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        return load(name, device="cpu", quantization_config=config)
    base = load(name, device="cpu", dtype="bfloat16" if kind == "bfloat16" else "float32")
    if kind == "dynamic":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated for torchao's
            from torch.ao.quantization import quantize_dynamic

            base.model.model = quantize_dynamic(base.model.model, {nn.Linear}, dtype=torch.qint8)
    return base


@pytest.mark.parametrize("kind", ["bfloat16", *INT8])
def test_a_base_in_another_precision_is_searched_trained_on_and_evaluated(kind, model_folder):
    base = in_precision(str(model_folder(num_layers=6)), kind)
    records = drllm.search_paths(base, "builtin_facts", limit=8, num_simulations=6)
    targets = drllm.supervise(records, target="least_kl")
    routers = drllm.train(base, targets, num_epochs=1, num_windows=2, router_width=4)
    few = {"num_texts": 2, "baselines": "none", "limit": 8}
    [result] = drllm.evaluate(base, "builtin_facts", routers=routers, **few)
    assert result.num_questions == 8


@pytest.mark.parametrize("kind", INT8)
def test_routers_and_paths_of_the_same_base_are_taken_with_a_warning_those_of_others_are_not(
    kind, model_folder, tmp_path, caplog
):
    folder = str(model_folder(num_layers=6))
    full, int8 = load(folder, device="cpu"), in_precision(folder, kind)
    known = f"quantised-{fingerprint(full.model).partition('-')[2]}-"
    assert fingerprint(int8.model).startswith(known)
    records = drllm.search_paths(full, "builtin_facts", limit=8, num_simulations=6)
    targets = drllm.supervise(records, target="least_kl")
    trained = {"num_epochs": 1, "num_windows": 2, "router_width": 4}
    drllm.train(full, targets, output_dir=tmp_path, **trained)
    assert "quantised" not in caplog.text
    routed = drllm.attach(int8.model, str(tmp_path), tokenizer=int8.tokenizer)
    assert "one of two base models is quantised" in caplog.text
    routed.detach()
    other = in_precision(str(model_folder(num_layers=6, seed=1)), kind)
    with pytest.raises(CheckpointError, match="base_fingerprint"):
        drllm.attach(other.model, str(tmp_path))


@pytest.mark.parametrize("kind", INT8)
def test_a_quantised_base_is_not_shortened(kind, model_folder):
    base = in_precision(str(model_folder(num_layers=6)), kind)
    with pytest.raises(ArchitectureError, match="then quantise the result"):
        drllm.shorten(base.model, [2])


@pytest.mark.parametrize("kind", INT8)
def test_a_quantised_base_is_not_shrunk_into_a_folder_that_could_never_be_written(
    kind, model_folder, tmp_path
):
    base = in_precision(str(model_folder(num_layers=6)), kind)
    with pytest.raises(ArchitectureError, match="then quantise the result"):
        drllm.shrink(base, "builtin_facts", output_dir=tmp_path / "smaller")
    assert not list((tmp_path / "smaller.work").glob("*.json"))


@pytest.mark.thorough
@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 6), ("torchao", 6)])
def test_few_verdicts_of_a_real_model_change_with_its_precision(kind, most, smollm2):
    task = get_task("builtin_facts")
    prompts = [task.prompt(each, "loglikelihood") for each in task.examples("search")[:16]]
    L = smollm2.num_layers
    paths = [full_decisions(L)]
    paths += [tuple(0 if at in (n, n + 1) else 1 for at in range(L)) for n in range(8, 20, 2)]
    pairs = [(place, path) for place in range(len(prompts)) for path in paths]
    rewards = []
    for base in (smollm2, in_precision("smollm2-135m", kind)):
        routed = RoutedModel(base.model, tokenizer=base.tokenizer)
        rewards.append([each.reward for each in Evaluator(routed, prompts, 1.0).evaluate(pairs)])
        routed.detach()
    changed = sum(one != other for one, other in zip(*rewards, strict=True))
    assert changed <= most, f"{changed} of {len(pairs)}"
