"""Routing put on a model and taken off again, however often and by whomever; the model's manners.

What a routed model answers itself, and what it asks its model.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model

import drllm
from drllm.errors import CheckpointError, RoutingError
from drllm.model.load import BaseModel
from drllm.models.routed_model import unrouted
from drllm.models.routers.checkpoint import complete_config
from drllm.models.routing.policies import RouterPolicy
from drllm.paths import StaticPath
from slow_way import tiny_routers

IDS = torch.tensor([[3, 4, 5, 6, 7]])
PLAN = [0, 1, 2, 1, 0, 2]


def routers_of(model):
    routers = tiny_routers()
    routers.config = complete_config(routers.config, model)
    return routers


def state_of(model):
    """What could stay behind on a model: its own attributes, its layers' and all hooks."""
    modules = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return modules, hooks, list(model.state_dict())


def test_a_notebook_cell_that_attaches_can_be_run_twice(tiny_llama):
    model = tiny_llama()
    model.name_or_path = "./gone"  # its tokenizer, which nothing here needs, can't be had
    before, expected = state_of(model), model(IDS).logits
    first = drllm.attach(model, routers_of(model))
    second = drllm.attach(first)
    assert torch.equal(second(IDS).logits, expected)
    with second.fixed(PLAN):
        second(IDS)
    assert second.last_route.tolist() == [PLAN]
    for use in (first.detach, lambda: first(IDS), lambda: first.generate(IDS)):
        with pytest.raises(RoutingError, match=r"taken off the model.*another attach"):
            use()
    assert drllm.detach(model) is model
    assert state_of(model) == before


def test_a_model_whose_handle_was_deleted_is_detached_and_attached_again(tiny_llama):
    model = tiny_llama()
    before = state_of(model)
    routed = drllm.attach(model, routers_of(model))
    del routed
    assert "generate" in model.__dict__
    assert state_of(drllm.detach(model)) == before
    assert state_of(drllm.detach(drllm.attach(model))) == before
    assert drllm.detach(model) is model, "one that isn't routed stays as it is"


def test_a_copy_of_a_routed_model_is_detached_without_the_first(tiny_llama):
    routed = drllm.attach(tiny_llama())
    twin = copy.deepcopy(routed.model)
    before = state_of(tiny_llama())
    assert state_of(drllm.detach(twin)) == before
    with routed.fixed(PLAN):
        routed(IDS)
    assert routed.last_route.tolist() == [PLAN]


def test_an_attach_that_is_refused_leaves_what_was_attached(tiny_llama):
    model = tiny_llama()
    routed = drllm.attach(model, routers_of(model))
    expected, state = routed(IDS).logits, state_of(model)
    with pytest.raises(CheckpointError, match="these routers were trained for"):
        drllm.attach(model, routers_of(tiny_llama(seed=1)))
    assert torch.equal(routed(IDS).logits, expected)
    assert state_of(model) == state


def test_routing_that_other_code_took_off_in_part_is_detached(tiny_llama):
    model = tiny_llama()
    before = state_of(model)
    drllm.attach(model)
    del model.model.layers[2].forward
    assert state_of(drllm.detach(model)) == before


def test_routers_are_attached_from_a_folder(tiny_llama, tmp_path):
    model = tiny_llama()
    routers = routers_of(model)
    routed = drllm.attach(model, routers)
    expected = routed(IDS).logits
    routed.save_pretrained(tmp_path)
    assert torch.equal(drllm.attach(model, tmp_path)(IDS).logits, expected)


def test_inside_disabled_the_model_is_the_base_model(tiny_llama):
    model = tiny_llama(attn_implementation="eager")
    expected, options = model(IDS, use_cache=True), {"max_new_tokens": 6, "do_sample": False}
    answer = model.generate(IDS, **options)
    try:
        model.generate(IDS, prefill_chunk_size=2, **options)
        chunks = {"prefill_chunk_size": 2}
    except ValueError:  # transformers 5.0 reads prompts in chunks only with a cache that is given
        chunks = {}
    routed = drllm.attach(model, policy=drllm.FixedPolicy(PLAN, 6))
    skipping = routed.generate(IDS, **options)
    with routed.disabled():
        found = routed(IDS, use_cache=True, output_attentions=True)
        assert torch.equal(routed.generate(IDS, **chunks, **options), answer)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.attentions) == 6
    assert {type(layer) for layer in found.past_key_values.layers} == {
        type(layer) for layer in expected.past_key_values.layers
    }
    assert torch.equal(routed.generate(IDS, **options), skipping)
    assert routed.last_route.tolist() == [PLAN]


def test_a_plan_inside_disabled_is_followed(tiny_llama):
    routed = drllm.attach(tiny_llama())
    with routed.fixed(PLAN):
        expected = routed(IDS).logits
    with routed.disabled():
        base = routed(IDS).logits
        with routed.fixed(PLAN):
            assert torch.equal(routed(IDS).logits, expected)
        assert torch.equal(routed(IDS).logits, base)
    assert routed.last_route.tolist() == [PLAN]


@pytest.mark.filterwarnings(  # transformers renames it; PEFT still asks by the old name
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_routed_model_answers_like_the_model_it_wraps(tiny_llama, with_adapter):
    model = tiny_llama()
    if with_adapter:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    routed = drllm.attach(model, routers_of(model))
    assert routed.config is model.config
    assert (routed.device, routed.dtype) == (model.device, torch.float32)
    assert list(routed.parameters()) == list(model.parameters())
    assert routed.train() is routed
    assert model.training
    assert routed.eval() is routed
    assert not model.training
    assert routed.to(torch.float64) is routed
    assert (routed.dtype, routed.routers.hidden_weight.dtype) == (torch.float64, torch.float32)
    assert routed(IDS, labels=IDS).loss.ndim == 0
    with pytest.raises(AttributeError, match="has no attribute 'routers_'"):
        _ = routed.routers_
    twin = copy.deepcopy(routed)
    assert torch.equal(twin(IDS).logits, routed(IDS).logits)
    assert twin.model is not routed.model


def test_a_thread_reads_the_route_of_its_own_last_prompt(tiny_llama):
    routed = drllm.attach(tiny_llama())

    def run(plan):
        if plan:
            with routed.fixed(plan):
                routed(IDS)
        return routed.last_route.tolist()

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert one.submit(run, PLAN).result() == [PLAN]
        assert run(None) == [PLAN], "where no prompt has passed: that of any thread"
        assert other.submit(run, PLAN[::-1]).result() == [PLAN[::-1]]
        assert one.submit(run, None).result() == [PLAN]


def test_a_thread_that_ran_no_prompt_reads_the_last_route_of_any(tiny_llama):
    """Also if the system has given it the number of a thread that ran one."""
    routed = drllm.attach(tiny_llama())

    def run(plan):
        with routed.fixed(plan):
            routed(IDS)

    def in_a_thread(function, *args):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *args).result()

    in_a_thread(run, [1, 0, 1, 1, 1, 1])
    run(PLAN)
    assert in_a_thread(lambda: routed.last_route.tolist()) == [PLAN]


def test_what_was_attached_to_a_loaded_model_is_detached_from_it(tiny_base):
    base = tiny_base()
    before = state_of(base.model)
    drllm.attach(base)
    assert drllm.detach(base) is base.model
    assert state_of(base.model) == before


def test_the_routers_follow_the_model_to_another_device(tiny_llama):
    routed = drllm.attach(tiny_llama(), tiny_routers())
    assert routed.to("meta").routers.hidden_weight.is_meta


CHANGES = {
    "to": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "cpu": lambda model: model.cpu(),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "train": lambda model: model.train(),
    "eval": lambda model: model.train().eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_method_that_changes_the_model_returns_the_routed_model_and_keeps_its_routers(
    tiny_llama, name
):
    change = CHANGES[name]
    routed = drllm.attach(tiny_llama(), tiny_routers())
    plain = tiny_llama()
    assert change(routed) is routed
    change(plain)
    assert routed.model.training == plain.training
    for routed_weight, weight in zip(routed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(routed_weight, weight)
        assert routed_weight.requires_grad == weight.requires_grad
    assert routed.routers.hidden_weight.dtype == torch.float32
    assert routed.routers.hidden_weight.device == plain.device


def test_cuda_returns_the_routed_model_and_moves_the_routers(tiny_llama, monkeypatch):
    routed = drllm.attach(tiny_llama(), tiny_routers())
    monkeypatch.setattr(routed.model, "cuda", routed.model.to)  # this machine may have no GPU
    assert routed.cuda("meta") is routed
    assert routed.model.device.type == "meta"
    assert routed.routers.hidden_weight.is_meta


def show(routed):
    """The repr of a routed model without the part that is the same in all tests."""
    return repr(routed).replace("LlamaForCausalLM, 6 layers, float32 on cpu, ", "")


def test_the_repr_shows_the_model_and_the_policy(tiny_llama):
    model = tiny_llama()
    routed = drllm.attach(model)
    assert repr(routed) == (
        "RoutedModel(LlamaForCausalLM, 6 layers, float32 on cpu, runs every layer once)"
    )
    model.name_or_path = "owner/name"
    assert repr(routed.bfloat16()) == (
        "RoutedModel(LlamaForCausalLM 'owner/name', 6 layers, bfloat16 on cpu, "
        "runs every layer once)"
    )


def test_the_repr_shows_what_decides_now(tiny_llama):
    routers = tiny_routers()
    routed = drllm.attach(tiny_llama(), routers)
    assert show(routed) == f"RoutedModel(routers with {routers.config.num_windows} windows)"
    with routed.fixed(StaticPath([0, 2, 1, 3])):
        path = "skips layers 4 and 5, runs the layers in another order"
        assert show(routed) == f"RoutedModel({path})"
    with routed.fixed([0, 1, 2, 1, 1, 1]):
        assert show(routed) == "RoutedModel(skips layer 0, repeats layer 2)"
    with routed.fixed([PLAN, PLAN]):
        assert show(routed) == "RoutedModel(decisions for 2 prompts)"
    with routed.using(RouterPolicy(routers, depth_bias=0.5)):
        assert show(routed).endswith("windows, depth bias 0.5)")
    with routed.using(RouterPolicy(routers, router_penalty=-0.5)):
        assert show(routed).endswith("windows, router penalty -0.5)")
    drllm.attach(routed)
    assert show(routed) == "RoutedModel(routing taken off)"


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_at_once_and_comes_back(tiny_llama, name):
    model = tiny_llama()
    if not hasattr(model, name):
        pytest.skip(f"this transformers has no {name}")
    routed = drllm.attach(model)
    with pytest.raises(RoutingError, match="continuous batching") as caught:
        getattr(routed, name)([[3, 4, 5]])
    assert "\n" not in str(caught.value)
    routed.detach()
    assert name not in vars(model)


def test_after_a_stage_the_model_is_in_the_mode_that_it_was_in(tiny_llama, tiny_tokenizer):
    model = tiny_llama().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    with unrouted(model, tiny_tokenizer) as base:
        assert not any(module.training for module in base.model.modules())
    assert [module.training for module in model.modules()] == modes
    frozen = BaseModel(model, tiny_tokenizer, "tiny")
    with unrouted(frozen):
        assert not model.training
    assert model.training
