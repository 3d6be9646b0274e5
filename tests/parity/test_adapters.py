"""Healed paths, whose adapter is PEFT's, against the plain model whose weights have it merged."""

import copy
import pickle
import threading

import accelerate
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from drllm.errors import RoutingError
from drllm.model.prompts import pad_left
from drllm.models.routed_model import RoutedModel, attach
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.lora import LoraWeights, read_map_sizes
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.prefix_cache import PrefixCache
from drllm.models.scoring.prefix_sharing import pack_rows
from drllm.models.scoring.score import Request
from drllm.paths import StaticPath, get_adapter, get_layers
from slow_way import (
    LOGIT_TOLERANCE,
    ListedModel,
    Meeting,
    answers,
    assert_sums,
    biased_model,
    tiny_adapter,
)

FAMILIES = ("llama", "qwen2", "gpt2", "phi", "gemma2", "gemma3_text", "mixtral", "falcon")
PATH = StaticPath([0, 2, 4, 5, 5], "a")
OTHER = StaticPath([0, 1, 3, 4, 5], "b")
PLAIN = PATH.with_adapter("")
END = 2
LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6}
IDS = torch.tensor([[5, 6, 7]])


def with_adapters(model):
    """Route a model with two adapters: one on layers 2 and 4 to 5, one on all but 0."""
    routed = RoutedModel(model)
    routed.injection.add_adapter("a", tiny_adapter(routed, [2, 4, 5], seed=0))
    routed.injection.add_adapter("b", tiny_adapter(routed, range(1, 6), seed=1))
    return routed


def listed(model, path):
    """Return the plain model of a path, its adapter merged; `model` isn't routed."""
    routed = with_adapters(copy.deepcopy(model))
    adapter = routed.injection.lora.weights(path.adapter) if path.adapter else None
    return ListedModel(model, path=path.layers, adapter=adapter)


@pytest.fixture
def routed(tiny_llama):
    return with_adapters(tiny_llama())


def along(routed, path, ids=IDS):
    with routed.fixed(path), torch.no_grad():
        return routed(ids, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_a_healed_path_is_the_plain_model_with_merged_weights(name, prompts):
    model = biased_model(name, {})
    slow = listed(model, PATH)
    expected = [slow.greedy(prompt, 6, never=END) for prompt in prompts]
    routed = with_adapters(model)
    with routed.fixed(PATH):
        assert answers(routed, prompts, **LENGTHS) == expected
        assert answers(routed, prompts, **LENGTHS, use_cache=False) == expected
    found = along(routed, PATH, torch.tensor(prompts[:1]))[0]
    torch.testing.assert_close(found, slow.logits(prompts[0]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_of_a_healed_path_the_model_keeps_its_bits(name, prompts):
    model = biased_model(name, {})
    ids = torch.tensor(prompts[:1])
    plain = RoutedModel(model)
    expected = model(ids).logits, along(plain, PLAIN, ids), along(plain, [1, 0, 2, 1, 0, 1], ids)
    states = torch.randn(1, 3, 32)
    maps = plain.injection.linear_maps
    wide = {key: module for key, module in maps.items() if read_map_sizes(module)[0] == 32}
    mapped = {key: module(states) for key, module in wide.items()}
    plain.detach()
    routed = with_adapters(model)
    for _ in range(2):
        assert torch.equal(model(ids).logits, expected[0])
        assert torch.equal(along(routed, PLAIN, ids), expected[1])
        assert torch.equal(along(routed, [1, 0, 2, 1, 0, 1], ids), expected[2])
        with routed.disabled():
            assert torch.equal(routed(ids).logits, expected[0])
        along(routed, PATH, ids)
    for key, before in mapped.items():
        number, _, place = key.partition(".")
        layer = routed.injection.layers[int(number)]
        assert torch.equal(layer.get_submodule(place)(states), before)


def test_detaching_restores_the_model_its_keys_and_its_bits(tiny_llama):
    model = tiny_llama().requires_grad_(True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modules = dict(model.named_modules())
    attributes = {name: sorted(vars(module)) for name, module in modules.items()}
    routed = with_adapters(model)
    along(routed, PATH)
    assert list(model.state_dict()) != list(before)
    routed.detach()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert dict(model.named_modules()) == modules
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_adapter_comes_and_goes_with_the_routing(tiny_llama):
    model = tiny_llama()
    keys = list(model.state_dict())
    first = with_adapters(model)
    second = attach(model)
    assert list(model.state_dict()) == keys
    assert second.injection.lora.names == ()
    second.detach()
    first.injection.install()
    assert first.injection.lora.names == ("a", "b")
    torch.testing.assert_close(along(first, PATH)[0], listed(tiny_llama(), PATH).logits(IDS[0]))


def test_copies_and_pickles_run_the_adapter_too(routed):
    expected = along(routed, PATH)
    twin = copy.deepcopy(routed)
    assert torch.equal(along(twin, PATH), expected)
    assert twin.injection.lora is not routed.injection.lora
    again = pickle.loads(pickle.dumps(routed.model))
    assert torch.equal(again(IDS).logits, routed(IDS).logits)


def test_dropping_the_last_adapter_puts_the_linear_maps_back(tiny_llama):
    keys = list(tiny_llama().state_dict())
    routed = with_adapters(tiny_llama())
    expected = along(routed, OTHER)
    routed.injection.lora.drop("a")
    assert torch.equal(along(routed, OTHER), expected)
    routed.injection.lora.drop("b")
    assert list(routed.model.state_dict()) == keys


@pytest.mark.parametrize("ways", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_follow_a_healed_path_as_the_plain_model_does(routed, tiny_llama, prompts, ways):
    ids, mask = pad_left(prompts, "cpu")
    options = {"input_ids": ids, "attention_mask": mask, "do_sample": False, **LENGTHS, **ways}
    with routed.fixed(PATH):
        cached = routed.generate(**options)
        assert torch.equal(routed.generate(**options, use_cache=False), cached)
    expected = listed(tiny_llama(), PATH).model.generate(**options, use_cache=False)
    assert cached.tolist() == expected.tolist()


def test_samples_are_the_same_with_a_cache_and_without(routed, prompts):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        with routed.fixed(PATH):
            found.append(answers(routed, prompts, **LENGTHS, **options))
    assert found[0] == found[1]


def test_a_continuation_keeps_the_adapter_of_the_path_that_its_cache_has_pinned(routed, tiny_llama):
    slow = listed(tiny_llama(), PATH)
    with routed.fixed(PATH), torch.no_grad():
        cache = routed(IDS, use_cache=True).past_key_values
    name = cache_argument(routed.model)
    with torch.no_grad(), routed.fixed([1] * 6):
        found = routed(torch.tensor([[9]]), **{name: cache}).logits[0]
    expected = slow.logits([*IDS[0].tolist(), 9])[-1:]
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_many_prompts_are_answered_along_a_healed_path(routed, tiny_tokenizer, tiny_llama):
    routed.tokenizer = tiny_tokenizer
    texts = ["a", "bcd", "ef", "gh", "ijk", "lmno"]
    slow = listed(tiny_llama(), PATH)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "chat": False, "batch_size": 4}
    with routed.fixed(PATH):
        found = generate_many(routed, texts, **options)
    for text, answer in zip(texts, found, strict=True):
        tokens = tiny_tokenizer.encode(text)
        assert list(answer.tokens) == slow.greedy(tokens, 4, never=END)
        assert answer.route == (1, 0, 1, 0, 1, 2)


@pytest.mark.parametrize(
    ("name", "memory_gb"),  # packed, and a row for each continuation
    [
        ("llama", 1.0),
        ("gemma2", 0.0),
        pytest.param("llama", 0.0, marks=pytest.mark.thorough),
        pytest.param("gemma2", 1.0, marks=pytest.mark.thorough),
    ],
)
def test_healed_and_plain_paths_are_scored_in_passes_of_their_own(name, tiny_model, memory_gb):
    routed = with_adapters(tiny_model(name))
    shared = [5, 9, 30, 7, 8, 11, 12, 13, 14, 15]
    questions = [
        Request([*shared, 7], [[4, 8], [61]]),
        Request([*shared, 11, 3], [[2, 6, 1]]),
    ]
    plans = [PATH, (1, 0, 2, 1, 1, 0), OTHER, PLAIN, StaticPath(range(6), "b"), (1,) * 6]
    pairs = [(row, plan) for plan in plans for row in range(2)]
    batch = ChoiceBatch(routed, questions, memory_gb)
    found = batch.scores(pairs, kl=True)
    again = batch.scores(pairs[::-1], kl=True)[::-1]
    model = tiny_model(name)
    full = [listed(model, StaticPath(range(6))).logits(each.context) for each in questions]
    for (row, plan), score, twice in zip(pairs, found, again, strict=True):
        slow = listed(model, StaticPath(get_layers(plan), get_adapter(plan)))
        expected = slow.sums(questions[row].context, questions[row].continuations)
        assert_sums([expected, expected], [score, twice])
        ours = slow.logits(questions[row].context).log_softmax(-1)
        theirs = full[row].log_softmax(-1)
        kl = float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())
        assert score.kl == pytest.approx(kl, abs=1e-5)
        assert twice.kl == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_options_are_scored_under_the_policy_of_a_healed_path(name, tiny_model):
    """A path in an order that decisions can't express, too: gemma2 has a row for each option."""
    questions = [Request([5, 9, 30, row], [[4, 8], [61], [7, 7, 8]]) for row in range(3)]
    for path in (PATH, StaticPath([0, 3, 1, 5])):
        routed = with_adapters(tiny_model(name))
        batch = ChoiceBatch(routed, questions, 1.0)
        found, _ = batch.routed_scores(routed.build_policy(path))
        slow = listed(tiny_model(name), path)
        expected = [slow.sums(each.context, each.continuations) for each in questions]
        assert_sums(expected, found)


def test_a_pass_that_mixes_a_healed_path_with_another_is_refused(routed):
    rows = pack_rows(routed, [Request([5, 9, 30])], PrefixCache(0))
    for other in (PLAIN, OTHER, (1,) * 6):
        run = rows.run([(0, PATH), (0, other)], [1, 1])
        with pytest.raises(RoutingError, match="in one batch with another path") as caught, run:
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [
        (PATH, [1] * 6, True),
        ([1] * 6, PATH, True),
        (PATH, OTHER, True),
        (PATH, PATH, False),
        ([1] * 6, PLAIN, False),
    ],
)
def test_a_second_thread_that_runs_another_path_is_refused(routed, first, second, is_refused):
    expected = along(routed, first), along(routed, second)
    meeting, found = Meeting(routed.injection.layers[0]), []
    thread = threading.Thread(target=lambda: found.append(along(routed, first)))
    thread.start()
    assert meeting.has_begun.wait(30)
    try:
        if is_refused:
            with pytest.raises(RoutingError, match="another thread runs this model") as caught:
                along(routed, second)
            assert "\n" not in str(caught.value)
        else:
            assert torch.equal(along(routed, second), expected[1])
    finally:
        meeting.may_go_on.set()
        thread.join()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(along(routed, second), expected[1])


def test_a_pass_that_fails_leaves_the_adapter_switched_off(routed):
    before = routed(IDS).logits
    handle = routed.injection.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    path = StaticPath([0, 3, 5], "a")
    with pytest.raises(ZeroDivisionError):
        along(routed, path)
    handle.remove()
    assert torch.equal(routed(IDS).logits, before)


@pytest.mark.parametrize("trains", [False, True])
def test_only_the_adapter_gets_gradients_and_what_it_learns_is_what_runs(tiny_llama, trains):
    model = tiny_llama().train(trains)
    routed = RoutedModel(model)
    lora, maps = routed.injection.lora, routed.injection.linear_maps
    weights = lora.create("new", 4, 4.0, range(2, 6), maps, seed=0)
    path = StaticPath([0, 1, 2, 4, 5])
    healed = path.with_adapter("new")
    before = along(routed, path)
    assert torch.equal(along(routed, healed), before)
    optimiser = torch.optim.SGD(weights, lr=1.0)
    with routed.fixed(healed):
        routed(IDS, use_cache=False).logits.square().sum().backward()
    optimiser.step()
    assert not torch.equal(along(routed, healed), before)
    assert torch.equal(along(routed, path), before)
    learned = {name for name, (_, b) in lora.weights("new").maps.items() if b.any()}
    # Layer 3 is one that the path leaves out.
    assert learned == {name for name in maps if name[0] in "245"}
    ours = {id(weight) for weight in weights}
    assert not any(p.grad is not None for p in model.parameters() if id(p) not in ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_or_converting_the_model_takes_the_adapter_along(tiny_llama, dtype):
    routed = with_adapters(tiny_llama())
    assert routed.to(dtype) is routed
    twin = with_adapters(tiny_llama().to(dtype))
    assert torch.equal(along(routed, PATH), along(twin, PATH))
    assert {w.dtype for w in routed.injection.lora.parameters("a")} == {dtype}


@pytest.mark.thorough
def test_a_compiled_model_runs_the_adapter_too(routed):
    compiled = torch.compile(routed.model, backend="eager")
    with routed.fixed(PATH), torch.no_grad():
        expected = routed(IDS, use_cache=False).logits
        assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, routed(IDS).logits)


def test_experts_are_not_adapted(tiny_model):
    routed = RoutedModel(tiny_model("mixtral"))
    places = {name.partition(".")[2] for name in routed.injection.linear_maps}
    assert places == {f"self_attn.{part}_proj" for part in "qkvo"}


def test_maps_with_packed_weights_are_adapted_by_the_numbers_that_they_give(tiny_llama):
    class Packed(torch.nn.Linear):
        """A linear map of 8 bits."""

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.float() / 100)

    packed, plain = tiny_llama(), tiny_llama()
    for ours, theirs in zip(
        packed.model.layers.modules(), plain.model.layers.modules(), strict=True
    ):
        if isinstance(ours, torch.nn.Linear):
            values = (100 * ours.weight).round().to(torch.int8)
            ours.weight = torch.nn.Parameter(values, requires_grad=False)
            ours.__class__ = Packed
            theirs.weight.copy_(values.float() / 100)
    found = along(with_adapters(packed), PATH)[0]
    slow = listed(plain, PATH)
    torch.testing.assert_close(found, slow.logits([5, 6, 7]), atol=LOGIT_TOLERANCE, rtol=0)


def test_an_adapter_runs_beside_weights_that_are_offloaded(tiny_llama):
    expected = along(with_adapters(tiny_llama()), PATH)
    model = tiny_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(along(with_adapters(model), PATH), expected)


def zeros(rank, num_in, num_out):
    return torch.zeros(rank, num_in), torch.zeros(num_out, rank)


BAD = {
    r"\[7\] have no nn.Linear": lambda lora, maps: lora.create("c", 2, 2, [7], maps, 0),
    "'a', which is in the model already": lambda lora, maps: lora.add("a", lora.weights("b"), maps),
    "give it a name": lambda lora, maps: lora.add("", lora.weights("b"), maps),
    r"'0\.self_attn\.q'; did you mean": lambda lora, maps: lora.add(
        "c", LoraWeights(2, 2, {"0.self_attn.q": zeros(2, 32, 32)}), maps
    ),
    r"A \[2, 31\]": lambda lora, maps: lora.add(
        "c", LoraWeights(2, 2, {"0.self_attn.q_proj": zeros(2, 31, 32)}), maps
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_adapters_that_do_not_fit_are_refused(routed, message):
    expected = along(routed, PATH)
    with pytest.raises(RoutingError, match=message):
        BAD[message](routed.injection.lora, routed.injection.linear_maps)
    assert routed.injection.lora.names == ("a", "b")
    assert torch.equal(along(routed, PATH), expected)


def test_a_path_whose_adapter_is_not_in_the_model_is_refused(routed):
    with pytest.raises(RoutingError, match="no adapter 'c'"):
        routed.fixed(StaticPath([0, 1], "c"))
    policy = routed.build_policy(PATH)
    routed.injection.lora.drop("a")
    with routed.using(policy), pytest.raises(RoutingError, match="no adapter 'a'"):
        routed(IDS)
    assert torch.isfinite(routed(IDS).logits).all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_a_model_with_peft_layers_of_its_own_is_refused(tiny_llama):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    routed = RoutedModel(get_peft_model(tiny_llama(), config))
    with pytest.raises(RoutingError, match="merge_and_unload"):
        routed.injection.add_adapter("a", tiny_adapter(routed, [2]))


@pytest.mark.parametrize("num_before", [0, 2])
def test_an_adapter_that_peft_puts_in_halfway_is_taken_out_again(
    tiny_llama, routed, monkeypatch, num_before
):
    model = routed if num_before else RoutedModel(tiny_llama())
    names = model.injection.lora.names
    keys = list(model.model.state_dict())
    inject = peft.inject_adapter_in_model

    def fail(*args):
        inject(*args)
        raise MemoryError

    monkeypatch.setattr(peft, "inject_adapter_in_model", fail)
    with pytest.raises(MemoryError):
        model.injection.create_lora("c", rank=2, alpha=2, layers=[1, 2], seed=0)
    assert len(names) == num_before
    assert model.injection.lora.names == names
    assert list(model.model.state_dict()) == keys
    monkeypatch.undo()
    assert model.injection.create_lora("c", rank=2, alpha=2, layers=[1, 2], seed=0)
