"""The cache entry of a routed layer, as code that knows transformers' entries uses it."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from drllm.errors import RoutingError
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.kv_cache import cache_argument
from drllm.paths import StaticPath

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def read(routed, plan, ids=IDS, is_static=False):
    cache = DynamicCache()
    if is_static:
        cache = StaticCache(config=routed.config, max_cache_len=8)
    with routed.fixed(plan), torch.no_grad():
        routed(ids, **{cache_argument(routed.model): cache})
    return cache


def test_k_and_v_of_a_layer_that_every_row_executes_once_can_be_set(tiny_llama):
    routed = RoutedModel(tiny_llama())
    cache, other = read(routed, [1] * 6), read(routed, [1] * 6, IDS.flip(0))
    for entry, theirs in zip(cache.layers, other.layers, strict=True):
        entry.keys = theirs.keys
        entry.values = theirs.values
    name, token = cache_argument(routed.model), torch.tensor([[3], [4]])
    with torch.no_grad():
        found = routed(token, **{name: cache}).logits
        assert torch.equal(found, routed(token, **{name: other}).logits)


def test_k_and_v_of_a_layer_that_rows_skip_can_not_be_set(tiny_llama):
    routed = RoutedModel(tiny_llama())
    cache = read(routed, [1, 0, 2, 1, 1, 1])
    for layer in (1, 2):
        with pytest.raises(RoutingError, match="has no K and V of the whole batch"):
            cache.layers[layer].keys = torch.zeros(1)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("plan", [[1] * 6, [1, 0, 2, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
def test_copies_of_entries_grow_by_themselves(tiny_llama, plan, is_static):
    routed = RoutedModel(tiny_llama())
    name = cache_argument(routed.model)

    def step(cache, token):
        with torch.no_grad():
            return routed(torch.full((2, 1), token), **{name: cache}).logits

    def steps(first, second):
        cache = read(routed, plan, is_static=is_static)
        step(cache, 3)
        return step(cache, first), step(cache, second)

    expected = steps(20, 21), steps(30, 31)
    cache = read(routed, plan, is_static=is_static)
    step(cache, 3)
    other = copy.copy(cache)
    other.layers = [copy.copy(entry) for entry in cache.layers]
    found = step(cache, 20), step(other, 30), step(cache, 21), step(other, 31)
    assert torch.equal(found[0], expected[0][0])
    assert torch.equal(found[1], expected[1][0])
    assert torch.equal(found[2], expected[0][1])
    assert torch.equal(found[3], expected[1][1])


def test_the_rows_of_an_empty_cache_can_be_repeated(tiny_llama):
    routed = RoutedModel(tiny_llama())
    cache = read(routed, [1, 0, 2, 1, 1, 1])
    cache.reset()
    cache.batch_repeat_interleave(2)
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 6


class Interrupting:
    """Interrupts the passes of a model inside of a layer, as a user would."""

    def __init__(self, model, layer):
        self.hook = model.model.layers[layer].mlp.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("plan", [[1] * 6, [0, 1, 2, 1, 1, 1], StaticPath((0, 1, 3, 2, 5))])
def test_a_cache_can_be_used_again_after_an_interrupted_prompt_but_not_after_a_later_token(
    tiny_llama, plan, is_static
):
    routed = RoutedModel(tiny_llama())
    cache = DynamicCache()
    if is_static:
        cache = StaticCache(config=routed.config, max_cache_len=8)
    inputs = {cache_argument(routed.model): cache}
    with routed.fixed(plan), torch.no_grad():
        with Interrupting(routed.model, 3), pytest.raises(KeyboardInterrupt):
            routed(IDS, **inputs)
        assert cache.get_seq_length() == 0
        assert torch.equal(routed(IDS, **inputs).logits, routed(IDS, use_cache=False).logits)
        with pytest.raises(RoutingError, match="must keep the rows"):  # no layer has run
            routed(IDS[:1, :1], **inputs)
        routed(IDS[:, :1], **inputs)
        with Interrupting(routed.model, 3), pytest.raises(KeyboardInterrupt):
            routed(IDS[:, :1], **inputs)
        with pytest.raises(RoutingError, match=r"was interrupted.*start with a new cache"):
            routed(IDS[:, :1], **inputs)
        cache.reset()
        routed(IDS, **inputs)
