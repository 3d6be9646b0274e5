"""The shares of a layer's parts, against what torch counts when each part runs alone."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drllm.errors import ArchitectureError
from drllm.models.routing import shares
from drllm.models.routing.routed_model import RoutedModel
from drllm.models.routing.shares import layer_shares
from drllm.paths import ATTENTION, MLP, StaticPath, Step

EXPERTS = ("olmoe", "mixtral", "qwen2_moe", "gpt_oss", "ernie4_5_moe", "jetmoe", "granitemoe")


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "phi3", "gemma2"])
def test_shares_are_those_of_the_multiplications_that_torch_counts(tiny_model, family):
    routed = RoutedModel(tiny_model(family, attention="eager"))
    head = [Step(0, MLP)]

    def counted(*more):
        with routed.fixed(StaticPath([*head, *more])), torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                routed.model(torch.tensor([[5]]), logits_to_keep=1, use_cache=False)
            return counter.get_total_flops()

    scores = 4 * 32  # of a token with itself: 32 numbers of all heads, twice multiplied and added
    alone = counted()
    ours = counted(Step(1, ATTENTION)) - alone - scores
    theirs = counted(Step(1, MLP)) - alone
    assert layer_shares(routed)[1] == pytest.approx(
        (ours / (ours + theirs), theirs / (ours + theirs))
    )


@pytest.mark.parametrize("family", EXPERTS)
def test_as_many_experts_count_as_a_token_runs(tiny_model, family):
    model = tiny_model(family)
    routed, config = RoutedModel(model), model.config
    name = "moe_k" if family == "ernie4_5_moe" else "num_experts_per_tok"
    found = {}
    for num in (1, 2, 4):
        setattr(config, name, num)
        (found[num], theirs) = layer_shares(routed)[1]
        assert found[num] + theirs == pytest.approx(1)
    if family != "jetmoe":  # whose attention has experts too
        ours = sum(
            p.numel() for p in routed.injection.sublayers.attention[1].parameters() if p.dim() > 1
        )
        mlps = {num: ours / share - ours for num, share in found.items()}
        # One expert more is as much each time; it has 32 inputs, 64 or 32 gates and as many values.
        expert = mlps[2] - mlps[1]
        assert mlps[4] - mlps[2] == pytest.approx(2 * expert)
        assert round(expert) in {3 * 32 * 64, 3 * 32 * 32}


def test_experts_of_which_nobody_says_how_many_run_are_refused(tiny_model, monkeypatch):
    routed = RoutedModel(tiny_model("mixtral"))
    monkeypatch.setattr(shares, "CHOSEN", ("number_of_them",))
    with pytest.raises(ArchitectureError, match=r"MixtralForCausalLM has 4 experts.*whole layers"):
        layer_shares(routed)
