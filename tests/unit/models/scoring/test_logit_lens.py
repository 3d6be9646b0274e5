"""What a model would say behind a layer equals what it says when it is cut off there."""

import pytest
import torch

from drllm.errors import ArchitectureError
from drllm.model.layers import find_layers
from drllm.models.families import IN_SUITE
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy
from drllm.models.scoring.logit_lens import LogitLens
from slow_way import LOGIT_TOLERANCE, ListedModel

PROMPT = [[5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("family", IN_SUITE)
@pytest.mark.parametrize("num_layers", [2, 6])
def test_a_state_says_what_the_model_cut_off_there_says(tiny_model, family, num_layers):
    model, states = tiny_model(family), []
    cut_off = ListedModel(model, path=range(num_layers))
    find_layers(cut_off.model)[1][-1].register_forward_hook(
        lambda _layer, _inputs, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    expected = cut_off.logits(PROMPT[0])
    with torch.no_grad():
        found = LogitLens(RoutedModel(model)).logits(states[0][0])
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0)


def test_looking_for_the_norm_leaves_nothing_behind(tiny_llama):
    routed = RoutedModel(tiny_llama(), policy=FixedPolicy([1, 0, 1, 2, 1, 0], 6))
    routed.model(torch.tensor(PROMPT))
    before = routed.last_route.tolist()
    lens = LogitLens(routed)
    assert lens.norm is routed.model.model.norm
    assert before == routed.last_route.tolist()
    assert not any(module._forward_hooks for module in routed.injection.layers)
    assert not any(module._forward_pre_hooks for module in routed.model.model.children())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_read_in_float32_at_least(tiny_llama, dtype):
    routed = RoutedModel(tiny_llama().to(dtype))
    assert LogitLens(routed).logits(torch.zeros(2, 32, dtype=dtype)).dtype == torch.float32


def test_a_model_that_does_more_than_norm_and_head_is_refused(tiny_llama):
    model = tiny_llama()
    forward = model.forward

    def capped(*args, **options):
        output = forward(*args, **options)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    with pytest.raises(ArchitectureError, match="more than a final norm and a head"):
        LogitLens(RoutedModel(model))
