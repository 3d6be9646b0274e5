"""Adapters on some rows, against the plain model whose weights have them merged."""

import copy
import pickle

import pytest
import torch

from drllm.errors import RoutingError
from drllm.models.base.prompts import left_padded
from drllm.models.routing.adapters import Adapter
from drllm.models.routing.batch_generation import generate_many
from drllm.models.routing.policies import FixedPolicy, Policy, RouterPolicy
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.scoring.choices import ChoiceBatch
from drllm.models.scoring.packing import Request
from drllm.paths import MLP, StaticPath, Step, to_path
from slow_way import (
    LOGIT_TOLERANCE,
    ListedModel,
    answers,
    assert_sums,
    biased_model,
    tiny_adapter,
    tiny_routers,
)

FAMILIES = ("llama", "qwen2", "gpt2", "phi", "gemma2", "gemma3_text", "mixtral")
PATH = [0, Step(1, MLP), Step(2, adapter="a"), Step(4, adapter="a"), 5, Step(5, adapter="a")]
DECISIONS = [[1, 0, 1, 2, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1], [1, 0, 1, 2, 1, 1]]
NAMES = [["", "", "a", "a", "", "a"], [""] * 6, ["", "b", "", "b", "b", "b"], [""] * 6]
"""What the four prompts run with, row by row: `a`, nothing on the full path, `b`, nothing."""
END = 2
LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6}


def with_adapters(model):
    """Route a model that holds two adapters of all its layers."""
    routed = RoutedModel(model)
    for seed, name in enumerate("ab"):
        routed.add_adapter(name, tiny_adapter(routed, range(6), seed))
    return routed


class Mixed(Policy):
    """Gives each row the decisions and adapters of its own."""

    reads_prompt = False

    def __init__(self, decisions, names):
        self.plan, self.names = decisions, names

    def decide(self, layer, prompts):
        return [row[layer] for row in self.plan]

    def adapters(self, layer, prompts):
        return [row[layer] for row in self.names]


def mixed(rows=range(4)):
    return Mixed([DECISIONS[row] for row in rows], [NAMES[row] for row in rows])


def plans():
    """Return what the four rows run, as plans of their own."""
    return [
        StaticPath([Step(layer, adapter=names[layer]) for layer in to_path(row)])
        for row, names in zip(DECISIONS, NAMES, strict=True)
    ]


def listed(model, plan, routed):
    """Return the plain model of a plan."""
    return ListedModel(model, path=plan.steps, adapters=routed.adapters)


@pytest.fixture
def routed(tiny_llama):
    return with_adapters(tiny_llama())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_path_with_an_adapter_is_the_plain_model_with_merged_weights(name, prompts):
    model = biased_model(name, {})
    slow = ListedModel(model, path=PATH, adapters=with_adapters(copy.deepcopy(model)).adapters)
    expected = [slow.greedy(prompt, 6, never=END) for prompt in prompts]
    routed = with_adapters(model)
    with routed.fixed(StaticPath(PATH)):
        found = routed(torch.tensor(prompts[:1]), use_cache=False).logits[0]
        assert answers(routed, prompts, **LENGTHS) == expected
        assert answers(routed, prompts, **LENGTHS, use_cache=False) == expected
    torch.testing.assert_close(found, slow.logits(prompts[0]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_other_adapters_say_what_each_says_alone(name, prompts):
    model = biased_model(name, {})
    routed = with_adapters(copy.deepcopy(model))
    each = zip(plans(), prompts, strict=True)
    expected = [listed(model, plan, routed).greedy(tokens, 6, never=END) for plan, tokens in each]
    with routed.using(mixed()):
        assert answers(routed, prompts, **LENGTHS) == expected
        assert answers(routed, prompts, **LENGTHS, use_cache=False) == expected


def test_rows_without_an_adapter_keep_their_bits(routed, prompts):
    ids, mask = left_padded(prompts, "cpu")
    with routed.using(FixedPolicy(DECISIONS, 6)):
        without = routed(ids, attention_mask=mask).logits
    with routed.using(mixed()):
        found = routed(ids, attention_mask=mask).logits
    for row, names in enumerate(NAMES):
        assert torch.equal(found[row], without[row]) == (not any(names))


def test_a_model_that_holds_an_adapter_stays_what_it_was(tiny_llama):
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7]])
    before, keys = model(ids).logits, list(model.state_dict())
    routed = with_adapters(model)
    assert torch.equal(routed(ids).logits, before)
    assert list(model.state_dict()) == keys
    with routed.fixed(StaticPath(PATH)):
        healed = routed(ids).logits
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, before)
    twin = copy.deepcopy(routed)
    with twin.fixed(StaticPath(PATH)):
        assert torch.equal(twin(ids).logits, healed)
    routed.detach()
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, before)


def test_letting_go_of_the_last_adapter_takes_the_hooks_off(routed):
    routed.remove_adapter("a")
    routed.remove_adapter("b")
    hooked = [m for m in routed.model.modules() if m._forward_hooks]
    assert hooked == [routed.injection.decoder]


@pytest.mark.parametrize("ways", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_keep_the_adapter_of_their_prompt(routed, prompts, ways):
    with routed.using(mixed()):
        cached = answers(routed, prompts, **LENGTHS, **ways)
        assert answers(routed, prompts, **LENGTHS, **ways, use_cache=False) == cached
    alone = []
    for row, tokens in enumerate(prompts):
        with routed.using(mixed([row])):
            alone += answers(routed, [tokens], **LENGTHS, **ways)
    assert cached == alone


def test_samples_are_the_same_with_a_cache_and_without(routed, prompts):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        with routed.using(mixed()):
            found.append(answers(routed, prompts, **LENGTHS, **options))
    assert found[0] == found[1]


def test_a_continuation_keeps_the_adapters_that_its_cache_has_pinned(routed, prompts):
    ids, mask = left_padded(prompts, "cpu")
    with routed.using(mixed()):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = routed(ids, attention_mask=mask, position_ids=positions).past_key_values
    token, mask = torch.full((2, 1), 9), torch.cat([mask, mask[:, :1] ** 0], dim=1)[[2, 0]]
    cache.batch_select_indices(torch.tensor([2, 0]))
    positions = mask.sum(dim=1, keepdim=True) - 1
    found = routed(token, attention_mask=mask, past_key_values=cache, position_ids=positions).logits
    for place, row in enumerate((2, 0)):
        with routed.using(mixed([row])):
            alone = routed(torch.tensor([[*prompts[row], 9]])).logits[0, -1]
        torch.testing.assert_close(found[place, -1], alone, atol=LOGIT_TOLERANCE, rtol=0)


def test_many_prompts_are_answered_in_batches_of_equal_plans(routed, tiny_tokenizer):
    class ByLength(Policy):
        """Decides by the prompt's length, so that prompts have to be read."""

        def decide(self, layer, prompts):
            return [DECISIONS[int(length) % 4][layer] for length in prompts.readable.sum(dim=1)]

        def adapters(self, layer, prompts):
            return [NAMES[int(length) % 4][layer] for length in prompts.readable.sum(dim=1)]

    routed.tokenizer = tiny_tokenizer
    texts = ["a", "bcd", "ef", "gh", "ijk", "lmno"]
    with routed.using(ByLength()):
        alone = [generate_many(routed, [text], max_new_tokens=4, chat=False)[0] for text in texts]
        found = generate_many(routed, texts, max_new_tokens=4, chat=False, batch_size=3)
    assert found == alone


def test_shared_prefixes_know_the_adapter_of_each_state(tiny_llama):
    routed = with_adapters(tiny_llama())
    questions = [Request([5, 9, 30, 7], [[4, 8], [61]]), Request([5, 9, 30, 11, 3], [[2, 6, 1]])]
    given = [(row, plan) for plan in [*plans(), StaticPath(PATH)] for row in range(2)]
    batch = ChoiceBatch(routed, questions, 1.0)
    found = batch.scores(given, kl=True)
    expected = [
        listed(tiny_llama(), plan, routed).sums(
            questions[row].context, questions[row].continuations
        )
        for row, plan in given
    ]
    assert_sums(expected, found)
    assert found[0].kl != found[-1].kl


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # packed, and a row for each continuation
def test_options_are_scored_with_the_adapter_of_their_question(name, tiny_model):
    questions = [Request([5, 9, 30, row], [[4, 8], [61], [7, 7, 8]]) for row in range(4)]
    routed = with_adapters(tiny_model(name))
    found, _ = ChoiceBatch(routed, questions, 1.0).routed_scores(mixed())
    expected = [
        listed(tiny_model(name), plan, routed).sums(each.context, each.continuations)
        for plan, each in zip(plans(), questions, strict=True)
    ]
    assert_sums(expected, found)


def test_routed_rows_run_with_the_adapter_once_they_have_left_the_full_path(routed, prompts):
    ids, mask = left_padded(prompts, "cpu")
    with routed.using(RouterPolicy(tiny_routers(), adapter="a")):
        found = routed(ids, attention_mask=mask).logits
    decisions = routed.last_route.tolist()
    names = [["a" if row[:layer] != [1] * layer else "" for layer in range(6)] for row in decisions]
    assert sum(map(any, names)) > 0
    with routed.using(Mixed(decisions, names)):
        assert torch.equal(routed(ids, attention_mask=mask).logits, found)
    for place, route in enumerate(map(to_path, decisions)):
        path = StaticPath(route)
        with routed.fixed(path.with_adapter("a", path.departure + 1)):
            alone = routed(torch.tensor([prompts[place]])).logits[0]
        own = found[place, -len(prompts[place]) :]
        torch.testing.assert_close(own, alone, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("trains", [False, True])
def test_only_the_adapter_gets_gradients_and_what_it_learns_is_what_runs(tiny_llama, trains):
    model, ids = tiny_llama().train(trains), torch.tensor([[5, 6, 7, 8]])
    routed = RoutedModel(model)
    adapter = Adapter.fresh(routed, 4, 4.0, range(2, 6), seed=0)
    weights = [each.requires_grad_() for each in adapter.parameters()]
    routed.add_adapter("new", adapter)
    path = StaticPath([0, 1, 2, 4, 5])
    with routed.fixed(path):
        before = routed(ids, use_cache=False).logits
    with routed.fixed(path.with_adapter("new", 2)):
        assert torch.equal(routed(ids, use_cache=False).logits, before)
        optimiser = torch.optim.SGD(weights, lr=1.0)
        routed(ids, use_cache=False).logits.square().sum().backward()
        optimiser.step()
        assert not torch.equal(routed(ids, use_cache=False).logits, before)
    assert {name for name, (_, b) in adapter.weights.items() if b.any()} == {
        name
        for name in adapter.weights
        if not name.startswith("3.")  # which the path leaves out
    }
    assert not any(weight.grad is not None for weight in model.parameters())


@pytest.mark.thorough
def test_a_compiled_model_runs_the_adapter_too(routed):
    ids = torch.tensor([[5, 6, 7, 8]])
    compiled = torch.compile(routed.model, backend="eager")
    with routed.fixed(StaticPath(PATH)), torch.no_grad():
        expected = routed(ids, use_cache=False).logits
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, routed(ids).logits)


def test_experts_are_not_adapted(tiny_model):
    routed = RoutedModel(tiny_model("mixtral"))
    places = {name.partition(".")[2] for name in Adapter.fresh(routed, 2, 2, [0], 0).weights}
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
    routed = with_adapters(packed)
    with routed.fixed(StaticPath(PATH)):
        found = routed(torch.tensor([[5, 6, 7]])).logits[0]
    slow = ListedModel(plain, path=PATH, adapters=routed.adapters)
    torch.testing.assert_close(found, slow.logits([5, 6, 7]), atol=LOGIT_TOLERANCE, rtol=0)


BAD = {
    r"\[7\] have no nn.Linear": lambda routed: Adapter.fresh(routed, 2, 2, [7], 0),
    "no adapter 'c'": lambda routed: routed.fixed(StaticPath([0, Step(1, adapter="c")])),
    "'a', which is there already": lambda routed: routed.add_adapter("a", routed.adapters["b"]),
    "is no name": lambda routed: routed.add_adapter("", routed.adapters["b"]),
    r"'0\.self_attn\.q'; did you mean": lambda routed: routed.add_adapter(
        "c", Adapter(2, 2, {"0.self_attn.q": (torch.zeros(2, 32), torch.zeros(32, 2))})
    ),
    r"A \[2, 31\]": lambda routed: routed.add_adapter(
        "c", Adapter(2, 2, {"0.self_attn.q_proj": (torch.zeros(2, 31), torch.zeros(32, 2))})
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_adapters_that_do_not_fit_are_refused(routed, said):
    with pytest.raises(RoutingError, match=said):
        BAD[said](routed)
    assert set(routed.adapters) == {"a", "b"}


def test_a_policy_whose_adapter_is_gone_is_refused_when_it_runs(routed):
    policy = mixed([0])
    routed.remove_adapter("a")
    with routed.using(policy), pytest.raises(RoutingError, match="no adapter 'a'"):
        routed(torch.tensor([[5, 6, 7]]))
    assert torch.isfinite(routed(torch.tensor([[5, 6, 7]])).logits).all()
