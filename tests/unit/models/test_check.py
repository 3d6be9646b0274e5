import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from drllm.errors import ArchitectureError
from drllm.models import check as checking
from drllm.models.check import (
    check_family,
    check_model,
    make_plans,
    make_tiny,
    replace_layers,
)
from drllm.models.families import COMMON, FAMILIES, IN_SUITE, REFUSED
from drllm.models.routing.injection import LayerCall

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = (REPOSITORY / "docs" / "architectures.md").read_text(encoding="utf-8")
DOCUMENTED = dict(re.findall(r"^ (\w+) +\w+ +(exact|refused|broken|absent|differs) ", PAGE, re.M))
DOCUMENTED_REFITS = dict(re.findall(r"^ (\w+) +\w+ +\w+ +\S+ +\S+ +(yes|no|–)(?= |$)", PAGE, re.M))
DOCUMENTED_VERSION = re.search(r"with transformers ([\d.]+)", PAGE)[1]


@pytest.fixture(scope="module")
def findings():
    return {family: check_family(family) for family in FAMILIES}


@pytest.mark.thorough
def test_no_family_is_routed_wrongly_and_those_of_the_suite_are_exact(findings):
    assert [family for family, found in findings.items() if found.status == "differs"] == []
    assert dict.fromkeys(IN_SUITE, "exact") == {name: findings[name].status for name in IN_SUITE}


@pytest.mark.thorough
def test_what_the_page_says_is_so(findings):
    assert list(FAMILIES) == list(DOCUMENTED)
    refused = [family for family, status in DOCUMENTED.items() if status == "refused"]
    assert sorted(refused) == sorted(family for families in REFUSED.values() for family in families)
    assert {findings[family].status for family in refused} - {"absent"} == {"refused"}
    if version("transformers") == DOCUMENTED_VERSION:
        assert {family: found.status for family, found in findings.items()} == DOCUMENTED
        words = {True: "yes", False: "no", None: "–"}
        refits = {family: words[found.can_be_refitted] for family, found in findings.items()}
        assert refits == DOCUMENTED_REFITS


@pytest.mark.thorough
def test_a_refusal_gives_its_reason_in_one_line_and_what_was_compared_a_difference(findings):
    for found in findings.values():
        assert (found.greatest_difference is not None) == (found.status in ("exact", "broken"))
        if found.status == "refused":
            assert found.reason
            assert "\n" not in found.reason


def test_a_model_with_packed_experts_is_routed_but_not_refitted():
    found = check_family("mixtral")
    assert found.status == "exact"
    assert found.can_be_refitted is False
    assert "packed" in found.refit_obstacle


def test_a_family_that_transformers_lacks_is_absent(monkeypatch):
    monkeypatch.setattr(checking, "CONFIG_MAPPING", {})
    found = check_family("llama")
    assert (found.status, found.class_name) == ("absent", "")
    assert version("transformers") in found.reason


def test_a_checked_model_is_left_as_it_was(tiny_model):
    model = tiny_model("gemma3_text")
    ids = torch.tensor([[5, 6, 7]])
    logits, config = model(ids).logits, model.config.to_dict()
    parts = [(name, id(part), set(part.__dict__)) for name, part in model.named_modules()]
    assert check_model(model).status == "exact"
    assert config == model.config.to_dict()
    assert parts == [(name, id(part), set(part.__dict__)) for name, part in model.named_modules()]
    assert torch.equal(logits, model(ids).logits)


def test_the_list_of_layers_is_put_back_after_an_error(tiny_model):
    model = tiny_model("gemma3_text")
    layers, kinds = model.model.layers, list(model.config.layer_types)

    def fail_inside():
        with replace_layers(model, [2, 0, 1, 0, 1, 1]):
            assert len(model.model.layers) == 5
            assert [kinds[i] for i in (0, 0, 2, 4, 5)] == model.config.layer_types
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert model.model.layers is layers
    assert (kinds, COMMON["num_hidden_layers"]) == (
        model.config.layer_types,
        model.config.num_hidden_layers,
    )


class Deaf(LlamaForCausalLM):
    """A model that doesn't hear which tokens are padding."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_model_that_is_wrong_by_itself_is_called_broken(tiny_model):
    model = tiny_model("llama")
    deaf = Deaf(model.config).eval().requires_grad_(False)
    deaf.load_state_dict(model.state_dict())
    found = check_model(deaf)
    assert found.status == "broken"
    assert version("transformers") in found.reason


def test_one_wrong_row_is_enough_to_differ(tiny_model, monkeypatch):
    original = LayerCall.run

    def run(self, hidden, rows=None, **options):
        output = original(self, hidden, rows, **options)
        return output if rows is None else output.roll(1, dims=0)

    monkeypatch.setattr(LayerCall, "run", run)
    found = check_model(tiny_model("llama"))
    assert found.status == "differs"
    assert "report" in found.reason


@pytest.mark.parametrize("num_layers", [1, 2, 3, 30])
def test_the_plans_can_be_run_by_a_model_of_any_depth(num_layers):
    plans = make_plans(num_layers)
    assert all(len(plan) == num_layers and sum(plan) > 0 for plan in plans)
    assert all(0 <= value <= 2 for plan in plans for value in plan)


def test_the_same_seed_and_fields_make_the_same_model_whatever_the_global_generator():
    before = torch.get_rng_state()
    first, again, other = make_tiny("qwen2"), make_tiny("qwen2"), make_tiny("qwen2", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(first(ids).logits, again(ids).logits)
    assert not torch.equal(first(ids).logits, other(ids).logits)
    model = make_tiny("llama", num_hidden_layers=3, attention="eager")
    assert (len(model.model.layers), model.config._attn_implementation) == (3, "eager")


def test_an_unknown_family_and_one_that_transformers_lacks_cannot_be_made(monkeypatch):
    with pytest.raises(ArchitectureError, match="did you mean 'mistral'"):
        make_tiny("mistrall")
    monkeypatch.setitem(FAMILIES, "no_such_family", {})
    with pytest.raises(ArchitectureError, match="has no no_such_family"):
        make_tiny("no_such_family")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_small_frozen_and_as_deep_as_the_others(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {family}")
    model = make_tiny(family)
    assert COMMON["num_hidden_layers"] == model.config.num_hidden_layers
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert not model.training
    assert {(torch.float32, False)} == {(p.dtype, p.requires_grad) for p in model.parameters()}
