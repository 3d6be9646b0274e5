"""Refitted paths against the plain model with layers dropped and weights replaced."""

import copy
import pickle
import threading

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

from drllm.errors import RoutingError
from drllm.model.load import BaseModel
from drllm.model.prompts import pad_left
from drllm.models.export import export_path
from drllm.models.routed_model import RoutedModel, attach
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.lora import LoraWeights
from drllm.models.scoring.score import Request, score
from drllm.paths import StaticPath
from drllm.records.static_paths import load_path
from healed_folder import written_refit
from slow_way import (
    LOGIT_TOLERANCE,
    ListedModel,
    Meeting,
    answers,
    assert_sums,
    biased_model,
    largest_list,
    merged,
    needs_tracing,
    tiny_adapter,
    tiny_refit,
)

FAMILIES = ("llama", "gpt2", "gpt_neox", "phi", "gemma3_text")
"""GPT-2 has transposed maps with a bias; GPT-NeoX and Phi run attention and MLP in parallel."""
PATH = StaticPath([0, 1, 3, 4], "a")  # layers 1 and 4 come before gaps
OTHER = StaticPath([0, 1, 4, 5], "b")
PLAIN = PATH.with_adapter("")
END = 2
LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6}
IDS = torch.tensor([[5, 6, 7]])


def refit_of(routed, name):
    return tiny_refit(routed, [1, 4], seed=0) if name == "a" else tiny_refit(routed, [1], seed=1)


def with_refits(model):
    """Route a model with two refits: one of layers 1 and 4, another of layer 1."""
    routed = RoutedModel(model)
    for name in ("a", "b"):
        routed.injection.add_adapter(name, refit=refit_of(routed, name))
    return routed


def listed(model, path, **options):
    """Return the plain model of a path, its new weights copied in; `model` isn't routed."""
    refit = {}
    if path.adapter:
        refit = with_refits(copy.deepcopy(model)).injection.refits.weights(path.adapter)
    return ListedModel(model, path=path.layers, refit=refit, **options)


@pytest.fixture
def routed(tiny_llama):
    return with_refits(tiny_llama())


def along(routed, path, ids=IDS):
    with routed.fixed(path), torch.no_grad():
        return routed(ids, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_refitted_path_is_the_plain_model_with_the_new_weights(name, prompts):
    model = biased_model(name, {})
    slow = listed(model, PATH)
    expected = [slow.greedy(prompt, 6, never=END) for prompt in prompts]
    routed = with_refits(model)
    with routed.fixed(PATH):
        assert answers(routed, prompts, **LENGTHS) == expected
        assert answers(routed, prompts, **LENGTHS, use_cache=False) == expected
        assert answers(routed, prompts, **LENGTHS, cache_implementation="static") == expected
    logits = along(routed, PATH, torch.tensor(prompts[:1]))[0]
    torch.testing.assert_close(logits, slow.logits(prompts[0]), atol=LOGIT_TOLERANCE, rtol=0)


def test_the_down_projection_of_a_shared_expert_can_be_refitted(prompts, tiny_tokenizer, tmp_path):
    """Qwen2-MoE runs it on all tokens as one long row, so it can't have LoRA."""
    name = "1.mlp.shared_expert.down_proj"
    model = biased_model("qwen2_moe", {})
    base = BaseModel(model, tiny_tokenizer, "tiny")
    routed = RoutedModel(model)
    assert name not in routed.injection.linear_maps
    weight = routed.injection.refittable_modules[name].weight
    generator = torch.Generator().manual_seed(0)
    refit = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator)}
    routed.detach()
    path = [0, 1, 3, 4, 5]
    slow = ListedModel(model, path=path, refit=refit)
    record = written_refit(tmp_path / "healed", model, base.identity, path=path, refit=refit)
    assert record.refit.modules == (name,)
    healed = load_path(tmp_path / "healed")
    export_path(base, healed, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    routed = attach(base)
    with routed.fixed(healed):
        expected = [slow.greedy(prompt, 6, never=END) for prompt in prompts]
        assert answers(routed, prompts, **LENGTHS) == expected
        logits = routed(IDS, use_cache=False).logits
    for other in (slow.logits(IDS[0]), exported(IDS, use_cache=False).logits[0]):
        torch.testing.assert_close(logits[0], other, atol=LOGIT_TOLERANCE, rtol=0)


WAYS = {
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "greedy": {},
    "without a cache": {"use_cache": False},
}


def generate(model, prompts, **options):
    ids, mask = pad_left(prompts, "cpu")
    options = {"do_sample": False, **LENGTHS, **options}
    torch.manual_seed(0)
    return model.generate(input_ids=ids, attention_mask=mask, **options).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_attached_and_exported_say_what_the_plain_model_says(
    name, prompts, tiny_tokenizer, tmp_path
):
    base = BaseModel(biased_model(name, {}), tiny_tokenizer, "tiny")
    record = written_refit(tmp_path / "healed", base.model, base.identity)
    healed = load_path(tmp_path / "healed")
    export_path(base, healed, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    routed = RoutedModel(base.model)
    refit = tiny_refit(routed, [1, 4])
    routed.detach()
    plain = ListedModel(base.model, path=PATH.layers, refit=refit, cached=True).model
    routed = attach(base)
    with routed.fixed(healed):
        for way in WAYS.values():
            expected = generate(plain, prompts, **way)
            assert generate(routed, prompts, **way) == expected
            assert generate(exported, prompts, **way) == expected
        logits = routed(IDS, use_cache=False).logits
    assert record.adapter in routed.injection.adapters.names
    assert torch.equal(exported(IDS, use_cache=False).logits, logits)
    slow = plain(IDS, use_cache=False).logits
    torch.testing.assert_close(slow, logits, atol=LOGIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("draft", ["prompt lookup", "a draft model"])
def test_drafts_are_accepted_as_the_path_alone_says(routed, tiny_llama, draft):
    slow = listed(tiny_llama(), PATH)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    ways = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "a draft model": {"assistant_model": tiny_llama(seed=1)},
    }
    with routed.fixed(PATH):
        [answer] = answers(routed, [prompt], max_new_tokens=6, suppress_tokens=[END], **ways[draft])
    assert answer == slow.greedy(prompt, 6, never=END)


def test_a_continuation_keeps_the_weights_of_the_path_that_its_cache_has_pinned(routed, tiny_llama):
    slow = listed(tiny_llama(), PATH)
    with routed.fixed(PATH), torch.no_grad():
        cache = routed(IDS, use_cache=True).past_key_values
    name = cache_argument(routed.model)
    with torch.no_grad(), routed.fixed([1] * 6):
        logits = routed(torch.tensor([[9]]), **{name: cache}).logits[0]
    expected = slow.logits([*IDS[0].tolist(), 9])[-1:]
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_many_prompts_are_answered_along_a_refitted_path(routed, tiny_tokenizer, tiny_llama):
    routed.tokenizer = tiny_tokenizer
    texts = ["a", "bcd", "ef", "gh", "ijk", "lmno"]
    slow = listed(tiny_llama(), PATH)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "chat": False, "batch_size": 4}
    with routed.fixed(PATH):
        results = generate_many(routed, texts, **options)
    for text, answer in zip(texts, results, strict=True):
        assert list(answer.tokens) == slow.greedy(tiny_tokenizer.encode(text), 4, never=END)
        assert answer.route == (1, 1, 0, 1, 1, 0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_refitted_paths_are_scored_as_each_path_alone(name, tiny_model):
    model = tiny_model(name)
    routed = with_refits(copy.deepcopy(model))
    shared = [5, 9, 30, 7, 8, 11, 12, 13, 14, 15]
    requests = [
        Request([*shared, 7], [[4, 8], [61]]),
        Request([*shared, 11, 3], [[2, 6, 1]]),
    ]
    paths = [PATH, OTHER, PLAIN, (1, 0, 1, 1, 1, 0)]
    full = listed(model, StaticPath(range(6)))
    for path, outcomes in zip(paths, score(routed, requests, paths, kl=True), strict=True):
        plan = path if isinstance(path, StaticPath) else StaticPath([0, 2, 3, 4])
        slow = listed(model, plan)
        for request, outcome in zip(requests, outcomes, strict=True):
            assert_sums([slow.sums(request.context, request.continuations)], [outcome])
            ours = slow.logits(request.context).log_softmax(-1)
            theirs = full.logits(request.context).log_softmax(-1)
            kl = float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())
            assert outcome.kl == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_of_a_refitted_path_the_model_keeps_its_bits(name, prompts):
    model = biased_model(name, {})
    ids = torch.tensor(prompts[:1])
    plain = RoutedModel(model)
    decisions = [1, 0, 2, 1, 0, 1]
    expected = [model(ids).logits, along(plain, PLAIN, ids), along(plain, decisions, ids)]
    plain.detach()
    routed = with_refits(model)
    for _ in range(2):
        assert torch.equal(model(ids).logits, expected[0])
        assert torch.equal(along(routed, PLAIN, ids), expected[1])
        assert torch.equal(along(routed, decisions, ids), expected[2])
        with routed.disabled():
            assert torch.equal(routed(ids).logits, expected[0])
        assert not torch.equal(along(routed, PATH, ids), expected[1])
    before = routed.injection.refits.handles[0]
    states = torch.randn(2, 3, before.module.weight.shape[1 if name != "gpt2" else 0])
    assert torch.equal(before.module(states), before.original()(states))  # outside of a pass


def test_three_threads_run_two_refitted_paths_and_the_base_at_once(routed):
    plans = [PATH, OTHER, StaticPath(range(6))]
    expected = [along(routed, plan) for plan in plans]
    meeting = threading.Barrier(len(plans))

    def meet(*_args):
        meeting.wait(30)

    # All threads are inside layer 1, which both refits change, before any of them goes on.
    handle = routed.injection.layers[1].register_forward_pre_hook(meet)
    results = [[] for _ in plans]

    def run(number):
        for _ in range(3):
            results[number].append(along(routed, plans[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for number, logits in enumerate(expected):
        assert len(results[number]) == 3
        assert all(torch.equal(result, logits) for result in results[number])


def test_detaching_restores_the_model_and_attaching_works_again(tiny_llama):
    model = tiny_llama().requires_grad_(True)
    keys = list(model.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    expected = model(IDS).logits
    routed = with_refits(model)
    logits = along(routed, PATH)
    assert list(model.state_dict()) == keys
    routed.detach()
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(model(IDS).logits, expected)
    routed.injection.install()
    assert torch.equal(along(routed, PATH), logits)
    second = attach(model)
    assert second.injection.adapters.names == ()
    assert torch.equal(model(IDS).logits, expected)
    second.detach()
    assert torch.equal(along(with_refits(model), PATH), logits)


def test_an_override_over_ours_is_not_lost_silently(routed):
    module = routed.injection.layers[1].mlp.down_proj
    ours = module.forward
    module.forward = lambda states: ours(states)
    with pytest.raises(RoutingError, match=r"module 1\.mlp\.down_proj was overridden again"):
        routed.detach()
    module.forward = ours
    routed.detach()


def test_copies_and_pickles_run_the_refit_too(routed):
    expected = along(routed, PATH)
    twin = copy.deepcopy(routed)
    assert twin.injection.refits is not routed.injection.refits
    assert torch.equal(along(twin, PATH), expected)
    model = pickle.loads(pickle.dumps(routed.model))
    assert torch.equal(model(IDS).logits, routed(IDS).logits)
    assert torch.equal(along(pickle.loads(pickle.dumps(routed)), PATH), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_or_converting_the_model_takes_the_refit_along(tiny_llama, dtype):
    routed = with_refits(tiny_llama())
    routed.to(dtype)
    with torch.inference_mode():
        first = routed.build_policy(PATH)
        with routed.using(first):
            routed(IDS)
    twin = RoutedModel(tiny_llama().to(dtype))
    refit = refit_of(RoutedModel(tiny_llama()), "a")
    twin.injection.add_adapter("a", refit={name: each.to(dtype) for name, each in refit.items()})
    assert torch.equal(along(routed, PATH), along(twin, PATH))
    weights = routed.injection.refits.weights("a").values()
    assert {weight.dtype for weight in weights} == {dtype}
    assert not any(weight.is_inference() for weight in weights)


def test_new_weights_that_need_gradients_get_them(routed, tiny_llama):
    refit = refit_of(routed, "a")
    for weight in refit.values():
        weight.requires_grad_()
    routed.injection.add_adapter("c", refit=refit)
    with routed.fixed(PATH.with_adapter("c")):
        routed(IDS, use_cache=False).logits.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in refit.values())


@needs_tracing
@pytest.mark.thorough
def test_a_model_with_refits_compiles_to_one_graph_while_none_is_active(routed):
    torch._dynamo.reset()
    compiled = torch.compile(routed.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, routed(IDS).logits)


@pytest.mark.thorough
def test_a_compiled_model_runs_the_refit_too(routed):
    torch._dynamo.reset()
    compiled = torch.compile(routed.model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, routed(IDS).logits)
    for path in (PATH, OTHER, PLAIN):
        with routed.fixed(path), torch.no_grad():
            expected = routed(IDS, use_cache=False).logits
            assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, routed(IDS).logits)


def with_both(model):
    """Route a model with a refit and LoRA under one name, and with LoRA on all maps as "l"."""
    routed = RoutedModel(model)
    refit = refit_of(routed, "a")
    lora = tiny_adapter(routed, PATH.layers)
    for name in refit:
        del lora.maps[name]
    routed.injection.add_adapter("both", lora, refit)
    routed.injection.add_adapter("l", tiny_adapter(routed, PATH.layers, seed=1))
    routed.injection.add_adapter("r", refit=refit)
    return routed


BOTH = PATH.with_adapter("both")
LORA = PATH.with_adapter("l")
REFIT = PATH.with_adapter("r")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_a_refit_runs_beside_lora_on_the_other_maps(name, prompts):
    model = biased_model(name, {})
    twin = with_both(copy.deepcopy(model)).injection.adapters
    expected = {}
    for path in (BOTH, LORA, REFIT):
        weights = twin.weights(path.adapter)
        slow = ListedModel(model, path=path.layers, adapter=weights.lora, refit=weights.refit)
        expected[path] = [slow.greedy(prompt, 6, never=END) for prompt in prompts]
    expected[PLAIN] = [listed(model, PLAIN).greedy(prompt, 6, never=END) for prompt in prompts]
    before = model(IDS).logits
    lora = twin.weights("l").lora
    stack, layers_name = largest_list(model)
    plain_layers = copy.deepcopy(getattr(stack, layers_name))
    routed = with_both(model)
    for path, texts in expected.items():
        with routed.fixed(path):
            assert answers(routed, prompts, **LENGTHS) == texts
        assert torch.equal(model(IDS).logits, before)
    # PEFT merges into copies of the maps, also of those that have a refit of another adapter.
    for key, merged_weight in routed.injection.lora.merged_weights("l").items():
        layer, _, place = key.partition(".")
        module = merged(plain_layers[int(layer)], int(layer), lora).get_submodule(place)
        torch.testing.assert_close(merged_weight, module.weight.data)
    routed.detach()
    assert torch.equal(model(IDS).logits, before)


def test_a_refitted_map_gets_no_new_lora(tiny_llama):
    routed = with_refits(tiny_llama())
    injection = routed.injection
    injection.create_lora("a", 4, 4.0, [1, 3, 4], seed=0)
    weights = injection.adapters.weights("a")
    assert weights.refit.keys() == {"1.mlp.down_proj", "4.mlp.down_proj"}
    in_layers = {name for name in injection.linear_maps if name[0] in "134"}
    assert weights.lora.maps.keys() == in_layers - weights.refit.keys()
    assert injection.adapters.names == ("a", "b")
    injection.adapters.drop("a")
    assert injection.lora.names == ()
    assert injection.adapters.names == ("b",)


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [(REFIT, LORA, True), (BOTH, REFIT, True), (REFIT, PLAIN, False)],
)
def test_with_lora_in_the_model_another_thread_is_refused_as_before(
    tiny_llama, first, second, is_refused
):
    routed = with_both(tiny_llama())
    expected = along(routed, first), along(routed, second)
    meeting = Meeting(routed.injection.layers[0])
    results = []
    thread = threading.Thread(target=lambda: results.append(along(routed, first)))
    thread.start()
    assert meeting.has_begun.wait(30)
    try:
        if is_refused:
            with pytest.raises(RoutingError, match="another thread runs this model"):
                along(routed, second)
        else:
            assert torch.equal(along(routed, second), expected[1])
    finally:
        meeting.may_go_on.set()
        thread.join()
    assert torch.equal(results[0], expected[0])


def weight(*shape):
    return torch.zeros(shape)


BAD = {
    "'a', which is in the model already": ("a", None, {"1.mlp.down_proj": weight(32, 64)}),
    "give it a name": ("", None, {"1.mlp.down_proj": weight(32, 64)}),
    "has no weights": ("c", None, {}),
    r"'1\.mlp\.down'; did you mean": ("c", None, {"1.mlp.down": weight(32, 64)}),
    r"shape \[32, 64\], the refit one of \[64, 32\]": (
        "c",
        None,
        {"1.mlp.down_proj": weight(64, 32)},
    ),
    "a refitted map can't have LoRA": (
        "c",
        LoraWeights(2, 2.0, {"1.mlp.down_proj": (weight(2, 64), weight(32, 2))}),
        {"1.mlp.down_proj": weight(32, 64)},
    ),
    r"A \[2, 31\]": (
        "c",
        LoraWeights(2, 2.0, {"1.mlp.up_proj": (weight(2, 31), weight(64, 2))}),
        {"1.mlp.down_proj": weight(32, 64)},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_refit_that_does_not_fit_is_refused_and_leaves_nothing_behind(routed, message):
    expected = along(routed, PATH)
    with pytest.raises(RoutingError, match=message) as caught:
        routed.injection.add_adapter(*BAD[message])
    assert "\n" not in str(caught.value)
    assert routed.injection.adapters.names == ("a", "b")
    assert torch.equal(along(routed, PATH), expected)


class Packed(torch.nn.Linear):
    """A linear map with arithmetic of its own."""

    def forward(self, states):
        return super().forward(states) / 100


def packed(model):
    model.model.layers[1].mlp.down_proj.__class__ = Packed


def overridden(model):
    module = model.model.layers[1].mlp.down_proj
    forward = module.forward
    module.forward = lambda states: forward(states) / 100


def offloaded(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (packed, "1.mlp.down_proj is quantised"),
        (overridden, "1.mlp.down_proj is quantised"),
        (offloaded, "the weight of 1.mlp.down_proj is offloaded"),
    ],
)
def test_maps_whose_weight_can_not_be_replaced_are_refused_in_one_line(tiny_llama, change, message):
    model = tiny_llama()
    refit = refit_of(RoutedModel(tiny_llama()), "a")
    change(model)
    routed = RoutedModel(model)
    with pytest.raises(RoutingError, match=message) as caught:
        routed.injection.add_adapter("a", refit=refit)
    assert "\n" not in str(caught.value)


def test_hooks_of_accelerate_that_only_move_tensors_are_no_hindrance(tiny_llama):
    expected = along(with_refits(tiny_llama()), PATH)
    model = tiny_llama()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(along(with_refits(model), PATH), expected)


def test_a_path_whose_refit_is_not_in_the_model_is_refused(routed):
    with pytest.raises(RoutingError, match=r"no adapter 'c' \(it has a, b\)"):
        routed.fixed(StaticPath([0, 1], "c"))
    policies = [routed.build_policy(path) for path in (PATH, OTHER)]
    for policy, name in zip(policies, "ab", strict=True):
        routed.injection.adapters.drop(name)
        with routed.using(policy), pytest.raises(RoutingError, match=f"no adapter '{name}'"):
            routed(IDS)
    assert torch.isfinite(routed(IDS).logits).all()
