"""Static paths, in any order, against the plain model whose list of layers is the path."""

import pickle
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from drllm.errors import DrllmError, PathError, RoutingError
from drllm.model.prompts import pad_left
from drllm.models.families import FAMILIES, REFUSED
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.kv_cache import cache_argument
from drllm.paths import StaticPath
from slow_way import ListedModel, answers, biased_model, stored_rows

PATHS = {
    "two left out": [0, 2, 4, 5],
    "a block of three repeated": [0, 1, 2, 3, 1, 2, 3, 4, 5],
    "left out, back and again": [0, 2, 3, 2, 3, 3, 3, 5],
    "any order": [3, 0, 5, 0],
}
IN_BRIEF = ("left out, back and again",)
"""Paths that have all kinds of moves between them; the others are for the thorough tests."""
ROUTED = sorted(FAMILIES.keys() - {f for group in list(REFUSED.values())[:2] for f in group})
TOO_OLD = {"biogpt": ("4.",), "gpt_bigcode": ("4.",)}
"""Family → versions of transformers in which it isn't routed."""
QUICK = ("falcon", "gemma2", "opt", "llama4_text")
END = 2
TOLERANCE = 5e-5
"""Greatest difference of two logits; 2.2e-5 was measured, on models whose biases aren't zero."""
pytestmark = pytest.mark.filterwarnings("ignore:.*sliding_window_pattern:FutureWarning")  # cohere2
generate = partial(answers, max_new_tokens=8, min_new_tokens=8)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=[] if name in IN_BRIEF else pytest.mark.thorough)
        for name, path in PATHS.items()
    ],
)
def test_a_padded_batch_says_what_each_row_says_alone(family, path, prompts):
    model = biased_model(family, TOO_OLD)
    slow = ListedModel(model, path=path)
    expected = [slow.greedy(prompt, 8, never=END) for prompt in prompts]
    routed = RoutedModel(model)
    with routed.fixed(StaticPath(path)):
        assert generate(routed, prompts) == expected
        assert generate(routed, prompts, use_cache=False) == expected


def test_a_path_may_be_named_by_the_layers_that_it_leaves_out(tiny_llama):
    routed = RoutedModel(tiny_llama())
    ids = torch.tensor([[5, 6, 7]])
    with routed.fixed(StaticPath([0, 1, 4, 5])):
        expected = routed.model(ids).logits
    with routed.fixed("without:2,3"):
        assert torch.equal(routed.model(ids).logits, expected)
    with pytest.raises(DrllmError, match="nowhere"):
        routed.fixed("nowhere.json")


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each in QUICK else pytest.mark.thorough) for each in ROUTED],
)
def test_every_family_runs_a_path_as_the_plain_model_does(name):
    model, ids = biased_model(name, TOO_OLD), torch.tensor([[5, 6, 7, 8, 9]])
    path = PATHS["left out, back and again"]
    routed = RoutedModel(model)
    with routed.fixed(StaticPath(path)), torch.no_grad():
        found = routed(ids, use_cache=False).logits[0]
        cached = routed.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    routed.detach()
    slow = ListedModel(model, path=path)
    torch.testing.assert_close(slow.logits(ids[0].tolist()), found, atol=TOLERANCE, rtol=0)
    expected = slow.logits(cached.sequences[0].tolist())[-5:-1]
    decoded = torch.cat(cached.logits)
    torch.testing.assert_close(expected, decoded, atol=TOLERANCE, rtol=0)


def test_a_path_that_decisions_can_express_is_run_as_these(tiny_llama):
    routed = RoutedModel(tiny_llama())
    with routed.fixed(StaticPath([0, 2, 2, 3, 4, 5])):
        found = routed(torch.tensor([[5, 6, 7]])).logits
    assert routed.last_route.tolist() == [[1, 0, 2, 1, 1, 1]]
    with routed.fixed([1, 0, 2, 1, 1, 1]):
        assert torch.equal(routed(torch.tensor([[5, 6, 7]])).logits, found)


def test_the_last_route_counts_the_executions_of_a_path(tiny_llama):
    routed = RoutedModel(tiny_llama())
    with routed.fixed(StaticPath([0, 1, 0, 3, 5])):
        routed(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert routed.last_route.tolist() == [[2, 1, 0, 1, 0, 1]] * 2


def test_every_execution_keeps_k_and_v(tiny_llama):
    routed, cache = RoutedModel(tiny_llama()), DynamicCache()
    name = cache_argument(routed.model)
    with routed.fixed(StaticPath([0, 1, 2, 1, 2, 5])):
        routed(torch.tensor([[5, 6, 7]] * 2), **{name: cache})
    assert stored_rows(cache) == 2 * 6
    assert [int(entry.get_seq_length()) for entry in cache.layers] == [3] * 6


def test_a_continuation_follows_the_path_that_its_cache_has_pinned(tiny_llama):
    path = [0, 2, 3, 2, 3, 4, 5]
    slow = ListedModel(tiny_llama(), path=path)
    routed, cache = RoutedModel(tiny_llama()), DynamicCache()
    name = cache_argument(routed.model)
    with routed.fixed(StaticPath(path)), torch.no_grad():
        routed(torch.tensor([[5, 6, 7]]), **{name: cache})
    with torch.no_grad(), routed.fixed([1, 1, 1, 1, 1, 1]):
        found = routed(torch.tensor([[8]]), **{name: cache}).logits[0]
    expected = slow.logits([5, 6, 7, 8])[-1:]
    torch.testing.assert_close(expected, found, atol=TOLERANCE, rtol=0)


def test_beams_follow_a_path_as_the_plain_model_does(tiny_llama):
    path = PATHS["a block of three repeated"]
    routed = RoutedModel(tiny_llama())
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with routed.fixed(StaticPath(path)):
        found = routed.generate(torch.tensor([[5, 6, 7]]), **options)
        alone = routed.generate(torch.tensor([[5, 6, 7]]), **options, use_cache=False)
    expected = ListedModel(tiny_llama(), path=path).model.generate(
        torch.tensor([[5, 6, 7]]), **options, use_cache=False
    )
    assert found.tolist() == alone.tolist() == expected.tolist()


def test_after_detaching_the_model_is_what_it_was(tiny_llama):
    model = tiny_llama()
    before = model(torch.tensor([[5, 6, 7]])).logits
    routed = RoutedModel(model)
    with routed.fixed(StaticPath([0, 2, 1, 3, 4, 5])):
        routed(torch.tensor([[5, 6, 7]]))
    assert torch.equal(routed(torch.tensor([[5, 6, 7]])).logits, before)
    pickle.dumps(model)
    routed.detach()
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)


def test_left_padding_changes_nothing_along_a_path(tiny_llama):
    path = StaticPath(PATHS["left out, back and again"])
    routed = RoutedModel(tiny_llama())
    ids, mask = pad_left([[5, 6, 7, 8], [9]], "cpu")
    with routed.fixed(path), torch.no_grad():
        padded = routed(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        alone = routed(torch.tensor([[9]])).logits[0, -1]
    torch.testing.assert_close(padded.logits[1, -1], alone, atol=TOLERANCE, rtol=0)


def test_a_path_of_another_model_is_refused(tiny_llama):
    routed = RoutedModel(tiny_llama())
    with pytest.raises(PathError, match="6 at position 1"):
        routed.fixed(StaticPath([0, 6]))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_checkpointing_along_a_path_is_refused(tiny_llama):
    model = tiny_llama().requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    routed = RoutedModel(model)
    path = StaticPath([0, 2, 1, 3, 4, 5])
    with routed.fixed(path), pytest.raises(RoutingError, match="checkpointing"):
        routed(torch.tensor([[5, 6, 7]]), use_cache=False)
