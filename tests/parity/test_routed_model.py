"""The routed model against the slow way: plain model, layers listed in path order, row by row."""

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from transformers.utils import is_torch_flex_attn_available

from drllm.errors import PathError, RoutingError
from drllm.model.prompts import pad_left
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.driver import RoutedPass
from drllm.models.routing.kv_cache import cache_argument
from drllm.models.routing.policies import FullPolicy
from slow_way import (
    LOGIT_TOLERANCE,
    Opaque,
    Recorder,
    right_padded,
    route_alone,
    tiny_routers,
)

PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22]]

PLANS = {
    "skip of layer 0": [0, 1, 1, 1, 1, 1],
    "skip of everything but one layer": [0, 0, 0, 1, 0, 0],
    "repeats": [1, 2, 1, 1, 2, 1],
    "all repeated": [2, 2, 2, 2, 2, 2],
    "skips and repeats": [1, 0, 2, 0, 1, 2],
}
MIXED = [PLANS["skip of layer 0"], PLANS["all repeated"], PLANS["skips and repeats"], [1] * 6]


IDS = torch.tensor([PROMPTS[0]])
LONG = torch.tensor([PROMPTS[2]])


def batch():
    ids, mask = pad_left(PROMPTS, "cpu")
    return {"input_ids": ids, "attention_mask": mask}


def on(model, cache):
    return {cache_argument(model): cache, "use_cache": True}


@pytest.fixture
def routed(tiny_llama):
    return RoutedModel(tiny_llama())


@pytest.fixture
def by_routers(tiny_llama):
    return RoutedModel(tiny_llama(), tiny_routers())


def test_keys_and_weights_never_change(tiny_llama):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    routed = RoutedModel(model)
    with routed.fixed(MIXED):
        routed.generate(**batch(), max_new_tokens=2)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_routers_decide_in_a_padded_batch_as_they_do_by_hand(tiny_llama):
    model = tiny_llama()
    stack = tiny_routers()
    with torch.no_grad():
        expected = [route_alone(model, stack, prompt) for prompt in PROMPTS]
    assert len({value for row in expected for value in row}) == 3, "the sample must be a test"
    routed = RoutedModel(model, stack)
    routed.generate(**batch(), max_new_tokens=5)
    assert expected == routed.last_route.tolist()


def test_prompt_lengths_keep_continuations_from_the_routers(by_routers):
    alone, padded = [], []
    for prompt in PROMPTS:
        by_routers.model(torch.tensor([prompt]))
        alone.append(by_routers.last_route[0].tolist())
    rows = [[*prompt, 40 + i, 50, 60] for i, prompt in enumerate(PROMPTS)]
    ids, mask = right_padded(rows)
    with by_routers.prompt_lengths([len(prompt) for prompt in PROMPTS]):
        by_routers.model(ids, attention_mask=mask)
        padded = by_routers.last_route.tolist()
        by_routers.model(ids)  # as some harnesses do: right padding without a mask
        assert alone == by_routers.last_route.tolist()
    assert alone == padded


@pytest.mark.parametrize("lengths", [[0, 1, 1, 1], [1, 1, 1], [9, 2, 8, 3]])
def test_impossible_prompt_lengths_are_refused(by_routers, lengths):
    with by_routers.prompt_lengths(lengths), pytest.raises(RoutingError, match="prompt_lengths"):
        by_routers.model(**batch())


class ByRow(FullPolicy):
    """Gives each row a plan of its own, and says that it reads the prompt."""

    reads_prompt = True

    def __init__(self, plans):
        self.plans = plans

    def decide(self, layer, prompts):
        return [plan[layer] for plan in self.plans]


class Listed(FullPolicy):
    """Reads the prompt, and gives its decisions as a list."""

    reads_prompt = True


@pytest.mark.parametrize("own", [None, Listed()], ids=["a tensor", "a list"])
def test_a_row_of_padding_alone_is_refused_however_decisions_are_given(by_routers, own):
    ids = torch.full((2, 3), 7)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with by_routers.using(own or by_routers.policy), pytest.raises(RoutingError, match="prompt"):
        by_routers(input_ids=ids, attention_mask=mask)


def test_one_row_that_skips_everything_executes_the_last_layer_and_the_others_dont(tiny_llama):
    plans = [[0] * 6, [1, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0], [1] * 6]
    routed = RoutedModel(tiny_llama(), policy=ByRow(plans))
    routed.model(**batch())
    assert routed.last_route.tolist() == [[0, 0, 0, 0, 0, 1], *plans[1:]]


def test_a_model_that_asks_its_cache_whether_this_is_the_first_turn_is_told():
    """PaliGemma's mask of a first turn lets a prompt see itself whole."""
    shape = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config={
                **shape,
                "model_type": "gemma",
                "vocab_size": 101,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
            vision_config={**shape, "model_type": "siglip_vision_model", "num_attention_heads": 4},
            image_token_index=100,
            projection_dim=32,
        )
    ).eval()

    def second_turn():
        cache = DynamicCache(config=model.config.get_text_config())
        for ids in (IDS, LONG):
            types = torch.zeros_like(ids)  # all of it is prompt
            logits = model(ids, token_type_ids=types, **on(model, cache)).logits
        return logits

    with torch.no_grad():
        expected = second_turn()
        RoutedModel(model)
        assert torch.equal(expected, second_turn())


def tensors_of(cache):
    return [part for layer in cache for part in layer if part is not None]


def test_a_cache_whose_layers_are_executed_once_is_read_and_converted_as_any(tiny_model, family):
    model = tiny_model(family)

    def cache_of(length):
        cache = DynamicCache(config=model.config)
        for part in (LONG, LONG)[:length]:
            model(part, **on(model, cache))
        return cache

    expected = [tensors_of(cache_of(length)) for length in (0, 1, 2)]
    RoutedModel(model)
    for length, tensors in enumerate(expected):
        found = tensors_of(cache_of(length))
        assert len(found) == len(tensors)
        assert all(map(torch.equal, tensors, found))


@pytest.mark.parametrize("plan", [[1, 0, 1, 1, 1, 1], [1, 2, 1, 1, 1, 1], MIXED])
def test_a_cache_without_one_k_and_v_of_all_rows_says_so_when_it_is_read(routed, plan):
    cache = DynamicCache(config=routed.model.config)
    with routed.fixed(plan):
        routed.model(**batch(), **on(routed.model, cache))
    with pytest.raises(RoutingError, match="no K and V of the whole batch"):
        list(cache)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda routed: pickle.loads(pickle.dumps(routed))]
)
def test_a_copy_routes_as_the_model_does_and_by_itself(routed, copied):
    twin = copied(routed)
    with routed.fixed(PLANS["repeats"]):
        expected = routed.model(LONG).logits
        twin.model(LONG)
    assert [PLANS["repeats"]] == routed.last_route.tolist()
    assert twin.last_route.tolist() == [[1] * 6]
    with twin.fixed(PLANS["repeats"]):
        assert torch.equal(expected, twin.model(LONG).logits)


def test_a_removed_override_is_noticed(routed):
    del routed.model.model.layers[3].forward
    with pytest.raises(RoutingError, match="layer 3 was taken off"):
        routed.model(IDS)


@pytest.mark.parametrize("called", [[0, 2, 1, 3, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5, 5]])
def test_a_loop_that_swaps_omits_or_repeats_layers_later_is_noticed(routed, called):
    decoder = routed.model.model
    decoder.layers = torch.nn.ModuleList([decoder.layers[index] for index in called])
    decoder.config.num_hidden_layers = len(called)
    with pytest.raises(RoutingError, match=re.escape(f"called layers {called}")):
        routed.model(IDS, use_cache=False)


@pytest.mark.parametrize("what", ["layer 2", "the decoder"])
def test_an_override_over_ours_is_not_swept_away(routed, what):
    decoder = routed.model.model
    module = decoder if what == "the decoder" else decoder.layers[2]
    module.forward = lambda *args, **kwargs: None
    with pytest.raises(RoutingError, match=f"{what} was overridden again"):
        routed.detach()
    assert hasattr(routed.model.model.layers[0].forward, "__self__")


def test_a_cache_filled_without_routing_is_refused(tiny_llama):
    model = tiny_llama()
    cache = DynamicCache(config=model.config)
    model(IDS, **on(model, cache))
    routed = RoutedModel(model)
    with pytest.raises(RoutingError, match="filled without routing"):
        routed.model(torch.tensor([[4]]), **on(model, cache))


@pytest.mark.parametrize("plan", [[1] * 6, PLANS["skips and repeats"]])
def test_a_routed_cache_is_refused_without_routing_and_goes_on_with_it_as_if_nothing_was(
    tiny_llama, plan
):
    routed = RoutedModel(tiny_llama())
    caches = [DynamicCache(config=routed.model.config) for _ in range(2)]
    with routed.fixed(plan):
        for cache in caches:
            routed.model(IDS, **on(routed.model, cache))
    routed.detach()
    with pytest.raises(RoutingError, match="run without routing"):
        routed.model(torch.tensor([[4]]), **on(routed.model, caches[0]))
    again = RoutedModel(routed.model)
    found, expected = (
        again.model(torch.tensor([[4]]), **on(again.model, cache)).logits for cache in caches
    )
    assert torch.equal(found, expected)


def test_after_the_prompt_the_driver_is_asked_for_the_layers_alone_that_rows_differ_in(
    routed, monkeypatch
):
    asked = []
    layer = RoutedPass.layer
    monkeypatch.setattr(
        RoutedPass,
        "layer",
        lambda of, call, hidden: asked.append(call.index) or layer(of, call, hidden),
    )
    cache = DynamicCache(config=routed.model.config)
    with routed.fixed([[1, 1, 0, 1, 1, 2], [1, 1, 1, 1, 1, 1]]):
        routed.model(IDS.repeat(2, 1), **on(routed.model, cache))
        assert asked == [0, 1, 2, 3, 4, 5]
        routed.model(torch.tensor([[4], [4]]), **on(routed.model, cache))
    assert asked[6:] == [0, 2, 5]  # layer 0 finds that the cache has decisions


def test_attentions_are_refused_under_routing_and_given_without(tiny_llama):
    routed = RoutedModel(tiny_llama(attn_implementation="eager"))
    with routed.fixed(PLANS["repeats"]), pytest.raises(RoutingError, match="output_attentions"):
        routed.model(IDS, output_attentions=True)
    routed.model.config.output_attentions = True
    with routed.fixed(PLANS["repeats"]), pytest.raises(RoutingError, match="output_attentions"):
        routed.model(IDS)
    with routed.using(FullPolicy()):
        assert len(routed.model(IDS, output_attentions=True).attentions) == 6


def test_an_error_inside_a_forward_leaves_routing_usable(routed):
    with routed.fixed([PLANS["repeats"]] * 3), pytest.raises(RoutingError, match="3 prompts"):
        routed.model(IDS)
    routed.model(IDS)
    assert routed.last_route.tolist() == [[1] * 6]


def test_beams_without_a_cache_equal_beams_with_one(routed):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 6}
    with routed.fixed(MIXED):
        expected = routed.generate(**batch(), **options)
        assert torch.equal(expected, routed.generate(**batch(), use_cache=False, **options))


@pytest.mark.parametrize("plan", [[1] * 5, [1, 1, 3, 1, 1, 1], [0] * 6, [[1] * 6, [0] * 6]])
def test_plans_that_no_model_can_run_are_refused(routed, plan):
    with pytest.raises(PathError), routed.fixed(plan):
        pass


def test_an_argument_that_cannot_be_cut_by_rows_is_refused(routed):
    plans = [[1] * 6, [1, 0, 1, 1, 1, 1]]
    with routed.fixed(plans), pytest.raises(RoutingError, match="Opaque"):
        routed.model(torch.tensor([[3, 4], [5, 6]]), custom=Opaque())


def test_what_one_model_may_read_is_no_matter_of_another(tiny_llama):
    first, second = RoutedModel(tiny_llama()), Recorder()
    other = RoutedModel(tiny_llama(), policy=second)
    with first.prompt_lengths([2]):
        other.model(IDS)
    assert second.read == [[len(PROMPTS[0])]]


def test_two_threads_route_the_same_model_apart(routed):
    chosen = [PLANS["repeats"], PLANS["skip of layer 0"]] * 8

    def run(plan):
        with routed.fixed(plan), torch.no_grad():
            return routed.model(LONG).logits

    expected = list(map(run, chosen))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, chosen))
    for slow, fast in zip(expected, found, strict=True):
        torch.testing.assert_close(slow, fast, atol=LOGIT_TOLERANCE, rtol=0)


def test_an_interrupted_forward_leaves_nothing_behind(routed):
    class Interrupting(FullPolicy):
        def decide(self, layer, prompts):
            if layer == 3:
                raise KeyboardInterrupt
            return super().decide(layer, prompts)

    expected = routed.model(IDS).logits
    with pytest.raises(KeyboardInterrupt), routed.using(Interrupting()):
        routed.model(IDS)
    assert torch.equal(expected, routed.model(IDS).logits)
    layer, hidden = routed.model.model.layers[0], torch.randn(1, 3, 32)
    rotary = routed.model.model.rotary_emb(hidden, torch.arange(3)[None])
    by_hand = layer(hidden, position_embeddings=rotary)
    routed.detach()
    assert torch.equal(by_hand, layer(hidden, position_embeddings=rotary))


def test_a_detached_model_says_so(routed):
    routed.detach()
    for use in (
        routed.detach,
        lambda: routed.generate(input_ids=torch.tensor([[3]])),
        lambda: routed.fixed([1] * 6).__enter__(),
    ):
        with pytest.raises(RoutingError, match="detach"):
            use()


# --- whose generate it is ----------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_either_generate_without_a_cache_asks_the_policy_once(tiny_llama, own):
    policy = Recorder()
    routed = RoutedModel(tiny_llama(), policy=policy)
    options = {"use_cache": False, "max_new_tokens": 4, "min_new_tokens": 4}
    (routed.model if own else routed).generate(IDS, **options)
    assert policy.read == [[len(PROMPTS[0])]]


@pytest.mark.parametrize("by_position", [False, True])
def test_a_prompt_in_chunks_is_refused_where_routers_would_read_the_first(by_routers, by_position):
    options = {"prefill_chunk_size": 3, "max_new_tokens": 2}
    given = [[GenerationConfig(**options, pad_token_id=0)], {}] if by_position else [[], options]
    with pytest.raises(RoutingError, match=r"prefill_chunk_size=3 .*first chunk"):
        by_routers.model.generate(LONG, *given[0], **given[1])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}]
)
def test_copies_of_a_prompt_are_asked_about_once_and_share_its_route(tiny_llama, options):
    policy = Recorder()
    routed = RoutedModel(tiny_llama(), policy=policy)
    routed.generate(**batch(), max_new_tokens=4, **options)
    assert policy.read == [[len(prompt) for prompt in PROMPTS]]
    with routed.using(ByRow(MIXED)):
        routed.generate(**batch(), max_new_tokens=4, **options)
    assert routed.last_route.tolist() == [plan for plan in MIXED for _ in range(3)]


@pytest.mark.parametrize("drafting", ["prompt lookup", "assistant"])
def test_drafted_tokens_are_not_read_as_part_of_the_prompt(tiny_llama, drafting):
    policy = Recorder()
    routed = RoutedModel(tiny_llama(), policy=policy)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_llama(seed=1)},
    }[drafting]
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    routed.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, **options)
    assert policy.read == [[len(prompt)]]


def test_a_generation_config_given_by_position_is_read_too(routed):
    options = GenerationConfig(num_beams=3, max_new_tokens=4, pad_token_id=0)
    with routed.fixed(MIXED):
        routed.generate(batch()["input_ids"], options, attention_mask=batch()["attention_mask"])
    assert routed.last_route[::3].tolist() == MIXED


def test_a_draft_by_the_first_layers_is_refused_before_anything_runs(routed):
    before = routed.generate(IDS, max_new_tokens=3)
    with pytest.raises(RoutingError, match="assistant_early_exit=2"):
        routed.model.generate(IDS, assistant_early_exit=2, max_new_tokens=3)
    assert torch.equal(before, routed.generate(IDS, max_new_tokens=3))


def test_a_cache_cropped_to_nothing_takes_a_new_prompt(routed):
    cache = DynamicCache(config=routed.model.config)
    named = on(routed.model, cache)
    with torch.no_grad():
        for plan in (PLANS["repeats"], PLANS["skip of layer 0"]):
            with routed.fixed(plan):
                expected = routed.model(torch.tensor([[5, 6]])).logits
                assert torch.equal(expected, routed.model(torch.tensor([[5, 6]]), **named).logits)
            cache.crop(-2)


# --- what can't be right -----------------------------------------------------------------------


RESTARTED = torch.tensor([[0, 1, 2, 0, 1]])
WRONG = {
    "routed already": lambda routed: RoutedModel(routed.model),
    "no prompt": lambda routed: routed.last_route,
    "guidance_scale=2": lambda routed: routed.generate(IDS, guidance_scale=2.0, use_cache=False),
    "not both": lambda routed: RoutedModel(routed.detach(), tiny_routers(), policy=FullPolicy()),
    "packed seq": lambda routed: routed.model(IDS, position_ids=RESTARTED),
    "packed sequences": lambda routed: routed.model(IDS, cu_seq_lens_q=torch.tensor([0, 3, 5])),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_cannot_be_right_is_refused(routed, said):
    with pytest.raises(RoutingError, match=said):
        WRONG[said](routed)


def test_a_cache_of_a_foreign_kind_is_refused(routed):
    layer, hidden = routed.model.model.layers[0], torch.zeros(1, 1, 32)

    def call_first(module, args, kwargs):
        layer(hidden, past_key_values=object())

    hook = routed.model.model.register_forward_pre_hook(call_first, with_kwargs=True)
    with pytest.raises(RoutingError, match="cache of this model is a object"):
        routed.model(torch.tensor([[3]]))
    hook.remove()


def test_an_argument_whose_axis_does_not_count_the_rows_is_refused(routed):
    ids, mask = pad_left(PROMPTS[:3], "cpu")
    layer = routed.model.model.layers[1]
    forward = layer.forward

    def cut(hidden, **kwargs):
        kwargs["attention_mask"] = kwargs["attention_mask"][:2]
        return forward(hidden, **kwargs)

    cut.__wrapped__ = forward
    layer.forward = cut
    plans = [[1] * 6, [1, 0, 1, 1, 1, 1], [1] * 6]
    with routed.fixed(plans), pytest.raises(RoutingError, match="doesn't count the 3 rows"):
        routed.model(ids, attention_mask=mask)


def test_a_policy_that_answers_for_too_few_rows_is_refused(tiny_llama):
    class Short(FullPolicy):
        def decide(self, layer, prompts):
            return [1]

    routed = RoutedModel(tiny_llama(), policy=Short())
    with pytest.raises(RoutingError, match=r"the policy gave \[1\] at layer 0"):
        routed.model(torch.tensor([[3, 4], [5, 6]]))


@pytest.mark.thorough  # its mask is compiled first
@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="this torch has no flex attention")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
def test_flex_attention_is_refused_where_rows_differ(routed):
    routed.model.config._attn_implementation = "flex_attention"
    with (
        routed.fixed(MIXED),  # its first layer runs on some of the rows
        pytest.raises(RoutingError, match="BlockMask, which can't be cut by rows"),
    ):
        routed.model(**batch())


def test_a_static_cache_is_not_kept_for_the_next_generate_nor_ours_on_the_model(tiny_llama):
    model = tiny_llama()
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    untouched = model.generate(IDS, **options)
    routed = RoutedModel(model)
    assert "generate" in model.__dict__
    for plan in (PLANS["repeats"], PLANS["skip of layer 0"]):
        with routed.fixed(plan):
            expected = routed.generate(IDS, max_new_tokens=4, do_sample=False)
            assert torch.equal(expected, routed.generate(IDS, **options))
    routed.detach()
    assert "generate" not in model.__dict__
    assert torch.equal(untouched, model.generate(IDS, **options))
