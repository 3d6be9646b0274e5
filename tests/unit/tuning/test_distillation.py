"""The loss of healing and its gradient, against autograd."""

import pytest
import torch
from torch.nn import functional as F

from drllm.tuning import distillation
from drllm.tuning.distillation import compute_kl


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("in_cache", [1, 120, 2**18])
def test_the_kl_and_its_gradient_are_those_of_autograd(scale, in_cache, monkeypatch):
    monkeypatch.setattr(distillation, "LOGITS_IN_CACHE", in_cache)  # 1, 2 and all tokens at once
    generator = torch.Generator().manual_seed(0)
    teacher = scale * torch.randn(7, 50, generator=generator)
    logits = (scale * torch.randn(7, 50, generator=generator)).requires_grad_()
    target = teacher.log_softmax(dim=-1)
    expected = F.kl_div(logits.log_softmax(dim=-1), target, reduction="sum", log_target=True) / 7
    expected.backward()
    kl, gradient = compute_kl(teacher, logits.detach(), weight=1 / 7)
    assert float(kl) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(gradient, logits.grad, atol=1e-6)


def test_equal_distributions_have_no_kl_and_no_gradient():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    kl, gradient = compute_kl(logits, logits)
    assert float(kl) == pytest.approx(0.0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-6
